"""The attacks that evaluation runs, by the names that the field's tables use.

An attack is one file in this folder: it registers its definition, label, strength and description::

    @register("darker", "every pixel as dark as allowed", {}, label="Darker", strength=1)
    def darker(model, image, label, threat, seed, number):
        return (image - threat.epsilon).clamp(0, 1)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cure.attacks.threat import Threat
from cure.errors import ConfigError, CureNote, unknown
from cure.registry import ATTACKS

Run = Callable[[nn.Module, Tensor, Tensor, Threat, int, int], Tensor]
"""(model, image [B, C, H, W], label [B], threat, seed, number of the batch) to adversarial images:
inside [0, 1] and, unless the attack minimises the change, inside the ball; not necessarily
misclassified."""


@dataclass(frozen=True)
class Part:
    """A part of an attack, which runs on the images that the parts before it did not fool.

    Attributes:
        run: the attack on one batch.
        passes: about how many forward passes that takes when no image is fooled, for progress.
        least_classes: the part is not defined for fewer.
        gradient: it needs the gradient by the image.
        enough: where the attack has an order: stop after so many images in a row withstood the
            part; None attacks all.
    """

    run: Run
    passes: int = 1
    least_classes: int = 2
    gradient: bool = True
    enough: int | None = None


def unchanged(model: nn.Module, image: Tensor) -> nn.Module:  # noqa: ARG001
    """The network itself."""
    return model


@dataclass(frozen=True)
class EvaluationAttack:
    """A named attack with fixed settings.

    Attributes:
        name: as in result files.
        description: one line for ``cure list attacks``.
        settings: for the result file; sizes as shares of epsilon where they scale with it.
        parts: by name, in their order; an attack of one part calls it by its own name.
        label: as papers write it; by default the name.
        strength: attacks are listed from the lowest to the highest.
        reference: its accuracy is one to report: several kinds of attacks, one without gradients,
            on every image.
        norms: the attack is defined in these.
        minimum: whether it looks for the smallest change instead of staying in the ball.
        transferred: whether its images are made on another network and only tried on this one.
        prepare: (model, some images) to the network that the parts attack; whatever fools it is
            tried on the model itself.
        order: (network, image [B, C, H, W], label [B], threat) to [B]: what falls most easily has
            the smallest number.  Parts with ``enough`` take the images in this order.
    """

    name: str
    description: str
    settings: dict[str, Any]
    parts: Mapping[str, Part]
    label: str = ""
    strength: int = 3
    reference: bool = False
    norms: tuple[str, ...] = ("Linf", "L2")
    minimum: bool = False
    transferred: bool = False
    prepare: Callable[[nn.Module, Tensor], nn.Module] = field(default=unchanged)
    order: Callable[[nn.Module, Tensor, Tensor, Threat], Tensor] | None = None

    def enough(self, part: str) -> int | None:
        """After how many images in a row that withstood it a part ends; None for all images."""
        return None if self.order is None else self.parts[part].enough

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

    def without_gradient(self, reason: str) -> EvaluationAttack:
        """The attack on a network through which no gradient reaches the image.

        Args:
            reason: why none does.

        Raises:
            ConfigError: when every part needs one; names what can be run.
        """
        kept = {n: p for n, p in self.parts.items() if not p.gradient or self.transferred}
        if len(kept) == len(self.parts):
            return self
        if not kept:
            raise ConfigError(
                f"{self.name} needs the gradient by the image, and none reaches it ({reason}); "
                "what can be run: --attacks natural,noise,square"
            )
        warnings.warn(
            f"{self.name}: only {' and '.join(kept)} was possible, because no gradient reaches the "
            f"image ({reason})",
            CureNote,
            stacklevel=2,
        )
        left_out = dict(self.settings.get("left_out", {})) | {
            name: "no gradient reaches the image" for name in self.parts if name not in kept
        }
        settings = self.settings | {"parts": list(kept), "left_out": left_out}
        return replace(self, parts=kept, settings=settings, order=None)


@dataclass(frozen=True)
class AttackFamily:
    """Attacks whose names carry a number or options, such as ``pgd50:restarts=5``.

    Attributes:
        pattern: of the name without options.
        make: (match of the pattern, options as text ["restarts=5"]) to the attack.
        listed: names for ``cure list attacks``, with descriptions of those that name no attack.
    """

    pattern: str
    make: Callable[[re.Match[str], list[str]], EvaluationAttack]
    listed: Mapping[str, str | None]


def register(
    name: str, description: str, settings: dict[str, Any], *, gradient: bool = True, **more: Any
) -> Callable[[Run], Run]:
    """Decorator that registers a function as an attack of one part.

    Args:
        name: as users write it.
        description: one line for ``cure list attacks``.
        settings: for the result file.
        gradient: it needs the gradient by the image.
        more: further attributes of :class:`EvaluationAttack`: ``label``, ``strength``, ``norms``.
    """

    def decorate(run: Run) -> Run:
        parts = {name: Part(run, gradient=gradient)}
        add_attack(EvaluationAttack(name, description, settings, parts, **more))
        return run

    return decorate


def add_attack(attack: EvaluationAttack) -> EvaluationAttack:
    """Register an attack of several parts."""
    ATTACKS.register(attack.name)(attack)
    return attack


def evaluation_attack(name: str, source: nn.Module | None = None) -> EvaluationAttack:
    """The attack called ``name``.

    Args:
        name: from ``cure list attacks``; ``pgdK`` with any number of steps.  PGD and ``cw`` take
            options: ``pgd50:restarts=5:step=2/255:start=none``.
        source: network that makes the images of an attack that is ``transferred``: images
            [B, C, H, W] in [0, 1] to logits of the same classes.

    Raises:
        ConfigError: when the name or an option is unknown, or a transferred attack has no source.

    >>> evaluation_attack("pgd7").parts["pgd7"].passes
    7
    """
    base, *options = name.split(":")
    for entry in _families().values():
        match = re.fullmatch(entry.pattern, base)
        if match is not None:
            return entry.make(match, options)
    if base not in ATTACKS or base in _families():
        raise ConfigError(unknown("attack", name, known_attacks()))
    attack: EvaluationAttack = ATTACKS[base]
    if options:
        families = " and ".join(sorted(_families(), reverse=True))
        raise ConfigError(f"{name}: only {families} take options, {base} is as it is")
    if not attack.transferred:
        return attack
    if source is None:
        raise ConfigError(
            f"the attack {name} makes images on another network: name it with --transfer TARGET"
        )
    network = source
    return replace(attack, prepare=lambda model, image: network)  # noqa: ARG005


def known_attacks() -> dict[str, str]:
    """Names and descriptions for a list, the weakest first; "natural" is no attack."""
    named = {name: ATTACKS[name].description for name in ATTACKS.names() if name not in _families()}
    further: dict[str, str] = {}
    for family in _families().values():
        for name, text in family.listed.items():
            (named if text is None else further)[name] = text or evaluation_attack(name).description
    return (
        {"natural": "accuracy on unchanged images"}
        | {name: named[name] for name in sorted(named, key=attack_order)}
        | further
    )


def check_attacks(names: Iterable[str]) -> None:
    """Refuse an unknown attack before anything is read or computed."""
    for name in names:
        if name != "natural":
            evaluation_attack(name)


def attack_label(name: str) -> str:
    """An attack as papers write it; the name itself where there is no such attack (any more).

    >>> attack_label("pgd20"), attack_label("cw:restarts=5")
    ('PGD-20', 'C&W (restarts=5)')
    """
    attack = _find(name)
    return (attack.label or attack.name) if attack is not None else name


def attack_name(name: str) -> str:
    """The name that results have for an attack; the name itself where there is no such attack.

    >>> attack_name("pgd-20"), attack_name("natural")
    ('pgd20', 'natural')
    """
    attack = _find(name)
    return attack.name if attack is not None else name


def attack_order(name: str) -> tuple[int, int, str]:
    """What sorts attacks from the weakest to the strongest, and PGD by its steps."""
    attack = _find(name)
    steps = attack.settings.get("steps", 0) if attack is not None and ":" not in name else 0
    return (attack.strength if attack is not None else 3, steps, name)


def is_reference(name: str) -> bool:
    """Whether an attack is one whose accuracy is reported; other attacks are weaker or estimates.

    >>> [name for name in ("autoattack", "screened-ordered", "pgd100") if is_reference(name)]
    ['autoattack']
    """
    attack = _find(name)
    return attack is not None and attack.reference


def _find(name: str) -> EvaluationAttack | None:
    try:
        return evaluation_attack(name, nn.Identity())
    except ConfigError:
        return None


def _families() -> dict[str, AttackFamily]:
    return {
        name: ATTACKS[name] for name in ATTACKS.names() if isinstance(ATTACKS[name], AttackFamily)
    }
