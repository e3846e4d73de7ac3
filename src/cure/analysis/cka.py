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
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cure.analysis.study import STUDIES, Looked, Rows, Study, keep, look
from cure.attacks.registry import evaluation_attack
from cure.data import ImageSet, batches
from cure.errors import ConfigError, DataError
from cure.evaluation.options import Split
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import TargetLike
from cure.models import core
from cure.models.checks import check_outputs
from cure.utils import plotting as drawing
from cure.utils.io import check_free
from cure.utils.plotting import Picture
from cure.utils.stats import jackknife_interval

NAME = "cka"
ATTACK = "pgd20"
FEWEST = 4
"""Images a batch must have: the unbiased estimator divides by n - 3."""

CELLS = 32
"""Rows and columns of a drawn map at most; of deeper networks neighbouring layers are averaged."""

NUMBERS = 144
"""Cells of a drawn map that has its numbers written into them, at most."""

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
                interval = list(jackknife_interval(means[place], values))
            found.append({"name": name, "mean": _plain(means[place]), "interval": interval})
        return found


def _mean_thirds(matrix: Tensor) -> list[float]:
    """Mean of each third of a diagonal, without what is not a number."""
    diagonal = matrix.diagonal()
    bounds = [round(len(diagonal) * part / 3) for part in range(4)]
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
        model: any network; wrappers around it are looked through.
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


