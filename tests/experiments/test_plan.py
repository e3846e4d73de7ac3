"""Plans of runs: what is read and refused, what is skipped, who does the work."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

import cure
from cure.errors import CheckpointError, ConfigError, CureError, Interrupted
from cure.experiments.executors import Job, LocalExecutor, cluster_executor
from cure.experiments.plan import Entry, entries, read_plan, stages
from cure.experiments.plan_work import (
    answer,
    carry_out_plan,
    is_done,
    result_path,
    work,
    write_tables,
)
from cure.runs.folder import RunFolder
from cure.runs.packed import read_packed, summary, write_packed
from cure.runs.results import RunRecord
from helpers import Command, bright_or_dark, refused

PLAN: dict[str, Any] = {
    "name": "tiny",
    "recipe": "digits",
    "runs": "runs",
    "settings": {
        "start": "run:natural",
        "data.limit": 400,
        "data.validation": 50,
        "model": {"name": "small_cnn", "options": {"width": 2}},
        "attack.steps": 1,
        "training.epochs": 2,
        "training.validation_steps": 1,
        "training.collapse_patience": 100,
        "training.threads": 1,
    },
    "evaluations": [{"attacks": ["pgd2"], "limit": 20, "checkpoints": ["best", "last"]}],
    "rows": {
        "natural": {"settings": {"method": "natural", "start": "scratch"}},
        "at": {"settings": {"method": "at"}},
        "ard": {"settings": {"method": "ard", "method.teacher": "run:at"}, "note": "a student"},
    },
}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def written(**changes: Any) -> Path:
    path = Path("plan.yaml")
    path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False), encoding="utf-8")
    return path


class Done:
    """A job that was done when it was handed out."""

    def __init__(self, function: Callable[..., str], *arguments: Any) -> None:
        self.outcome: str | CureError
        try:
            self.outcome = function(*arguments)
        except CureError as error:
            self.outcome = error

    def result(self) -> str:
        if isinstance(self.outcome, CureError):
            raise self.outcome
        return self.outcome


class Here:
    """Works at once, in this process, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Job:
        (entry,) = (argument for argument in arguments if isinstance(argument, Entry))
        self.given.append(entry.name)
        return Done(function, *arguments)


def names(groups: list[list[Entry]]) -> list[list[str]]:
    return [[entry.name for entry in group] for group in groups]


def test_runs_wait_for_those_they_need_and_come_seed_by_seed():
    rows = {label: {**row, "seeds": [0, 2]} for label, row in PLAN["rows"].items()}
    plan = read_plan(written(rows=rows))
    assert [entry.name for entry in entries(plan)][:4] == [
        "natural-seed0",
        "at-seed0",
        "ard-seed0",
        "natural-seed2",
    ]
    assert names(stages(plan)) == [
        ["natural-seed0", "natural-seed2"],
        ["at-seed0", "at-seed2"],
        ["ard-seed0", "ard-seed2"],
    ]
    assert all(entry.config.seed == entry.seed for entry in entries(plan))


def test_a_row_changes_nothing_for_the_next():
    settings = {**PLAN["settings"], "start": "scratch", "method": {"name": "cure", "percent": 20}}
    rows = {
        "one": {"settings": {"method.gamma": 0, "method.mask.kind": "none"}},
        "two": {"settings": {}},
    }
    one, two = entries(read_plan(written(settings=settings, rows=rows)))
    assert (one.config.method.gamma, one.config.method.mask.kind) == (0, "none")
    assert (two.config.method.gamma, two.config.method.mask.kind) == (1, "prominence")


