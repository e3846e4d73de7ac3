"""From runs and result files to one flat row a run, and which rows may be compared."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from cure.config import NATURAL, NATURAL_FROM, ROBUST, Ratio, defaults
from cure.errors import CheckpointError, ConfigError
from cure.experiments.compare.sources import (
    IMAGES,
    Images,
    Source,
    images_of,
    no_place,
)
from cure.registry import METHODS, PLUGINS
from cure.runs.folder import paths_of
from cure.runs.packed import costs_of, merged, read_packed
from cure.runs.results import Accuracy, EvaluationRecord, RunRecord, oldest_first
from cure.utils.io import read_json
from cure.utils.stats import is_unequal

if TYPE_CHECKING:
    from cure.runs.run import Run

TableRow = dict[str, Any]
"""One run: flat values by name, as documented in docs/compare.md."""

COMPARISON_FORMAT = "cure-comparison-1"
USUAL = ("pgd20", "cw", "autoattack")
"""Attacks that every row has a place for, measured or not."""
RATIOS = ("cw", "autoattack")
SETTINGS = ("epochs", "parameters")
WHO = ("run", "label", "method", "seed", "network", "epochs", "epoch", "checkpoint", "n")
NESTED = ("attack_settings", "settings", "configuration", "environment")
BY_CLASS = "class_counts"
"""Images of each class, by name; as many values as there are classes, so not in CSV."""

# Columns of a row, and the names of these costs in the lines of timing.
_COSTS: Mapping[str, str] = {
    "seconds_per_epoch": "seconds",
    "processor_seconds_per_epoch": "processor_seconds",
    "peak_memory_mib": "peak_memory_mib",
}
COSTS = tuple(_COSTS)
_ENVIRONMENT = ("cure", "commit", "python", "packages", "processor", "cores", "threads", "gpu")

# Settings that say where and how closely a run was watched, not what it learnt.
_OUTSIDE = {
    *("name", "description", "seed", "method", "evaluation", "tracking", "training.device"),
    *("training.threads", "training.tensorboard", "training.deterministic"),
    *("training.channels_last", "training.checkpoint_every", "training.collapse_patience"),
}


# Reading.


def read_rows(runs: Iterable[str | Path | Run], split: str | None = None) -> list[TableRow]:
    """One row a run; see :func:`~cure.experiments.compare.compare`.

    Raises:
        CureError: when one cannot be read, was not evaluated, or not like the others.
    """
    sources: list[Source] = []
    rows: list[TableRow] = []
    loose: list[tuple[str, EvaluationRecord]] = []
    for path in paths_of(runs):
        if not path.is_file():
            sources.append(Source.of_folder(path))
            continue
        if path.suffix == ".jsonl":
            records = read_packed(path).items()
            sources += [Source.of_record(record, name, str(path)) for name, record in records]
            continue
        content = read_json(path)
        kind = content.get("format") if isinstance(content, dict) else None
        if kind == COMPARISON_FORMAT:
            rows += _checked_rows(content.get("rows"), path)
        elif kind == "cure-run-1":
            record = RunRecord.parse(content, path)
            sources.append(Source.of_record(record, path.stem, str(path)))
        else:
            loose.append((str(path), EvaluationRecord.parse(content, path)))
    sources += _merged(loose)
    if not sources and not rows:
        raise ConfigError("expected one or more runs, got none; name the folders of evaluated runs")
    if split is not None:
        _keep_split(sources, rows, split)
    rows = rows_of(sources, rows)
    check_alike(rows)
    return rows


def _checked_rows(rows: object, path: Path) -> list[TableRow]:
    needed = {*WHO, *IMAGES, *NESTED, "natural"}
    found: list[TableRow] = rows if isinstance(rows, list) else []
    if not found or not all(isinstance(row, dict) and needed <= row.keys() for row in found):
        raise CheckpointError(
            f"expected the rows of a table of `cure compare` in {path}, but parts of them are "
            "missing; write the table again"
        )
    return found


def _merged(loose: list[tuple[str, EvaluationRecord]]) -> list[Source]:
    """Result files by the run they say they are of.

    Raises:
        ConfigError: when two that name the same run cannot be of the same network.
    """
    sources: dict[Images, Source] = {}
    seen: dict[Images, tuple[str, Any]] = {}
    for typed, result in loose:
        facts, natural = result.model, result.natural
        identity = (
            *(result.target, facts.method, facts.recipe, facts.run_seed),
            *(facts.weights, facts.name, facts.parameters),
        )
        source = sources.setdefault(identity, Source(no_place(result.target), typed, []))
        source.results.append(result)
        for key, value in (
            (("epoch",), facts.epoch),
            (("natural accuracy", natural.n, images_of(result)), natural.accuracy),
        ):
            other, there = seen.setdefault((identity, facts.checkpoint, *key), (typed, value))
            if there != value:
                raise ConfigError(
                    f"{other} and {typed} both are results of '{source.name}', but {key[0]} is "
                    f"{there} in one and {value} in the other, so they are of two runs; name the "
                    "run folders in their place"
                )
    for source in sources.values():
        source.results = oldest_first(source.results)
    return list(sources.values())


def _keep_split(sources: list[Source], rows: list[TableRow], split: str) -> None:
    """Leave only evaluations of one split."""
    for source in sources:
        source.results = [result for result in source.results if result.data.split == split]
        if not source.results:
            raise ConfigError(
                f"{source.typed} was not evaluated on the {split} split; do so with `cure "
                f"evaluate {source.typed} --split {split}`"
            )
    other = next((row for row in rows if row["split"] != split), None)
    if other is not None:
        raise ConfigError(
            f"expected evaluations on the {split} split, but the table has {other['run']} on "
            f"{other['split']}; name its run folder"
        )


# Rows.


def rows_of(sources: Sequence[Source], rows: Sequence[TableRow] = ()) -> list[TableRow]:
    """One row a source, all about the images that most share; then ``rows`` as they are.

    Whether they may be compared is another question: :func:`check_alike`, :func:`alike`.

    Args:
        sources: one or more, each with results.
        rows: of an earlier table.
    """
    rank = _rank(sources, rows)
    return _labelled(_filled([*(_row(source, rank) for source in sources), *rows]))


def _rank(sources: Sequence[Source], rows: Sequence[TableRow]) -> Callable[[Images], Any]:
    """Preference of one kind of images over another.

    Those that all were evaluated on, then test images, then the threat that the runs were trained
    for, then images that the runs themselves name, then the most images, then the latest.
    """
    evaluated: list[dict[Images, tuple[bool, int, str]]] = []
    for source in sources:
        best: dict[Images, tuple[bool, int, str]] = {}
        for result in source.of(source.checkpoint):
            own, images = result.data.own is not False, images_of(result)
            latest = (own, result.natural.n, result.time)
            best[images] = max(best.get(images, latest), latest)
        evaluated.append(best)
    evaluated += [{tuple(row[name] for name in IMAGES): (True, row["n"], "")} for row in rows]
    trained = [_threat(source.config) for source in sources if source.config is not None]

    def rank(images: Images) -> Any:
        having = [best[images] for best in evaluated if images in best]
        return (len(having), images[1] == "test", trained.count(images[3:]), min(having), images)

    return rank


def _threat(config: Mapping[str, Any]) -> Images | None:
    try:
        return config["threat"]["norm"], float(Ratio(config["threat"]["epsilon"]))
    except (KeyError, ValueError):
        return None


def _row(source: Source, rank: Callable[[Images], Any]) -> TableRow:
    """The flat record of one run."""
    checkpoint, config = source.checkpoint, source.config
    images = max({images_of(result) for result in source.of(checkpoint)}, key=rank)
    main = source.of(checkpoint, images)
    whole = _largest(main)
    facts = whole.model
    last = source.of("last", images) if checkpoint == "best" else []
    if checkpoint == "best" and config and facts.epoch == config["training"]["epochs"]:
        # The best epoch is the last one: these are the same weights, whether measured twice or not.
        last = main + last
    attacks = sorted({name for result in main for name in result.attacks}, key=strength)
    chosen = {name: _largest([r for r in main if name in r.attacks]) for name in attacks}
    row: TableRow = {
        "run": source.name,
        "method": config["method"]["name"] if config else facts.method,
        "label": "",
        "plan_label": source.label,
        "mixed": source.mixed,
        "seed": config["seed"] if config else facts.run_seed,
        "network": no_place(facts.name),
        "parameters": facts.parameters,
        "weights": facts.weights,
        "recipe": facts.recipe,
        "epochs": config["training"]["epochs"] if config else None,
        "epoch": facts.epoch,
        "checkpoint": checkpoint,
        "finished": source.finished,
        **dict(zip(IMAGES, images, strict=True)),
        "epsilon_text": whole.threat.epsilon_text,
        "n": whole.natural.n,
        "majority": whole.majority.accuracy if whole.majority is not None else None,
        "unequal": is_unequal(counts) if (counts := whole.data.images_by_class) else None,
        BY_CLASS: dict(zip(whole.data.classes, counts, strict=False)) if counts else None,
        "images_sha256": whole.data.sha256,
    }
    for name in ("natural", *attacks):
        part = whole.natural if name == "natural" else chosen[name].attacks[name]
        row |= {name: part.accuracy, f"{name}_interval": part.interval}
        row |= {
            f"balanced_{name}": part.balanced_accuracy,
            f"balanced_{name}_interval": part.balanced_interval,
        }
        row |= {} if name == "natural" else {f"{name}_n": part.n}
        row |= {f"nrr_{name}": chosen[name].nrr.get(name)} if name in RATIOS else {}
        row |= _last(name, part, last)
    costs = costs_of(source.timing)
    row |= {column: costs.get(key) for column, key in _COSTS.items()}
    row["attack_settings"] = {name: chosen[name].attacks[name].settings for name in attacks}
    row["settings"] = no_place(config["method"]) if config else None
    row["configuration"] = _configuration(config) if config else None
    known = source.environment or whole.environment
    row["environment"] = {name: getattr(known, name) for name in _ENVIRONMENT}
    return row


def _largest(results: list[EvaluationRecord]) -> EvaluationRecord:
    """The result on most images, the newest of several; they come oldest first."""
    return max(reversed(results), key=lambda result: result.natural.n)


def _last(name: str, best: Accuracy, last: list[EvaluationRecord]) -> TableRow:
    """The same number of the last checkpoint, on as many images, and how far it lies below."""
    parts = [r.natural if name == "natural" else r.attacks.get(name) for r in reversed(last)]
    part = next((part for part in parts if part is not None and part.n == best.n), None)
    if part is None:
        return {f"last_{name}": None, f"best_minus_last_{name}": None}
    return {
        f"last_{name}": part.accuracy,
        f"last_{name}_interval": part.interval,
        f"best_minus_last_{name}": best.accuracy - part.accuracy,
    }


_STRENGTH = {
    "noise": 0,
    "transfer": 0,
    "fgsm": 1,
    "pgd": 2,
    "cw": 4,
    "autoattack-rand": 5,
    "screened-ordered": 5,
    "autoattack": 6,
    "screened": 6,
    "autoattack-plus": 7,
}
"""Places of attacks; of others it is 3."""


def strength(attack: str) -> tuple[int, int, str]:
    """Order of attacks from the weakest, PGD by its steps: that of the registry.

    The registry imports PyTorch, so it is asked only where plug-ins may have added an attack.

    >>> sorted(["cw", "pgd20", "autoattack", "fgsm", "pgd100"], key=strength)
    ['fgsm', 'pgd20', 'pgd100', 'cw', 'autoattack']
    """
    if os.environ.get(PLUGINS):
        from cure.attacks.registry import attack_order

        return attack_order(attack)
    base, _, options = attack.partition(":")
    steps = re.fullmatch(r"pgd(\d+)", base)
    place = _STRENGTH.get("pgd" if steps else base, 3)
    return (place, int(steps[1]) if steps and not options else 0, attack)


def attacks_of(rows: Iterable[TableRow]) -> list[str]:
    """Every attack that a row has, and the usual ones."""
    measured = (name for row in rows for name in row["attack_settings"])
    return sorted({*USUAL, *measured}, key=strength)


def _filled(rows: list[TableRow]) -> list[TableRow]:
    """The same rows, all with the same keys in the same order; what is missing is None."""
    names = ("natural", *attacks_of(rows))
    columns: list[str] = []
    for name in names:
        columns += [name, f"{name}_interval"] + [f"{name}_n"] * (name != "natural")
    columns += [f"nrr_{name}" for name in RATIOS]
    for name in names:
        columns += [f"balanced_{name}", f"balanced_{name}_interval"]
    for name in names:
        columns += [f"last_{name}", f"last_{name}_interval", f"best_minus_last_{name}"]
    columns += COSTS
    single = [name for name in rows[0] if name not in {*columns, *NESTED}]
    return [{name: row.get(name) for name in (*single, *columns, *NESTED)} for row in rows]


def flattened(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; those that are not set are left out.

    >>> flattened({"a": {"b": 1, "c": None}, "d": 2})
    {'a.b': 1, 'd': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run besides its method, by dotted name."""
    flat = flattened({key: value for key, value in config.items() if key not in _OUTSIDE})
    flat = {key: no_place(value) for key, value in flat.items() if key not in _OUTSIDE}
    if "start" in flat:
        flat["start"] = _origin(str(flat["start"]))
    if "data.source" in flat:
        flat["data.source"] = PurePath(str(flat["data.source"])).name
    return flat


