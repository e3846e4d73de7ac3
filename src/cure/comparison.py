"""Runs side by side: one row a run, one line a group of seeds, and only like against like.

Nothing here needs PyTorch: rows are read from the files that runs and evaluations leave behind.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from cure.errors import CheckpointError, ConfigError, unknown

if TYPE_CHECKING:
    from cure.api import Run

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
    *("name", "description", "seed", "method", "evaluation", "training.device"),
    *("training.threads", "training.tensorboard", "training.deterministic"),
    *("training.channels_last", "training.checkpoint_every", "training.collapse_patience"),
}


class Difference(NamedTuple):
    """How far one group of runs lies above another.

    Attributes:
        mean: of the differences a - b over the seeds both have; None without such a seed.
        interval: its 95 % Student t interval over seeds; None for fewer than two seeds.
        n: seeds that both have.
    """

    mean: float | None
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Table:
    """What :func:`compare` returns.

    Attributes:
        rows: one flat record a run, as documented in docs/compare.md.
        groups: one record a label, means over its seeds; in the order of the table.
        columns: what the table shows of them.
        caption: on what images, with what intervals, on what hardware.
        chosen: whether the columns were asked for.
    """

    rows: list[Row]
    groups: list[Row]
    columns: list[str]
    caption: str
    chosen: bool = False

    def header(self) -> list[str]:
        """The heading of each column of the table."""
        return ["model", "n seeds", *(_heading(column, self.rows) for column in self.columns)]

    def cells(self) -> list[list[str]]:
        """The text of the table, a list a group; what is missing is "-"."""
        return [
            [
                group["label"],
                _text(group["n_seeds"], "{:d}"),
                *(_cell(group, column, self.rows) for column in self.columns),
            ]
            for group in self.groups
        ]

    def markdown(self) -> str:
        """A table as GitHub reads it, and the caption."""
        header, *body = (
            [_markdown(text) for text in line] for line in [self.header(), *self.cells()]
        )
        rule = ["---"] + ["---:"] * (len(header) - 1)
        lines = ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]
        return "\n".join([*lines, "", _markdown(self.caption), ""])

    def csv(self) -> str:
        """A line a run; intervals as two columns ``_low`` and ``_high``, missing values empty.

        All that is known of a run, or who it is and the columns that were asked for.
        """
        kept = list(self.rows[0])
        if self.chosen:
            parts = [(name, f"{name}_interval", f"{name}_n") for name in self.columns]
            kept = [*WHO, *(name for part in parts for name in part if name in kept)]
        flat = [_flat_record(row, kept) for row in self.rows]
        names = list(dict.fromkeys(name for record in flat for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def json(self) -> str:
        """Everything: all columns of all rows and groups."""
        content = {
            "format": FORMAT,
            "caption": self.caption,
            "rows": self.rows,
            "groups": self.groups,
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, output: str | Path) -> None:
        """Write a new file in the form that its suffix names.

        Raises:
            ConfigError: for another suffix, a file that exists, or a place that refuses it.
        """
        check_output(output)
        write: dict[str, Callable[[], str]] = {
            ".md": self.markdown,
            ".csv": self.csv,
            ".json": self.json,
        }
        text = write[Path(output).suffix.lower()]()
        try:
            # "x": another process may have made the file since it was looked for.
            with Path(output).open("x", encoding="utf-8", newline="") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"{output} exists and is kept; name another output file") from None
        except OSError as error:
            raise ConfigError(
                f"{output} cannot be written ({error.strerror}); make room or name another file"
            ) from None


def compare(
    runs: Iterable[str | Path | Run],
    *,
    columns: str | Sequence[str] | None = None,
    sort: str | None = None,
    split: str | None = None,
    output: str | Path | None = None,
) -> Table:
    """Set runs side by side: accuracies with intervals over images or seeds, and what they cost.

    Args:
        runs: run folders, result files of ``cure evaluate --output``, records that a plan keeps
            of its runs, or tables of this function in JSON.  Results of the same run make one row.
        columns: of the table, as a list or as "natural,pgd20"; by default what was measured.
        sort: column to sort by, largest first; by default the NRR of the strongest attack that
            all have.
        split: only evaluations of this split; by default test images where all have them.
        output: new file to write, by its suffix: Markdown, CSV or JSON.

    Returns:
        Rows, groups of seeds and caption.

    Raises:
        CureError: when a run was not evaluated, when two were not evaluated alike, or for a
            column or file that cannot be.
    """
    if output is not None:
        check_output(output)
    done = table(read_rows(runs, split), columns, sort)
    if output is not None:
        done.write(output)
    return done


def check_output(output: str | Path) -> None:
    """Refuse a file that could not be written, before anything is read.

    Raises:
        ConfigError: for an unknown suffix, a file that exists, a folder that does not.
    """
    path = Path(output)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"expected an output file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"got {output}; name such a file"
        )
    if path.exists():
        raise ConfigError(f"{output} exists and is kept; name another output file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {output} does not exist; make it, or name another file")


# Reading.


@dataclass
class _Source:
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
            if result["model"].get("checkpoint") == checkpoint and _images(result) == images
        ]


def read_rows(runs: Iterable[str | Path | Run], split: str | None = None) -> list[Row]:
    """One row a run; see :func:`compare`.

    Raises:
        CureError: when one cannot be read, was not evaluated, or not like the others.
    """
    sources: list[_Source] = []
    rows: list[Row] = []
    loose: list[tuple[str, dict[str, Any]]] = []
    seen: set[Path] = set()
    for run in runs:
        path = Path(run if isinstance(run, str | Path) else run.path)
        if path.resolve() in seen:
            raise ConfigError(f"{path} is named twice; a run counts once: name it once")
        seen.add(path.resolve())
        if path.is_file():
            content = _read_json(path)
            if content.get("format") == FORMAT:
                rows += _checked_rows(content.get("rows"), path)
            elif content.get("format") == RUN_FORMAT:
                sources.append(_read_record(content, path))
            else:
                loose.append((str(path), _checked_result(content, path)))
        else:
            sources.append(_read_folder(path))
    sources += _merged(loose)
    if not sources and not rows:
        raise ConfigError("expected one or more runs, got none; name the folders of evaluated runs")
    if split is not None:
        sources, rows = _only(sources, rows, split)
    rank = _rank(sources, rows)
    rows = [_row(source, rank) for source in sources] + rows
    _check_alike(rows)
    return _labelled(_filled(rows))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); name a run folder or a result of "
            "`cure evaluate --output`"
        ) from None
    return content if isinstance(content, dict) else {}


def _checked_result(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result, once everything that a row takes from it was found in it."""
    try:
        for name, part in {"natural": content["natural"], **content["attacks"]}.items():
            low, high = part["interval"]
            for number in (part["accuracy"], part["n"], low, high):
                _need(isinstance(number, int | float))
            _need(name == "natural" or isinstance(part["settings"], dict))
        for section in ("model", "nrr", "environment", "threat"):
            _need(isinstance(content[section], dict))
        for text in (content["target"], content["threat"]["epsilon_text"], _time(content)):
            _need(isinstance(text, str))
        _images(content)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(
            f"expected a run folder or a result of `cure evaluate --output`, got {path}, which "
            "lacks parts of a result; evaluate the run again"
        ) from None
    return content