def test_the_work_is_done_once_and_kept():
    plan, here, told = read_plan(written()), Here(), []
    assert carry_out_plan(plan, Path("out"), here, tell=told.append) == []
    assert here.given == ["natural-seed0", "at-seed0", "ard-seed0"]
    assert told == [f"{name}: done" for name in here.given]
    start = RunFolder.open("runs/at-seed0").config.start
    assert Path(start) == Path("runs/natural-seed0")
    record = json.loads(Path("out/runs/ard-seed0.json").read_text())
    assert record["config"]["method"]["teacher"]["path"] == "run:at"
    assert record["note"] == "a student"
    best = RunFolder.open("runs/ard-seed0").status().best.epoch
    expected = ["best"] if best == 2 else ["best", "last"]
    assert [r["model"]["checkpoint"] for r in record["evaluations"]] == expected
    assert len(record["metrics"]) == len(record["timing"]) == 2

    again = Here()
    told.clear()
    assert carry_out_plan(plan, Path("out"), again, tell=told.append) == []
    assert again.given == []
    assert told[0] == "natural-seed0: done before"


def test_results_are_enough_where_the_runs_are_gone():
    plan = read_plan(written())
    carry_out_plan(plan, Path("out"), Here(), only=["at"])
    Path("runs").rename("elsewhere")
    again = Here()
    assert carry_out_plan(plan, Path("out"), again, only=["at"]) == []
    assert again.given == []


def test_a_run_that_others_need_is_trained_again_where_only_its_result_is_there():
    plan = read_plan(written())
    carry_out_plan(plan, Path("out"), Here(), only=["at"])
    write_tables(plan, Path("out"))
    Path("out/runs").rename("results-elsewhere")
    Path("runs").rename("elsewhere")
    again, told = Here(), list[str]()
    assert carry_out_plan(plan, Path("out"), again, tell=told.append) == []
    assert again.given == ["natural-seed0", "at-seed0", "ard-seed0"]
    assert "need their weights, which are not in runs: 'at-seed0', 'natural-seed0'; " in told[0]
    # Where the run is not needed any more, its result is enough.
    Path("runs").rename("elsewhere-too")
    last = Here()
    assert carry_out_plan(plan, Path("out"), last, tell=told.append) == []
    assert last.given == []
    assert sum("trained again" in line for line in told) == 1


def test_runs_are_enough_where_the_results_are_gone():
    """Nothing is trained or attacked a second time."""
    plan = read_plan(written())
    carry_out_plan(plan, Path("out"), Here(), only=["at"])
    first = json.loads(Path("out/runs/at-seed0.json").read_text())
    before = Path("runs/at-seed0/checkpoints/last.safetensors").stat().st_mtime_ns
    carry_out_plan(plan, Path("other"), Here(), only=["at"])
    assert json.loads(Path("other/runs/at-seed0.json").read_text()) == first
    assert Path("runs/at-seed0/checkpoints/last.safetensors").stat().st_mtime_ns == before


def test_an_evaluation_that_was_added_is_made_up_for():
    carry_out_plan(read_plan(written()), Path("out"), Here(), only=["natural"])
    more = [*PLAN["evaluations"], {"attacks": ["cw"], "limit": 10, "seeds": [0]}]
    plan = read_plan(written(evaluations=more))
    here = Here()
    carry_out_plan(plan, Path("out"), here, only=["natural"])
    assert here.given == ["natural-seed0"]
    record = json.loads(Path("out/runs/natural-seed0.json").read_text())
    assert [r["data"]["n"] for r in record["evaluations"] if "cw" in r["attacks"]] == [10]
    elsewhere = [*PLAN["evaluations"], {"attacks": ["cw"], "limit": 9, "rows": ["at"]}]
    (entry,) = (e for e in entries(plan) if e.label == "natural")
    assert is_done(read_plan(written(evaluations=elsewhere)), entry, Path("out"))


