"""Runs side by side: every number of a row, what is refused, intervals against scipy."""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from scipy import stats
from torch import nn

import cure
from cure.attacks.registry import ATTACKS, attack_order, known_attacks, register
from cure.data import ImageKind
from cure.errors import CheckpointError, ConfigError
from cure.experiments.compare import ResultTable, compare, difference, read_rows, table
from cure.experiments.compare.rows import strength
from cure.models import save_weights
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.runs.records import EpochTiming
from cure.runs.results import RunRecord
from helpers import Command, refused

MINI = Path(__file__).resolve().parents[2] / "results" / "cifar10-mini-cure"

PGD = {"steps": 20, "step_size": "epsilon/4", "start": "uniform", "restarts": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "square": {},
    "pgd20": PGD | {"objective": "cross_entropy"},
    "pgd100": PGD | {"steps": 100, "objective": "cross_entropy"},
    "cw": PGD | {"objective": "margin", "confidence": 50},
    "autoattack": {"version": "standard", "package": "pyautoattack", "package_version": "0.2.0"},
}
ENVIRONMENT = {
    "cure": "0.1.0",
    "commit": "abc",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
    "platform": "Linux x86_64",
    "processor": "Processor A",
    "cores": 2,
    "threads": 1,
    "gpu": None,
    "command": "cure evaluate",
    "time": "2026-01-01T00:00:00+00:00",
}
WITHOUT_METHOD = [
    "start=scratch",
    "training.epochs=7",
    "threat.epsilon=8/255",
    "attack.step_size=2/255",
]


def part(correct: int, n: int) -> dict[str, Any]:
    """An accuracy as a result file has it, its interval by scipy."""
    wilson = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    interval = [100 * float(wilson.low), 100 * float(wilson.high)]
    return {"accuracy": 100 * correct / n, "interval": interval, "correct": correct, "n": n}


def result(
    natural: int,
    n: int = 100,
    *,
    checkpoint: str | None = "best",
    epoch: int | None = 5,
    split: str = "test",
    data: str = "digits",
    epsilon: str = "8/255",
    norm: str = "Linf",
    minute: int = 0,
    target: str = "run",
    size: tuple[int, ...] = (1, 8, 8),
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, Any] | None = None,
    **attacks: int,
) -> dict[str, Any]:
    """A result of ``cure evaluate``: numbers of images that were right."""
    over, _, under = epsilon.partition("/")
    parts = {
        name: part(correct, n) | {"seed": 0, "settings": (settings or {}).get(name, SETTINGS[name])}
        for name, correct in attacks.items()
    }
    return {
        "format": "cure-evaluation-1",
        "target": target,
        "natural": part(natural, n),
        "attacks": parts,
        "nrr": {
            name: statistics.harmonic_mean([100 * natural / n, parts[name]["accuracy"]])
            if name in parts
            else None
            for name in ("cw", "autoattack")
        },
        "threat": {
            "norm": norm,
            "epsilon": float(over) / float(under or 1),
            "epsilon_text": epsilon,
        },
        "data": {
            "name": data,
            "split": split,
            "n": n,
            "classes": ["a", "b"],
            "classes_present": 2,
            "size": list(size),
        },
        "model": {
            "name": "small_cnn",
            "parameters": 1234,
            "checkpoint": checkpoint,
            "epoch": epoch,
            **(model or {}),
        },
        "seed": 0,
        "environment": {
            **ENVIRONMENT,
            "time": f"2026-01-01T00:{minute:02d}:00+00:00",
            **(environment or {}),
        },
    }