def _origin(start: str) -> str:
    # Each seed starts from a run of its own, so the path is no setting that tells groups apart.
    prefix = next((p for p in (ROBUST, NATURAL_FROM) if start.startswith(p)), "")
    return start if start in {NATURAL, "scratch", "model"} else f"{prefix}checkpoint"


# Labels: runs of one label differ in nothing but their seed.


def _labelled(rows: list[TableRow]) -> list[TableRow]:
    """The same rows with ``label``: a plan's, or the method; and what differs between its runs."""
    labels = [_plain_label(row) for row in rows]
    for plain in dict.fromkeys(labels):
        alike = [row for row, label in zip(rows, labels, strict=True) if label == plain]
        _fill_methods(alike)
        facts = [_facts(row) for row in alike]
        differing = _differing(alike, facts)
        for row, own in zip(alike, facts, strict=True):
            words = [
                f"{key.removeprefix('method.')}={_value(own[key])}"
                for key in differing
                if key in own
            ]
            row["label"] = f"{plain} ({', '.join(words)})" if words else plain
    return rows


def _fill_methods(rows: list[TableRow]) -> None:
    """Give settings of a method that came with a later version to the runs before it, in place."""
    having = [row for row in rows if row["settings"]]
    if len({(row["method"], *sorted(row["settings"])) for row in having}) <= 1:
        return  # The methods' own defaults are known beside PyTorch only.
    for row in having:
        if row["method"] in METHODS:
            known = defaults(METHODS[row["method"]].Config)
            row["settings"] = merged(known, row["settings"])


