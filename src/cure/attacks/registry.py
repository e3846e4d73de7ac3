"""The attacks that evaluation runs, by the names that the field's tables use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY, MARGIN, Objective
from cure.attacks.pgd import Attack, Start, attack_mode
from cure.attacks.third_party import (
    MINIMUM,
    MINIMUM_SETTINGS,
    VERSIONS,
    part_of_autoattack,
    smallest_change,
)
from cure.attacks.threat import Threat
from cure.config import Ratio
from cure.errors import ConfigError, unknown
from cure.models.fuse import folded_copy
from cure.utils.random import generator

Run = Callable[[nn.Module, Tensor, Tensor, Threat, int, int], Tensor]
"""(model, image [B, C, H, W], label [B], threat, seed, number of the batch) to adversarial images:
inside [0, 1] and, unless the attack minimises the change, inside the ball; not necessarily
fooling."""


@dataclass(frozen=True)
class Part:
    """A part of an attack, which runs on the images that the parts before it left standing.

    Attributes:
        run: the attack on one batch.
        passes: about how many forward passes that takes when no image is fooled, for progress.
        least_classes: the part is not defined for fewer.
    """

    run: Run
    passes: int = 1
    least_classes: int = 2


def unchanged(model: nn.Module, image: Tensor) -> nn.Module:  # noqa: ARG001
    """The network itself."""
    return model


@dataclass(frozen=True)
class EvaluationAttack:
    """A named attack with fixed settings.

    Attributes:
        name: as in result files.
        description: one line for ``cure list attacks``.
        settings: what stands in the result file; sizes as shares of epsilon where they scale.
        parts: by name, in their order; an attack of one part calls it by its own name.
        norms: the attack is defined in these.
        minimum: whether it looks for the smallest change instead of staying in the ball.
        transferred: whether what it crafts comes from another network and is only tried on this.
        prepare: (model, some images) to the network that the parts attack; whatever fools it is
            tried on the model itself.
    """

    name: str
    description: str
    settings: dict[str, Any]
    parts: Mapping[str, Part]
    norms: tuple[str, ...] = ("Linf", "L2")
    minimum: bool = False
    transferred: bool = False
    prepare: Callable[[nn.Module, Tensor], nn.Module] = unchanged

    def defined(self, classes: int, threat: Threat) -> EvaluationAttack:
        """The attack for so many classes: without the parts that are not defined for so few.

        Raises:
            ConfigError: when it is not defined in the threat's norm, or none of its parts is left.
        """
        if threat.norm not in self.norms:
            raise ConfigError(
                f"{self.name} is an attack in {' or '.join(self.norms)}, the threat is in "
                f"{threat.norm}; leave it out or say --norm {self.norms[0]}"
            )
        kept = {n: part for n, part in self.parts.items() if classes >= part.least_classes}
        if len(kept) == len(self.parts):
            return self
        least = max(part.least_classes for part in self.parts.values())
        if not kept:
            raise ConfigError(
                f"{self.name} needs at least {least} classes, the data has {classes}; leave it out"
            )
        left_out = {
            name: f"needs {part.least_classes} classes"
            for name, part in self.parts.items()
            if name not in kept
        }
        settings = self.settings | {"parts": list(kept), "left_out": left_out}
        return replace(self, parts=kept, settings=settings)


# -- PGD and its like ------------------------------------------------------------------------------


STEPS = 20
"""Of the C&W margin attack, as in the field's tables."""


def _ascent(
    key: str, objective: Objective, steps: int, step_size: float | None, start: Start
) -> Run:
    """Gradient ascent in the ball; ``step_size`` None is a quarter of epsilon."""

    def run(
        model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
    ) -> Tensor:
        length = threat.epsilon / 4 if step_size is None else step_size
        draws = generator(image.device, seed, key, number)
        return Attack(threat, steps, length, start=start)(model, image, label, objective, draws)

    return run


