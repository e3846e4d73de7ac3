"""The study ``cka``: how alike the features of two inputs, or of two networks, are, layer by layer.

Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019; the
unbiased estimator: Song et al., Feature Selection via Dependence Maximization, JMLR 2012; over
batches: Nguyen, Raghu & Kornblith, Do Wide and Deep Networks Learn the Same Things?, ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cure.analysis.render import MISSING, StudyTable, View, listed, number, with_interval
from cure.analysis.study import STUDIES, NetworkStudyOptions, Study, StudyInputs, save_result
from cure.attacks.registry import evaluation_attack
from cure.data import batches
from cure.errors import ConfigError, DataError
from cure.evaluation.runner import Progress, Result
from cure.evaluation.target import TargetLike
from cure.models import core
from cure.models.checks import check_outputs
from cure.utils.plotting import Chart, Figures, HeatMap, HeatMaps, Panel, Series
from cure.utils.stats import jackknife_interval

NAME = "cka"
ATTACK = "pgd20"
FEWEST = 4
"""Images a batch must have: the unbiased estimator divides by n - 3."""

CELLS = 32
"""Rows and columns of a map at most; of deeper networks neighbouring layers are averaged."""

_COLUMNS = 2**16
_THIRDS = ("early", "middle", "late")
# They hand on what they are given, in evaluation mode.
_NO_LAYER: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    # An empty one is the identity: the shortcut of many a residual block.
    nn.Sequential,
)

# -- two matrices of features ----------------------------------------------------------------------


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two matrices of features of the same samples.

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with ``K = x x^T``, ``L = y y^T``.  It does not
    change when features are rotated, scaled as a whole or shifted.  With the biased estimator it
    lies in [0, 1] and is far above 0 for unrelated features wherever these are many and samples
    few; the unbiased estimator gives 0 on average there, and its noise can leave [0, 1].  In
    float64, and without an n x n matrix where features are fewer than samples.

    Args:
        x: [n, d1].
        y: [n, d2], row by row the samples of ``x``.
        debiased: the unbiased estimator of HSIC, which needs n >= 4.

    Returns:
        1 for the same features; NaN where the estimate of HSIC of one with itself is not above 0,
        as for constant features.

    Raises:
        DataError: when these are no two matrices with equally many rows, or rows are too few.

    Source: Kornblith et al., ICML 2019; Song et al., JMLR 2012, Eq. 5.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise DataError(
            "expected features [n, d1] and [n, d2] of the same n samples, got "
            f"{list(x.shape)} and {list(y.shape)}"
        )
    fewest = FEWEST if debiased else 2
    if len(x) < fewest:
        raise DataError(f"expected features of at least {fewest} samples, got {len(x)}")
    # Neither estimator depends on the mean; without it fewer digits are lost.
    x, y = (matrix.double() - matrix.double().mean(dim=0) for matrix in (x, y))
    hsic = _unbiased if debiased else _traced
    return _ratio(hsic(x, y), hsic(x, x), hsic(y, y))


def _ratio(cross: float, first: float, second: float) -> float:
    return cross / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def _traced(x: Tensor, y: Tensor) -> float:
    """``trace(K L)``: of centred features the biased HSIC times (n - 1)^2, which cancels."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return float((x.T @ y).square().sum())
    return float(((x @ x.T) * (y @ y.T)).sum())


def _unbiased(x: Tensor, y: Tensor) -> float:
    """The unbiased HSIC of linear kernels, from features: diagonals and sums of rows suffice."""
    n = len(x)
    own = [matrix.square().sum(dim=1) for matrix in (x, y)]
    rows = [m @ m.sum(dim=0) - d for m, d in zip((x, y), own, strict=True)]
    product = _traced(x, y) - float(own[0] @ own[1])
    sums = float(rows[0].sum()) * float(rows[1].sum()) / ((n - 1) * (n - 2))
    return (product + sums - 2 * float(rows[0] @ rows[1]) / (n - 2)) / (n * (n - 3))


# -- batches ---------------------------------------------------------------------------------------


@torch.no_grad()
def centred_gram(feature: Tensor) -> Tensor:
    """Gram matrix of features [n, ...] without its diagonal, U-centred: [n, n] of float64.

    ``(A . B).sum() / (n (n - 3))`` of two of them is the unbiased HSIC (Szekely & Rizzo, 2014,
    Prop. 1).  Products of features are float32 for the columns of a part and float64 between
    parts; no copy of all features is made.
    """
    n, flat = len(feature), feature.flatten(1)
    gram = torch.zeros(n, n, dtype=torch.float64, device=feature.device)
    for part in torch.split(flat, _COLUMNS, dim=1):
        part = part.float()
        part = part - part.mean(dim=0)
        gram += part @ part.T
    gram.fill_diagonal_(0)
    rows = gram.sum(dim=1) / (n - 2)
    gram += rows.sum() / (n - 1) - rows[:, None] - rows[None, :]
    return gram.fill_diagonal_(0)