def cka(
    *targets: TargetLike,
    other: TargetLike | None = None,
    layers: Sequence[str] | None = None,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    limit: int | None = 1000,
    epsilon: str | float | None = None,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    batch_size: int | None = 100,
    device: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Result:
    """How alike features are: of natural and adversarial images, or of two networks.

    Costs 23 forward and 20 backward passes an image and network, and ``8 layers batch_size^2``
    bytes for each input.

    Args:
        targets: runs, names of networks, networks.  Each is compared with itself: all its layers
            on natural images with all its layers on adversarial images (PGD-20, the run's threat,
            uniform start, made on that network).
        other: compare each target with this network instead: natural images in both, and
            adversarial images, each network's own.
        layers: patterns of names of modules; see :func:`chosen_modules`.
        data: images; by default those of the first run.
        split: which images.
        limit: only the first so many; all with None.
        epsilon: radius; by default that of the first run.
        norm: as ``epsilon``.
        checkpoint: which weights of runs.
        weights: weights file of a single network.
        batch_size: images of which similarity is estimated at once; a last batch of fewer than
            four is left out.
        device: "auto", "cpu", "cuda".
        seed: of the attack's random starts.
        output: JSON file.
        progress: told (what, images done, images in all).

    Returns:
        ``maps``: for each pair ``first``, ``second`` {"model", "input"}, ``layers`` of both,
        ``matrix`` [L1][L2] (null where features do not vary), ``thirds`` of the diagonal where the
        layers are the same.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    check_free(output)
    looked = look(
        [*targets, *([] if other is None else [other])],
        data=data,
        split=split,
        limit=limit,
        epsilon=epsilon,
        norm=norm,
        checkpoint=checkpoint,
        weights=weights,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    if not targets:
        raise ConfigError("expected a run or network besides the other")
    used = len(looked.images) // looked.batch_size * looked.batch_size
    rest = len(looked.images) - used
    used += rest if rest >= FEWEST else 0
    if not used:
        raise ConfigError(
            f"expected at least {FEWEST} images and batches of at least {FEWEST}, got "
            f"{len(looked.images)} images in batches of {looked.batch_size}; raise --limit or "
            "--batch-size"
        )
    if looked.batch_size < FEWEST:
        raise ConfigError(
            f"expected batches of at least {FEWEST} images, got {looked.batch_size}; raise "
            "--batch-size"
        )
    names = list(looked.networks)
    reference = names.pop() if other is not None else None
    found = _layers(looked, layers)
    pairs = {pair: Similarity() for name in names for pair in _pairs(name, reference)}
    done = 0
    for number, (natural, label) in enumerate(_batches(looked, used)):
        inputs: dict[tuple[str, str], list[Tensor]] = {}
        for name in [*([] if reference is None else [reference]), *names]:
            adversarial = _adversarial(looked, name, natural, label, number)
            inputs[name, "natural"] = found[name].grams(natural)
            inputs[name, "adversarial"] = found[name].grams(adversarial)
            for (first, second), similarity in pairs.items():
                if first[0] == name:
                    similarity.add(inputs[first], inputs[second])
            if name != reference:
                del inputs[name, "natural"], inputs[name, "adversarial"]
        done += len(natural)
        progress(NAME, done, used)
    body = {
        **looked.described(),
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
    return keep(NAME, body, folder=looked.folder, output=output)


def _pairs(name: str, reference: str | None) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    if reference is None:
        return [((name, "natural"), (name, "adversarial"))]
    return [((name, kind), (reference, kind)) for kind in ("natural", "adversarial")]


def _layers(looked: Looked, layers: Sequence[str] | None) -> dict[str, Layers]:
    """The layers of each network, once each was seen to return logits."""
    image, _ = next(_batches(looked, FEWEST))
    for network in looked.networks.values():
        check_outputs(network, image, len(looked.images.classes))
    evaluation_attack(ATTACK).defined(len(looked.images.classes), looked.threat)
    return {name: layers_of(network, image, layers) for name, network in looked.networks.items()}


def _batches(looked: Looked, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    images = looked.images.checked().to(looked.engine.device)
    for batch in batches(images, looked.batch_size, count):
        yield looked.engine.arrange(batch.image), batch.label


def _adversarial(looked: Looked, name: str, image: Tensor, label: Tensor, number: int) -> Tensor:
    part = evaluation_attack(ATTACK).parts[ATTACK]
    made = part.run(looked.networks[name], image, label, looked.threat, looked.seed, number)
    return looked.engine.arrange(made)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- how it is told --------------------------------------------------------------------------------


def _label(end: Mapping[str, str]) -> str:
    return f"{end['model']}, {end['input']} images"


def _three(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "not defined"
    limits = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{value:.3f}{limits}"


def _threat(result: Result) -> str:
    return f"{result['threat']['norm']} {result['threat']['epsilon_text']}"


def findings(result: Result) -> list[str]:
    """What was found, in sentences."""
    said = []
    for drawn in result["maps"]:
        first, second = drawn["first"], drawn["second"]
        if first["model"] == second["model"]:
            what = f"{first['model']}: features of an image and of its adversarial version"
        else:
            what = (
                f"{first['model']} and {second['model']}: features of the same "
                f"{first['input']} images"
            )
        if drawn["thirds"]:
            early, middle, late = (
                _three(third["mean"], third["interval"]) for third in drawn["thirds"]
            )
            said.append(
                f"{what} are alike to {early} in the early third of the layers, {middle} in the "
                f"middle and {late} in the late one."
            )
        else:
            best = [max((v for v in row if v is not None), default=None) for row in drawn["matrix"]]
            known = [value for value in best if value is not None]
            mean = math.fsum(known) / len(known) if known else None
            said.append(
                f"{what}: a layer of {first['model']} is alike to its most similar layer of "
                f"{second['model']} to {_three(mean)}, mean over layers."
            )
    ranked = [
        (drawn["thirds"][2]["mean"], drawn["first"]["model"])
        for drawn in result["maps"]
        if drawn["thirds"] and drawn["first"]["model"] == drawn["second"]["model"]
        if drawn["thirds"][2]["mean"] is not None
    ]
    if len(ranked) > 1:
        order = ", ".join(f"{name} {value:.3f}" for value, name in sorted(ranked, reverse=True))
        said.append(f"In the late third, from the most to the least alike: {order}.")
    said.append(
        f"Alike is linear CKA: 1 for the same features up to rotation and scale, 0 for unrelated "
        f"ones; n = {result['n']:,} images in batches of {result['batch_size']}, adversarial "
        f"images by PGD-20, {_threat(result)}; in brackets 95 % intervals (jackknife over "
        "batches). A network whose features hardly move under attack need not classify better: "
        "read this beside its accuracy."
    )
    if any(value is None for drawn in result["maps"] for row in drawn["matrix"] for value in row):
        said.append(
            "Where nothing is given, the features of a layer do not vary over the images by more "
            "than the estimate's own noise."
        )
    return said


def tables(result: Result) -> list[Rows]:
    """Means by third, and the diagonals layer by layer."""
    thirds = [
        [
            _label(drawn["first"]),
            _label(drawn["second"]),
            *(
                [_three(third["mean"], third["interval"]) for third in drawn["thirds"]]
                if drawn["thirds"]
                else ["-"] * 3
            ),
        ]
        for drawn in result["maps"]
    ]
    made = [
        Rows(
            "Linear CKA of each layer with itself, mean over thirds of the layers (95 % interval)",
            ["features of", "and of", *_THIRDS],
            thirds,
        )
    ]
    for layers, drawn in _by_layers(result):
        made.append(
            Rows(
                "Linear CKA of each layer with itself",
                ["layer", *(f"{_label(m['first'])} / {_label(m['second'])}" for m in drawn)],
                [
                    [layer, *(_three(m["matrix"][place][place]) for m in drawn)]
                    for place, layer in enumerate(layers)
                ],
            )
        )
    return made


def _by_layers(result: Result) -> list[tuple[list[str], list[dict[str, Any]]]]:
    """Maps whose two sides have the same layers, by these layers."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for drawn in result["maps"]:
        if drawn["layers"][0] == drawn["layers"][1]:
            groups.setdefault(tuple(drawn["layers"][0]), []).append(drawn)
    return [(list(layers), drawn) for layers, drawn in groups.items()]


def pictures(result: Result) -> list[Picture]:
    """The diagonals as curves, and a map for each pair."""
    made = []
    for number, (layers, drawn) in enumerate(_by_layers(result)):
        if len(layers) > 1:
            made.append(_curves(f"cka-layers-{number + 1}", layers, drawn, result))
    for number, one in enumerate(result["maps"]):
        made.append(_map(f"cka-map-{number + 1}", one, result))
    return made


def _curves(
    name: str, layers: list[str], maps: Sequence[Mapping[str, Any]], result: Result
) -> Picture:
    figure, (axes, change) = drawing.canvas(2, height=5.8, sharex=True)
    same = all(one["first"]["model"] == one["second"]["model"] for one in maps)
    for number, one in enumerate(maps):
        values = [one["matrix"][place][place] for place in range(len(layers))]
        points = [(place, value) for place, value in enumerate(values) if value is not None]
        style = drawing.series(number)
        axes.plot(*_columns(points), label=drawing.plain(_pair(one)), **style)
        # What the estimate's noise puts at 1 or above has no place on a logarithmic scale.
        change.plot(*_columns([(place, 1 - v) for place, v in points if v < 1]), **style)
    axes.set_ylabel("linear CKA (1: the same)")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.02)
    change.set_yscale("log")
    change.set_ylabel("1 - CKA, logarithmic")
    change.set_xlabel("layer, in the order of computation")
    _name_ticks(change.xaxis, [[layer] for layer in layers], rotation=90)
    drawing.legend(axes)
    what = "an image and its adversarial version" if same else "two networks"
    title = f"How alike features of {what} are, layer by layer"
    spoken = "; ".join(
        f"{_pair(one)}: " + ", ".join(f"{t['name']} {_three(t['mean'])}" for t in one["thirds"])
        for one in maps
    )
    return drawing.picture(
        figure,
        name,
        title,
        f"Mean over thirds of the layers. {spoken}. n = {result['n']:,} images.",
    )


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _pair(one: Mapping[str, Any]) -> str:
    first, second = one["first"], one["second"]
    if first["model"] == second["model"]:
        return str(first["model"])
    return f"{first['model']} and {second['model']}, {first['input']}"