def _plain_label(row: TableRow) -> str:
    if row.get("plan_label"):
        return str(row["plan_label"])
    if row["method"] is None:
        return f"{row['run']} ({row['weights']})" if row.get("weights") else str(row["run"])
    known = row["configuration"] or {}
    label = str(row["method"])
    if row.get("mixed"):
        label += f" (mixed {row['mixed']})"
    if any(key.startswith("training.weight_perturbation.") for key in known):
        label += " + awp"
    kind = known.get("training.averaging.kind")
    return label if kind is None else f"{label} + {'swa' if kind == 'equal' else 'ema'}"


def _facts(row: TableRow) -> dict[str, Any]:
    """All that tells two runs of one method apart, but for the seed."""
    facts: dict[str, Any] = {"network": row["network"], "recipe": row["recipe"]}
    if row["configuration"] is None:
        return facts | {"parameters": row["parameters"]}
    for key, value in flattened(row["settings"] or {}, "method.").items():
        if not key.endswith(".seed"):
            facts[key] = _origin(str(value)) if key.endswith(".path") else value
    facts.update(row["configuration"])
    return facts


def _differing(rows: list[TableRow], every: list[dict[str, Any]]) -> list[str]:
    """Names of the facts that are not the same in all these runs, sorted."""
    known = [facts for facts, row in zip(every, rows, strict=True) if row["configuration"]]
    # Where the settings of a run are not known, the name of its recipe has to stand for them.
    shared = [] if len(known) == len(every) else ["network", "recipe", "parameters"]
    names = {n for n in shared if len({repr(f[n]) for f in every if n in f}) > 1}
    every_name = {name for facts in known for name in facts} - {"recipe", "network"}
    names |= {n for n in every_name if len({repr(facts.get(n)) for facts in known}) > 1}
    return sorted(names)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # Shortened only where nothing is lost: two values must not become one label.
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


