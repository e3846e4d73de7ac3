"""Do our attacks decide as those of other libraries do?  The same images, one after the other.

    python results/agreement.py RUN [RUN ...] [--images 500] [--output results/agreement.json]

Counts, for each attack, how many images withstand ours and theirs, and on how many the verdicts
differ.  Without a random start the same steps are asked of both; with one, each draws its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eagerpy
import foolbox
import torch
import torchattacks
from foolbox.attacks import LinfProjectedGradientDescentAttack
from pyautoattack import AutoAttack
from torch import Tensor, nn

import cure
from cure.attacks import Threat
from cure.attacks.registry import evaluation_attack
from cure.data import batches
from cure.evaluation.target import Target
from cure.utils.engine import Engine
from cure.utils.environment import environment

EPSILON = 8 / 255
Fools = Callable[[nn.Module, Tensor, Tensor], Tensor]


class FoolboxMargin(LinfProjectedGradientDescentAttack):
    """foolbox's PGD on the C&W margin with confidence 50."""

    def get_loss_fn(self, model: Any, labels: Any) -> Any:
        """The sum of the margins of a batch."""

        def loss(inputs: Any) -> Any:
            logits = model(inputs)
            rows = range(logits.shape[0])
            own = logits[rows, labels]
            others = logits - eagerpy.onehot_like(logits, labels, value=eagerpy.inf)
            return -(own - others.max(axis=-1) + 50).maximum(0).sum()

        return loss


def ours(name: str) -> Fools:
    """Adversarial images by an attack of ours."""

    def run(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        attack = evaluation_attack(name)
        changed = image
        for part in attack.parts.values():
            changed = part.run(model, image, label, Threat("Linf", EPSILON), 0, 0)
        return changed

    return run


def of_foolbox(kind: type, start: bool) -> Fools:
    """By foolbox: 20 steps of epsilon / 4."""

    def run(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        made = kind(rel_stepsize=0.25, steps=20, random_start=start)
        lent = foolbox.PyTorchModel(model, bounds=(0, 1))
        _, clipped, _ = made(lent, image, label, epsilons=EPSILON)
        return clipped

    return run


def of_torchattacks(start: bool) -> Fools:
    """By torchattacks: 20 steps of epsilon / 4."""

    def run(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        made = torchattacks.PGD(model, EPSILON, EPSILON / 4, 20, random_start=start)
        return made(image, label)

    return run


def of_pyautoattack(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """APGD on cross-entropy by its package."""
    suite = AutoAttack(model, eps=EPSILON, seed=0, version="custom", attacks=["apgd-ce"])
    suite.apgd.n_restarts = 1
    found, _ = suite.run_standard_evaluation(image, label, batch_size=len(image))
    return found


PAIRS: list[tuple[str, str, Fools, Fools]] = [
    (
        "PGD-20, no start",
        "foolbox",
        ours("pgd20:start=none"),
        of_foolbox(LinfProjectedGradientDescentAttack, False),
    ),
    ("PGD-20, no start", "torchattacks", ours("pgd20:start=none"), of_torchattacks(False)),
    ("C&W margin, no start", "foolbox", ours("cw:start=none"), of_foolbox(FoolboxMargin, False)),
    ("PGD-20", "foolbox", ours("pgd20"), of_foolbox(LinfProjectedGradientDescentAttack, True)),
    ("PGD-20", "torchattacks", ours("pgd20"), of_torchattacks(True)),
    ("C&W margin", "foolbox", ours("cw"), of_foolbox(FoolboxMargin, True)),
    ("APGD-CE", "pyautoattack", ours("apgd-ce"), of_pyautoattack),
]


def compared(run: str, count: int) -> dict[str, Any]:
    """Verdicts on the first ``count`` test images."""
    target = Target.of(run, limit=count)
    images, model = target.load()
    # One layout for all: rounding differs between layouts.
    model = Engine(torch.device("cpu")).place(model).eval().requires_grad_(False)
    whole = next(batches(images, len(images)))
    with torch.no_grad():
        right = model(whole.image).argmax(dim=1) == whole.label
    image, label = whole.image[right], whole.label[right]
    rows = []
    for attack, library, first, second in PAIRS:
        stands = []
        for fools in (first, second):
            torch.manual_seed(0)
            changed = fools(model, image, label).detach()
            assert float((changed - image).abs().max()) <= EPSILON * (1 + 1e-4)
            with torch.no_grad():
                stands.append(model(changed).argmax(dim=1) == label)
        rows.append(
            {
                "attack": attack,
                "library": library,
                "ours": int(stands[0].sum()),
                "theirs": int(stands[1].sum()),
                "differ": int((stands[0] != stands[1]).sum()),
            }
        )
        print(target.name, rows[-1], flush=True)
    return {"run": target.name, "n": count, "natural": int(right.sum()), "rows": rows}


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {
        "format": "cure-agreement-1",
        "epsilon": "8/255",
        "versions": {
            "foolbox": foolbox.__version__,
            "torchattacks": torchattacks.__version__,
            "cure": cure.__version__,
        },
        "models": [compared(run, options.images) for run in options.runs],
        "environment": environment(),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