def pgd(
    steps: int,
    *,
    margin: bool = False,
    step: str | None = None,
    restarts: int = 1,
    start: Start = "uniform",
) -> EvaluationAttack:
    """PGD: last iterate of so many steps; an image that any restart fools is fooled.

    On cross-entropy, or on the C&W margin with confidence 50: the field's Linf "C&W".

    Args:
        steps: of gradient ascent.
        margin: climb the margin instead of cross-entropy.
        step: length of a step, "2/255"; by default a quarter of epsilon.
        restarts: how often it starts anew, on the images that still stand.
        start: where: "uniform" in the ball, "gaussian" close to the image, or "none".

    Source: Madry et al., ICLR 2018; the default step is 2/255 at epsilon 8/255.
    """
    base = "cw" if margin else f"pgd{steps}"
    name = base if not margin or steps == STEPS else f"cw:steps={steps}"
    name += f":step={step}" if step else ""
    name += f":restarts={restarts}" if restarts > 1 else ""
    name += f":start={start}" if start != "uniform" else ""
    objective = MARGIN if margin else CROSS_ENTROPY
    length = None if step is None else float(Ratio(step))
    parts = {}
    for number in range(restarts):
        key = base if number == 0 else f"{base}-restart{number}"
        part = name if restarts == 1 else f"restart {number + 1}"
        parts[part] = Part(_ascent(key, objective, steps, length, start), steps)
    settings = {
        "steps": steps,
        "step_size": step or "epsilon/4",
        "start": start,
        "restarts": restarts,
        "objective": "margin" if margin else "cross_entropy",
    }
    return EvaluationAttack(
        name,
        "PGD on the C&W margin with confidence 50, 20 steps of epsilon/4: the field's Linf 'C&W'"
        if margin
        else f"PGD on cross-entropy, {steps} steps of epsilon/4, uniform start, last iterate",
        settings | ({"confidence": 50} if margin else {}),
        parts,
    )


def _fgsm(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    threat: Threat,
    seed: int,  # noqa: ARG001
    number: int,  # noqa: ARG001
) -> Tensor:
    attack = Attack(threat, 1, threat.epsilon, start="none")
    return attack(model, image, label, CROSS_ENTROPY, None)


FGSM = EvaluationAttack(
    "fgsm",
    "one step of epsilon along the sign of the gradient (L2: along the gradient)",
    {"steps": 1, "step_size": "epsilon", "start": "none", "objective": "cross_entropy"},
    {"fgsm": Part(_fgsm)},
)

DRAWS = 10
"""Of the noise that looks for nothing."""


def _noise(draw: int) -> Run:
    def run(
        model: nn.Module,  # noqa: ARG001
        image: Tensor,
        label: Tensor,  # noqa: ARG001
        threat: Threat,
        seed: int,
        number: int,
    ) -> Tensor:
        draws = generator(image.device, seed, f"noise{draw}", number)
        return (image + threat.project(_at_the_edge(threat, image, draws))).clamp(0, 1)

    return run


def _at_the_edge(threat: Threat, image: Tensor, draws: torch.Generator) -> Tensor:
    """A random change as long as the threat allows: a corner of the cube, a point of the sphere."""
    return threat.epsilon * threat.steepest(
        threat.sample(image, draws)
        if threat.norm == "Linf"
        else torch.randn(image.shape, generator=draws, device=image.device, dtype=image.dtype)
    )


NOISE = EvaluationAttack(
    "noise",
    f"random changes of length epsilon, {DRAWS} draws: what an attack must be stronger than",
    {"draws": DRAWS, "where": "corners of the cube (Linf), the sphere (L2)"},
    {f"draw {number + 1}": Part(_noise(number)) for number in range(DRAWS)},
)

# -- AutoAttack ------------------------------------------------------------------------------------

