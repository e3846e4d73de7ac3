"""PGD on cross-entropy (``pgdK``) and on the C&W margin (``cw``), as evaluation runs them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY, MARGIN, Objective
from cure.attacks.pgd import PGD, Start
from cure.attacks.registry import AttackFamily, EvaluationAttack, Part, Run
from cure.attacks.threat import Threat
from cure.config import Ratio
from cure.errors import ConfigError
from cure.registry import ATTACKS
from cure.utils.random import generator

STEPS = 20
"""Of the C&W margin attack, as in the field's tables."""
OPTIONS = "step=2/255, restarts=5, start=none"


def ascent(
    key: str,
    objective: Objective,
    steps: int,
    step_size: float | None = None,
    start: Start = "uniform",
) -> Run:
    """Gradient ascent in the ball; ``step_size`` None is a quarter of epsilon.

    ``key`` names the stream of random numbers.
    """

    def run(
        model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
    ) -> Tensor:
        length = threat.epsilon / 4 if step_size is None else step_size
        draws = generator(image.device, seed, key, number)
        return PGD(threat, steps, length, start=start)(model, image, label, objective, draws)

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
        margin: maximise the margin instead of cross-entropy.
        step: length of a step, "2/255"; by default a quarter of epsilon.
        restarts: number of starts, each on the images that are not fooled yet.
        start: where: "uniform" in the ball, "gaussian" close to the image, or "none".

    Source: Madry et al., ICLR 2018; the default step is 2/255 at epsilon 8/255.
    """
    base = "cw" if margin else f"pgd{steps}"
    options = [f"steps={steps}"] if margin and steps != STEPS else []
    options += [f"step={step}"] if step else []
    options += [f"restarts={restarts}"] if restarts > 1 else []
    options += [f"start={start}"] if start != "uniform" else []
    name = ":".join([base, *options])
    label = "C&W" if margin else f"PGD-{steps}"
    objective = MARGIN if margin else CROSS_ENTROPY
    length = None if step is None else float(Ratio(step))
    parts = {}
    for number in range(restarts):
        key = base if number == 0 else f"{base}-restart{number}"
        part = name if restarts == 1 else f"restart {number + 1}"
        parts[part] = Part(ascent(key, objective, steps, length, start), steps)
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
        label=label + (f" ({', '.join(options)})" if options else ""),
        strength=4 if margin else 2,
    )


def _pgd(match: re.Match[str], words: list[str]) -> EvaluationAttack:
    return pgd(int(match[1]), **dict(_option(match.string, word) for word in words))


def _cw(match: re.Match[str], words: list[str]) -> EvaluationAttack:
    options = dict(_option(match.string, word) for word in words)
    return pgd(options.pop("steps", STEPS), margin=True, **options)


ATTACKS.register("pgdK")(
    AttackFamily(
        r"pgd-?([1-9][0-9]{0,4})",
        _pgd,
        {"pgd20": None, "pgd100": None, "pgdK": "PGD with any number of steps K"},
    )
)
ATTACKS.register("cw")(AttackFamily("cw", _cw, {"cw": None}))


def _option(attack: str, word: str) -> tuple[str, Any]:
    """One ``key=value`` after the name."""
    key, _, text = word.partition("=")
    if key == "step":
        try:
            if Ratio(text) > 0:
                return key, text
        except ValueError:
            pass
        raise ConfigError(f"{attack}: expected a step such as 2/255 above 0, got '{text}'")
    if key == "restarts" or (key == "steps" and attack == "cw"):
        if re.fullmatch(r"[1-9][0-9]{0,4}", text):
            return key, int(text)
        raise ConfigError(f"{attack}: expected a whole number above 0 for {key}, got '{text}'")
    if key == "start":
        if text in ("uniform", "gaussian", "none"):
            return key, text
        raise ConfigError(f"{attack}: expected uniform, gaussian or none for start, got '{text}'")
    raise ConfigError(f"{attack}: unknown option '{key}'; there are {OPTIONS}")
