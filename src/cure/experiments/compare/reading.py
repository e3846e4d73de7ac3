"""From the files that runs, evaluations and plans leave behind to one flat row a run."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from cure.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from cure.runs.run import Run

Row = dict[str, Any]

FORMAT = "cure-comparison-1"
RUN_FORMAT = "cure-run-1"
"""The record that a plan keeps of a run: settings, evaluations and times in one file."""
USUAL = ("pgd20", "cw", "autoattack")
"""Attacks that every row has a place for, measured or not."""
RATIOS = ("cw", "autoattack")
COSTS = ("seconds_per_epoch", "processor_seconds_per_epoch", "peak_memory_mib")
SETTINGS = ("epochs", "parameters")
IMAGES = ("data", "split", "size", "norm", "epsilon")
"""What two evaluations must share to be set side by side, besides the number of images."""
WHO = ("run", "label", "method", "seed", "network", "epochs", "epoch", "checkpoint", "n")
NESTED = ("attack_settings", "settings", "configuration", "environment")
SUFFIXES = (".md", ".csv", ".json")

# Settings that say where and how closely a run was watched, not what it learnt.
_OUTSIDE = {
    *("name", "description", "seed", "method", "evaluation", "tracking", "training.device"),
    *("training.threads", "training.tensorboard", "training.deterministic"),
    *("training.channels_last", "training.checkpoint_every", "training.collapse_patience"),
}


# Reading.


@dataclass
class Source:
    """What is known of one run.

    Attributes:
        name: in the table.
        typed: as the user named it, for messages.
        results: of ``cure evaluate``, oldest first.
        config: its settings; None where only results are known.
        timing: seconds and memory of each epoch.
        environment: where it was trained, or where it was evaluated when that is not known.
        finished: whether it was trained to its end, where known.
        label: of the row, where a plan gives it one.
    """

    name: str
    typed: str
    results: list[dict[str, Any]]
    config: dict[str, Any] | None = None
    timing: Sequence[dict[str, Any]] = ()
    environment: Mapping[str, Any] | None = None
    finished: bool | None = None
    label: str | None = None

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the row is about: the best where it was evaluated."""
        kinds = {result["model"].get("checkpoint") for result in self.results}
        return next((kind for kind in ("best", "last") if kind in kinds), None)

    def of(self, checkpoint: str | None, images: tuple[Any, ...]) -> list[dict[str, Any]]:
        """Results of one checkpoint on one kind of images, oldest first."""
        return [
            result
            for result in self.results
            if result["model"].get("checkpoint") == checkpoint and images_of(result) == images
        ]


def read_rows(runs: Iterable[str | Path | Run], split: str | None = None) -> list[Row]:
    """One row a run; see :func:`compare`.

    Raises:
        CureError: when one cannot be read, was not evaluated, or not like the others.
    """
    sources: list[Source] = []
    rows: list[Row] = []
    loose: list[tuple[str, dict[str, Any]]] = []
    seen: set[Path] = set()
    for run in runs:
        path = Path(run if isinstance(run, str | Path) else run.path)
        if path.resolve() in seen:
            raise ConfigError(f"{path} is named twice; a run counts once: name it once")
        seen.add(path.resolve())
        if path.is_file():
            content = read_json(path)
            if content.get("format") == FORMAT:
                rows += _checked_rows(content.get("rows"), path)
            elif content.get("format") == RUN_FORMAT:
                sources.append(read_record(content, path))
            else:
                loose.append((str(path), checked_result(content, path)))
        else:
            sources.append(_read_folder(path))
    sources += _merged(loose)
    if not sources and not rows:
        raise ConfigError("expected one or more runs, got none; name the folders of evaluated runs")
    if split is not None:
        sources, rows = _only(sources, rows, split)
    rows = rows_of(sources, rows)
    check_alike(rows)
    return rows


def rows_of(sources: Sequence[Source], rows: Sequence[Row] = ()) -> list[Row]:
    """One row a source, all about the images that most share; then ``rows`` as they are.

    Whether they compare is another question: :func:`check_alike`, :func:`alike`.

    Args:
        sources: one or more, each with results.
        rows: of an earlier table.
    """
    rank = _rank(list(sources), list(rows))
    return _labelled(_filled([*(_row(source, rank) for source in sources), *rows]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when it holds another kind of JSON.

    Raises:
        CheckpointError: when it is no JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); name a run folder or a result of "
            "`cure evaluate --output`"
        ) from None
    return content if isinstance(content, dict) else {}