def _need(true: bool) -> None:
    if not true:
        raise ValueError


def _time(result: Mapping[str, Any]) -> str:
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


def _read_folder(path: Path) -> _Source:
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
    config = _checked_config(config, config_file)
    files = sorted((path / "evaluations").glob("*.json"), key=_number)
    results = [_checked_result(_read_json(file), file) for file in files]
    if not results:
        raise CheckpointError(f"{path} was not evaluated yet; do so with `cure evaluate {path}`")
    results.sort(key=_time)
    results = _current(results)
    environment, status = path / "environment.json", path / "status.json"
    place = path.resolve()
    inside = (place.parent / "config.yaml").is_file()
    return _Source(
        # All natural starts are in folders called "natural".
        name=f"{place.parent.name}/{place.name}" if inside else place.name,
        typed=str(path),
        results=results,
        config=config,
        timing=_lines(path / "timing.jsonl"),
        environment=_read_json(environment) if environment.is_file() else None,
        finished=_read_json(status).get("state") == "finished" if status.is_file() else None,
    )


def _read_record(content: dict[str, Any], path: Path) -> _Source:
    """A run as a plan keeps it when its folder may be gone."""
    config = _checked_config(content.get("config"), path)
    evaluations, timing = content.get("evaluations"), content.get("timing")
    if not evaluations or not isinstance(evaluations, list) or not isinstance(timing, list):
        raise CheckpointError(
            f"{path} holds no evaluation of its run; move it away and do that run of the plan again"
        )
    results = sorted((_checked_result(result, path) for result in evaluations), key=_time)
    return _Source(
        name=path.stem,
        typed=str(path),
        results=_current(results),
        config=config,
        timing=timing,
        environment=content.get("environment"),
        finished=True,
        label=str(content["label"]) if content.get("label") else None,
    )