def with_classes(correct: int) -> dict[str, Any]:
    """A result on 90 images of one class, all right, and 10 of another, so many of them right."""
    made = result(90 + correct, pgd20=90)
    made["majority"] = {"class": "a", "accuracy": 90.0}
    made["data"]["images_by_class"] = [90, 10]
    for one, right in ((made["natural"], correct), (made["attacks"]["pgd20"], 0)):
        one["balanced_accuracy"] = (100 + 10 * right) / 2
        one["balanced_interval"] = [40.0, 99.0]
    return made


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run folder as training leaves it, with these evaluations."""

    def make(
        name: str,
        *results: dict[str, Any],
        settings: tuple[str, ...] = (),
        method: str = "trades",
        seed: int = 0,
        timing: tuple[dict[str, Any], ...] = (),
        environment: Mapping[str, Any] | None = None,
        state: str = "finished",
    ) -> Path:
        words = [f"method={method}", f"seed={seed}", *WITHOUT_METHOD, *settings]
        config = load_recipe("digits", ["method=null", *words])
        kind = ImageKind(("a", "b"), 1, (8, 8))
        folder = RunFolder.create(tmp_path / name, config, kind)
        known = json.dumps({**ENVIRONMENT, **(environment or {})})
        (folder.path / "environment.json").write_text(known)
        folder.set_status(state)
        for record in timing:
            folder.append(EpochTiming.model_validate(record))
        for content in results:
            folder.keep("evaluations", content)
        return folder.path

    return make


def seeds(make_run: MakeRun, method: str, correct: Mapping[int, int], **more: Any) -> list[Path]:
    """A run a seed with so many images right under PGD."""
    return [
        make_run(
            f"{method}-{seed}", result(800, 1000, pgd20=right), method=method, seed=seed, **more
        )
        for seed, right in correct.items()
    ]


# One row.


def test_balanced_accuracy_is_shown_where_classes_are_unequal(make_run: MakeRun) -> None:
    runs = [make_run("a", with_classes(10)), make_run("b", with_classes(5), seed=1, method="mart")]
    first, _ = read_rows(runs)
    assert (first["majority"], first["unequal"]) == (90.0, True)
    assert (first["balanced_natural"], first["balanced_pgd20"]) == (100.0, 50.0)
    shown = compare(runs)
    assert shown.columns[:5] == [
        *("natural", "pgd20", "majority", "balanced_natural", "balanced_pgd20")
    ]
    assert shown.cells()[0][2:7] == [
        *("95.0 (88.8-97.8)", "90.0 (82.6-94.5)", "90.0", "75.0 (40.0-99.0)", "50.0 (40.0-99.0)")
    ]
    # Results of earlier versions do not know.
    old = compare([make_run("c", result(80, pgd20=40), seed=2)])
    assert old.columns == ["natural", "pgd20"]


def test_every_number_of_a_row(make_run: MakeRun) -> None:
    timing = (
        {"epoch": 1, "seconds": 9.0, "processor_seconds": 17.0, "peak_memory_mib": 300.0},
        {"epoch": 2, "seconds": 2.0, "processor_seconds": 4.0, "peak_memory_mib": 410.5},
        {"epoch": 3, "seconds": 3.0, "processor_seconds": 5.0, "peak_memory_mib": 400.0},
    )
    run = make_run(
        "a",
        result(80, pgd20=40, cw=30),
        result(16, 20, minute=1, autoattack=5),
        result(82, checkpoint="last", epoch=7, minute=2, pgd20=35, cw=26),
        seed=3,
        timing=timing,
    )
    (row,) = read_rows([run])
    assert row["run"] == "a"
    assert (row["method"], row["label"], row["seed"]) == ("trades", "trades", 3)
    assert (row["epochs"], row["epoch"], row["checkpoint"]) == (7, 5, "best")
    assert (row["n"], row["natural"]) == (100, 80.0)
    # Wilson for 80 of 100, from the formula: (0.8 + 0.019207 +- 1.95996 sqrt(...)) / 1.038415.
    assert row["natural_interval"] == pytest.approx([71.1170, 86.6633], abs=1e-3)
    assert (row["pgd20"], row["pgd20_n"], row["cw"], row["cw_n"]) == (40.0, 100, 30.0, 100)
    assert (row["autoattack"], row["autoattack_n"]) == (25.0, 20)
    assert row["autoattack_interval"] == part(5, 20)["interval"]
    # 2 * 80 * 30 / 110 and, with the natural accuracy of the same 20 images, 2 * 80 * 25 / 105.
    assert row["nrr_cw"] == pytest.approx(4800 / 110)
    assert row["nrr_autoattack"] == pytest.approx(4000 / 105)
    assert (row["last_natural"], row["last_pgd20"], row["last_cw"]) == (82.0, 35.0, 26.0)
    assert row["best_minus_last_natural"] == -2.0
    assert row["best_minus_last_pgd20"] == 5.0
    assert row["last_autoattack"] is row["best_minus_last_autoattack"] is None
    assert row["seconds_per_epoch"] == 3.0
    assert row["processor_seconds_per_epoch"] == 5.0
    assert row["peak_memory_mib"] == 410.5
    assert row["settings"] == {"name": "trades", "beta": 6.0}
    assert row["environment"]["processor"] == "Processor A"
    assert row["environment"]["packages"]["torch"] == "2.13.0"
    assert json.loads(json.dumps(row)) == row


def test_nrr_of_autoattack_is_of_its_own_images(make_run: MakeRun) -> None:
    run = make_run("a", result(80, pgd20=40), result(12, 20, autoattack=6))
    (row,) = read_rows([run])
    assert row["natural"] == 80.0
    assert row["nrr_autoattack"] == pytest.approx(2 * 60 * 30 / 90)


def test_old_runs_have_no_processor_seconds(make_run: MakeRun) -> None:
    timing = ({"epoch": 1, "seconds": 2.0}, {"epoch": 2, "seconds": 4.0})
    (row,) = read_rows([make_run("a", result(80), timing=timing)])
    assert row["seconds_per_epoch"] == 3.0
    assert row["processor_seconds_per_epoch"] is None
    assert row["peak_memory_mib"] is None


def test_a_killed_line_of_timing_is_left_out(make_run: MakeRun) -> None:
    run = make_run("a", result(80), timing=({"epoch": 1, "seconds": 2.0},))
    with (run / "timing.jsonl").open("a") as file:
        file.write('{"epoch": 2, "sec')
    assert read_rows([run])[0]["seconds_per_epoch"] == 2.0


def test_most_images_then_the_newest(make_run: MakeRun) -> None:
    run = make_run(
        "a",
        result(81, minute=3, pgd20=41, cw=31),
        result(82, minute=9, pgd20=42),
        result(9, 10, minute=20, pgd20=9, cw=8),
        # A result that was written within the same minute as another comes after it.
        *(result(83, minute=9, pgd20=43) for _ in range(10)),
        result(84, minute=9, pgd20=44),
    )
    (row,) = read_rows([run])
    assert (row["n"], row["natural"], row["pgd20"], row["cw"]) == (100, 84.0, 44.0, 31.0)


def test_a_best_that_was_replaced_is_no_part_of_a_row(make_run: MakeRun) -> None:
    """The run went on after its first evaluation and found a better epoch."""
    run = make_run("a", result(500, 1000, epoch=2, pgd20=100), result(80, minute=5, pgd20=40))
    (row,) = read_rows([run])
    assert (row["epoch"], row["n"], row["pgd20"]) == (5, 100, 40.0)


def test_what_was_measured_later_tells_which_best_is_the_current_one(make_run: MakeRun) -> None:
    old = (result(70, epoch=2, minute=minute, pgd20=30) for minute in (0, 1))
    run = make_run("a", *old, result(80, minute=5, split="validation", pgd20=40))
    (row,) = read_rows([run])
    assert (row["epoch"], row["split"], row["pgd20"]) == (5, "validation", 40.0)
    with pytest.raises(ConfigError, match="not evaluated on the test split"):
        read_rows([run], "test")


def test_a_best_epoch_that_is_the_last_has_lost_nothing(make_run: MakeRun) -> None:
    """Leaving these runs out would make robust overfitting look worse than it is."""
    (row,) = read_rows([make_run("a", result(80, epoch=7, pgd20=40))])
    assert (row["last_natural"], row["last_pgd20"]) == (80.0, 40.0)
    assert (row["best_minus_last_natural"], row["best_minus_last_pgd20"]) == (0.0, 0.0)
    assert row["last_cw"] is None
    measured = result(81, epoch=7, checkpoint="last", minute=1, pgd20=39)
    (row,) = read_rows([make_run("b", result(80, epoch=7, pgd20=40), measured)])
    assert row["last_pgd20"] == 39.0


def test_last_is_compared_on_as_many_images(make_run: MakeRun) -> None:
    last = {"checkpoint": "last", "epoch": 7}
    run = make_run("a", result(80, pgd20=40), result(8, 10, pgd20=5, minute=1, **last))
    assert read_rows([run])[0]["best_minus_last_pgd20"] is None


def test_runs_with_only_a_last_evaluation_compare(make_run: MakeRun) -> None:
    run = make_run("a", result(82, checkpoint="last", epoch=7, pgd20=35))
    (row,) = read_rows([run])
    assert (row["checkpoint"], row["pgd20"], row["last_pgd20"]) == ("last", 35.0, None)


def test_all_rows_have_the_same_keys(make_run: MakeRun) -> None:
    first = make_run("a", result(80, pgd20=40))
    second = make_run("b", result(80, pgd100=38), method="mart")
    rows = read_rows([first, second])
    assert list(rows[0]) == list(rows[1])
    assert (rows[0]["pgd100"], rows[1]["pgd20"], rows[0]["cw_n"]) == (None, None, None)


def test_the_natural_start_is_named_with_its_run(make_run: MakeRun) -> None:
    run = make_run("a", result(80, pgd20=40))
    start = make_run("a/natural", result(90, pgd20=0), method="natural")
    assert [row["run"] for row in read_rows([run, start])] == ["a", "a/natural"]


# Which evaluations are set side by side.


def test_test_images_and_the_threat_of_training_come_first(make_run: MakeRun) -> None:
    def evaluations(shift: int) -> list[dict[str, Any]]:
        return [
            result(70 + shift, epsilon="4/255", minute=9, pgd20=60),
            result(71 + shift, pgd20=40),
            result(900 + shift, 1000, split="validation", minute=12, pgd20=800),
        ]

    runs = [make_run("a", *evaluations(0)), make_run("b", *evaluations(5), method="mart")]
    assert [row["natural"] for row in read_rows(runs)] == [71.0, 76.0]
    assert [row["natural"] for row in read_rows(runs, "validation")] == [90.0, 90.5]


def test_images_that_all_were_evaluated_on_come_before_test_images(make_run: MakeRun) -> None:
    first = make_run("a", result(70), result(75, split="validation"))
    second = make_run("b", result(76, split="validation"), method="mart")
    assert [row["natural"] for row in read_rows([first, second])] == [75.0, 76.0]
    with pytest.raises(ConfigError, match="b was not evaluated on the test split; do so with `cur"):
        read_rows([first, second], "test")


UNLIKE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "data": ({"data": "svhn"}, ("data digits against svhn",)),
    "split": ({"split": "validation"}, ("split test against validation",)),
    "size": ({"size": (3, 8, 8)}, ("size 1x8x8 against 3x8x8",)),
    "norm": ({"norm": "L2"}, ("norm Linf against L2",)),
    "epsilon": ({"epsilon": "4/255"}, ("epsilon", "against 0.0156")),
    "images": ({"n": 90}, ("number of images 100 against 90",)),
    "steps": ({"settings": {"pgd20": PGD | {"restarts": 5}}}, ("pgd20 restarts 1 against 5",)),
    "version": (
        {"settings": {"autoattack": SETTINGS["autoattack"] | {"package_version": "0.3.0"}}},
        ("autoattack package_version 0.2.0 against 0.3.0",),
    ),
    "checkpoint": ({"checkpoint": "last"}, ("checkpoint best against last",)),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_is_not_alike_is_refused(make_run: MakeRun, case: str) -> None:
    change, words = UNLIKE[case]
    numbers = {"pgd20": 40, "cw": 30, "autoattack": 25}
    first = make_run("first", result(80, 100, **numbers))
    third = make_run("third", result(80, 100, **numbers), method="mart")
    second = make_run("second", result(80, **{"n": 100, **change}, **numbers), method="at")
    with pytest.raises(ConfigError) as refusal:
        compare([first, third, second])
    message = str(refusal.value)
    assert message.startswith("first and second were not evaluated alike: ")
    for word in words:
        assert word in message
    assert "cure evaluate" in message
    assert compare([first, third])


def of_epoch(run: Path, epoch: int, **facts: str) -> Path:
    """The run with best weights of an epoch."""
    save_weights(
        nn.Linear(1, 1), run / "checkpoints/best.safetensors", {"epoch": str(epoch)} | facts
    )
    return run


def test_results_of_weights_that_were_replaced_do_not_count(make_run: MakeRun) -> None:
    old, new = result(52, epoch=2, pgd20=20), result(91, epoch=5, pgd20=60, minute=1)
    both = of_epoch(make_run("both", old, new), 5)
    assert [row["natural"] for row in read_rows([both])] == [91.0]
    assert len(RunFolder.open(both).evaluations()) == 1
    with pytest.raises(CheckpointError, match="other weights since it was evaluated"):
        read_rows([of_epoch(make_run("stale", old), 5)])
    kept = RunRecord.parse(record(both, "row") | {"best_epoch": 5, "evaluations": [old, new]}, "f")
    assert [each.natural.accuracy for each in kept.of_best_weights()] == [91.0]


def test_a_mixed_network_is_no_other_seed_of_its_method(make_run: MakeRun) -> None:
    trained = make_run("trained", result(80, pgd20=40))
    mixed = make_run("mixed", result(82, epoch=None, pgd20=35), seed=1)
    (mixed / "tradeoff.json").write_text("{}")
    of_epoch(mixed, 0, shares="0.2500 0.7500")
    made = compare([trained, mixed])
    assert sorted(group["label"] for group in made.groups) == [
        "trades",
        "trades (mixed 0.25/0.75)",
    ]


def test_other_images_under_one_name_are_refused_or_said(make_run: MakeRun) -> None:
    """By the images of each class, whatever the order of classes; by their pixels."""
    made = [result(80, pgd20=40) for _ in range(3)]
    made[0]["data"] |= {"classes": ["a", "b"], "images_by_class": [60, 40], "sha256": "00"}
    made[1]["data"] |= {"classes": ["b", "a"], "images_by_class": [40, 60], "sha256": "00"}
    made[2]["data"] |= {"classes": ["a", "c"], "images_by_class": [60, 40], "sha256": "00"}
    first, second, third = (make_run(f"r{k}", one, seed=k) for k, one in enumerate(made))
    same = compare([first, second])
    assert "pixels" not in same.caption
    assert "class_counts" not in same.csv()
    assert json.loads(same.json())["rows"][1]["class_counts"] == {"a": 60, "b": 40}
    with pytest.raises(ConfigError, match=r"images of 'b' 40 against 0, images of 'c' 0 against"):
        compare([first, third])
    made[1]["data"]["sha256"] = "01"
    other = compare([first, make_run("r3", made[1], seed=3)])
    assert "The pixels of these images are not the same in all rows" in other.caption


def test_attacks_on_other_numbers_of_images_are_refused(make_run: MakeRun) -> None:
    first = make_run("first", result(80, pgd20=40), result(40, 50, cw=20))
    second = make_run("second", result(80, pgd20=40), result(32, 40, cw=20), method="mart")
    with pytest.raises(ConfigError, match=r"first and second.* cw images 50 against 40"):
        compare([first, second])


def test_the_seed_of_random_starts_may_differ(make_run: MakeRun) -> None:
    other = result(80, pgd20=40)
    other["attacks"]["pgd20"]["seed"] = other["seed"] = 9
    assert compare([make_run("a", result(80, pgd20=40)), make_run("b", other, method="at")])


def test_autoattack_on_fewer_images_is_named_in_the_heading(make_run: MakeRun) -> None:
    runs = [
        make_run(name, result(80, cw=30), result(16, 20, autoattack=right), method=name)
        for name, right in (("trades", 5), ("mart", 4))
    ]
    done = compare(runs)
    assert "autoattack (n = 20)" in done.header()
    assert "NRR autoattack (n = 20)" in done.header()
    assert "cw" in done.header()
    assert "(autoattack: 20)" in done.caption
    low, high = part(5, 20)["interval"]
    assert done.cells()[0][4] == f"25.0 ({low:.1f}-{high:.1f})"


def test_autoattack_on_different_numbers_of_images_is_named_in_the_cells(make_run: MakeRun) -> None:
    first = make_run("a", result(80, cw=30), result(16, 20, autoattack=9))
    second = make_run("b", result(80, cw=31), result(32, 40, autoattack=4), method="mart")
    done = compare([first, second])
    column = done.header().index("autoattack")
    cells = {line[0]: line[column] for line in done.cells()}
    assert cells["trades"].startswith("45.0 (")
    assert cells["trades"].endswith("), n = 20")
    assert cells["mart"].endswith("), n = 40")
    assert "(autoattack: 20 or 40)" in done.caption
    # What is not of the same images does not decide the order.
    assert [group["label"] for group in done.groups] == ["mart", "trades"]
    assert "sorted by NRR cw" in done.caption


# Result files.


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


FACTS = {"method": "trades", "recipe": "digits", "run_seed": 4}


def test_result_files_of_one_run_make_one_row(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.json", result(80, model=FACTS, pgd20=40))
    slow = write(tmp_path / "slow.json", result(16, 20, model=FACTS, autoattack=5))
    other = {**FACTS, "run_seed": 5}
    second = write(tmp_path / "b.json", result(81, target="b", model=other, pgd20=42))
    rows = read_rows([whole, second, slow])
    assert [(row["run"], row["seed"], row["autoattack"]) for row in rows] == [
        ("run", 4, 25.0),
        ("b", 5, None),
    ]
    assert rows[0]["settings"] is rows[0]["epochs"] is rows[0]["seconds_per_epoch"] is None
    done = table(rows)
    assert [(group["label"], group["n_seeds"]) for group in done.groups] == [("trades", 2)]
    assert "settings are not in these files" in done.caption


def test_result_files_are_told_apart_by_what_they_know(make_run: MakeRun, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"run_seed": 5},
        "c": {"run_seed": 6, "recipe": "other"},
        "d": {"run_seed": 7, "name": "resnet10", "parameters": 99},
        "e": {"run_seed": 8, "parameters": 99},
    }
    files = [
        write(tmp_path / f"{name}.json", result(80, target=name, model={**FACTS, **change}))
        for name, change in changes.items()
    ]
    found = [row["label"] for row in read_rows(files)]
    assert found[0] == found[1]
    assert len(set(found)) == 4
    assert found[2] == "trades (network=small_cnn, parameters=1234, recipe=other)"
    # Beside a run folder, whose settings are known, the recipe's name has to do as well.
    model = {"recipe": "digits", "run_seed": 0, "method": "trades"}
    folder = make_run("folder", result(80, model=model))
    same = [row["label"] for row in read_rows([folder, *files[:2]])]
    assert same == ["trades"] * 3
    apart = [row["label"] for row in read_rows([folder, files[2]])]
    assert apart == ["trades (recipe=digits)", "trades (recipe=other)"]


@pytest.mark.parametrize("change", [{"natural": 79}, {"epoch": 6}])
def test_result_files_that_cannot_be_of_one_run_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    first = write(tmp_path / "x.json", result(80, model=FACTS, pgd20=40))
    second = write(tmp_path / "y.json", result(**{"natural": 80, **change}, model=FACTS, cw=30))
    with pytest.raises(ConfigError, match=r"x\.json and .*y\.json both are results of 'run'"):
        read_rows([first, second])


def test_networks_without_a_run_stand_alone(tmp_path: Path) -> None:
    files = [
        write(
            tmp_path / f"{name}.json",
            result(right, checkpoint=None, epoch=None, target="vit", model={"weights": name}),
        )
        for name, right in (("one.pt", 80), ("two.pt", 90))
    ]
    done = compare(files)
    assert [line[:2] for line in done.cells()] == [["vit (two.pt)", "-"], ["vit (one.pt)", "-"]]


def test_the_archived_results_give_the_readme_table() -> None:
    done = compare([MINI / "seed0-cure.json", MINI / "seed0-cure-autoattack.json"])
    ((label, count, *cells),) = done.cells()
    assert (label, count) == ("cure", "1")
    assert cells == [
        "68.2 (67.3-69.1)",
        "20.6 (19.8-21.4)",
        "18.9 (18.1-19.7)",
        "16.8 (13.8-20.3)",
        "29.6",
        "27.0",
    ]


def test_a_network_without_a_run_compares_with_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"checkpoint": None, "epoch": None, "target": "vit"}
    file = write(tmp_path / "a.json", result(90, **facts))
    run = make_run("a", result(80))
    for order in ([file, run], [run, file]):
        done = compare(order)
        assert labels(done) == ["vit", "trades"]
        assert "best checkpoint" in done.caption


def test_the_same_network_twice_is_no_group(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"checkpoint": None, "epoch": None, "target": "vit"}
    first = write(tmp_path / "a.json", result(80, **facts))
    second = write(tmp_path / "b.json", result(90, **facts))
    compare([first], output=tmp_path / "t.json")
    done = compare([tmp_path / "t.json", second])
    assert sorted(line[2][:4] for line in done.cells()) == ["80.0", "90.0"]


def record(run: Path, label: str) -> dict[str, Any]:
    """What a plan keeps of a run."""
    folder = RunFolder.open(run)
    return {
        "format": "cure-run-1",
        "plan": "plan",
        "label": label,
        "seed": folder.config.seed,
        "config": folder.config.model_dump(mode="json"),
        "best_epoch": 5,
        "environment": folder.environment().content(),
        "metrics": [],
        "timing": [line.content() for line in folder.timing()],
        "evaluations": [result.content() for result in folder.evaluations()],
    }


def test_records_of_a_plan_are_rows_by_its_labels(make_run: MakeRun, tmp_path: Path) -> None:
    timing = ({"epoch": 1, "seconds": 2.0, "processor_seconds": 3.0, "peak_memory_mib": 100.0},)
    runs = [
        make_run(f"r{seed}", result(80, pgd20=right), seed=seed, timing=timing)
        for seed, right in enumerate((40, 42))
    ]
    files = [
        write(tmp_path / f"mine-seed{seed}.json", record(run, "mine"))
        for seed, run in enumerate(runs)
    ]
    rows, direct = read_rows(files), read_rows(runs)
    assert [row["run"] for row in rows] == ["mine-seed0", "mine-seed1"]
    assert [row["label"] for row in rows] == ["mine", "mine"]
    own = {"run", "label", "plan_label"}
    for row, other in zip(rows, direct, strict=True):
        assert {k: v for k, v in row.items() if k not in own} == {
            k: v for k, v in other.items() if k not in own
        }
    compare(files, output=tmp_path / "t.json")
    other = write(
        tmp_path / "other.json",
        record(make_run("c", result(80), settings=("method.beta=2",), seed=2), "mine"),
    )
    # A label that two plans give to different settings is no group.
    again = compare([tmp_path / "t.json", other], sort="label")
    assert labels(again) == ["mine (beta=2)", "mine (beta=6)"]


def test_the_published_records_of_a_plan_are_its_table(command: Command) -> None:
    folder = MINI.parent / "ablation"
    ended = command("compare", folder / "records.jsonl")
    assert ended.status == 0, ended.err
    shown = (folder / "table.md").read_text()
    for line in compare([folder / "records.jsonl"]).cells():
        assert f"| {' | '.join(line[:5])} |" in shown


@pytest.mark.parametrize(
    "change", [{"evaluations": []}, {"config": None}, {"timing": None}, {"evaluations": [{}]}]
)
def test_records_that_are_none_are_refused(
    make_run: MakeRun, tmp_path: Path, change: dict[str, Any]
) -> None:
    whole = record(make_run("a", result(80)), "mine")
    file = write(tmp_path / "mine.json", whole | change)
    with pytest.raises(CheckpointError, match=r"mine\.json"):
        read_rows([file])


# Groups of seeds.


def test_several_seeds_are_a_mean_with_a_t_interval(make_run: MakeRun) -> None:
    correct = {0: 431, 1: 447, 2: 412}
    done = compare(seeds(make_run, "trades", correct))
    (group,) = done.groups
    values = [right / 10 for right in correct.values()]
    truth = stats.t.interval(0.95, 2, loc=43.0, scale=stats.sem(values))
    assert group["pgd20"] == pytest.approx(43.0)
    assert group["pgd20_interval"] == pytest.approx(truth, rel=1e-12)
    assert (group["n_seeds"], group["seeds"]) == (3, [0, 1, 2])
    ((_, count, _, cell),) = done.cells()
    # By hand: s = 1.7521, t(0.975, 2) = 4.3027, half = 4.3527.
    assert (count, cell) == ("3", "43.0 (38.6-47.4)")
    assert "Student t" in done.caption
    # A setting is no measurement.
    settings = compare(seeds(make_run, "at", correct), columns="epochs,parameters")
    assert settings.cells() == [["at", "3", "7", "1,234"]]
    assert "Wilson" not in done.caption
    assert "says nothing about the spread" not in done.caption


def test_one_seed_has_the_interval_over_images(make_run: MakeRun) -> None:
    done = compare(seeds(make_run, "trades", {2: 431}))
    ((_, count, _, cell),) = done.cells()
    low, high = part(431, 1000)["interval"]
    assert (count, cell) == ("1", f"43.1 ({low:.1f}-{high:.1f})")
    assert done.groups[0]["pgd20_interval_over"] == "images"
    assert "Wilson 95 % interval over images" in done.caption
    assert "One seed" in done.caption
    assert "says nothing about the spread over seeds" in done.caption
    assert "Student" not in done.caption


def test_equal_seeds_have_an_interval_of_no_length(make_run: MakeRun) -> None:
    done = compare(seeds(make_run, "trades", {0: 431, 1: 431}))
    assert done.groups[0]["pgd20_interval"] == pytest.approx([43.1, 43.1])


def test_an_interval_below_zero_is_readable(make_run: MakeRun) -> None:
    done = compare(seeds(make_run, "trades", {0: 0, 1: 4}), columns="pgd20")
    # s = 0.2828, t(0.975, 1) = 12.706, half = 2.541.
    assert done.cells()[0][2] == "0.2 (-2.3 to 2.7)"


def test_a_number_that_some_seeds_lack_says_so(make_run: MakeRun) -> None:
    runs = seeds(make_run, "trades", {0: 431, 1: 447})
    runs.append(make_run("c", result(800, 1000, cw=300), seed=2))
    done = compare(runs, columns=["pgd20", "cw", "autoattack", "nrr_cw"])
    ((_, count, pgd, cw, autoattack, ratio),) = done.cells()
    assert count == "3"
    assert pgd.startswith("43.9 (")
    assert pgd.endswith("), 2 seeds")
    assert cw.endswith("), 1 seed")
    assert autoattack == "-"
    assert ratio == "43.6, 1 seed"


def test_runs_that_differ_in_a_setting_are_no_seeds_of_each_other(make_run: MakeRun) -> None:
    runs = [
        make_run(f"r{number}", result(80, pgd20=40), seed=number, settings=words)
        for number, words in enumerate(
            [
                ("method.beta=1",),
                ("method.beta=6",),
                ("method.beta=6", "training.epochs=9"),
                ("training.threads=2", "tracking=[tensorboard]", "name=other"),
            ]
        )
    ]
    assert [row["label"] for row in read_rows(runs)] == [
        "trades (beta=1, training.epochs=7)",
        "trades (beta=6, training.epochs=7)",
        "trades (beta=6, training.epochs=9)",
        "trades (beta=6, training.epochs=7)",
    ]
    assert [group["n_seeds"] for group in compare(runs, sort="label").groups] == [1, 2, 1]


def test_runs_of_a_version_without_a_setting_are_seeds_of_later_ones(make_run: MakeRun) -> None:
    """A setting that came later had the effect of its default before."""

    def earlier(run: Path, **changes: Any) -> Path:
        content = yaml.safe_load((run / "config.yaml").read_text())
        del content["new_head"], content["training"]["compile"], content["method"]["natural_weight"]
        content["data"]["augment"] = {"crop_padding": 4} | changes
        (run / "config.yaml").write_text(yaml.safe_dump(content))
        return run

    words = ("data.augment={crop_padding: 4}",)
    runs = [
        make_run(f"r{seed}", result(80), method="cure", seed=seed, settings=words)
        for seed in range(3)
    ]
    earlier(runs[1])
    earlier(runs[2], cutmix=0.5)
    assert [row["label"] for row in read_rows(runs[:2])] == ["cure", "cure"]
    assert read_rows(runs)[2]["label"] == "cure (data.augment.cutmix=0.5)"


def test_wrappers_are_in_the_label(make_run: MakeRun) -> None:
    runs = [
        make_run(f"r{number}", result(80), method=method, settings=words)
        for number, (method, words) in enumerate(
            [
                ("at", ("training.weight_perturbation={gamma: 0.01}",)),
                ("at", ("training.averaging={kind: exponential}",)),
                ("at", ("training.averaging={kind: equal, every: epoch}",)),
                ("at", ()),
            ]
        )
    ]
    assert [row["label"] for row in read_rows(runs)] == ["at + awp", "at + ema", "at + swa", "at"]


def test_the_run_that_a_seed_starts_from_makes_no_group(make_run: MakeRun) -> None:
    runs = [
        make_run(f"r{seed}", result(80), seed=seed, settings=(f"start=runs/natural-{seed}",))
        for seed in range(3)
    ]
    assert [row["label"] for row in read_rows(runs)] == ["trades"] * 3
    other = make_run("scratch", result(80), seed=3)
    assert read_rows([*runs, other])[3]["label"] == "trades (start=scratch)"


def test_the_teacher_of_a_seed_makes_no_group(make_run: MakeRun) -> None:
    words = [(f"method.teacher={path}",) for path in ("runs/at-0", "runs/at-1", "natural")]
    runs = [
        make_run(f"r{seed}", result(80), method="ard", seed=seed, settings=word)
        for seed, word in enumerate(words)
    ]
    assert [row["label"] for row in read_rows(runs[:2])] == ["ard", "ard"]
    assert len({row["label"] for row in read_rows(runs)}) == 2
    runs = [
        make_run(
            f"own{seed}",
            result(80),
            method="ard",
            seed=seed,
            settings=(f"method.teacher={{recipe: digits, settings: {{seed: {seed}}}}}",),
        )
        for seed in range(2)
    ]
    assert [row["label"] for row in read_rows(runs)] == ["ard", "ard"]


def test_a_seed_counts_once(make_run: MakeRun) -> None:
    runs = [make_run(name, result(80, pgd20=40)) for name in "ab"]
    with pytest.raises(ConfigError, match="a and b both are 'trades' with seed 0"):
        compare(runs)


def test_a_run_counts_once(make_run: MakeRun) -> None:
    run = make_run("a", result(80, pgd20=40))
    with pytest.raises(ConfigError, match="named twice"):
        compare([run, run / ".." / "a"])


def test_one_run_may_come_alone(make_run: MakeRun) -> None:
    run = make_run("a", result(80, pgd20=40))
    for alone in (run, str(run)):
        assert compare(alone).rows == compare([run]).rows
    with pytest.raises(ConfigError, match="split: expected one of train, validation, test"):
        compare(run, split="tests")  # type: ignore[arg-type]


# Order and columns.


def labels(done: ResultTable) -> list[str]:
    return [group["label"] for group in done.groups]


def three(make_run: MakeRun) -> list[Path]:
    return [
        make_run("a", result(80, pgd20=40, cw=20), method="at"),
        make_run("b", result(70, pgd20=30, cw=30, autoattack=25), method="mart"),
        make_run("c", result(60, pgd20=50, cw=25, autoattack=24), method="trades"),
    ]


def test_the_order_is_by_the_strongest_that_all_have(make_run: MakeRun) -> None:
    runs = three(make_run)
    # NRR of C&W: at 32, mart 42, trades 35.3.
    assert labels(compare(runs)) == ["mart", "trades", "at"]
    # NRR of AutoAttack: mart 36.8, trades 34.3.
    assert labels(compare(runs[1:])) == ["mart", "trades"]
    assert "sorted by NRR autoattack" in compare(runs[1:]).caption
    without = make_run("d", result(90, pgd20=45), method="natural")
    assert labels(compare([*runs, without])) == ["trades", "natural", "at", "mart"]
    assert "sorted by pgd20" in compare([*runs, without]).caption


def test_the_order_is_by_the_attack_that_left_fewest(make_run: MakeRun) -> None:
    masked = make_run("masked", result(80, pgd20=80, cw=80, square=2), method="at")
    honest = make_run("honest", result(80, pgd20=20, cw=19, square=30), method="mart")
    done = compare([masked, honest])
    assert "sorted by square" in done.caption
    assert labels(done) == ["mart", "at"]


def test_attacks_have_the_order_of_the_registry() -> None:
    for name in (
        *(n for n in known_attacks() if n != "natural"),
        "pgd2",
        "pgd50:restarts=5",
        "cw:restarts=5",
    ):
        assert strength(name)[0] == attack_order(name)[0], name
    assert strength("pgd20") > strength("pgd9") > strength("fgsm")


def test_an_attack_of_a_plug_in_has_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_attacks()
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    register("darker-than-all", "test", {}, strength=9)(lambda model, image, *_: image)
    assert strength("darker-than-all") < strength("autoattack")
    monkeypatch.setenv("CURE_PLUGINS", "torch")
    assert strength("darker-than-all") > strength("autoattack")


def test_missing_values_come_last(make_run: MakeRun) -> None:
    runs = three(make_run)
    assert labels(compare(runs, sort="nrr_autoattack")) == ["mart", "trades", "at"]
    assert labels(compare(runs, sort="natural")) == ["at", "mart", "trades"]
    assert labels(compare(runs[::-1], sort="label")) == ["at", "mart", "trades"]


def test_zero_comes_before_missing(make_run: MakeRun) -> None:
    missing = make_run("m", result(70, pgd20=5), method="at")
    zero = make_run("z", result(70, pgd20=5, cw=0), method="trades")
    assert labels(compare([missing, zero], sort="cw")) == ["trades", "at"]


def test_columns_are_those_that_were_measured(make_run: MakeRun) -> None:
    done = compare(three(make_run))
    assert done.columns == ["natural", "pgd20", "cw", "autoattack", "nrr_cw", "nrr_autoattack"]
    done = compare(three_again(make_run), columns=" nrr_cw, pgd20,pgd20")
    assert done.columns == ["nrr_cw", "pgd20"]
    assert done.header() == ["model", "n seeds", "NRR cw", "pgd20"]


def three_again(make_run: MakeRun) -> list[Path]:
    return [make_run("x", result(80, pgd20=40, cw=20), method="at")]


@pytest.mark.parametrize(("key", "value"), [("columns", "natural,pgd2"), ("sort", "nrr")])
def test_unknown_columns_are_refused(make_run: MakeRun, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown column '(pgd2|nrr)'; did you mean"):
        compare(three(make_run), **{key: value})


def test_costs_and_their_headings(make_run: MakeRun) -> None:
    timing = ({"epoch": 1, "seconds": 2.0, "processor_seconds": 3.0, "peak_memory_mib": 100.0},)
    last = result(81, checkpoint="last", epoch=7, pgd20=38)
    done = compare([make_run("a", result(80, pgd20=40), last, timing=timing)])
    assert done.columns == ["natural", "pgd20", "best_minus_last_pgd20", "seconds_per_epoch"]
    assert done.header()[-2:] == ["best - last pgd20", "seconds per epoch"]
    assert done.cells()[0][-2:] == ["2.0", "2.0"]
    more = compare(
        [make_run("b", result(80), timing=timing)], columns=["peak_memory_mib", "epochs"]
    )
    assert more.header()[2:] == ["peak memory MiB", "epochs"]
    assert more.cells()[0][2:] == ["100.0", "7"]


# Caption.


def test_the_caption_says_what_the_numbers_are_of(make_run: MakeRun) -> None:
    timing = ({"epoch": 1, "seconds": 2.0},)
    first = make_run("a", result(8000, 10000, pgd20=4000), method="at", timing=timing)
    gpu = {"processor": "Processor B", "cores": 16, "gpu": "Device C", "cure": "0.2.0"}
    second = make_run(
        "b", result(8000, 10000), seed=3, timing=timing, environment=gpu, state="stopped"
    )
    caption = compare([first, second]).caption
    for words in (
        "On digits test, n = 10,000 images, Linf ε = 8/255, best checkpoint",
        "Seeds: 0, 3.",
        "Hardware: Processor A, 2 cores; Processor B, 16 cores, Device C.",
        "cure 0.1.0, torch 2.13.0, Python 3.11.7; cure 0.2.0, torch 2.13.0, Python 3.11.7.",
        "Times of different hardware do not compare.",
        "Not trained to the end: b.",
    ):
        assert words in caption
    without = compare([first, second], columns="natural").caption
    assert "do not compare" not in without
    alone = compare([first]).caption
    assert "do not compare" not in alone
    assert "Not trained" not in alone


def test_no_place_on_a_machine_is_in_an_output(
    make_run: MakeRun, tmp_path: Path, command: Command
) -> None:
    words = (f"data.source={tmp_path}/photos", f"start={tmp_path}/natural")
    words += (f"model={{name: small_cnn, options: {{folder: '{tmp_path}/inner'}}}}",)
    data = f"{tmp_path}/photos"
    run = make_run("a", result(80, pgd20=40, data=data), settings=words)
    for suffix in ("md", "csv", "json"):
        ended = command("compare", run, "--output", tmp_path / f"t.{suffix}")
        assert ended.status == 0, ended.err
        text = (tmp_path / f"t.{suffix}").read_text()
        assert str(tmp_path) not in text + ended.out
        assert "photos" in text


# Files.

NASTY = "a|b\\|c\n| x | <b>&lt;`*[l](http://x)"


def test_markdown_keeps_every_name_in_its_cell(make_run: MakeRun) -> None:
    rows = read_rows([make_run("a", result(80, pgd20=40)), make_run("b", result(80), method="at")])
    rows[0]["label"] = NASTY
    done = table(rows)
    tokens = MarkdownIt("commonmark").enable("table").parse(done.markdown())
    assert [token.type for token in tokens].count("table_open") == 1
    assert [token.type for token in tokens].count("tr_open") == 3
    inlines = [token for token in tokens if token.type == "inline"]
    # 3 lines of 4 cells, and the caption.
    assert len(inlines) == 13
    assert all(child.type == "text" for token in inlines for child in token.children or [])
    shown = ["".join(child.content for child in token.children or []) for token in inlines]
    assert NASTY.replace("\n", " ") in shown
    assert shown[:4] == ["model", "n seeds", "natural", "pgd20"]
    assert shown[-1] == done.caption


def test_csv_has_a_line_a_run_and_no_lists(make_run: MakeRun) -> None:
    runs = [
        make_run("a", result(80, pgd20=40), result(16, 20, autoattack=5)),
        make_run("b", result(81), method="at", seed=1),
    ]
    done = compare(runs)
    first, second = csv.DictReader(io.StringIO(done.csv()))
    low, high = part(40, 100)["interval"]
    assert (first["run"], first["label"], first["seed"]) == ("a", "trades", "0")
    assert [float(first[f"pgd20{end}"]) for end in ("", "_low", "_high")] == [40.0, low, high]
    assert (first["autoattack_n"], first["settings.beta"]) == ("20", "6.0")
    assert first["environment.packages.torch"] == "2.13.0"
    assert [second[f"pgd20{end}"] for end in ("", "_low", "_high")] == ["", "", ""]
    assert "[" not in done.csv()
    assert not any(name.endswith("_interval") for name in first)
    few = compare(runs, columns="pgd20")
    names = ["pgd20", "pgd20_low", "pgd20_high", "pgd20_n"]
    assert next(csv.reader(io.StringIO(few.csv())))[-5:] == ["n", *names]


def test_json_holds_everything_and_can_be_compared_again(make_run: MakeRun, tmp_path: Path) -> None:
    runs = seeds(make_run, "trades", {0: 431, 1: 447}, settings=("method.beta=2",))
    written = compare(runs, output=tmp_path / "first.json")
    content = json.loads((tmp_path / "first.json").read_text())
    assert content == {
        "format": "cure-comparison-1",
        "caption": written.caption,
        "rows": written.rows,
        "groups": written.groups,
    }
    again = compare([tmp_path / "first.json"])
    assert again == written
    # With a further run the settings that were kept tell the labels apart.
    more = make_run("c", result(800, 1000, pgd100=300, pgd20=300), settings=("method.beta=4",))
    labelled = compare([tmp_path / "first.json", more])
    assert labels(labelled) == ["trades (beta=2)", "trades (beta=4)"]
    assert [row["pgd100"] for row in labelled.rows] == [30.0, None, None]
    with pytest.raises(ConfigError, match="expected evaluations on the validation split"):
        compare([tmp_path / "first.json"], split="validation")


def test_output_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "kept.md").write_text("mine")
    for name, words in (
        ("x.txt", r"ends in \.md, \.csv or \.json, got"),
        ("x", "ends in"),
        ("kept.md", "exists and is kept"),
        ("none/x.md", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare([tmp_path / "no-run"], output=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.md"]
    assert (tmp_path / "kept.md").read_text() == "mine"


# Paired differences.


def test_difference_is_the_paired_t_interval(make_run: MakeRun) -> None:
    ours = {0: 431, 1: 447, 2: 412, 3: 466, 7: 999}
    theirs = {1: 401, 0: 420, 3: 433, 2: 409, 9: 1}
    rows = read_rows([*seeds(make_run, "trades", ours), *seeds(make_run, "at", theirs)])
    mean, interval, n = difference(rows[:5], rows[5:], "pgd20")
    common = [0, 1, 2, 3]
    test = stats.ttest_rel([ours[s] / 10 for s in common], [theirs[s] / 10 for s in common])
    truth = test.confidence_interval(0.95)
    # By hand: (1.1 + 4.6 + 0.3 + 3.3) / 4.
    assert mean == pytest.approx(2.325)
    assert interval == pytest.approx((truth.low, truth.high), rel=1e-9)
    assert n == 4
    backwards = difference(rows[5:], rows[:5], "pgd20")
    assert backwards.mean == pytest.approx(-2.325)


def test_difference_of_few_seeds_has_no_interval(make_run: MakeRun) -> None:
    one, two = seeds(make_run, "trades", {0: 431, 1: 447})
    other, unpaired = seeds(make_run, "at", {0: 421, 5: 300})
    rows = read_rows([one, two, other, unpaired])
    assert difference(rows[:2], rows[2:], "pgd20") == (pytest.approx(1.0), None, 1)
    assert difference(rows[1:2], rows[2:], "pgd20") == (None, None, 0)
    assert difference(rows[:2], rows[2:], "cw") == (None, None, 0)


def test_difference_refuses_what_does_not_pair(make_run: MakeRun) -> None:
    rows = read_rows(seeds(make_run, "trades", {0: 431, 1: 447}))
    other = read_rows(seeds(make_run, "at", {0: 421}))
    with pytest.raises(ConfigError, match="unknown column"):
        difference(rows, other, "pgd")
    with pytest.raises(ConfigError, match="with seed 0"):
        difference([rows[0], rows[0] | {"run": "copy"}], other, "pgd20")
    with pytest.raises(ConfigError, match="with seed 0"):
        difference(other, [rows[0], rows[0] | {"run": "copy"}], "pgd20")
    with pytest.raises(ConfigError, match="not evaluated alike: data"):
        difference(rows, [other[0] | {"data": "svhn"}], "pgd20")
    slow = [
        make_run("s", result(80), result(16, 20, autoattack=5), method="at"),
        make_run("t", result(80), result(32, 40, autoattack=9), method="mart"),
    ]
    first, second = read_rows(slow)
    for column in ("autoattack", "nrr_autoattack"):
        with pytest.raises(ConfigError, match=f"{column} images 20 against 40"):
            difference([first], [second], column)


# What cannot be read.


def test_a_run_without_evaluation_says_what_to_do(make_run: MakeRun, command: Command) -> None:
    good, run = make_run("good", result(80)), make_run("a")
    ended = command("compare", good, run)
    refused(ended, f"{run} was not evaluated yet; do so with `cure evaluate {run}`")
    assert len(ended.err.strip().splitlines()) == 1


def test_what_is_no_run_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.json").write_text('{"format": "cure-eval')
    torn = make_run("torn", result(80))
    (torn / "config.yaml").write_text("method: [")
    half = result(80, pgd20=40)
    del half["attacks"]["pgd20"]["interval"]
    cases = {
        tmp_path / "nowhere": "nowhere does not exist",
        tmp_path / "empty": "holds no run",
        tmp_path / "torn.json": "cannot be read as JSON",
        write(tmp_path / "list.json", [1]): "no whole result of `cure evaluate`",
        write(tmp_path / "half.json", half): "no whole result of `cure evaluate`",
        write(tmp_path / "rows.json", {"format": "cure-comparison-1", "rows": [{}]}): "the rows of",
        torn: "config.yaml cannot be read",
    }
    for path, words in cases.items():
        with pytest.raises(CheckpointError, match=words):
            compare([path])
    with pytest.raises(ConfigError, match="got none"):
        compare([])


# The command, and a real run.


def test_the_command_prints_and_writes(command: Command, make_run: MakeRun, tmp_path: Path) -> None:
    runs = seeds(make_run, "trades", {0: 431, 1: 447}) + seeds(make_run, "at", {0: 401})
    target = tmp_path / "table.md"
    ended = command("compare", *runs, "--columns", "pgd20", "--output", target)
    assert ended.status == 0, ended.err
    cells = compare(runs, columns="pgd20").cells()
    assert [line[0] for line in cells] == ["trades", "at"]
    for line in cells:
        shown = next(row for row in ended.out.splitlines() if f" {line[0]} " in row)
        assert [cell.strip() for cell in shown.strip("│ ").split("│")] == line
        assert "| " + " | ".join(line) + " |" in target.read_text().splitlines()
    again = command("compare", *runs, "--output", target)
    refused(again, "exists and is kept")
    refused(command("compare", *runs, "--output", tmp_path / "table.txt"), ".md, .csv or .json")
    refused(command("compare", *runs, "--split", "train"), "not evaluated on the train split")
    assert command("compare").status == 2


def test_comparing_does_not_wait_for_pytorch(make_run: MakeRun) -> None:
    run = make_run("a", result(80, pgd20=40))
    code = "import sys, cure; cure.compare([sys.argv[1]]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == 0


def test_real_runs_of_two_seeds(tmp_path: Path) -> None:
    settings = {
        "method": "natural",
        "start": "scratch",
        "training.epochs": 2,
        "training.validation_steps": 1,
        "training.optimizer.learning_rate": 0.05,
    }
    runs, results = [], []
    for seed in (0, 1):
        run = cure.train(
            "digits", {**settings, "seed": seed}, run=tmp_path / f"s{seed}", quiet=True
        )
        results.append(cure.evaluate(run, attacks="pgd2,cw", limit=60))
        cure.evaluate(run, attacks="pgd2,cw", limit=60, checkpoint="last")
        cure.evaluate(run, attacks="pgd2", limit=10)
        runs.append(run)
    done = cure.compare(runs, output=tmp_path / "table.json")
    (group,) = done.groups
    assert (group["label"], group["seeds"]) == ("natural", [0, 1])
    for column in ("pgd2", "cw"):
        values = [result["attacks"][column]["accuracy"] for result in results]
        assert group[column] == pytest.approx(statistics.mean(values))
        assert [row[column] for row in done.rows] == values
    assert [row["nrr_cw"] for row in done.rows] == [result["nrr"]["cw"] for result in results]
    assert [row["pgd2_n"] for row in done.rows] == [60, 60]
    for row, run in zip(done.rows, runs, strict=True):
        lines = (run.path / "timing.jsonl").read_text().splitlines()
        timing = [json.loads(line)["seconds"] for line in lines]
        assert row["seconds_per_epoch"] == pytest.approx(sum(timing) / 2)
        assert row["best_minus_last_natural"] == row["natural"] - row["last_natural"]
        assert row["finished"] is True
