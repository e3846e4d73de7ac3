"""Train the runs of a front, and keep what they found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cure.attacks.registry import check_attacks
from cure.config import NATURAL, checked_words
from cure.errors import ConfigError, TrainingStopped, counted
from cure.experiments.executors import LocalExecutor
from cure.experiments.front.curves import Curve, Values, curves_of, plan_of
from cure.experiments.front.picture import write_picture
from cure.experiments.front.record import FORMAT, record_of
from cure.experiments.pareto import Point, check_reference
from cure.experiments.plan import Plan, entries
from cure.experiments.plan_work import carry_out_plan, pack, results_of, to_do
from cure.recipe import parse_override
from cure.runs.results import FrontRecord
from cure.utils.io import read_json, user_path

Say = Callable[[str], None]


def front(
    methods: str | Sequence[str],
    recipe: str | Path,
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    values: Values | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int | Sequence[int] = (0,),
    attacks: str | Sequence[str] = ("pgd20",),
    split: Any = "test",
    limit: int | None = None,
    reference: Point = (0.0, 0.0),
    at: Sequence[float] | None = None,
    folder: str | Path | None = None,
    output: str | Path | None = None,
    jobs: int = 1,
    say: Say = lambda line: None,  # noqa: ARG005
) -> FrontRecord:
    """Train methods with several values of their trade-off setting, and compare their fronts.

    What is done in ``folder`` is not done again, so the same call continues after a kill.  On
    another machine the folder's ``records.jsonl`` is enough; only runs that others learn from or
    begin with are trained again.

    Each run has a process of its own, which imports the calling script: keep the call in it under
    ``if __name__ == "__main__":``.

    Args:
        methods: names from ``cure list methods``.
        recipe: a name, or the path of a YAML file.
        settings: changes to it for all runs; ``{seed}`` in a text is the run's seed, as in
            ``start=runs/natural-seed{seed}``.  With ``start: natural`` the natural start of a seed
            is trained once for all its runs.
        values: by method, values in the place of those that the method declares
            (:attr:`cure.methods.Method.tradeoff`); under ``METHOD:KEY``, of another setting.
        own: by method, settings for it alone; ``run:ROW`` is the run of another row.
        seeds: of the runs.
        attacks: what is measured; the first gives the robust accuracy of the front.
        split: which images, "validation" or "test".
        limit: only the first so many of them.
        reference: natural and robust accuracy from which the hypervolume counts.
        at: robust accuracies in percent at which natural accuracies are compared; by default the
            middle of what all methods reach.
        folder: of runs and results; by default ``fronts/NAME`` with the recipe's name.
        output: JSON file to write, with a picture (.svg, .png) beside it; by default
            ``front.json`` in ``folder``.
        jobs: runs at a time.
        say: receives a line about each run.

    Returns:
        All rows, the points over seeds, hypervolumes and comparisons.

    Raises:
        CureError: for a mistake a user can correct, and when runs failed (what is done is written).

    >>> import cure
    >>> small = ["start=scratch", "training.epochs=1", "data.limit=100", "data.validation=20"]
    >>> values = {"at": [0, 0.5]}
    >>> found = cure.front("at", "digits", small, values=values, limit=20, folder="front")
    >>> [point.value for point in found.points]
    [0, 0.5]
    """
    check_reference(reference)
    if outside := [level for level in at or () if not 0 <= level <= 100]:
        raise ConfigError(f"at: expected accuracies from 0 to 100 percent, got {outside[0]:g}")
    attacks = checked_words("attacks", attacks)
    check_attacks(attacks)
    if not attacks or attacks[0] == NATURAL:
        raise ConfigError("attacks: expected one attack or more besides natural, such as pgd20")
    if not isinstance(settings, Mapping):
        settings = dict(map(parse_override, settings))
    curves = curves_of(checked_words("methods", methods), values or {})
    of = (seeds,) if isinstance(seeds, int) else seeds
    plan = plan_of(curves, recipe, settings, own or {}, of, attacks, split, limit, folder)
    place = Path(plan.runs).parent
    file = place / "front.json" if output is None else user_path(output)
    _check_output(file)
    _announce(plan, curves, place, say)
    place.mkdir(parents=True, exist_ok=True)

    def write() -> FrontRecord | None:
        done = results_of(plan, place)
        made = record_of(plan, curves, done, reference, at, own or {})
        if made is not None:
            pack(done, place)
            file.parent.mkdir(parents=True, exist_ok=True)
            made.write(file)
        return made

    def tell(line: str) -> None:
        say(line)
        if line.endswith(": done"):
            write()

    failures = carry_out_plan(plan, place, LocalExecutor(jobs), tell=tell)
    made = write()
    if made is not None:
        write_picture(made, file)
        say(f"kept in {file}, drawn in {file.with_suffix('.svg').name} and .png beside it")
    if failures or made is None:
        count = counted(len(failures), "run")
        raise TrainingStopped(f"{count} of the front failed: " + "; ".join(failures))
    return made


def _check_output(file: Path) -> None:
    """Refuse to replace a file that is no front, and a name that the picture beside it takes.

    Raises:
        ConfigError: when it is there and something else, or no ``.json`` file.
    """
    if file.suffix.lower() != ".json" or file.is_dir():
        raise ConfigError(f"expected an output file that ends in .json, got {file}; name one")
    if not file.exists():
        return
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{file} exists and is no front of this command; name another file")


def _announce(plan: Plan, curves: Sequence[Curve], place: Path, say: Say) -> None:
    """Say what is trained, and what is done already."""
    for curve in curves:
        if curve.key is None:
            say(f"{curve.label}: no setting trades natural for robust accuracy; trained once")
        else:
            say(f"{curve.label}: {curve.knob} {', '.join(map(str, curve.values))}")
    wanted, left = len(entries(plan)), to_do(plan, place).values()
    epochs = sum(entry.config.training.epochs for entry in left)
    say(
        f"{counted(wanted, 'run')}, {wanted - len(left)} of them done before; "
        f"{counted(epochs, 'epoch')} to train, in {plan.runs}"
    )
