"""Settings that vary: which trials there are, who does them, and what is told of them."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import cure
from cure.analysis.sensitivity import view
from cure.errors import ConfigError, Interrupted
from cure.experiments import sweep
from cure.experiments.pareto import undominated
from cure.experiments.sweep import Varied, fitting, read_varied
from cure.methods import METHODS
from cure.recipe import load_recipe, read_recipe, recipe_names
from cure.runs.folder import RunFolder
from cure.utils.stats import rank_correlation
from helpers import Command, refused

WORDS = [
    "data.limit=160",
    "data.validation=0.375",
    "model.options.width=2",
    "attack.steps=1",
    "natural.epochs=1",
    "training.epochs=2",
    "training.batch_size=32",
    "training.validation_steps=1",
    "training.threads=1",
    "training.collapse_patience=100",
    "training.optimizer.learning_rate=0.05",
]
CURE = [*WORDS, "method=cure", "method.revision={rate: 1.0, horizon: 1.0}"]
GRID = ["--vary", "method.percent=10:50", "--vary", "method.mask.kind=random,none", "--grid", "2"]
VARY = ["--vary", "method.beta=1:6"]
SCRATCH = [*WORDS, "method=trades", "start=scratch"]


def told(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "sensitivity.json").read_text())
    return result


# Numbers.


def test_rank_correlation_is_spearmans() -> None:
    draws = np.random.default_rng(0)
    x = draws.integers(0, 6, 30).astype(float)
    y = x + draws.normal(0, 2, 30).round()
    found = rank_correlation(list(x), list(y))
    assert found is not None
    assert found["rho"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    low, high = found["interval"]
    assert -1 < low < found["rho"] < high < 1
    assert rank_correlation([1, 2, 3, 4], [8, 4, 2, 1]) == {"rho": -1, "interval": [-1, -1], "n": 4}
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_the_interval_of_a_rank_correlation_holds_the_truth() -> None:
    """Normal pairs of correlation 0.6 have a rank correlation of (6 / pi) asin(0.3) = 0.582."""
    draws = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        x, noise = draws.normal(size=(2, 25))
        found = rank_correlation(list(x), list(0.6 * x + 0.8 * noise))
        assert found is not None
        low, high = found["interval"]
        held += low < 0.582 < high
    assert 925 <= held <= 980


@pytest.mark.parametrize(
    ("word", "points"),
    [
        ("k=10:50", [10, 30, 50]),
        ("k=0.1:10:log", [0.1, 1, 10]),
        ("k=1/255:3/255", [1 / 255, 2 / 255, 3 / 255]),
        ("k=a,2,true", ["a", 2, True]),
    ],
)
def test_what_varies_over_which_points(word: str, points: list[Any]) -> None:
    assert read_varied(word).points(3) == [
        pytest.approx(p) if isinstance(p, float) else p for p in points
    ]


@pytest.mark.parametrize(
    "word", ["k", "k=", "=1:2", "k=3", "k=2:1", "k=0:1:log", "k=a:b", "k=1:2:3", "k=1,1", "k=1,{}"]
)
def test_a_word_that_says_no_range(word: str) -> None:
    with pytest.raises(ConfigError, match="vary: expected KEY=LOW:HIGH"):
        read_varied(word)


def test_whole_numbers_stay_whole() -> None:
    raw = read_recipe("digits")
    words = ["attack.steps=1:4", "method.percent=10:50", "training.epochs=1:2"]
    steps, percent, epochs = fitting(raw, [read_varied(word) for word in words], "digits")
    assert (steps.whole, percent.whole, epochs.whole) == (True, False, True)
    assert steps.points(3) == [1, 2, 4], "2.5 is rounded to the even 2"
    assert epochs.points(3) == [1, 2]
    assert Varied("k", low=2.0, high=6.0).points(1) == [4.0]


@pytest.mark.parametrize(
    "recipe", [name for name in recipe_names() if "cure" in name or "di" in name]
)
def test_what_cure_varies_by_itself_fits_its_recipes(recipe: str) -> None:
    words = [f"method.{word}" for word in load_recipe(recipe).method.sweep()]
    keys = [one.key for one in fitting(read_recipe(recipe), list(map(read_varied, words)), recipe)]
    assert keys[:4] == [f"method.{name}" for name in ("percent", "alpha", "gamma", "revision.rate")]
    assert keys[4] in ("method.revision.decay", "method.revision.horizon")
    assert METHODS["at"].Config(name="at").sweep() == ()


# Trials.


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of four, killed in the second trial and gone on with by the same command."""
    work = tmp_path_factory.mktemp("grid")
    words = ["cure", "analyse", "sensitivity", "digits", *CURE, *GRID, "--output", "out"]
    killing = f"""
import os, signal, sys
from cure.cli.main import main
from cure.runs.folder import RunFolder
append = RunFolder.append
def dying(self, line):
    append(self, line)
    if self.path.name == "trial-0001" and line.file == "timing.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.append = dying
sys.argv = {words!r}
main()
"""
    done = subprocess.run([sys.executable, "-c", killing], cwd=work, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (work / "out" / "sensitivity.json").exists()
    first = work / "out" / "runs" / "trial-0000" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    killed = RunFolder.open(work / "out" / "runs" / "trial-0001")
    assert (killed.status().state, len(killed.metrics())) == ("running", 1)
    begun = (killed.path / "environment.json").read_bytes()
    again = [sys.executable, "-m", *words]
    done = subprocess.run(again, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before, "a finished trial is not done again"
    assert (killed.path / "environment.json").read_bytes() == begun, "an interrupted one goes on"
    (work / "printed").write_text(done.stdout)
    return work


def test_a_grid_has_every_combination_once(grid: Path) -> None:
    result = told(grid / "out")
    assert [trial["settings"] for trial in result["trials"]] == [
        {"method.percent": percent, "method.mask.kind": kind}
        for percent in (10.0, 50.0)
        for kind in ("random", "none")
    ]
    assert [trial["state"] for trial in result["trials"]] == ["finished"] * 4
    assert len(list((grid / "out" / "runs").glob("trial-*"))) == 4


def test_the_accuracies_are_those_of_the_runs_on_validation_images(grid: Path) -> None:
    result = told(grid / "out")
    assert result["data"] == {"name": "digits", "split": "validation", "n": 60}
    for trial in result["trials"]:
        run = RunFolder.open(grid / "out" / "runs" / f"trial-{trial['number']:04}")
        metrics = [line.content() for line in run.metrics()]
        best = next(r for r in metrics if r["epoch"] == trial["epoch"])["validation"]
        assert trial["natural"]["accuracy"] == best["natural"]
        assert trial["robust"]["accuracy"] == best["robust"]
        assert best["robust"] == max(r["validation"]["robust"] for r in metrics)
        assert run.config.start == "out/natural", "the natural start is trained once for all"


def test_the_printed_command_trains_what_the_trial_trained(
    grid: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(grid)
    trial = told(grid / "out")["trials"][3]
    words = shlex.split(trial["command"])
    ended = command(*words[1:], "--run", "chosen", "--quiet")
    assert ended.status == 0, ended.err
    theirs = RunFolder.open(grid / "out" / "runs" / "trial-0003").metrics()
    assert RunFolder.open("chosen").metrics() == theirs


def test_what_is_told_of_it(grid: Path) -> None:
    result = told(grid / "out")
    printed = (grid / "printed").read_text()
    best = [trial for trial in result["trials"] if trial["front"]]
    assert best
    for trial in result["trials"]:
        assert (f": {trial['command']}\n" in printed) == trial["front"]
    assert "The front: digits validation, n = 60" in printed.splitlines()[0]
    assert "4 trials are few" in printed
    assert "so evaluate the chosen run on test images." in printed
    names = {path.name for path in (grid / "out").glob("*.svg")}
    assert names == {"sensitivity-front.svg", "sensitivity-each.svg"}


def test_other_settings_in_the_same_folder_are_refused(grid: Path, command: Command) -> None:
    before = (grid / "out" / "trials.journal").read_bytes()
    start = ["analyse", "sensitivity", "digits", *CURE]
    out = ["--output", grid / "out"]
    refused(command(*start, "seed=1", *GRID, *out), "was begun with other settings")
    refused(command(*start, *GRID[:2], "--grid", "2", *out), "was begun with other varied")
    refused(command(*start, *GRID, "--storage", "x.log", *out), "was begun with other storage")
    refused(command(*start, *GRID, "--output", grid), "holds something else")
    assert (grid / "out" / "trials.journal").read_bytes() == before


def test_no_test_image_is_opened_and_zero_trials_only_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the test split was opened")

    monkeypatch.setattr("cure.data.sources._test", refuse)
    words = ["analyse", "sensitivity", "digits", *SCRATCH, *VARY, "--output", tmp_path / "out"]
    ended = command(*words, "--trials", 1)
    assert ended.status == 0, ended.err
    assert len(told(tmp_path / "out")["trials"]) == 1
    monkeypatch.setattr(sweep, "train", None)
    for count in (0, 1):
        assert command(*words, "--trials", count).status == 0
        assert len(told(tmp_path / "out")["trials"]) == 1


def test_two_workers_share_a_database_without_doing_a_trial_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["analyse", "sensitivity", "digits", *SCRATCH, *VARY, "--trials", 5, "--output", "out"]
    ended = command(*words, "--storage", "sqlite:///shared.db", "--jobs", 2)
    assert ended.status == 0, ended.err
    found = told(tmp_path / "out")["trials"]
    assert [trial["state"] for trial in found] == ["finished"] * 5
    assert len({trial["settings"]["method.beta"] for trial in found}) == 5
    assert all(1 <= trial["settings"]["method.beta"] <= 6 for trial in found)
    assert len(list(Path("out/runs").glob("trial-*"))) == 5
    assert not Path("out/trials.journal").exists()


def test_a_trial_held_by_a_living_worker_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = sweep.Sweep(
        "digits", tuple(SCRATCH), (read_varied("method.beta=1,6"),), 1, 0, 0, None, Path("out")
    )
    sweep.begin(planned)
    study = sweep.open_study(planned)
    home = json.loads(Path("out/sweep.json").read_text())["home"]
    first = sweep._take(planned, study, home)
    second = sweep._take(planned, study, home)
    assert first is not None
    assert second is not None
    assert [first[0].number, second[0].number] == [0, 1]
    assert sweep._take(planned, study, home) is None
    first[1].close()  # As when its process ends, however that ends.
    third = sweep._take(planned, study, home)
    assert third is not None
    assert sweep.run_of(third[0]) == 0
    assert sweep._take(planned, study, "another folder") is None
    second[1].close()
    assert sweep._take(planned, study, "another folder") is None


def test_a_trial_that_ends_while_another_worker_looks_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = sweep.Sweep(
        "digits", tuple(SCRATCH), (read_varied("method.beta=1,6"),), 1, 0, 0, None, Path("out")
    )
    sweep.begin(planned)
    study = sweep.open_study(planned)
    taken = sweep._take(planned, study, json.loads(Path("out/sweep.json").read_text())["home"])
    assert taken is not None
    seen = sweep._latest(study)[0]  # What the other worker has read.
    study.tell(taken[0], [80.0, 50.0])
    taken[1].close()
    sweep._requeue(planned, study, seen)
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    assert states == ["COMPLETE", "WAITING"]


def test_ctrl_c_stops_all_workers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    called_off: list[bool] = []

    class Stopped:
        def __init__(self, jobs: int) -> None:
            assert jobs == 2

        def submit(self, *work: Any) -> Stopped:
            return self

        def result(self) -> str:
            raise KeyboardInterrupt

        def cancel(self) -> None:
            called_off.append(True)

    monkeypatch.setattr("cure.analysis.sensitivity.LocalExecutor", Stopped)
    words = ["analyse", "sensitivity", "digits", *SCRATCH, *VARY, "--output", tmp_path / "out"]
    ended = command(*words, "--jobs", 2)
    assert (ended.status, called_off) == (130, [True])
    assert ended.err == "stopped: the trials are stopped; the same command goes on\n"


def test_equal_trials_are_trained_once_and_are_no_failures(
    tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    words = ["analyse", "sensitivity", "digits", *SCRATCH, "--output", out]
    words.remove("attack.steps=1")
    ended = command(*words, "--vary", "attack.steps=1:2", "--trials", "4")
    assert ended.status == 0, ended.err
    found = told(out)["trials"]
    values = [trial["settings"]["attack.steps"] for trial in found]
    assert len(values) == 4
    first = [values.index(value) == place for place, value in enumerate(values)]
    assert [t["state"] for t in found] == ["finished" if f else "repeated" for f in first]
    assert len(list((out / "runs").glob("trial-*"))) == sum(first)
    assert f"{sum(first)} trials finished, {4 - sum(first)} repeated; " in ended.out


@pytest.mark.parametrize("trials", [[], ["--trials", 4]])
def test_a_few_listed_values_are_all_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: list[Any], command: Command
) -> None:
    out = tmp_path / "out"
    # Every draw of Optuna's would be the first value.
    monkeypatch.setattr("optuna.samplers.TPESampler.sample_independent", lambda *_: 1)
    vary = ["--vary", "attack.steps=1,2", "--vary", "training.epochs=1,2"]
    words = ["analyse", "sensitivity", "digits", *SCRATCH, "--output", out]
    words = [w for w in words if w not in ("attack.steps=1", "training.epochs=2")]
    assert command(*words, *vary, *trials).status == 0
    found = [(t["state"], *t["settings"].values()) for t in told(out)["trials"]]
    assert sorted(found) == [("finished", a, b) for a in (1, 2) for b in (1, 2)]


def test_what_fails_is_told(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    words = ["analyse", "sensitivity", "digits", *SCRATCH, "--output", out]
    varied = ["--vary", "training.optimizer.learning_rate=0.05,1.0e+30"]
    words.remove("training.optimizer.learning_rate=0.05")
    ended = command(*words, *varied)
    assert ended.status == 0, ended.err
    found = told(out)["trials"]
    assert len(found) == 2
    for trial in found:
        bad = trial["settings"]["training.optimizer.learning_rate"] > 1
        assert (trial["state"] == "failed") == bad
        assert ("stopped being finite" in (trial["reason"] or "")) == bad
    assert {bool(t["reason"]) for t in found} == {True, False}


def test_a_batch_that_the_images_do_not_fill_fails_its_trial_alone(
    tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    words = ["analyse", "sensitivity", "digits", *SCRATCH, "--output", out]
    words.remove("training.batch_size=32")
    ended = command(*words, "--vary", "training.batch_size=32,500", "--grid", "2")
    assert ended.status == 0, ended.err
    found = {t["settings"]["training.batch_size"]: t for t in told(out)["trials"]}
    assert found[32]["state"] == "finished"
    assert "at least one batch of 500 images" in found[500]["reason"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "method.betta=1:6"], "unknown key 'betta'; did you mean 'beta'?"),
        (["--vary", "method.beta=-1:6"], "method.beta=-1.0 has a mistake"),
        (["--vary", "method.beta=6"], "expected KEY=LOW:HIGH"),
        (["--vary", "threat.epsilon=0.1:0.2"], "changes what accuracy is measured on or by"),
        (["--vary", "data.limit=100:200"], "changes what accuracy is measured on or by"),
        ([*VARY, *VARY], "method.beta is named twice"),
        (["method.beta=2", *VARY], "method.beta is both set and varied"),
        ([*VARY, "--grid", "2", "--trials", "3"], "got both"),
        ([*VARY, "--grid", "0"], "expected 1 or more values"),
        ([*VARY, "--trials", "-1"], "expected 0 or more"),
        ([*VARY, "--jobs", "0"], "--jobs: expected 1 or more"),
        ([*VARY, "--storage", "nothing://x"], "storage: Optuna cannot use it"),
        ([*VARY, "data.source=nowhere"], "nowhere"),
        ([], "the method trades does not say what to vary"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("analyse", "sensitivity", "digits", *SCRATCH, *words, "--output", "out")
    refused(ended, said)
    assert list(tmp_path.iterdir()) == []


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ["digits", *SCRATCH, *VARY, "--output", tmp_path / "out"]
    refused(command("analyse", "sensitivity", *words), "pip install 'cure-at[sweeps]'")
    assert list(tmp_path.iterdir()) == []


# Telling, from a result alone.


def made_up(points: list[tuple[float, float]], choices: list[str] | None = None) -> dict[str, Any]:
    def part(value: float) -> dict[str, Any]:
        return {"accuracy": value, "interval": [value - 5, value + 5]}

    values: list[Any] = choices or [10.0 * number for number in range(len(points))]
    found = [
        {
            **{"number": number, "settings": {"method.$k$": value}, "state": "finished"},
            **{"reason": None, "natural": part(natural), "robust": part(robust), "epoch": 1},
            **{"front": good, "command": f"cure train x {number}", "seconds": 1.0},
        }
        for number, (value, (natural, robust), good) in enumerate(
            zip(values, points, undominated(points), strict=True)
        )
    ]
    correlation = None if choices else {"rho": -0.9, "interval": [-0.99, -0.5], "n": len(points)}
    return {
        "recipe": "x",
        "data": {"name": "x", "split": "validation", "n": 100},
        "varied": {"method.$k$": {"choices": choices or []}},
        "trials": found,
        "correlations": {"method.$k$": {"natural": correlation, "robust": correlation}},
    }


def test_findings_of_a_planted_front() -> None:
    result = made_up([(80.0, 30.0), (70.0, 40.0), (69.0, 39.0), (60.0, 50.0)])
    result["trials"].append(
        {"number": 4, "settings": {"method.$k$": 1.0}, "state": "failed", "reason": "it fell"}
        | {"natural": None, "robust": None, "front": False, "command": "", "epoch": None}
    )
    shown = view(result)
    assert shown.finding.startswith("4 trials finished, 1 failed; 3 form the Pareto front")
    assert "method.$k$ lowers natural accuracy" in shown.finding
    best, everything, correlations = shown.tables
    assert [row[0] for row in best.rows] == ["0", "1", "3"]
    assert best.rows[0][2:4] == ["80.0 (75.0-85.0)", "30.0 (25.0-35.0)"]
    assert shown.commands == [
        *(("trial 0", "cure train x 0"), ("trial 1", "cure train x 1")),
        ("trial 3", "cure train x 3"),
    ]
    assert everything.rows[-1][-1] == "failed: it fell"
    assert correlations.rows == [["method.$k$", *["-0.90 (-0.99 to -0.50), n = 4"] * 2]]
    drawn = shown.pictures()
    assert "trial 3: natural 60.0 %, robust 50.0 %" in drawn[0].description
    assert "method.$k$" in drawn[1].svg, "a name is text and no formula"


def test_names_for_values_and_nothing_at_all() -> None:
    drawn = view(made_up([(80.0, 30.0), (70.0, 40.0)], ["$\\frac$", "<b>"])).pictures()
    assert "$\\frac$" in drawn[1].svg
    assert "<b>" not in drawn[1].svg
    empty = view(made_up([]))
    assert empty.finding == "No trial has finished yet."
    assert empty.pictures() == []
    assert empty.tables[0].rows == []


def test_the_function_says_what_it_wrote(tmp_path: Path) -> None:
    from cure.analysis.sensitivity import sensitivity

    result = sensitivity(
        "digits", SCRATCH, vary=["method.beta=1:6"], trials=0, output=tmp_path / "out"
    )
    assert result["file"] == str(tmp_path / "out" / "sensitivity.json")
    assert result["trials"] == []
    assert cure.__version__ == result["environment"]["cure"]


def test_a_stop_in_the_natural_start_names_the_command_itself(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path, **_: Any) -> None:
        raise Interrupted(f"continue with `cure resume {path}`")

    monkeypatch.setattr(sweep, "resume", stopped)
    words = ["digits", *CURE, *GRID, "--output", tmp_path / "sweep"]
    ended = command("analyse", "sensitivity", *words)
    assert ended.status == 130, ended
    assert "natural start of the trials; the same command goes on" in ended.err
    assert "cure resume" not in ended.err