@dataclass
class Similarity:
    """CKA of all layers with all layers, from batches.

    HSICs are averaged over batches, each with the weight of its images, and only then set in
    proportion: a mean of ratios would be biased.

    Attributes:
        weights: images of each batch.
        cross: for each batch [L1, L2].
        first: for each batch [L1], HSIC of each layer with itself.
        second: as ``first``, [L2].
    """

    weights: list[int] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """One batch: what :func:`centred_gram` gave for each layer."""
        n = len(first[0])
        scale = n * (n - 3)
        ones, others = (torch.stack(list(grams)).flatten(1) for grams in (first, second))
        self.weights.append(n)
        self.cross.append((ones @ others.T).cpu() / scale)
        self.first.append(ones.square().sum(dim=1).cpu() / scale)
        self.second.append(others.square().sum(dim=1).cpu() / scale)

    def matrix(self, without: int | None = None) -> Tensor:
        """[L1, L2] of float64, NaN where a self-HSIC is not above 0; may leave out a batch."""
        share = torch.tensor(self.weights, dtype=torch.float64)
        if without is not None:
            share[without] = 0
        cross, first, second = (
            torch.tensordot(share, torch.stack(parts), 1)
            for parts in (self.cross, self.first, self.second)
        )
        scale = first.clamp_min(0).sqrt()[:, None] * second.clamp_min(0).sqrt()[None, :]
        return torch.where(scale > 0, cross / scale, math.nan)

    def thirds(self) -> list[dict[str, Any]]:
        """Mean of the diagonal over each third of the layers, with a 95 % interval.

        The interval is the jackknife's over batches with Student's t; None for a single batch.
        """
        means = _mean_thirds(self.matrix())
        count = len(self.weights)
        left = [_mean_thirds(self.matrix(without)) for without in range(count if count > 1 else 0)]
        found = []
        for place, name in enumerate(_THIRDS):
            interval = None
            values = [means_[place] for means_ in left]
            if values and all(map(math.isfinite, values)):
                low, high = jackknife_interval(means[place], values)
                interval = [max(0.0, low), min(1.0, high)]  # where CKA lies
            found.append({"name": name, "mean": _plain(means[place]), "interval": interval})
        return found


def _mean_thirds(matrix: Tensor) -> list[float]:
    """Mean of each third of a diagonal, without what is not a number; a single layer is late."""
    diagonal = matrix.diagonal()
    count = len(diagonal)
    bounds = [*(min(round(count * part / 3), count - 1) for part in range(3)), count]
    parts = [diagonal[a:b] for a, b in pairwise(bounds)]
    return [float(part[part.isfinite()].mean()) for part in parts]


# -- networks --------------------------------------------------------------------------------------


@contextmanager
def _listening(modules: Mapping[str, nn.Module], hear: Callable[[str, object], None]) -> Any:
    """Tell ``hear`` the name of a module and its output, at each call."""
    handles = []
    try:
        for name, module in modules.items():

            def after(_: nn.Module, __: object, output: object, name: str = name) -> None:
                hear(name, output)

            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calls(model: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[Tensor, Any], None]:
    """A function (image, hear): one forward pass that tells the name of each call and its output.

    The second call of a module in one pass is a layer of its own: "act", "act (2)".
    """

    @torch.no_grad()
    def run(image: Tensor, hear: Callable[[str, object], None]) -> None:
        count: dict[str, int] = {}

        def numbered(name: str, output: object) -> None:
            count[name] = count.get(name, 0) + 1
            hear(name if count[name] == 1 else f"{name} ({count[name]})", _tensor(output))

        with _listening(modules, numbered):
            model(image)

    return run


def _tensor(output: object) -> object:
    """The first of several outputs."""
    return output[0] if isinstance(output, tuple | list) and output else output