# Forward passes for an image that is never fooled; and the fewest classes: the DLR loss compares
# with the third largest logit, the targeted one with the fourth.
_COST = {
    "apgd-ce": (102, 2),
    "apgd-dlr": (102, 3),
    "apgd-t": (919, 4),
    "fab": (1400, 2),
    "fab-t": (1400, 2),
    "square": (5002, 2),
}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def _part_of(kind: str, part: str) -> Part:
    def run(
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        threat: Threat,
        seed: int,
        number: int,  # noqa: ARG001 - the package begins each batch with the same seed
    ) -> Tensor:
        from cure.attacks.autoattack import PlainLayout, standard_part

        devices = [image.device.index or 0] if image.device.type == "cuda" else []
        # It seeds PyTorch's global generator: lend it the generator and the network.
        with attack_mode(model), torch.random.fork_rng(devices=devices):
            if kind == "standard" and threat.norm != "L1":
                return standard_part(part, model, image.contiguous(), label, threat, seed)
            plain = image.contiguous()
            attack = part_of_autoattack(kind, part, PlainLayout(model), plain, threat, seed)
            with torch.no_grad():
                found: Tensor = attack.perturb(plain, label)
            return found

    passes, least_classes = _COST[part]
    return Part(run, passes, least_classes)


def _prepared(model: nn.Module, image: Tensor) -> nn.Module:
    """The network with BatchNorm folded, channels innermost, without weight gradients."""
    network = folded_copy(model, image)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _of_autoattack(
    name: str, description: str, kind: str, parts: tuple[str, ...]
) -> EvaluationAttack:
    return EvaluationAttack(
        name,
        description,
        {
            "version": kind,
            "parts": list(parts),
            "package": "pyautoattack",
            "package_version": version("pyautoattack"),
        },
        {part: _part_of(kind, part) for part in parts},
        norms=("Linf", "L2", "L1"),
        # A network that draws at random is attacked as it is.
        prepare=unchanged if kind == "rand" else _prepared,
    )


AUTOATTACK = _of_autoattack(
    "autoattack",
    "AutoAttack standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square (pyautoattack)",
    "standard",
    STANDARD,
)
PLUS = _of_autoattack(
    "autoattack-plus",
    "AutoAttack plus: six parts, five restarts of the untargeted ones (pyautoattack)",
    "plus",
    VERSIONS["plus"],
)
RAND = _of_autoattack(
    "autoattack-rand",
    "AutoAttack rand, for networks that draw at random: APGD-CE and APGD-DLR, gradients averaged "
    "over 20 draws (pyautoattack)",
    "rand",
    VERSIONS["rand"],
)
SINGLE = {
    part: _of_autoattack(part, f"{title} alone, as in AutoAttack standard", "standard", (part,))
    for part, title in {
        "apgd-ce": "APGD on cross-entropy",
        "apgd-t": "targeted APGD on DLR",
        "fab-t": "targeted FAB",
        "square": "Square, black box, 5,000 queries",
    }.items()
}

# -- smallest changes ------------------------------------------------------------------------------


