"""benchmarks/gpu.py, which is to run on a rented GPU: each of its pieces, on a processor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cure.evaluation.runner import measure
from cure.runs.folder import RunFolder
from cure.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu

EVALUATION = sys.modules[measure.__module__]
TRAIN = ("--epochs", 2, "--natural-epochs", 1, "--quiet")
EVALUATE = ("--attacks", "pgd20", "--limit", 30, "--batch", 10)


@pytest.fixture(autouse=True)
def own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment in a result quotes the words of the process, which are pytest's."""
    monkeypatch.setattr(sys, "argv", ["gpu.py"])


def call(place: Path, command: str, *words: object) -> int:
    """A piece with the tiny network; its exit status."""
    where = ("--out", place / "runs", "--results", place / "results")
    common = ("--device", "cpu", "--tiny", *where)
    return gpu.main([str(word) for word in (command, *common, *words)])


def figures(place: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "results" / f"{name}.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nothing happened to."""
    place = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    assert call(place, "train", *TRAIN) == 0
    assert call(place, "evaluate", *EVALUATE) == 0
    return place


def interrupt_at(patch: pytest.MonkeyPatch, steps: int) -> None:
    """The alarm of a call whose time is over, during a step."""
    original, done = Trainer.train_step, 0

    def step(self: Trainer, batch: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGALRM)
        return original(self, batch)

    patch.setattr(Trainer, "train_step", step)


def test_interrupted_training_ends_with_the_same_bits(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An epoch has 6 steps: in the natural start, in CURE's second epoch, in TRADES' first.
    for steps, reached in ((3, {"natural"}), (3 + 8, {"natural", "cure"}), (4 + 3, {"trades"})):
        with monkeypatch.context() as patch:
            interrupt_at(patch, steps)
            assert call(tmp_path, "train", *TRAIN) == gpu.LEFT
        states = {name: run["state"] for name, run in figures(tmp_path, "train")["runs"].items()}
        assert reached <= states.keys()
        assert "stopped" in states.values()
    assert call(tmp_path, "train", *TRAIN) == 0

    came, expected = figures(tmp_path, "train"), figures(undisturbed, "train")
    assert list(came["runs"]) == list(expected["runs"]) == list(gpu.RUNS)
    assert len(came["commands"]) == 4
    commands = [entry["command"] for entry in came["commands"]]
    assert all(words.startswith("python benchmarks/gpu.py train ") for words in commands)
    for name, run in came["runs"].items():
        assert run["state"] == "finished"
        assert run["metrics"] == expected["runs"][name]["metrics"]
        for file in ("best", "last"):
            one, other = (
                load_file(place / "runs" / name / "checkpoints" / f"{file}.safetensors")
                for place in (tmp_path, undisturbed)
            )
            assert one.keys() == other.keys()
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_training_is_the_paper_s_from_one_start(undisturbed: Path) -> None:
    runs = figures(undisturbed, "train")["runs"]
    cure = runs["cure"]["settings"]["method"]
    assert (cure["percent"], cure["alpha"], cure["gamma"]) == (30, 0.1, 1)
    assert cure["revision"]["rate"] == 0.2
    assert cure["revision"]["decay"] is None
    for name in ("cure", "trades", "at"):
        settings = runs[name]["settings"]
        assert settings["method"]["name"] == name
        assert settings["start"] == "natural"
        config = RunFolder.open(undisturbed / "runs" / name).config
        assert config.start == str(undisturbed / "runs" / "natural")
        assert settings["training"]["optimizer"]["weight_decay"] == 5e-4
        assert settings["training"]["schedule"]["milestones"] == [0.5, 0.75]
    options = gpu.parser().parse_args(["train"])
    assert gpu.settings("cure", options)["method"]["revision"] == {"rate": 0.2, "horizon": 0.064}


def stop_after(patch: pytest.MonkeyPatch, passes: int) -> None:
    """Time that is up after so many passes of the network."""
    now, asked = EVALUATION.time.monotonic, 0

    class Watch:
        perf_counter = staticmethod(EVALUATION.time.perf_counter)

        @staticmethod
        def monotonic() -> float:
            nonlocal asked
            asked += 1
            return now() if asked <= passes else float("inf")

    patch.setattr(EVALUATION, "time", Watch)


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions."""

    def verdicts(result: dict[str, Any]) -> dict[str, Any]:
        parts = {"natural": result["natural"], **result["attacks"]}
        return {name: {**part, "seconds": None} for name, part in parts.items()}

    return {
        name: {key: verdicts(result) for key, result in results.items()}
        for name, results in found["runs"].items()
    }


def test_an_interrupted_evaluation_ends_with_the_same_verdicts(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*.json"):
        path.unlink()
    statuses = []
    for _ in range(20):
        with monkeypatch.context() as patch:
            stop_after(patch, 30)
            statuses.append(call(tmp_path, "evaluate", *EVALUATE))
        if statuses[-1] == 0:
            break
        last = list(figures(tmp_path, "evaluate")["runs"].values())[-1]
        assert "unfinished" in next(iter(last.values()))
    assert statuses[-1] == 0
    assert statuses.count(gpu.LEFT) > 1
    assert plain(figures(tmp_path, "evaluate")) == plain(figures(undisturbed, "evaluate"))
    assert list(figures(tmp_path, "evaluate")["runs"]) == list(gpu.RUNS)


def test_a_run_of_other_settings_is_not_gone_on_with(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(undisturbed, "train", "--epochs", 3, "--natural-epochs", 1, "--quiet") == 2
    assert "was begun with other settings" in capsys.readouterr().err


def quick_compiler(patch: pytest.MonkeyPatch) -> None:
    """Traces as the real one, without making machine code."""
    real = torch.compile
    patch.setattr(
        torch, "compile", lambda code, **options: real(code, backend="aot_eager", dynamic=False)
    )


def test_an_interrupted_bench_keeps_what_it_has_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--repetitions", 1, "--steps", 1, "--piece-seconds", 0)
    quick += ("--sides", "exact,bf16_compiled")
    quick_compiler(monkeypatch)
    # Its own process, as for users, would import everything again.
    monkeypatch.setattr(gpu.step, "peak_memory", lambda name, net, threads: 100.0 + len(name))
    assert call(tmp_path, "bench", *quick, "--seconds", 0) == gpu.LEFT
    assert figures(tmp_path, "bench")["nets"]["tiny"]["sides"] == {}

    errors: Callable[..., Any] = gpu.step.errors
    with monkeypatch.context() as patch:

        def interrupted(side: str, net: Any) -> Any:
            if side != "exact":
                raise KeyboardInterrupt
            return errors(side, net)

        patch.setattr(gpu.step, "errors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path, "bench", *quick)
    before = figures(tmp_path, "bench")["nets"]["tiny"]["sides"]
    assert list(before) == ["yardstick", "exact"]

    assert call(tmp_path, "bench", *quick) == 0
    found = figures(tmp_path, "bench")["nets"]["tiny"]
    assert {name: found["sides"][name] for name in before} == before
    assert found["sides"].keys() - before.keys() == {"bf16_compiled"}
    assert set(found["thresholds_ms"]) == {"ours", "kthvalue", "sort"}
    exact, lower = found["sides"]["exact"], found["sides"]["bf16_compiled"]
    # A forward pass each for both images, what the attack compares with and its ten steps; and a
    # backward pass for each of these steps, CE(x), CE(x_adv) and both images of the rest.
    assert exact["passes"] == lower["passes"] == {"forward": 13, "backward": 14, "revision": 2}
    assert exact["error"]["largest"] < 0.05
    assert lower["error"]["largest"] > 0

    capsys.readouterr()
    assert call(tmp_path, "report") == 0
    said = capsys.readouterr().out
    assert f"{exact['images_per_second']:.0f} | {exact['ratio']:.2f} (" in said
    assert said == (tmp_path / "results" / "report.md").read_text() + "\n"


def test_a_side_that_fails_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(net: gpu.Net) -> dict[str, Any]:
        raise torch.OutOfMemoryError("not enough\nof it")

    monkeypatch.setattr(gpu, "alone", fails)
    monkeypatch.setattr(gpu, "beside", lambda *arguments: {"peak_memory_mib": 1.0})
    assert call(tmp_path, "bench", "--sides", "exact", "--piece-seconds", 0) == 0
    sides = figures(tmp_path, "bench")["nets"]["tiny"]["sides"]
    assert sides["yardstick"] == {"failed": "OutOfMemoryError: not enough"}
    assert sides["exact"] == {"peak_memory_mib": 1.0}


def test_the_report_has_the_paper_s_row_and_ours(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(undisturbed, "report") == 0
    said = capsys.readouterr().out
    assert "| CURE, paper (resnet18, cifar10) | 200 | - | 86.8 | 54.9 | - | 49.7 |" in said
    for name in gpu.RUNS:
        (result,) = figures(undisturbed, "evaluate")["runs"][name].values()
        part = result["attacks"]["pgd20"]
        row = next(line for line in said.splitlines() if line.startswith(f"| {gpu.NAMES[name]} |"))
        assert f"| {part['accuracy']:.1f} (" in row
        assert "; 30)" in row
    assert "python benchmarks/gpu.py evaluate --device cpu" in said
    assert "## resnet10 on digits" in said
    assert torch.__version__ in said
    assert str(undisturbed) not in said


def test_shards_of_two_calls_come_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"train-0000{number}-of-00002.parquet" for number in (0, 1)]
    names.append("test-00000-of-00001.parquet")
    carried = tmp_path / "carried"
    carried.mkdir()
    for name in names:
        (carried / name).write_bytes(name.encode())
    data = tmp_path / "data"

    def bring(*which: str) -> int:
        return gpu.main(["collect", "--data", str(data), *(str(carried / name) for name in which)])

    assert bring(names[0], names[2]) == 0
    assert capsys.readouterr().out == f"missing: {names[1]}\n"
    assert gpu.main(["train", "--device", "cpu", "--data", str(data)]) == 2
    assert names[1] in capsys.readouterr().err
    assert bring(names[1]) == 0
    assert "complete" in capsys.readouterr().out
    for name in names:
        assert (data / "cifar10" / name).read_bytes() == name.encode()
    (carried / "cats.zip").touch()
    assert bring("cats.zip") == 2
    assert "cats.zip" in capsys.readouterr().err


def test_mistakes_are_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "report") == 2
    assert "holds no results" in capsys.readouterr().err
    assert call(tmp_path, "bench", "--sides", "fp8") == 2
    assert "fp8" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["bench", "--results", str(tmp_path)]) == 2
    assert "'cuda' cannot be used here" in capsys.readouterr().err