def test_only_an_evaluation_of_what_is_asked_for_counts() -> None:
    carry_out_plan(read_plan(written()), Path("out"), Here(), only=["natural"])
    run = Path("runs/natural-seed0")
    (entry,) = (e for e in entries(read_plan(written())) if e.label == "natural")

    def done(**measured: Any) -> bool:
        wanted = [{"attacks": ["noise"], **measured}]
        results = RunFolder.open(run).evaluations()
        (m,) = read_plan(written(evaluations=wanted)).evaluations
        record = RunRecord(format="cure-run-1", config={}, evaluations=results)
        kept, packed = (
            answer(each.evaluations, m.of("best"), entry.config)
            for each in (record, summary(record))
        )
        assert (kept is None) == (packed is None)
        return kept is not None

    evaluate = functools.partial(cure.evaluate, run, attacks=["noise"])
    evaluate(epsilon="4/255")  # within another ball than the run's
    evaluate(data_options={"split_seed": 1})  # on other images than the run's
    evaluate(seed=1)
    evaluate(precision="bf16_attack")
    evaluate(limit=15)
    assert (done(limit=15), done(), done(limit=16), done(limit=1000)) == (True, False, False, False)
    evaluate(limit=1000)  # there are fewer images
    assert (done(), done(limit=1000), done(limit=999), done(limit=16)) == (True, True, True, False)


def test_attacks_of_a_plan_may_be_spelt_otherwise() -> None:
    plan = read_plan(written(evaluations=[{"attacks": ["pgd-2"], "limit": 20}]))
    assert plan.evaluations[0].attacks == ("pgd2",)


def test_a_run_that_was_stopped_goes_on(monkeypatch):
    from cure.errors import Interrupted
    from cure.training.trainer import Trainer

    plan = read_plan(written())
    (entry,) = (e for e in entries(plan) if e.label == "natural")
    original = Trainer._finish_epoch

    def interrupting(self: Trainer, number: int, *arguments: Any) -> None:
        original(self, number, *arguments)
        if number == 1:
            self._interrupt()

    monkeypatch.setattr(Trainer, "_finish_epoch", interrupting)
    with pytest.raises(Interrupted):
        work(plan, entry, Path("out"))
    assert not result_path(Path("out"), entry).exists()
    monkeypatch.setattr(Trainer, "_finish_epoch", original)
    work(plan, entry, Path("out"))
    whole = read_plan(written(runs="whole"))
    work(whole, entry, Path("other"))
    weights = [
        load_file(f"{runs}/natural-seed0/checkpoints/last.safetensors")
        for runs in ("runs", "whole")
    ]
    assert all((value == weights[1][key]).all() for key, value in weights[0].items())


def test_a_failure_keeps_only_what_needs_it_from_being_done():
    rows = {
        **PLAN["rows"],
        "at": {"settings": {"method": "at", "training.optimizer.learning_rate": 1e30}},
        "trades": {"settings": {"method": "trades"}},
    }
    plan, here = read_plan(written(rows=rows)), Here()
    failures = carry_out_plan(plan, Path("out"), here)
    assert here.given == ["natural-seed0", "at-seed0", "trades-seed0"]
    assert len(failures) == 2
    assert "stopped being finite" in failures[0]
    assert failures[1] == "ard-seed0: needs at, which failed"
    assert result_path(Path("out"), next(e for e in entries(plan) if e.label == "trades")).exists()


def test_only_some_rows_and_seeds():
    rows = {label: {**row, "seeds": [0, 1]} for label, row in PLAN["rows"].items()}
    plan, here = read_plan(written(rows=rows)), Here()
    carry_out_plan(plan, Path("out"), here, only=["at"], seeds=[1])
    assert here.given == ["natural-seed1", "at-seed1"]


def test_a_seed_that_no_asked_row_has_is_refused(command: Command):
    refused(command("table", written(seeds=[0, 1]), "--seeds", "1,5"), "--seeds", "5", "0, 1")
    rows = {**PLAN["rows"], "ard": {**PLAN["rows"]["ard"], "seeds": [1]}}
    path = written(rows=rows, seeds=[0, 1])
    refused(command("table", path, "--only", "ard", "--seeds", "0"), "--seeds", "some of 1")
    assert not Path("runs").exists()


def test_a_folder_of_results_in_the_home_directory(monkeypatch, command: Command):
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    rows = {"natural": PLAN["rows"]["natural"]}
    ended = command("table", written(rows=rows, runs="~/runs"), "--output", "~/out")
    assert ended.status == 0, ended
    assert Path("home/out/table.md").is_file()
    assert Path("home/runs/natural-seed0").is_dir()
    assert not Path("~").exists()