def _smallest(name: str, description: str) -> EvaluationAttack:
    def run(
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        threat: Threat,
        seed: int,
        number: int,  # noqa: ARG001
    ) -> Tensor:
        devices = [image.device.index or 0] if image.device.type == "cuda" else []
        with attack_mode(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return smallest_change(name, model, image.contiguous(), label, threat)

    try:
        package = version("foolbox")
    except PackageNotFoundError:
        package = "not installed"
    return EvaluationAttack(
        name,
        f"{description}: median and curve over epsilon (foolbox)",
        MINIMUM_SETTINGS[name] | {"package": "foolbox", "package_version": package},
        {name: Part(run, 100)},
        norms=tuple(MINIMUM[name]),
        minimum=True,
    )


FMN = _smallest("fmn", "smallest change by Fast Minimum-Norm, 100 steps")
DDN = _smallest("ddn", "smallest L2 change by Decoupled Direction and Norm, 100 steps")
DEEPFOOL = _smallest("deepfool", "smallest change by DeepFool")
CW_L2 = _smallest("cw-l2", "smallest L2 change by Carlini and Wagner's minimisation")

# -- transfer --------------------------------------------------------------------------------------


def transfer(source: nn.Module | None) -> EvaluationAttack:
    """PGD-20 and the C&W margin climbed on ``source``, tried on the network.

    Args:
        source: images [B, C, H, W] in [0, 1] to logits of the same classes.

    Raises:
        ConfigError: without a source.
    """
    if source is None:
        raise ConfigError(
            "the attack transfer crafts images on another network: name it with --transfer TARGET"
        )
    network = source
    parts = {
        "pgd20": Part(_ascent("transfer", CROSS_ENTROPY, 20, None, "uniform"), 20),
        "cw": Part(_ascent("transfer-cw", MARGIN, 20, None, "uniform"), 20),
    }
    return EvaluationAttack(
        "transfer",
        "PGD-20 and the C&W margin climbed on another network (--transfer TARGET)",
        {"steps": 20, "step_size": "epsilon/4", "start": "uniform", "parts": list(parts)},
        parts,
        transferred=True,
        prepare=lambda model, image: network,  # noqa: ARG005
    )


# -- names -----------------------------------------------------------------------------------------

FIXED = {
    attack.name: attack
    for attack in (FGSM, AUTOATTACK, PLUS, RAND, *SINGLE.values(), FMN, DDN, DEEPFOOL, CW_L2, NOISE)
}
KNOWN = {
    "natural": "accuracy on unchanged images",
    "fgsm": FGSM.description,
    **{attack.name: attack.description for attack in (pgd(20), pgd(100), pgd(20, margin=True))},
    **{name: attack.description for name, attack in FIXED.items() if name != "fgsm"},
    "transfer": "PGD-20 and the C&W margin climbed on another network (--transfer TARGET)",
}
OPTIONS = "step=2/255, restarts=5, start=none"


def evaluation_attack(name: str, source: nn.Module | None = None) -> EvaluationAttack:
    """The attack called ``name``.

    Args:
        name: from ``cure list attacks``; ``pgdK`` with any number of steps.  PGD and ``cw`` take
            options: ``pgd50:restarts=5:step=2/255:start=none``.
        source: the network that "transfer" crafts on.

    Raises:
        ConfigError: when the name or an option is unknown, or "transfer" has no source.
    """
    base, *words = name.split(":")
    steps = re.fullmatch(r"pgd-?([1-9][0-9]{0,4})", base)
    if steps is None and base != "cw":
        if name == "transfer":
            return transfer(source)
        if name in FIXED:
            return FIXED[name]
        if words and base in KNOWN:
            raise ConfigError(f"{name}: only pgdK and cw take options, {base} is as it is")
        raise ConfigError(unknown("attack", name, KNOWN))
    options = dict(_option(name, word) for word in words)
    count = int(steps[1]) if steps is not None else options.pop("steps", STEPS)
    return pgd(count, margin=steps is None, **options)


def _option(attack: str, word: str) -> tuple[str, Any]:
    """One ``key=value`` behind a name."""
    key, _, text = word.partition("=")
    if key == "step":
        try:
            if Ratio(text) > 0:
                return key, text
        except ValueError:
            pass
        raise ConfigError(f"{attack}: expected a step such as 2/255 above 0, got '{text}'")
    if key == "restarts" or (key == "steps" and attack.startswith("cw")):
        if re.fullmatch(r"[1-9][0-9]{0,4}", text):
            return key, int(text)
        raise ConfigError(f"{attack}: expected a whole number above 0 for {key}, got '{text}'")
    if key == "start":
        if text in ("uniform", "gaussian", "none"):
            return key, text
        raise ConfigError(f"{attack}: expected uniform, gaussian or none for start, got '{text}'")
    raise ConfigError(f"{attack}: unknown option '{key}'; there are {OPTIONS}")