# Which rows may be compared.


def check_alike(rows: Sequence[TableRow]) -> None:
    """Refuse rows whose numbers do not compare.

    Raises:
        ConfigError: names the first two that differ, and in what.
    """
    for row in rows:
        first = rows[0]
        differing = [(name, first[name], row[name]) for name in IMAGES]
        differing.append(("number of images", first["n"], row["n"]))
        refuse_unlike(first, row, differing)
        # Folders of one name may hold other images; a table of an earlier version does not tell.
        ours, theirs = (one.get(BY_CLASS) or {} for one in (first, row))
        if ours and theirs:
            names = sorted(k for k in ours | theirs if ours.get(k, 0) != theirs.get(k, 0))
            unlike = [(f"images of '{k}'", ours.get(k, 0), theirs.get(k, 0)) for k in names[:3]]
            refuse_unlike(first, row, unlike)
    having = [row for row in rows if row["checkpoint"] is not None]
    for row in having:
        first = having[0]
        refuse_unlike(first, row, [("checkpoint", first["checkpoint"], row["checkpoint"])])
    for attack in attacks_of(rows):
        having = [row for row in rows if attack in row["attack_settings"]]
        for row in having:
            first = having[0]
            ours, theirs = (one["attack_settings"][attack] for one in (first, row))
            settings = {**ours, **theirs}
            differing = [
                (f"{attack} {name}", ours.get(name), theirs.get(name)) for name in settings
            ]
            # AutoAttack is slow: it may be run on fewer images, which the table then says.
            if attack != "autoattack":
                differing.append((f"{attack} images", first[f"{attack}_n"], row[f"{attack}_n"]))
            refuse_unlike(first, row, differing)


def alike(rows: Iterable[TableRow]) -> list[list[TableRow]]:
    """The same rows in groups that compare, each row with the first group it is like."""
    groups: list[list[TableRow]] = []
    for row in rows:
        for group in groups:
            try:
                check_alike([*group, row])
            except ConfigError:
                continue
            group.append(row)
            break
        else:
            groups.append([row])
    return groups


def refuse_unlike(first: TableRow, second: TableRow, facts: list[tuple[str, Any, Any]]) -> None:
    """Refuse two rows when one of the facts (name, first's, second's) differs.

    Raises:
        ConfigError: names all facts that differ.
    """
    differing = [fact for fact in facts if fact[1] != fact[2]]
    if not differing:
        return
    words = ", ".join(f"{name} {ours} against {theirs}" for name, ours, theirs in differing)
    raise ConfigError(
        f"{first['run']} and {second['run']} were not evaluated alike: {words}; evaluate both in "
        "the same way with `cure evaluate`"
    )