# -- who works -----------------------------------------------------------------------------------


def test_processes_of_this_machine_give_the_same_bits():
    rows = {label: PLAN["rows"][label] for label in ("natural", "at")}
    rows["trades"] = {"settings": {"method": "trades"}}
    plan = read_plan(written(rows=rows))
    assert carry_out_plan(plan, Path("out"), LocalExecutor(2)) == []
    carry_out_plan(read_plan(written(rows=rows, runs="here")), Path("other"), Here())
    for name in ("at-seed0", "trades-seed0"):
        ends = [
            load_file(f"{runs}/{name}/checkpoints/last.safetensors") for runs in ("runs", "here")
        ]
        assert all((value == ends[1][key]).all() for key, value in ends[0].items())


def test_a_failure_in_another_process_is_one_sentence():
    rows = {
        "natural": {
            "settings": {
                "method": "natural",
                "start": "scratch",
                "training.optimizer.learning_rate": 1e30,
            }
        }
    }
    plan = read_plan(written(rows=rows, settings={**PLAN["settings"], "start": "scratch"}))
    (failure,) = carry_out_plan(plan, Path("out"), LocalExecutor(1))
    assert failure.startswith("natural-seed0: the loss or the weights stopped being finite")


def test_what_is_cancelled_is_none_of_the_user_s_own_processes() -> None:
    own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    own.start()
    try:
        LocalExecutor(1).cancel()
        own.join(1)
        assert own.is_alive()
    finally:
        own.kill()
        own.join()


@pytest.mark.parametrize(
    ("kind", "told"),
    [(LocalExecutor, "the runs are stopped; the same command goes on"), (Here, "jobs of the clus")],
)
def test_a_stop_is_told(kind, told, monkeypatch):
    def submit(*_):
        raise KeyboardInterrupt

    executor = kind(1) if kind is LocalExecutor else kind()
    monkeypatch.setattr(executor, "submit", submit)
    with pytest.raises(Interrupted, match=told):
        carry_out_plan(read_plan(written()), Path("out"), executor)


@pytest.mark.parametrize("way", ["background", "terminated"])
def test_a_plan_that_is_stopped_stops_what_runs_and_begins_nothing_more(way):
    """By Ctrl-C where the shell had it ignored, and by SIGTERM to the command alone."""
    rows = {
        "natural": {"settings": {"method": "natural", "start": "scratch"}},
        "slow": {
            "settings": {"method": "at", "training.epochs": 500, "training.validate_every": 500}
        },
        "later": {"settings": {"method": "trades"}},
    }
    words = [sys.executable, "-m", "cure", "table", str(written(rows=rows))]
    process = subprocess.Popen(
        words,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN if way == "background" else signal.SIG_DFL
        ),
    )
    metrics = Path("runs/slow-seed0/metrics.jsonl")
    began = time.monotonic()
    while not metrics.exists() and time.monotonic() < began + 120:
        time.sleep(0.1)
    if way == "terminated":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert RunFolder.open("runs/slow-seed0").status().state == "stopped"
    assert not Path("runs/later-seed0").exists()
    assert not Path("runs/slow-seed0.json").exists()


def test_submitit_s_local_cluster():
    pytest.importorskip("submitit")
    rows = {"natural": PLAN["rows"]["natural"]}
    plan = read_plan(written(rows=rows))
    executor = cluster_executor("local", Path("runs/jobs"), {"timeout_min": 5})
    assert carry_out_plan(plan, Path("out"), executor) == []
    assert Path("out/runs/natural-seed0.json").exists()
    assert list(Path("runs/jobs").glob("*.out"))


@pytest.mark.parametrize(
    ("cluster", "options", "words"),
    [("slurn", {}, "slurn"), ("local", {"nodez": 1}, "nodez")],
)
def test_clusters_and_options_that_submitit_does_not_know(cluster, options, words):
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=words):
        cluster_executor(cluster, Path("jobs"), options)