def checked_result(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result, once everything that a row takes from it was found in it."""
    try:
        for name, part in {"natural": content["natural"], **content["attacks"]}.items():
            low, high = part["interval"]
            for number in (part["accuracy"], part["n"], low, high):
                _need(isinstance(number, int | float))
            _need(name == "natural" or isinstance(part["settings"], dict))
        for section in ("model", "nrr", "environment", "threat"):
            _need(isinstance(content[section], dict))
        for text in (content["target"], content["threat"]["epsilon_text"], time_of(content)):
            _need(isinstance(text, str))
        images_of(content)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(
            f"expected a run folder or a result of `cure evaluate --output`, got {path}, which "
            "lacks parts of a result; evaluate the run again"
        ) from None
    return content


def _need(true: bool) -> None:
    if not true:
        raise ValueError


def time_of(result: Mapping[str, Any]) -> str:
    """When it was measured, so that the newest is the last in alphabetical order."""
    time: str = result["environment"]["time"]
    return time


def _checked_rows(rows: object, path: Path) -> list[Row]:
    needed = {*WHO, *IMAGES, "natural", "attack_settings", "configuration", "environment"}
    records: list[Row] = rows if isinstance(rows, list) else []
    if not records or not all(isinstance(row, dict) and needed <= row.keys() for row in records):
        raise CheckpointError(
            f"expected the rows of a table of `cure compare` in {path}, but parts of them are "
            "missing; write the table again"
        )
    return records


def _read_folder(path: Path) -> Source:
    """A run and all its evaluations."""
    config_file = path / "config.yaml"
    if not config_file.is_file():
        what = "holds no run (no config.yaml)" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; name the folder that `cure train` printed, or a result of "
            "`cure evaluate --output`"
        )
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    config = checked_config(config, config_file)
    files = sorted((path / "evaluations").glob("*.json"), key=number_of)
    results = [checked_result(read_json(file), file) for file in files]
    if not results:
        raise CheckpointError(f"{path} was not evaluated yet; do so with `cure evaluate {path}`")
    results.sort(key=time_of)
    results = current(results)
    environment, status = path / "environment.json", path / "status.json"
    place = path.resolve()
    inside = (place.parent / "config.yaml").is_file()
    return Source(
        # All natural starts are in folders called "natural".
        name=f"{place.parent.name}/{place.name}" if inside else place.name,
        typed=str(path),
        results=results,
        config=config,
        timing=read_lines(path / "timing.jsonl"),
        environment=read_json(environment) if environment.is_file() else None,
        finished=read_json(status).get("state") == "finished" if status.is_file() else None,
    )


def read_record(content: dict[str, Any], path: Path) -> Source:
    """A run as a plan keeps it when its folder may be gone."""
    config = checked_config(content.get("config"), path)
    evaluations, timing = content.get("evaluations"), content.get("timing")
    if not evaluations or not isinstance(evaluations, list) or not isinstance(timing, list):
        raise CheckpointError(
            f"{path} holds no evaluation of its run; move it away and do that run of the plan again"
        )
    results = sorted((checked_result(result, path) for result in evaluations), key=time_of)
    return Source(
        name=path.stem,
        typed=str(path),
        results=current(results),
        config=config,
        timing=timing,
        environment=content.get("environment"),
        finished=True,
        label=str(content["label"]) if content.get("label") else None,
    )


def checked_config(config: Any, path: Path) -> dict[str, Any]:
    """The settings, once those that rows are made from were found in them.

    Raises:
        CheckpointError: when one is missing.
    """
    try:
        for section, key in (("method", "name"), ("training", "epochs"), ("threat", "epsilon")):
            _need(config[section][key] is not None)
        _need(isinstance(config["seed"], int))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} holds no whole configuration; restore it from a copy"
        ) from None
    return dict(config)


def current(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of a checkpoint that was replaced when the run went on."""
    now = {r["model"].get("checkpoint"): r["model"].get("epoch") for r in results}
    return [r for r in results if r["model"].get("epoch") == now[r["model"].get("checkpoint")]]


def number_of(file: Path) -> int:
    """The number at the end of the name of an evaluation: a later one has a larger number."""
    last = file.stem.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON; none when there is no file."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # The run was killed while it wrote this line.
    return records


def _merged(loose: list[tuple[str, dict[str, Any]]]) -> list[Source]:
    """Result files by the run they say they are of.

    Raises:
        ConfigError: when two that name the same run cannot be of the same network.
    """
    sources: dict[tuple[Any, ...], Source] = {}
    seen: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for typed, result in loose:
        facts = result["model"]
        keys = ("method", "recipe", "run_seed", "weights", "name", "parameters")
        identity = (result["target"], *(facts.get(key) for key in keys))
        source = sources.setdefault(identity, Source(no_place(result["target"]), typed, []))
        source.results.append(result)
        part = result["natural"]
        for key, value in (
            (("epoch",), facts.get("epoch")),
            (("natural accuracy", part["n"], images_of(result)), part["accuracy"]),
        ):
            place = (identity, facts.get("checkpoint"), *key)
            other, there = seen.setdefault(place, (typed, value))
            if there != value:
                raise ConfigError(
                    f"{other} and {typed} both are results of '{source.name}', but {key[0]} is "
                    f"{there} in one and {value} in the other, so they are of two runs; name the "
                    "run folders in their place"
                )
    for source in sources.values():
        source.results.sort(key=time_of)
    return list(sources.values())


def images_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values of ``IMAGES`` in a result or in a row."""
    if "attack_settings" in record:
        return tuple(record[name] for name in IMAGES)
    data, threat = record["data"], record["threat"]
    size = "x".join(map(str, data["size"]))
    return no_place(data["name"]), data["split"], size, threat["norm"], float(threat["epsilon"])


def _only(sources: list[Source], rows: list[Row], split: str) -> tuple[list[Source], list[Row]]:
    """The evaluations of one split."""
    for source in sources:
        source.results = [r for r in source.results if r["data"]["split"] == split]
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
    return sources, rows


def _rank(sources: list[Source], rows: list[Row]) -> Callable[[tuple[Any, ...]], Any]:
    """How much rather one kind of images is compared than another.

    Those that all were evaluated on, then test images, then the threat that the runs were trained
    for, then the most images, then the latest.
    """
    evaluated: list[dict[tuple[Any, ...], tuple[int, str]]] = []
    for source in sources:
        best: dict[tuple[Any, ...], tuple[int, str]] = {}
        for result in source.results:
            if result["model"].get("checkpoint") == source.checkpoint:
                latest = (int(result["natural"]["n"]), time_of(result))
                best[images_of(result)] = max(best.get(images_of(result), (0, "")), latest)
        evaluated.append(best)
    evaluated += [{images_of(row): (row["n"], "")} for row in rows]
    trained = [_threat(source.config) for source in sources if source.config is not None]

    def rank(images: tuple[Any, ...]) -> tuple[Any, ...]:
        having = [best[images] for best in evaluated if images in best]
        return (len(having), images[1] == "test", trained.count(images[3:]), min(having))

    return rank


def _threat(config: Mapping[str, Any]) -> tuple[str, float] | None:
    try:
        return config["threat"]["norm"], float(Fraction(str(config["threat"]["epsilon"])))
    except (ValueError, ZeroDivisionError):
        return None


# One row.


def _row(source: Source, rank: Callable[[tuple[Any, ...]], Any]) -> Row:
    """The flat record of one run."""
    checkpoint = source.checkpoint
    main = [r for r in source.results if r["model"].get("checkpoint") == checkpoint]
    images = max({images_of(result) for result in main}, key=lambda images: (rank(images), images))
    main = source.of(checkpoint, images)
    whole = _largest(main)
    facts, config = whole["model"], source.config
    last = source.of("last", images) if checkpoint == "best" else []
    if checkpoint == "best" and config and facts.get("epoch") == config["training"]["epochs"]:
        # The best epoch is the last one: these are the same weights, whether measured twice or not.
        last = main + last
    row: Row = {
        "run": source.name,
        "method": config["method"]["name"] if config else facts.get("method"),
        "label": "",
        "plan_label": source.label,
        "seed": config["seed"] if config else facts.get("run_seed"),
        "network": no_place(facts.get("name")),
        "parameters": facts.get("parameters"),
        "weights": facts.get("weights"),
        "recipe": facts.get("recipe"),
        "epochs": config["training"]["epochs"] if config else None,
        "epoch": facts.get("epoch"),
        "checkpoint": checkpoint,
        "finished": source.finished,
        **dict(zip(IMAGES, images, strict=True)),
        "epsilon_text": whole["threat"]["epsilon_text"],
        "n": whole["natural"]["n"],
        "natural": whole["natural"]["accuracy"],
        "natural_interval": whole["natural"]["interval"],
    }
    attacks = {name for result in main for name in result["attacks"]}
    chosen = {name: _largest([r for r in main if name in r["attacks"]]) for name in attacks}
    for name in sorted(attacks, key=strength):
        part = chosen[name]["attacks"][name]
        row |= {
            name: part["accuracy"],
            f"{name}_interval": part["interval"],
            f"{name}_n": part["n"],
        }
        if name in RATIOS:
            row[f"nrr_{name}"] = chosen[name]["nrr"].get(name)
    for name in ("natural", *sorted(attacks, key=strength)):
        row |= _last(name, row[name], row[f"{name}_n"] if name in chosen else row["n"], last)
    epochs = {name: [t[name] for t in source.timing if t.get(name) is not None] for name in _TIMING}
    for column, (name, summary) in zip(COSTS, _TIMING.items(), strict=True):
        row[column] = summary(epochs[name]) if epochs[name] else None
    row["attack_settings"] = {
        name: chosen[name]["attacks"][name]["settings"] for name in sorted(attacks, key=strength)
    }
    row["settings"] = no_place(config["method"]) if config else None
    row["configuration"] = _configuration(config) if config else None
    known = source.environment or whole["environment"]
    row["environment"] = {name: known.get(name) for name in _ENVIRONMENT}
    return row


_TIMING: dict[str, Callable[[list[float]], float]] = {
    "seconds": statistics.median,
    "processor_seconds": statistics.median,
    "peak_memory_mib": max,
}
_ENVIRONMENT = ("cure", "commit", "python", "packages", "processor", "cores", "threads", "gpu")


def _largest(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result on most images, the newest of several; they come oldest first."""
    return max(reversed(results), key=lambda result: int(result["natural"]["n"]))


def _last(name: str, value: float, count: int, last: list[dict[str, Any]]) -> Row:
    """The same number of the last checkpoint, on as many images, and how far it lies below."""
    parts = [r["natural"] if name == "natural" else r["attacks"].get(name) for r in last]
    part = next((p for p in reversed(parts) if p is not None and p["n"] == count), None)
    if part is None:
        return {f"last_{name}": None, f"best_minus_last_{name}": None}
    return {
        f"last_{name}": part["accuracy"],
        f"last_{name}_interval": part["interval"],
        f"best_minus_last_{name}": value - part["accuracy"],
    }


def strength(attack: str) -> tuple[int, int, str]:
    """Order of attacks in a table: PGD by its steps, others, C&W, AutoAttack."""
    steps = re.fullmatch(r"pgd(\d+)", attack)
    place = {"cw": 2, "autoattack": 3}.get(attack, 1)
    return (0, int(steps[1]), "") if steps else (place, 0, attack)


def attacks_of(rows: Iterable[Row]) -> list[str]:
    """Every attack that a row has, and the usual ones."""
    return sorted(
        {*USUAL, *(name for row in rows for name in row["attack_settings"])}, key=strength
    )


def _filled(rows: list[Row]) -> list[Row]:
    """The same rows, all with the same keys in the same order; what is missing is None."""
    attacks = attacks_of(rows)
    columns: list[str] = []
    for name in ("natural", *attacks):
        columns += [name, f"{name}_interval"] + [f"{name}_n"] * (name != "natural")
    columns += [f"nrr_{name}" for name in RATIOS]
    for name in ("natural", *attacks):
        columns += [f"last_{name}", f"last_{name}_interval", f"best_minus_last_{name}"]
    columns += COSTS
    single = [name for name in rows[0] if name not in {*columns, *NESTED}]
    return [{name: row.get(name) for name in (*single, *columns, *NESTED)} for row in rows]


def no_place(value: Any) -> Any:
    """The same value, with every path that says where on a machine cut to its last part."""
    if isinstance(value, Mapping):
        return {key: no_place(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [no_place(inner) for inner in value]
    if not isinstance(value, str):
        return value
    prefix, colon, rest = value.rpartition(":")
    return prefix + colon + PurePath(rest).name if rest.startswith(("/", "~", "..")) else value


def flattened(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; those that are not set are left out."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the run is besides its method, by dotted name."""
    flat = flattened({key: value for key, value in config.items() if key not in _OUTSIDE})
    flat = {key: no_place(value) for key, value in flat.items() if key not in _OUTSIDE}
    if "start" in flat:
        flat["start"] = _origin(str(flat["start"]))
    if "data.source" in flat:
        flat["data.source"] = PurePath(str(flat["data.source"])).name
    return flat


def _origin(start: str) -> str:
    # Each seed starts from a run of its own, so the path is no setting that tells groups apart.
    return start if start in {"natural", "scratch", "model"} else "checkpoint"


# Labels: runs of one label differ in nothing but their seed.


def _labelled(rows: list[Row]) -> list[Row]:
    """The same rows with ``label``: a plan's, or the method; and what differs between its runs."""
    labels = [_plain_label(row) for row in rows]
    for plain in dict.fromkeys(labels):
        alike = [row for row, label in zip(rows, labels, strict=True) if label == plain]
        differing = _differing(alike)
        for row in alike:
            facts = _facts(row)
            words = [
                f"{key.removeprefix('method.')}={_value(facts[key])}"
                for key in differing
                if key in facts
            ]
            row["label"] = f"{plain} ({', '.join(words)})" if words else plain
    return rows


def _plain_label(row: Row) -> str:
    if row.get("plan_label"):
        return str(row["plan_label"])
    if row["method"] is None:
        return f"{row['run']} ({row['weights']})" if row.get("weights") else str(row["run"])
    known = row["configuration"] or {}
    label = str(row["method"])
    if any(key.startswith("training.weight_perturbation.") for key in known):
        label += " + awp"
    kind = known.get("training.averaging.kind")
    return label if kind is None else f"{label} + {'swa' if kind == 'equal' else 'ema'}"


def _facts(row: Row) -> dict[str, Any]:
    """All that tells two runs of one method apart, but for the seed."""
    facts: dict[str, Any] = {"network": row["network"], "recipe": row["recipe"]}
    if row["configuration"] is None:
        return facts | {"parameters": row["parameters"]}
    for key, value in flattened(row["settings"] or {}, "method.").items():
        if not key.endswith(".seed"):
            facts[key] = _origin(str(value)) if key.endswith(".path") else value
    facts.update(row["configuration"])
    return facts


def _differing(rows: list[Row]) -> list[str]:
    """Names of the facts that are not the same in all these runs, sorted."""
    every = [_facts(row) for row in rows]
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


# Like against like.


def check_alike(rows: Sequence[Row]) -> None:
    """Refuse rows whose numbers do not compare.

    Raises:
        ConfigError: names the first two that differ, and in what.
    """
    for row in rows:
        first = rows[0]
        differing = [(name, first[name], row[name]) for name in IMAGES if first[name] != row[name]]
        if first["n"] != row["n"]:
            differing.append(("number of images", first["n"], row["n"]))
        refuse_unlike(first, row, differing)
    having = [row for row in rows if row["checkpoint"] is not None]
    for row in having:
        ours, theirs = having[0]["checkpoint"], row["checkpoint"]
        refuse_unlike(having[0], row, [("checkpoint", ours, theirs)] if ours != theirs else [])
    for attack in attacks_of(rows):
        having = [row for row in rows if attack in row["attack_settings"]]
        for row in having:
            ours, theirs = having[0]["attack_settings"][attack], row["attack_settings"][attack]
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            differing = [(f"{attack} {name}", ours.get(name), theirs.get(name)) for name in names]
            # AutoAttack is slow: it may be run on fewer images, which the table then says.
            if attack != "autoattack" and having[0][f"{attack}_n"] != row[f"{attack}_n"]:
                differing.append((f"{attack} images", having[0][f"{attack}_n"], row[f"{attack}_n"]))
            refuse_unlike(having[0], row, differing)


def alike(rows: Iterable[Row]) -> list[list[Row]]:
    """The same rows in groups that compare, each row with the first group it is like."""
    groups: list[list[Row]] = []
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


def refuse_unlike(first: Row, second: Row, differing: list[tuple[str, Any, Any]]) -> None:
    """Refuse two rows that differ in (what, first's, second's); none are alike."""
    if not differing:
        return
    words = ", ".join(f"{name} {ours} against {theirs}" for name, ours, theirs in differing)
    raise ConfigError(
        f"{first['run']} and {second['run']} were not evaluated alike: {words}; evaluate both in "
        "the same way with `cure evaluate`"
    )