def _checked_config(config: Any, path: Path) -> dict[str, Any]:
    try:
        for section, key in (("method", "name"), ("training", "epochs"), ("threat", "epsilon")):
            _need(config[section][key] is not None)
        _need(isinstance(config["seed"], int))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} holds no whole configuration; restore it from a copy"
        ) from None
    return dict(config)


def _current(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of a checkpoint that was replaced when the run went on."""
    now = {r["model"].get("checkpoint"): r["model"].get("epoch") for r in results}
    return [r for r in results if r["model"].get("epoch") == now[r["model"].get("checkpoint")]]


def _number(file: Path) -> int:
    """The number at the end of the name of an evaluation: a later one has a larger number."""
    last = file.stem.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # The run was killed while it wrote this line.
    return records


def _merged(loose: list[tuple[str, dict[str, Any]]]) -> list[_Source]:
    """Result files by the run they say they are of.

    Raises:
        ConfigError: when two that name the same run cannot be of the same network.
    """
    sources: dict[tuple[Any, ...], _Source] = {}
    seen: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for typed, result in loose:
        facts = result["model"]
        keys = ("method", "recipe", "run_seed", "weights", "name", "parameters")
        identity = (result["target"], *(facts.get(key) for key in keys))
        source = sources.setdefault(identity, _Source(_no_place(result["target"]), typed, []))
        source.results.append(result)
        part = result["natural"]
        for key, value in (
            (("epoch",), facts.get("epoch")),
            (("natural accuracy", part["n"], _images(result)), part["accuracy"]),
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
        source.results.sort(key=_time)
    return list(sources.values())


def _images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Values of ``IMAGES`` in a result or in a row."""
    if "attack_settings" in record:
        return tuple(record[name] for name in IMAGES)
    data, threat = record["data"], record["threat"]
    size = "x".join(map(str, data["size"]))
    return _no_place(data["name"]), data["split"], size, threat["norm"], float(threat["epsilon"])


def _only(sources: list[_Source], rows: list[Row], split: str) -> tuple[list[_Source], list[Row]]:
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


def _rank(sources: list[_Source], rows: list[Row]) -> Callable[[tuple[Any, ...]], Any]:
    """How much rather one kind of images is compared than another.

    Those that all were evaluated on, then test images, then the threat that the runs were trained
    for, then the most images, then the latest.
    """
    evaluated: list[dict[tuple[Any, ...], tuple[int, str]]] = []
    for source in sources:
        best: dict[tuple[Any, ...], tuple[int, str]] = {}
        for result in source.results:
            if result["model"].get("checkpoint") == source.checkpoint:
                latest = (int(result["natural"]["n"]), _time(result))
                best[_images(result)] = max(best.get(_images(result), (0, "")), latest)
        evaluated.append(best)
    evaluated += [{_images(row): (row["n"], "")} for row in rows]
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


def _row(source: _Source, rank: Callable[[tuple[Any, ...]], Any]) -> Row:
    """The flat record of one run."""
    checkpoint = source.checkpoint
    main = [r for r in source.results if r["model"].get("checkpoint") == checkpoint]
    images = max({_images(result) for result in main}, key=lambda images: (rank(images), images))
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
        "network": _no_place(facts.get("name")),
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
    for name in sorted(attacks, key=_strength):
        part = chosen[name]["attacks"][name]
        row |= {
            name: part["accuracy"],
            f"{name}_interval": part["interval"],
            f"{name}_n": part["n"],
        }
        if name in RATIOS:
            row[f"nrr_{name}"] = chosen[name]["nrr"].get(name)
    for name in ("natural", *sorted(attacks, key=_strength)):
        row |= _last(name, row[name], row[f"{name}_n"] if name in chosen else row["n"], last)
    epochs = {name: [t[name] for t in source.timing if t.get(name) is not None] for name in _TIMING}
    for column, (name, summary) in zip(COSTS, _TIMING.items(), strict=True):
        row[column] = summary(epochs[name]) if epochs[name] else None
    row["attack_settings"] = {
        name: chosen[name]["attacks"][name]["settings"] for name in sorted(attacks, key=_strength)
    }
    row["settings"] = _no_place(config["method"]) if config else None
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


def _strength(attack: str) -> tuple[int, int, str]:
    """Order of attacks in a table: PGD by its steps, others, C&W, AutoAttack."""
    steps = re.fullmatch(r"pgd(\d+)", attack)
    place = {"cw": 2, "autoattack": 3}.get(attack, 1)
    return (0, int(steps[1]), "") if steps else (place, 0, attack)


def _attacks(rows: Iterable[Row]) -> list[str]:
    """Every attack that a row has, and the usual ones."""
    return sorted(
        {*USUAL, *(name for row in rows for name in row["attack_settings"])}, key=_strength
    )


def _filled(rows: list[Row]) -> list[Row]:
    """The same rows, all with the same keys in the same order; what is missing is None."""
    attacks = _attacks(rows)
    columns: list[str] = []
    for name in ("natural", *attacks):
        columns += [name, f"{name}_interval"] + [f"{name}_n"] * (name != "natural")
    columns += [f"nrr_{name}" for name in RATIOS]
    for name in ("natural", *attacks):
        columns += [f"last_{name}", f"last_{name}_interval", f"best_minus_last_{name}"]
    columns += COSTS
    single = [name for name in rows[0] if name not in {*columns, *NESTED}]
    return [{name: row.get(name) for name in (*single, *columns, *NESTED)} for row in rows]


def _no_place(value: Any) -> Any:
    """The same value, with every path that says where on a machine cut to its last part."""
    if isinstance(value, Mapping):
        return {key: _no_place(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_no_place(inner) for inner in value]
    if not isinstance(value, str):
        return value
    prefix, colon, rest = value.rpartition(":")
    return prefix + colon + PurePath(rest).name if rest.startswith(("/", "~", "..")) else value


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; those that are not set are left out."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the run is besides its method, by dotted name."""
    flat = _flat({key: value for key, value in config.items() if key not in _OUTSIDE})
    flat = {key: _no_place(value) for key, value in flat.items() if key not in _OUTSIDE}
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
    for key, value in _flat(row["settings"] or {}, "method.").items():
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


def _check_alike(rows: Sequence[Row]) -> None:
    """Refuse rows whose numbers do not compare.

    Raises:
        ConfigError: names the first two that differ, and in what.
    """
    for row in rows:
        first = rows[0]
        differing = [(name, first[name], row[name]) for name in IMAGES if first[name] != row[name]]
        if first["n"] != row["n"]:
            differing.append(("number of images", first["n"], row["n"]))
        _refuse(first, row, differing)
    having = [row for row in rows if row["checkpoint"] is not None]
    for row in having:
        ours, theirs = having[0]["checkpoint"], row["checkpoint"]
        _refuse(having[0], row, [("checkpoint", ours, theirs)] if ours != theirs else [])
    for attack in _attacks(rows):
        having = [row for row in rows if attack in row["attack_settings"]]
        for row in having:
            ours, theirs = having[0]["attack_settings"][attack], row["attack_settings"][attack]
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            differing = [(f"{attack} {name}", ours.get(name), theirs.get(name)) for name in names]
            # AutoAttack is slow: it may be run on fewer images, which the table then says.
            if attack != "autoattack" and having[0][f"{attack}_n"] != row[f"{attack}_n"]:
                differing.append((f"{attack} images", having[0][f"{attack}_n"], row[f"{attack}_n"]))
            _refuse(having[0], row, differing)


def _refuse(first: Row, second: Row, differing: list[tuple[str, Any, Any]]) -> None:
    if not differing:
        return
    words = ", ".join(f"{name} {ours} against {theirs}" for name, ours, theirs in differing)
    raise ConfigError(
        f"{first['run']} and {second['run']} were not evaluated alike: {words}; evaluate both in "
        "the same way with `cure evaluate`"
    )


# Groups of seeds.


def table(
    rows: Sequence[Row],
    columns: str | Sequence[str] | None = None,
    sort: str | None = None,
) -> Table:
    """Rows of :func:`read_rows` as groups of seeds, sorted.

    A group of one seed has that run's numbers with Wilson 95 % intervals over images; one of
    several has means with 95 % Student t intervals over seeds.

    Args:
        rows: one or more.
        columns: see :func:`compare`.
        sort: a column, largest first and missing values last; or "label", in alphabetical order.

    Raises:
        ConfigError: for an unknown column, rows that do not compare, or a seed that comes twice
            under one label.
    """
    if not rows:
        raise ConfigError("expected one or more rows, got none; name evaluated runs")
    rows = list(rows)
    _check_alike(rows)
    known = _columns(rows)
    if isinstance(columns, str):
        columns = [name.strip() for name in columns.split(",") if name.strip()]
    shown = _usual_columns(rows) if columns is None else list(dict.fromkeys(columns))
    sort = _usual_sort(rows) if sort is None else sort
    for name in shown:
        if name not in known:
            raise ConfigError(unknown("column", name, known))
    if sort not in (*known, "label"):
        raise ConfigError(unknown("column", sort, [*known, "label"]))
    gathered: dict[tuple[Any, ...], list[Row]] = {}
    for number, row in enumerate(rows):
        # A network without a seed is one of its kind.
        key = (row["label"],) if row["seed"] is not None else (row["label"], number)
        gathered.setdefault(key, []).append(row)
    groups = [_group(members, known) for members in gathered.values()]
    groups.sort(key=lambda group: str(group["label"]))
    if sort != "label":
        # Sorting is stable: equal and missing values stay in the order of their labels.
        groups.sort(key=lambda group: (group[sort] is None, -(group[sort] or 0.0)))
    return Table(rows, groups, shown, _caption(rows, groups, shown, sort), columns is not None)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Every column that has a number to show."""
    attacks = _attacks(rows)
    return [
        *("natural", *attacks),
        *(f"nrr_{name}" for name in RATIOS),
        *(f"last_{name}" for name in ("natural", *attacks)),
        *(f"best_minus_last_{name}" for name in ("natural", *attacks)),
        *COSTS,
        "epoch",
        *SETTINGS,
    ]


def _usual_columns(rows: Sequence[Row]) -> list[str]:
    attacks = _attacks(rows)
    first = next((name for name in attacks if any(row.get(name) is not None for row in rows)), "")
    usual = ["natural", *attacks, *(f"nrr_{name}" for name in RATIOS)]
    usual += [f"best_minus_last_{first}", "seconds_per_epoch"]
    return [name for name in usual if any(row.get(name) is not None for row in rows)]


def _usual_sort(rows: Sequence[Row]) -> str:
    """The NRR of the strongest attack that all rows have on as many images, else that attack."""
    attacks = _attacks(rows)
    candidates = [*(f"nrr_{name}" for name in reversed(RATIOS)), *reversed(attacks)]
    for name in candidates:
        if all(row.get(name) is not None for row in rows) and len(_counts(rows, name)) == 1:
            return name
    return "natural"


def _count(row: Row, column: str) -> int | None:
    """Images that a number of a row is about; None for columns that are about none."""
    name = re.sub("^(nrr|last|best_minus_last)_", "", column)
    if name == "natural":
        return int(row["n"])
    count = row.get(f"{name}_n")
    return None if count is None else int(count)


def _counts(rows: Iterable[Row], column: str) -> list[int]:
    return sorted({n for n in (_count(row, column) for row in rows) if n is not None})


def _group(rows: list[Row], columns: Sequence[str]) -> Row:
    """Means over the seeds of one label."""
    label, seeds = rows[0]["label"], [row["seed"] for row in rows if row["seed"] is not None]
    _once(rows)
    group: Row = {
        "label": label,
        "method": rows[0]["method"],
        "runs": [row["run"] for row in rows],
        "seeds": sorted(seeds),
        "n_seeds": len(seeds) or None,
    }
    for column in columns:
        having = [row for row in rows if row.get(column) is not None]
        values = [float(row[column]) for row in having]
        interval = having[0].get(f"{column}_interval") if len(values) == 1 else None
        over = None if interval is None else "images"
        if len(values) > 1 and column not in SETTINGS:
            interval, over = list(_t_interval(values)), "seeds"
        group[column] = statistics.fmean(values) if values else None
        group[f"{column}_interval"] = interval
        group[f"{column}_interval_over"] = over
        group[f"{column}_runs"] = len(values)
        group[f"{column}_images"] = _counts(having, column)
    return group


def _once(rows: Sequence[Row]) -> None:
    """Refuse a seed that comes twice: its runs are no two draws."""
    seen: dict[Any, Row] = {}
    for row in rows:
        other = seen.setdefault(row["seed"], row)
        if row["seed"] is not None and other is not row:
            raise ConfigError(
                f"{other['run']} and {row['run']} both are '{row['label']}' with seed "
                f"{row['seed']}, and a seed counts once; leave one out, or name run folders, "
                "whose settings tell runs apart"
            )


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % Student t interval of the mean of two or more values, in their unit."""
    from scipy.special import stdtrit

    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return mean - half, mean + half


def difference(rows_a: Sequence[Row], rows_b: Sequence[Row], column: str) -> Difference:
    """By how much ``column`` is higher in a than in b, paired by seed.

    Args:
        rows_a: runs of one kind, each with another seed.
        rows_b: runs of the other kind.
        column: name of a number of a row ("pgd20", "nrr_cw", "seconds_per_epoch").

    Raises:
        ConfigError: when the column is unknown, the evaluations are not alike, or a seed comes
            twice on one side.
    """
    both = [*rows_a, *rows_b]
    if column not in _columns(both):
        raise ConfigError(unknown("column", column, _columns(both)))
    _check_alike(both)
    _once(rows_a)
    _once(rows_b)
    first, second = (
        {r["seed"]: r for r in rows if r["seed"] is not None and r.get(column) is not None}
        for rows in (rows_a, rows_b)
    )
    seeds = sorted(first.keys() & second.keys())
    for seed in seeds:
        ours, theirs = _count(first[seed], column), _count(second[seed], column)
        if ours != theirs:
            _refuse(first[seed], second[seed], [(f"{column} images", ours, theirs)])
    values = [float(first[seed][column]) - float(second[seed][column]) for seed in seeds]
    if not values:
        return Difference(None, None, 0)
    interval = _t_interval(values) if len(values) > 1 else None
    return Difference(statistics.fmean(values), interval, len(values))


# Words.


def _heading(column: str, rows: Sequence[Row]) -> str:
    heading = column
    for prefix, words in (
        ("nrr_", "NRR "),
        ("best_minus_last_", "best - last "),
        ("last_", "last "),
    ):
        heading = re.sub(f"^{prefix}", words, heading)
    counts = _counts([row for row in rows if row.get(column) is not None], column)
    if len(counts) == 1 and counts[0] != rows[0]["n"]:
        heading += f" (n = {counts[0]:,})"
    return heading.replace("_", " ").replace("mib", "MiB")


def _text(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _cell(group: Row, column: str, rows: Sequence[Row]) -> str:
    """``68.2 (67.3-69.1)``, with what is unlike the rest of its column or its group."""
    value, interval = group[column], group[f"{column}_interval"]
    if value is None:
        return "-"
    text = f"{value:,.0f}" if column in SETTINGS else f"{value:.1f}"
    if interval is not None:
        low, high = interval
        dash = "-" if low >= 0 else " to "
        text += f" ({low:.1f}{dash}{high:.1f})"
    if group[f"{column}_runs"] < (group["n_seeds"] or 1):
        count = group[f"{column}_runs"]
        text += f", {count} seed{'s' if count > 1 else ''}"
    if len(_counts([row for row in rows if row.get(column) is not None], column)) > 1:
        text += ", n = " + " and ".join(f"{count:,}" for count in group[f"{column}_images"])
    return text


def _caption(rows: list[Row], groups: list[Row], columns: Sequence[str], sort: str) -> str:
    """What the numbers are of, what their intervals mean, what made them."""
    first = rows[0]
    fewer = [
        f"{name}: {' or '.join(f'{count:,}' for count in _counts(rows, name))}"
        for name in _attacks(rows)
        if name in columns and _counts(rows, name) not in ([], [first["n"]])
    ]
    checkpoint = next((row["checkpoint"] for row in rows if row["checkpoint"]), None)
    sentences = [
        f"On {first['data']} {first['split']}, n = {first['n']:,} images"
        + (f" ({'; '.join(fewer)})" if fewer else "")
        + f", {first['norm']} ε = {first['epsilon_text']}"
        + (f", {checkpoint} checkpoint" if checkpoint else "")
        + f"; accuracies in percent, sorted by {_heading(sort, rows)}"
    ]
    if any(column.startswith("nrr_") for column in columns):
        sentences.append(
            "NRR: harmonic mean of natural accuracy and accuracy under that attack, same images"
        )
    kinds = {group[f"{column}_interval_over"] for group in groups for column in columns}
    if "seeds" in kinds:
        sentences.append("Several seeds: mean over seeds (95 % Student t interval over seeds)")
    if "images" in kinds or any(group["n_seeds"] == 1 for group in groups):
        sentences.append(
            "One seed: accuracy (Wilson 95 % interval over images), which says nothing about the "
            "spread over seeds"
        )
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    sentences.append(f"Seeds: {', '.join(map(str, seeds))}" if seeds else "No seed is known")
    unknown_settings = {row["label"] for row in rows if not row["configuration"]}
    if any(g["label"] in unknown_settings and (g["n_seeds"] or 0) > 1 for g in groups):
        sentences.append(
            "Runs known by result files alone are grouped by method, recipe and network; their "
            "settings are not in these files"
        )
    stopped = [row["run"] for row in rows if row.get("finished") is False]
    if stopped:
        sentences.append(f"Not trained to the end: {', '.join(stopped)}")
    hardware = _distinct(_hardware(row["environment"]) for row in rows)
    if len(hardware) > 1 and any("seconds" in column for column in columns):
        sentences.append("Times of different hardware do not compare")
    sentences.append(f"Hardware: {'; '.join(hardware)}")
    sentences.append("; ".join(_distinct(_versions(row["environment"]) for row in rows)))
    return ". ".join(sentences) + "."


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _hardware(environment: Mapping[str, Any]) -> str:
    cores = environment.get("cores")
    text = str(environment.get("processor") or "unknown processor")
    text += f", {cores} core{'' if cores == 1 else 's'}" if cores else ""
    return text + (f", {environment['gpu']}" if environment.get("gpu") else "")


def _versions(environment: Mapping[str, Any]) -> str:
    torch = (environment.get("packages") or {}).get("torch", "unknown")
    return f"cure {environment.get('cure')}, torch {torch}, Python {environment.get('python')}"


def _markdown(text: str) -> str:
    """Text that stays in its cell and is shown as it is."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)


def _flat_record(row: Row, names: Iterable[str]) -> Row:
    """The named values of a row for CSV, intervals in two parts."""
    record: Row = {}
    for name in names:
        value = row[name]
        if name.endswith("_interval"):
            ends = ("_low", "_high")
            limits = value or (None, None)
            record |= {
                name.removesuffix("_interval") + e: v for e, v in zip(ends, limits, strict=True)
            }
        elif isinstance(value, Mapping):
            for key, inner in _flat(value, f"{name}.").items():
                record[key] = " ".join(map(str, inner)) if isinstance(inner, list) else inner
        elif value is not None or name not in NESTED:
            record[name] = value
    return record