# -- tables --------------------------------------------------------------------------------------


def test_tables_and_differences_to_the_reference(command: Command):
    rows = {label: PLAN["rows"][label] for label in ("natural", "at")}
    rows["trades"] = {"settings": {"method": "trades"}, "note": "beta 6"}
    changes = {"rows": rows, "seeds": [0, 1], "reference": "at"}
    path = written(**changes)
    plan = read_plan(path)
    assert write_tables(plan, Path("out")) is None
    carry_out_plan(plan, Path("out"), Here())
    ended = command("table", path, "--output", "out")
    assert ended.status == 0, ended.err
    assert ended.out.count("done before") == 6
    content = json.loads(Path("out/table.json").read_text())
    assert {(r["label"], r["seed"]) for r in content["rows"]} == {
        (label, seed) for label in rows for seed in (0, 1)
    }
    by = {(r["label"], r["seed"]): r for r in content["rows"]}
    for (label, seed), row in by.items():
        record = json.loads(Path(f"out/runs/{label}-seed{seed}.json").read_text())
        best = next(r for r in record["evaluations"] if r["model"]["checkpoint"] == "best")
        assert row["natural"] == best["natural"]["accuracy"]
        assert row["pgd2"] == best["attacks"]["pgd2"]["accuracy"]
        assert row["seconds_per_epoch"] > 0
        assert row["peak_memory_mib"] > 50
    text = Path("out/table.md").read_text()
    text, after = text.split("Differences to at")
    mean = sum(by["trades", s]["natural"] - by["at", s]["natural"] for s in (0, 1)) / 2
    line = next(line for line in after.splitlines() if line.startswith("| trades | 2 |"))
    assert f"{mean:+.1f} (" in line
    assert "- trades: beta 6" in after


@pytest.mark.parametrize("best", [1, 2])
def test_a_plan_of_last_checkpoints_evaluates_the_last_one_also_where_it_is_the_best(
    best: int, monkeypatch: pytest.MonkeyPatch
):
    from cure.training.trainer import Trainer

    accuracies = iter([10.0, 20.0 if best == 2 else 5.0])
    monkeypatch.setattr(
        Trainer, "validate", lambda self: dict.fromkeys(("natural", "robust"), next(accuracies))
    )
    only_last = [{"attacks": ["pgd2"], "limit": 20, "checkpoints": ["last"]}]
    rows = {"natural": PLAN["rows"]["natural"]}
    plan = read_plan(written(evaluations=only_last, rows=rows))
    assert carry_out_plan(plan, Path("out"), Here()) == []
    assert RunFolder.open("runs/natural-seed0").status().best.epoch == best
    shown = write_tables(plan, Path("out"))
    assert shown is not None
    assert [(row["checkpoint"], row["epoch"]) for row in shown.rows] == [("last", 2)]
    again = Here()
    carry_out_plan(plan, Path("out"), again)
    assert again.given == []


def test_the_packed_figures_are_enough_for_the_tables():
    rows = {label: PLAN["rows"][label] for label in ("natural", "at")}
    plan = read_plan(written(rows=rows, seeds=[0, 1], reference="natural"))
    carry_out_plan(plan, Path("out"), Here())
    assert write_tables(plan, Path("out")) is not None
    before = {name: Path("out", name).read_text() for name in ("table.md", "records.jsonl")}
    shutil.rmtree("out/runs")
    shutil.rmtree("runs")
    again = Here()
    assert carry_out_plan(plan, Path("out"), again) == []
    assert again.given == []
    assert write_tables(plan, Path("out")) is not None
    assert {name: Path("out", name).read_text() for name in before} == before
    changed = before["records.jsonl"].replace('"seed":1', '"seed":3')
    Path("out/records.jsonl").write_text(changed)
    with pytest.raises(CheckpointError, match=r"records\.jsonl is damaged"):
        write_tables(plan, Path("out"))