def chosen_modules(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The modules whose outputs are layers, by name.

    Args:
        model: any network; wrappers around it are inputs through.
        layers: patterns of names with ``*`` and ``?`` (``layer?.?`` for the blocks of a ResNet);
            by default every module that has no modules inside, and attention blocks of PyTorch,
            but not what hands on its input in evaluation mode (dropout, flatten, identity).

    Raises:
        ConfigError: when a pattern fits no name.
    """
    inside = core(model)
    named = {name: module for name, module in inside.named_modules() if name}
    if layers is None:
        attention = [
            name for name, module in named.items() if isinstance(module, nn.MultiheadAttention)
        ]
        return {
            name: module
            for name, module in named.items()
            if not isinstance(module, _NO_LAYER)
            and (name in attention or not any(True for _ in module.children()))
            and not any(name.startswith(f"{block}.") for block in attention)
        } or {"network": inside}
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(
                f"--layers: expected the name of a module of the network, or a pattern of one, got "
                f"'{pattern}'; its modules: {', '.join(list(named)[:12])}, ..."
            )
    return {
        name: module
        for name, module in named.items()
        if any(fnmatchcase(name, pattern) for pattern in layers)
    }


@dataclass(frozen=True)
class Layers:
    """The layers of a network, in the order in which they are computed.

    Attributes:
        names: a call of a module each; "act (2)" is the second call of ``act`` in a pass.
        left_out: names of calls that are no layers, and why.
        grams: images [B, C, H, W] to :func:`centred_gram` of each layer.
    """

    names: list[str]
    left_out: dict[str, str]
    grams: Callable[[Tensor], list[Tensor]]


def layers_of(model: nn.Module, image: Tensor, layers: Sequence[str] | None = None) -> Layers:
    """Find the layers of ``model``: modules that return features of each image.

    Args:
        model: in evaluation mode.
        image: [B, C, H, W], a few images to try; at least 3.
        layers: see :func:`chosen_modules`.

    Raises:
        ConfigError: when there is none.
    """
    run = _calls(model, chosen_modules(model, layers))
    # Twice, with two sizes of batch: what has a row for each image follows both.
    shapes: list[dict[str, list[int] | None]] = []
    for count in (2, 3):
        seen: dict[str, list[int] | None] = {}

        def note(name: str, output: object, seen: dict[str, list[int] | None] = seen) -> None:
            known = isinstance(output, Tensor) and output.is_floating_point()
            seen[name] = list(output.shape) if known else None  # type: ignore[attr-defined]

        run(image[:count], note)
        shapes.append(seen)
    names, left_out = [], {}
    for name, shape in shapes[0].items():
        other = shapes[1].get(name)
        if shape is None or other is None:
            left_out[name] = "returns no tensor of real numbers"
        elif shape[:1] != [2] or other[:1] != [3]:
            left_out[name] = "its output has no row for each image"
        else:
            names.append(name)
    if not names:
        raise ConfigError(
            "expected modules that return a tensor with a row for each image, found none; name "
            "others with --layers"
        )

    def grams(batch: Tensor) -> list[Tensor]:
        found: dict[str, Tensor] = {}

        def hear(name: str, output: object) -> None:
            # At once: features are dropped, and what follows may overwrite them in place.
            if name not in left_out:
                found[name] = centred_gram(output)  # type: ignore[arg-type]

        run(batch, hear)
        return [found[name] for name in names]

    return Layers(names, left_out, grams)


# -- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CkaOptions(NetworkStudyOptions):
    """Options of the study.

    Attributes:
        other: compare each target with this network: natural images in both, and adversarial
            images, each network's own. By default each target is compared with itself: all its
            layers on natural images with all its layers on adversarial images.
        layers: patterns of module names; see :func:`chosen_modules`.
        batch_size: images over which similarity is estimated; a last batch of fewer than four
            images is left out.
    """

    other: Annotated[TargetLike | None, "Compare each with this run instead of with itself."] = None
    layers: Annotated[
        Sequence[str] | None,
        "Names of modules, with * and ?: 'layer?.?,linear' (default: leaves).",
    ] = None
    limit: Annotated[int | None, "Only the first so many images."] = 1000
    batch_size: Annotated[int | None, "Images compared at once."] = 100


def compute(targets: Sequence[TargetLike], options: CkaOptions, progress: Progress) -> Result:
    """CKA of natural and adversarial images, or of two networks, between all layers.

    Adversarial images are made by PGD-20 on the network itself.  Costs 23 forward and 20 backward
    passes for each image and network, and ``8 layers batch_size^2`` bytes for each input.

    Returns:
        ``maps``: for each pair ``first``, ``second`` {"model", "input"}, ``layers`` of both,
        ``matrix`` [L1, L2] (null where features do not vary), ``thirds`` of the diagonal where the
        layers are the same.
    """
    other, layers = options.other, options.layers
    if not targets:
        raise ConfigError("expected a run or network to compare")
    inputs = StudyInputs.load([*targets, *([] if other is None else [other])], options)
    used = len(inputs.images) // inputs.batch_size * inputs.batch_size
    rest = len(inputs.images) - used
    used += rest if rest >= FEWEST else 0
    if not used:
        raise ConfigError(
            f"expected at least {FEWEST} images and batches of at least {FEWEST}, got "
            f"{len(inputs.images)} images in batches of {inputs.batch_size}; raise --limit or "
            "--batch-size"
        )
    if inputs.batch_size < FEWEST:
        raise ConfigError(
            f"expected batches of at least {FEWEST} images, got {inputs.batch_size}; raise "
            "--batch-size"
        )
    names = list(inputs.networks)
    reference = names.pop() if other is not None else None
    found = _layers(inputs, layers)
    pairs = {pair: Similarity() for name in names for pair in _pairs(name, reference)}
    done = 0
    for place, (natural, label) in enumerate(_batches(inputs, used)):
        grams: dict[tuple[str, str], list[Tensor]] = {}
        for name in [*([] if reference is None else [reference]), *names]:
            adversarial = _adversarial(inputs, name, natural, label, place)
            grams[name, "natural"] = found[name].grams(natural)
            grams[name, "adversarial"] = found[name].grams(adversarial)
            for (first, second), similarity in pairs.items():
                if first[0] == name:
                    similarity.add(grams[first], grams[second])
            if name != reference:
                del grams[name, "natural"], grams[name, "adversarial"]
        done += len(natural)
        progress(NAME, done, used)
    body = {
        **inputs.described(),
        "n": used,
        "attack": {"name": ATTACK} | evaluation_attack(ATTACK).settings,
        "estimator": "unbiased HSIC, averaged over batches by images, then normalised",
        "left_out": {name: found[name].left_out for name in found},
        "maps": [
            {
                "first": {"model": first[0], "input": first[1]},
                "second": {"model": second[0], "input": second[1]},
                "layers": [found[first[0]].names, found[second[0]].names],
                "matrix": [[_plain(v) for v in row] for row in similarity.matrix().tolist()],
                "thirds": similarity.thirds()
                if found[first[0]].names == found[second[0]].names
                else None,
            }
            for (first, second), similarity in pairs.items()
        ],
    }
    return save_result(NAME, body, folder=inputs.folder, output=options.output)


def _pairs(name: str, reference: str | None) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    if reference is None:
        return [((name, "natural"), (name, "adversarial"))]
    return [((name, kind), (reference, kind)) for kind in ("natural", "adversarial")]


def _layers(inputs: StudyInputs, layers: Sequence[str] | None) -> dict[str, Layers]:
    """The layers of each network, once each was seen to return logits."""
    image, _ = next(_batches(inputs, FEWEST))
    for network in inputs.networks.values():
        check_outputs(network, image, len(inputs.images.classes))
    evaluation_attack(ATTACK).defined(len(inputs.images.classes), inputs.threat)
    return {name: layers_of(network, image, layers) for name, network in inputs.networks.items()}


def _batches(inputs: StudyInputs, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    images = inputs.images.checked().to(inputs.engine.device)
    for batch in batches(images, inputs.batch_size, count):
        yield inputs.engine.arrange(batch.image), batch.label


def _adversarial(
    inputs: StudyInputs, name: str, image: Tensor, label: Tensor, place: int
) -> Tensor:
    part = evaluation_attack(ATTACK).parts[ATTACK]
    made = part.run(inputs.networks[name], image, label, inputs.threat, inputs.seed, place)
    return inputs.engine.arrange(made)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- what is shown ---------------------------------------------------------------------------------


def view(result: Result) -> View:
    """CKA by thirds of the layers, layer by layer, and as maps."""
    maps = result["maps"]
    thirds = [
        [
            *(_label(one[end]) for end in ("first", "second")),
            *(
                [with_interval(third["mean"], third["interval"], 3) for third in one["thirds"]]
                if one["thirds"]
                else [MISSING] * 3
            ),
        ]
        for one in maps
    ]
    title = "Linear CKA of each layer with itself, mean over thirds of the layers (95 % interval)"
    tables = [StudyTable(title, ["features of", "and of", *_THIRDS], thirds)]
    figures: list[Figures] = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in maps:
        if one["layers"][0] == one["layers"][1]:
            groups.setdefault(tuple(one["layers"][0]), []).append(one)
    for serial, (layers, group) in enumerate(groups.items(), 1):
        values = {_pair(one): [one["matrix"][n][n] for n in range(len(layers))] for one in group}
        rows = [
            [layer, *(number(of[place], 3) for of in values.values())]
            for place, layer in enumerate(layers)
        ]
        tables.append(StudyTable("Linear CKA of each layer with itself", ["layer", *values], rows))
        if len(layers) > 1:
            figures.append(_curves(f"cka-layers-{serial}", layers, values, result))
    figures += [_map(f"cka-map-{place}", one, result) for place, one in enumerate(maps, 1)]
    late = listed(f"{_pair(one)} {_late(one)}" for one in maps)
    finding = (
        f"Linear CKA of late layers (1: equal features, 0: unrelated): {late}; n = {result['n']:,} "
        f"images, PGD-20 at {result['threat']['norm']} {result['threat']['epsilon_text']}."
    )
    return View(finding, tables, figures)


def _label(end: Mapping[str, str]) -> str:
    return f"{end['model']}, {end['input']} images"


def _pair(one: Mapping[str, Any]) -> str:
    first, second = one["first"], one["second"]
    if first["model"] == second["model"]:
        return f"{first['model']}, natural and adversarial"
    return f"{first['model']} and {second['model']}, {first['input']}"


def _late(one: Mapping[str, Any]) -> str:
    """CKA of the late third; of networks with other layers, of each layer with its most similar."""
    if one["thirds"]:
        return with_interval(one["thirds"][2]["mean"], one["thirds"][2]["interval"], 3)
    rows = one["matrix"][-math.ceil(len(one["matrix"]) / 3) :]
    best = [max(known) for row in rows if (known := [v for v in row if v is not None])]
    mean = math.fsum(best) / len(best) if best else None
    return f"{number(mean, 3)} (most similar layers)"


def _curves(
    name: str, layers: Sequence[str], values: Mapping[str, Sequence[float | None]], result: Result
) -> Chart:
    places = range(len(layers))
    # The noise of the estimate can put a value at 1 or above, which has no logarithm.
    change = {pair: [1 - v if v and v < 1 else None for v in of] for pair, of in values.items()}
    panels = [
        Panel(
            [Series(pair, places, curve) for pair, curve in of.items()],
            "" if what == "linear CKA" else "layer, in the order of computation",
            what,
            categories=layers,
            log="" if what == "linear CKA" else "y",
        )
        for what, of in (("linear CKA", values), ("1 - CKA", change))
    ]
    said = f"{listed(values)}, from the first layer to the last; n = {result['n']:,} images."
    return Chart(name, "Linear CKA layer by layer", said, panels, height=3.0)


def _map(name: str, one: Mapping[str, Any], result: Result) -> HeatMaps:
    rows, columns = (_groups(layers) for layers in one["layers"])
    cells = [[_mean_cell(one["matrix"], row, column) for column in columns] for row in rows]
    known = [value for row in cells for value in row if math.isfinite(value)]
    joined = max(len(group) for group in (*rows, *columns))
    said = f"n = {result['n']:,} images; blank cells are not defined."
    if known:
        said = f"From {min(known):.2f} to {max(known):.2f}; {said}"
    if joined > 1:
        said += f" Each cell is the mean of up to {joined} x {joined} layers."
    names = [
        [layers[group[0]] for group in groups]
        for layers, groups in zip(one["layers"], (rows, columns), strict=True)
    ]
    first, second = _label(one["first"]), _label(one["second"])
    drawn = HeatMap(cells, names[0], names[1], f"layer: {second}", f"layer: {first}", "linear CKA")
    return HeatMaps(name, f"Linear CKA of all layers: {first}, and {second}", said, [drawn], 5.6)


def _groups(layers: Sequence[str]) -> list[range]:
    """Places of neighbouring layers, at most ``CELLS`` groups."""
    size = math.ceil(len(layers) / CELLS)
    return [range(a, min(a + size, len(layers))) for a in range(0, len(layers), size)]


def _mean_cell(matrix: Sequence[Sequence[float | None]], rows: range, columns: range) -> float:
    known = [value for r in rows for c in columns if (value := matrix[r][c]) is not None]
    return math.fsum(known) / len(known) if known else math.nan


cka: Study = STUDIES.register(NAME)(
    Study(
        NAME,
        "Similarity of features (CKA)",
        "How much do the features of each layer change when images are attacked, or between two "
        "networks?",
        "cure analyse cka RUN RUN ...",
        CkaOptions,
        compute,
        view,
    )
)