def _map(name: str, one: Mapping[str, Any], result: Result) -> Picture:
    rows, columns = (_groups(layers) for layers in one["layers"])
    cells = [[_mean_cell(one["matrix"], row, column) for column in columns] for row in rows]
    figure, (axes,) = drawing.canvas(width=6.4, height=5.6)
    mesh = drawing.heat_map(axes, cells, low=0.0, high=1.0)
    _name_ticks(axes.yaxis, [[one["layers"][0][p] for p in row] for row in rows], shift=0.5)
    _name_ticks(
        axes.xaxis, [[one["layers"][1][p] for p in row] for row in columns], shift=0.5, rotation=90
    )
    axes.set_aspect("equal")
    axes.set_ylabel(f"layer: {_label(one['first'])}", parse_math=False)
    axes.set_xlabel(f"layer: {_label(one['second'])}", parse_math=False)
    drawing.colour_bar(figure, axes, mesh, "linear CKA")
    if len(rows) * len(columns) <= NUMBERS:
        light = drawing.contrast(cells, 0.0, 1.0)
        for r, c in product(range(len(rows)), range(len(columns))):
            if math.isfinite(cells[r][c]):
                colour = "#ffffff" if (r, c) in light else "#111111"
                axes.text(
                    c + 0.5,
                    r + 0.5,
                    f"{cells[r][c]:.2f}",
                    color=colour,
                    fontsize=7,
                    ha="center",
                    va="center",
                )
    figures = [value for row in cells for value in row if math.isfinite(value)]
    joined = max(len(group) for group in (*rows, *columns))
    note = f" Each cell is the mean of up to {joined} x {joined} layers." if joined > 1 else ""
    title = f"Linear CKA of all layers: {_label(one['first'])}, and {_label(one['second'])}"
    description = f"n = {result['n']:,} images. Blank cells are not defined.{note}"
    if figures:
        description = f"From {min(figures):.2f} to {max(figures):.2f}. {description}"
    return drawing.picture(figure, name, title, description)


def _groups(layers: Sequence[str]) -> list[range]:
    """Places of neighbouring layers, at most ``CELLS`` groups."""
    size = math.ceil(len(layers) / CELLS)
    return [range(a, min(a + size, len(layers))) for a in range(0, len(layers), size)]


def _mean_cell(matrix: Sequence[Sequence[float | None]], rows: range, columns: range) -> float:
    known = [matrix[r][c] for r in rows for c in columns]
    numbers = [value for value in known if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _name_ticks(
    axis: Any, groups: Sequence[Sequence[str]], shift: float = 0.0, rotation: int = 0
) -> None:
    """Names of layers along an axis, as many as can be read."""
    every = math.ceil(len(groups) / 30)
    places = range(0, len(groups), every)
    axis.set_ticks(
        [place + shift for place in places],
        labels=[groups[place][0] for place in places],
        fontsize=7,
        rotation=rotation,
        parse_math=False,
    )


STUDIES.register(NAME)(
    Study(
        NAME,
        "Similarity of features (CKA)",
        "How much do the features of a layer change when an image is attacked, or from one network "
        "to another?",
        "cure analyse cka RUN RUN ...",
        findings,
        tables,
        pictures,
    )
)