def test_a_row_replaces_what_the_plan_sets() -> None:
    plan = written(
        settings={"training.batch_size": 8, "method.beta": 3, "training.min_steps": 9},
        rows={"a": {"settings": {"training": {"epochs": 2}, "method": "at"}}},
        recipe="digits",
        evaluations=[],
    )
    (entry,) = entries(read_plan(plan))
    assert entry.settings.keys() == {"training", "method", "seed", "name"}
    training = entry.config.training
    assert (training.epochs, training.batch_size, training.min_steps) == (2, 128, None)


def test_packed_figures_of_other_rows_are_kept() -> None:
    plan = read_plan(written(rows={"natural": PLAN["rows"]["natural"]}))
    carry_out_plan(plan, Path("out"), Here())
    write_tables(plan, Path("out"))
    packed = Path("out/records.jsonl")
    other = {"other-seed0": read_packed(packed)["natural-seed0"]}
    write_packed(packed, other)
    assert write_tables(plan, Path("out")) is not None
    assert list(read_packed(packed)) == ["natural-seed0", "other-seed0"]
    assert read_packed(packed)["other-seed0"] == other["other-seed0"]


def test_a_plan_that_is_stopped_midway_still_has_a_table():
    plan = read_plan(written())
    carry_out_plan(plan, Path("out"), Here(), only=["natural"])
    shown = write_tables(plan, Path("out"))
    assert shown is not None
    assert [row["label"] for row in shown.rows] == ["natural"]


@pytest.mark.parametrize("name", ["front", "evaluate_in_shards"])
def test_a_script_that_its_processes_would_run_again(name: str, tmp_path: Path):
    tiny = ["start=scratch", "data.limit=100", "data.validation=20", "training.epochs=1"]
    call = {
        "front": f"cure.front('at', 'digits', {tiny}, values={{'at': [0, 0.5]}}, folder='f')",
        "evaluate_in_shards": "cure.evaluate_in_shards('run', 2, output='result.json')",
    }[name]
    (tmp_path / "script.py").write_text(f"import cure\n{call}\n")
    words = [sys.executable, "script.py"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if "cure.experiments" in line]
    assert 'the call under `if __name__ == "__main__":`' in said[-1]
    assert "failed" not in said[-1]
    assert "freeze_support" not in ended.stderr
    assert ended.stderr.count("Traceback") == 2, "of one process and of the script"


def killed() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def test_a_process_that_is_killed_is_told_in_one_sentence():
    with pytest.raises(CureError, match="was killed, for want of memory or by a signal"):
        LocalExecutor(1).submit(killed).result()


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rows": {"at": {"settings": {"method": "att", "start": "scratch"}}}},
            ["row at", "did you mean 'at'"],
        ),
        ({"rows": {"at": {"settings": {"start": "run:nobody"}}}}, ["row at", "nobody"]),
        ({"rows": {"at": {"settings": {"start": "run:at"}}}}, ["at", "circle"]),
        ({"rows": {"at": {"stings": {}}}}, ["rows.at: unknown key 'stings'", "'settings'"]),
        ({"rows": {"at": None}}, ["rows.at: ", "got None"]),
        ({"rows": {}}, ["rows: expected one row or more"]),
        ({"seeds": [0, 1, 0]}, ["seeds: expected one seed or more, each once, got 0, 1, 0"]),
        ({"seeds": []}, ["seeds: expected one seed or more, each once, got none"]),
        ({"rows": {"at": {"seeds": []}}}, ["rows.at.seeds", "got none"]),
        ({"evaluations": [{"limt": 4}]}, ["evaluations.0: unknown key 'limt'", "'limit'"]),
        ({"evaluations": [{"limit": 0}]}, ["evaluations.0.limit", "greater than 0", "got 0"]),
        ({"recipe": "digit"}, ["unknown recipe", "digits"]),
        ({"reference": "nobody"}, ["reference", "nobody"]),
        ({"evaluations": [{"attacks": ["pgd"]}]}, ["pgd"]),
        ({"evaluations": [{"rows": ["nobody"]}]}, ["evaluations.rows", "nobody"]),
        ({"name": "a/b"}, ["name"]),
        ({"settings": {"training.epochs": 0}}, ["training.epochs"]),
    ],
)
def test_plans_that_mean_nothing(command: Command, change, words):
    refused(command("table", written(**change)), *words)
    assert not Path("runs").exists()


