"""Attacks of other packages, as evaluation runs them: pyautoattack's versions, foolbox's minima."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks.threat import Threat
from cure.errors import ConfigError

VERSIONS = {
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""Parts of AutoAttack's versions besides the standard one."""

MINIMUM = {
    # Not its L2 form: in foolbox 3.3.4 that finds changes five to two hundred times too long on a
    # linear network, however many steps it is given.
    "fmn": {"Linf": "LInfFMNAttack", "L1": "L1FMNAttack"},
    "ddn": {"L2": "DDNAttack"},
    "deepfool": {"Linf": "LinfDeepFoolAttack", "L2": "L2DeepFoolAttack"},
    "cw-l2": {"L2": "L2CarliniWagnerAttack"},
}
"""foolbox's classes by name and norm."""

MINIMUM_SETTINGS: dict[str, dict[str, Any]] = {
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
"""What they are given; each of foolbox's own defaults but for the 10,000 steps of C&W."""


def part_of_autoattack(
    version: str, part: str, network: nn.Module, image: Tensor, threat: Threat, seed: int
) -> Any:
    """The package's object for one part of a version of AutoAttack, with the package's settings.

    Args:
        version: "standard", "plus" or "rand".
        part: one of its parts.
        network: in evaluation mode, takes contiguous images and gives contiguous gradients.
        image: [B, C, H, W] contiguous, what it will attack.
        threat: the ball.
        seed: of PyTorch's global generator, which is seeded at the beginning of each batch.

    Returns:
        An object whose ``perturb(image, label)`` gives [B, C, H, W]: a fooling image in the ball
        where one was found, else the image itself.
    """
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = network(image[:1]).shape[1]
    suite = AutoAttack(
        network,
        norm=threat.norm,
        eps=threat.epsilon,
        seed=seed,
        device=image.device,
        version=version,
    )
    attack: Any = {
        "apgd-ce": suite.apgd,
        "apgd-dlr": suite.apgd,
        "apgd-t": suite.apgd_targeted,
        "fab": suite.fab,
        "fab-t": suite.fab,
        "square": suite.square,
    }[part]
    attack.seed = seed
    if part in ("apgd-ce", "apgd-dlr"):
        attack.loss = part.removeprefix("apgd-")
    if part in ("apgd-t", "fab-t"):
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)
    if part in ("fab", "fab-t"):
        attack.targeted = part == "fab-t"
    if part == "fab-t":
        attack.n_restarts = 1
    return attack


def smallest_change(
    name: str, network: nn.Module, image: Tensor, label: Tensor, threat: Threat
) -> Tensor:
    """Images [B, C, H, W] as near to ``image`` as the attack gets while they fool ``network``.

    Args:
        name: a key of ``MINIMUM``.
        network: in evaluation mode.
        image: [B, C, H, W] in [0, 1].
        label: [B].
        threat: its norm decides what near means; its radius plays no part.

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
    made = getattr(foolbox.attacks, MINIMUM[name][threat.norm])(**MINIMUM_SETTINGS[name])
    lent = foolbox.models.pytorch.PyTorchModel(network, bounds=(0, 1), device=image.device)
    found, _, _ = made(lent, image, foolbox.criteria.Misclassification(label), epsilons=None)
    # foolbox's own bounds hold up to rounding.
    changed: Tensor = found.detach().clamp(0, 1)
    # The smallest change ends at the boundary, where rounding decides: step over it.
    with torch.no_grad():
        for excess in (1e-4, 1e-3, 1e-2):
            right = network(changed).argmax(dim=1) == label
            further = (image + (1 + excess) * (found.detach() - image)).clamp(0, 1)
            changed = torch.where(right.view(-1, *[1] * (image.dim() - 1)), further, changed)
    return changed
