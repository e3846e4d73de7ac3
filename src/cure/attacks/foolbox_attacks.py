"""The smallest change that fools, by attacks of foolbox: FMN, DDN, DeepFool, C&W in L2."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks.pgd import attack_mode
from cure.attacks.registry import EvaluationAttack, Part, add_attack
from cure.attacks.threat import Threat, per_image
from cure.errors import ConfigError
from cure.utils.random import seeded

MINIMUM = {
    # Not its L2 form: in foolbox 3.3.4 that finds changes five to two hundred times too long on a
    # linear network, however many steps it is given.
    "fmn": {"Linf": "LInfFMNAttack", "L1": "L1FMNAttack"},
    "ddn": {"L2": "DDNAttack"},
    "deepfool": {"Linf": "LinfDeepFoolAttack", "L2": "L2DeepFoolAttack"},
    "cw-l2": {"L2": "L2CarliniWagnerAttack"},
}
"""foolbox's classes by name and norm."""

SETTINGS: dict[str, dict[str, Any]] = {
    "fmn": {"steps": 100},
    "ddn": {"steps": 100},
    "deepfool": {"steps": 50, "overshoot": 0.02},
    "cw-l2": {
        "binary_search_steps": 9,
        "steps": 1000,
        "stepsize": 0.01,
        "confidence": 0,
        "initial_const": 0.001,
        "abort_early": True,
    },
}
"""Their arguments; each of foolbox's own defaults but for the 10,000 steps of C&W."""


def smallest_change(
    name: str, network: nn.Module, image: Tensor, label: Tensor, threat: Threat
) -> Tensor:
    """Images [B, C, H, W] as near to ``image`` as the attack gets while they fool ``network``.

    Args:
        name: a key of ``MINIMUM``.
        network: in evaluation mode.
        image: [B, C, H, W] in [0, 1].
        label: [B].
        threat: its norm decides what near means; its radius is not used.

    Raises:
        ConfigError: when foolbox is not installed.
    """
    try:
        import foolbox
    except ImportError:
        raise ConfigError(
            f"the attack {name} is foolbox's, which is not installed; "
            "pip install 'cure-at[attacks]', or leave it out"
        ) from None
    made = getattr(foolbox.attacks, MINIMUM[name][threat.norm])(**SETTINGS[name])
    wrapped = foolbox.models.pytorch.PyTorchModel(network, bounds=(0, 1), device=image.device)
    found, _, _ = made(wrapped, image, foolbox.criteria.Misclassification(label), epsilons=None)
    # foolbox's own bounds hold up to rounding.
    changed: Tensor = found.detach().clamp(0, 1)
    # The smallest change ends at the boundary, where rounding decides: step over it.
    with torch.no_grad():
        for excess in (1e-4, 1e-3, 1e-2):
            right = network(changed).argmax(dim=1) == label
            further = (image + (1 + excess) * (found.detach() - image)).clamp(0, 1)
            changed = torch.where(per_image(right, image), further, changed)
    return changed


def _attack(name: str, label: str, description: str) -> EvaluationAttack:
    def run(
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        threat: Threat,
        seed: int,
        number: int,  # noqa: ARG001
    ) -> Tensor:
        with attack_mode(model), seeded(seed):
            return smallest_change(name, model, image.contiguous(), label, threat)

    try:
        package = version("foolbox")
    except PackageNotFoundError:
        package = "not installed"
    return EvaluationAttack(
        name,
        f"{description}: median and curve over epsilon (foolbox)",
        SETTINGS[name] | {"package": "foolbox", "package_version": package},
        {name: Part(run, 100)},
        label=label,
        norms=tuple(MINIMUM[name]),
        minimum=True,
    )


for _name, _label, _description in (
    ("fmn", "FMN", "smallest change by Fast Minimum-Norm, 100 steps"),
    ("ddn", "DDN", "smallest L2 change by Decoupled Direction and Norm, 100 steps"),
    ("deepfool", "DeepFool", "smallest change by DeepFool"),
    ("cw-l2", "C&W (L2)", "smallest L2 change by Carlini and Wagner's minimisation"),
):
    add_attack(_attack(_name, _label, _description))