def test_a_needed_row_that_leaves_the_seed_out(command: Command):
    rows = {**PLAN["rows"], "at": {"settings": {"method": "at"}, "seeds": [1]}}
    refused(command("table", written(rows=rows)), "ard", "run:at of seed 0")


def test_files_that_are_no_plan(command: Command):
    refused(command("table", "nowhere.yaml"), "nowhere.yaml", "cannot be read")
    Path("bad.yaml").write_text("a: [")
    refused(command("table", "bad.yaml"), "not valid YAML")
    Path("list.yaml").write_text("[1]")
    refused(command("table", "list.yaml"), "list.yaml", "name, recipe and rows", "[1]")


@pytest.mark.parametrize(
    "words", [["--jobs", "0"], ["--seeds", "a"], ["--only", "nobody"], ["--cluster", "slurn"]]
)
def test_options_that_mean_nothing(command: Command, words):
    refused(command("table", written(), *words), words[1])
    assert not Path("runs/natural-seed0").exists()


def test_results_made_with_other_settings_are_kept(command: Command):
    plan = read_plan(written())
    carry_out_plan(plan, Path("out"), Here(), only=["natural"])
    before = Path("out/runs/natural-seed0.json").read_bytes()
    settings = {**PLAN["settings"], "training.epochs": 3}
    path = written(settings=settings)
    refused(command("table", path, "--output", "out"), "training.epochs 2", "this call says 3")
    assert Path("out/runs/natural-seed0.json").read_bytes() == before
    # Nor is a run folder of other settings taken for the plan's.
    failures = carry_out_plan(read_plan(path), Path("fresh"), Here(), only=["natural"])
    assert "training.epochs 2" in failures[0]


def test_a_result_older_than_a_setting_has_its_default():
    plan = read_plan(written())
    carry_out_plan(plan, Path("out"), Here(), only=["natural"])
    path = Path("out/runs/natural-seed0.json")
    record = json.loads(path.read_text())
    del record["config"]["training"]["clip_norm"]
    del record["config"]["attack"]["steps"]  # Here the plan differs from the default of 10.
    path.write_text(json.dumps(record))
    (entry,) = (e for e in entries(plan) if e.label == "natural")
    with pytest.raises(ConfigError, match=r"attack\.steps 10, this call says 1"):
        is_done(plan, entry, Path("out"))
    record["config"]["attack"]["steps"] = 1
    path.write_text(json.dumps(record))
    assert is_done(plan, entry, Path("out"))


def test_a_result_that_is_damaged(command: Command):
    Path("out/runs").mkdir(parents=True)
    Path("out/runs/natural-seed0.json").write_text("{")
    ended = command("table", written(), "--output", "out")
    refused(ended, "natural-seed0.json", "cannot be read as JSON")


def test_a_number_of_validation_images_that_the_source_replaces_is_no_other_setting() -> None:
    """The source has a validation split of 24 images, so the 50 of the plan are not used."""
    splits = {"train": bright_or_dark(256), "val": bright_or_dark(24), "test": bright_or_dark(32)}
    arrays = {f"x_{k}": v.image.permute(0, 2, 3, 1).numpy() for k, v in splits.items()}
    np.savez("own.npz", **arrays, **{f"y_{k}": v.label.numpy() for k, v in splits.items()})
    settings = PLAN["settings"] | {"data.source": str(Path("own.npz").resolve())}
    rows = {"natural": PLAN["rows"]["natural"]}
    plan = read_plan(written(settings=settings, rows=rows))
    assert carry_out_plan(plan, Path("out"), Here()) == []
    assert carry_out_plan(plan, Path("out"), Here()) == []
    shutil.rmtree("out")
    assert carry_out_plan(plan, Path("out"), Here()) == []
    assert RunFolder.open("runs/natural-seed0").validation_images() == 24
