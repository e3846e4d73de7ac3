"""What each part of CURE does: every variant against the paper's form, from one natural start.

    python benchmarks/why_cure.py [--recipe cifar10-mini] [--seeds 0,1,2] [KEY=VALUE ...]

Mask: robust gradient prominence (paper), random, none, strict freeze; consistency with the revision
model on and off; the adversarial loss and the training attack by KL divergence (paper) or
cross-entropy.  Runs and results are in ``--folder``; what is done is skipped, so the script can be
stopped and called again.  The output has a row a run, and for each variant its difference to the
paper's form: the mean over seeds with a bootstrap interval over images (paired: the same images in
all runs) and a Student t interval over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cure.evaluation.metrics import unpack
from cure.experiments.compare.sources import no_place
from cure.experiments.pareto import Estimate, image_weights
from cure.experiments.plan import Measurement, Plan, PlanRow, entries
from cure.experiments.plan_work import results_of
from cure.recipe import parse_override
from cure.runs.results import RunRecord
from cure.utils.environment import environment
from planned import arguments, carry_out, keep

PAPER = "paper"
CE = {"method.adversarial_term": "ce"}
CE_ATTACK = {"attack.objective": "cross_entropy"}
RANDOM = {"method.mask.kind": "random"}
NONE = {"method.mask.kind": "none"}
STRICT = {"method.mask.strict_freeze": True}
OFF = {"method.gamma": 0}

VARIANTS: dict[str, dict[str, Any]] = {
    PAPER: {},
    "random mask": RANDOM,
    "no mask": NONE,
    "strict freeze": STRICT,
    "random mask, strict freeze": RANDOM | STRICT,
    "no revision": OFF,
    "random mask, no revision": RANDOM | OFF,
    "no mask, no revision": NONE | OFF,
    "ce loss": CE,
    "ce attack": CE_ATTACK,
    "ce loss and attack": CE | CE_ATTACK,
    "no mask, ce loss and attack": NONE | CE | CE_ATTACK,
    "no revision, ce loss and attack": OFF | CE | CE_ATTACK,
    "no mask, no revision, ce loss and attack": NONE | OFF | CE | CE_ATTACK,
}
"""What differs from the paper's form; the last is AT with a natural cross-entropy beside."""


def label(variant: str) -> str:
    """Name of the plan's row."""
    return variant.replace(", ", "-").replace(" ", "-")


def plan_of(options: argparse.Namespace) -> Plan:
    """All variants and seeds."""
    chosen = options.variants.split(",") if options.variants else [label(v) for v in VARIANTS]
    natural = {
        "method": "natural",
        "start": "scratch",
        "training.epochs": options.natural_epochs,
        "training.validate_every": 5,
    }
    rows = {"natural": PlanRow(settings=natural)}
    for variant, settings in VARIANTS.items():
        if label(variant) in chosen:
            rows[label(variant)] = PlanRow(settings=settings)
    return Plan(
        name="why-cure",
        recipe=options.recipe,
        runs=str(options.folder / "trained"),
        settings={"start": "run:natural", "training.threads": 1}
        | dict(map(parse_override, options.settings)),
        seeds=tuple(map(int, options.seeds.split(","))),
        evaluations=(Measurement(attacks=("pgd20",), limit=options.limit, per_image=True),),
        rows=rows,
    )


def right(record: RunRecord) -> np.ndarray[Any, Any]:
    """Which images are right, [2, images]: natural and under PGD-20."""
    result = next(found for found in record.evaluations if found.natural.right is not None)
    kinds = (result.natural, result.attacks["pgd20"])
    return np.stack([unpack(str(kind.right), kind.n) for kind in kinds])


def differences(done: dict[str, RunRecord], plan: Plan) -> dict[str, Any]:
    """Each variant minus the paper's form, paired by seed and image, in percentage points."""
    found: dict[str, Any] = {}
    for row in plan.rows:
        pairs = [(f"{row}-seed{seed}", f"{PAPER}-seed{seed}") for seed in plan.seeds]
        pairs = [pair for pair in pairs if row != PAPER and all(name in done for name in pair)]
        if not pairs:
            continue
        change = np.stack(
            [right(done[ours]).astype(float) - right(done[theirs]) for ours, theirs in pairs]
        )
        weights = image_weights(change.shape[-1], 2000)
        found[row] = {"seeds": len(pairs)}
        for place, kind in enumerate(("natural", "pgd20")):
            each = 100 * change[:, place].mean(axis=1)
            made = Estimate.of(each, 100 * weights @ change[:, place].T)
            found[row][kind] = {
                "difference": round(made.mean, 2),
                "images": list(made.images),
                "seeds": None if made.seeds is None else list(made.seeds),
            }
    return found


def write(plan: Plan, folder: Path, output: Path) -> dict[str, Any]:
    """Write the rows and differences that are done."""
    done = results_of(plan, folder)
    rows = []
    for entry in entries(plan):
        if entry.name in done:
            natural, robust = (100 * right(done[entry.name]).mean(axis=1)).round(2).tolist()
            n = right(done[entry.name]).shape[1]
            rows.append(
                {"variant": entry.label, "seed": entry.seed, "natural": natural, "pgd20": robust}
                | {"n": n}
            )
    found = {
        "rows": rows,
        "minus_paper": differences(done, plan),
        "recipe": plan.recipe,
        "settings": no_place(plan.settings),
        "variants": {row: plan.rows[row].settings for row in plan.rows if row != "natural"},
        "environment": environment(),
    }
    keep(output, found)
    return found


def main() -> None:
    """Train, evaluate and compare what is missing."""
    parser = arguments(__doc__, "why_cure", epochs=5)
    parser.add_argument("--variants", help="only these, as the output names them: paper,no-mask")
    options = parser.parse_args()
    options.settings = [f"training.epochs={options.epochs}", *options.settings]
    carry_out(plan_of(options), options, write, "minus_paper")


if __name__ == "__main__":
    main()
