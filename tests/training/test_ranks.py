"""Several processes together do what one does, and end together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_worker import CASES, PLAIN, WITH_BATCH_NORM, evaluated, trained, without_seconds
from safetensors.torch import load_file

import cure
from cure import data
from cure.config import AugmentConfig
from cure.errors import ConfigError
from cure.evaluation.journal import Journal
from cure.runs.folder import RunFolder
from cure.runs.state import load_state
from cure.utils.engine import Engine
from cure.utils.launcher import Launch, launched
from cure.utils.random import draw_for_batch, shared_generator
from helpers import Command, bright_or_dark

WORKER = Path(__file__).with_name("ranks_worker.py")
SETTINGS = [
    f"model.name={PLAIN['name']}",
    "data.limit=400",
    "data.validation=100",
    "natural.epochs=1",
    "training.epochs=2",
    "training.threads=1",
    "training.device=cpu",
    "training.validation_steps=2",
    "training.optimizer.learning_rate=0.02",
    "evaluation.batch_size=32",
    "attack.steps=2",
    "method.revision.horizon=0.9",
    # In float32 the rounding of two ranks can move a score across the percentile, and one weight
    # then learns in one of the runs only.  Masks of ranks are compared in float64, below.
    "method.percent=0",
]


def environment(**more: str) -> dict[str, str]:
    folders = [str(WORKER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"} | more


def together(task: str, folder: Path) -> list[Path]:
    """Two processes that do ``task``; what each of them wrote.

    Gloo can abort when a process ends, so what counts is what was written before.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, str(WORKER), task, str(folder)]
        log = (folder / f"log{rank}").open("w")
        started.append(
            subprocess.Popen(words, env=environment(**own), stdout=log, stderr=subprocess.STDOUT)
        )
    for process in started:
        process.wait(timeout=500)
    return [folder / str(rank) for rank in range(2)]


def torchrun(*words: object, task: str | None = None) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node 2 -m cure WORDS``, or the same with something planted."""
    program = ["-m", "cure"] if task is None else [str(WORKER), task]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*command, *program, *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# -- the parts of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_the_parts_of_a_batch_side_by_side_are_the_batch(world: int) -> None:
    settings: dict[str, Any] = {"batch_size": 24, "epoch": 1, "seed": 3}
    settings["augment"] = AugmentConfig(crop_padding=2, flip=True)
    images = bright_or_dark()
    whole = list(data.epoch(images, **settings, start=1))
    parts = [
        list(data.epoch(images, **settings, start=1, rank=r, world=world)) for r in range(world)
    ]
    assert len(whole) == 3
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert torch.equal(torch.cat([m.image for m in mine]), batch.image)
        assert torch.equal(torch.cat([m.label for m in mine]), batch.label)
        assert torch.equal(torch.cat([m.index for m in mine]), batch.index)
        assert {m.step for m in mine} == {batch.step}
    with pytest.raises(ValueError, match="no 5 equal parts"):
        data.epoch(images, **settings, world=5)


def test_draws_for_a_batch_do_not_depend_on_the_number_of_ranks() -> None:
    def draws(rank: int, world: int, dim: int) -> torch.Tensor:
        generator = shared_generator("cpu", rank, world, 7, "attack", 3)
        shape = [4, 3]
        shape[dim] //= world
        first = draw_for_batch(lambda s: torch.rand(s, generator=generator), shape, generator, dim)
        second = draw_for_batch(
            lambda s: torch.randn(s, generator=generator), shape, generator, dim
        )
        return torch.stack([first, second])

    parts = [draws(rank, 2, 0) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), draws(0, 1, 0))
    assert not torch.equal(*parts)
    thirds = [draws(rank, 3, 1) for rank in range(3)]
    assert torch.equal(torch.cat(thirds, dim=2), draws(0, 1, 1))


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    engine = Engine(torch.device("cpu"), world=3)
    engine.check_batch(12)
    with pytest.raises(ConfigError, match=r"multiple of the 3 ranks .* got 64; say 63 or 66"):
        engine.check_batch(64)
    with pytest.raises(ConfigError, match="say 3 or 6"):
        engine.check_batch(2)


def test_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(word, raising=False)
    assert launched() == Launch(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"launcher .* got WORLD_SIZE=4; start with `torchrun"):
        launched()
    for word, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "a")):
        monkeypatch.setenv(word, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert launched() == Launch(3, 4, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK=4"):
        launched()


# -- two processes -------------------------------------------------------------------------------


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    folders = together("words", tmp_path)
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    found = [json.loads((folder / "words.json").read_text()) for folder in folders]
    assert [f.pop("rank") for f in found] == [0, 1], logs
    assert [f.pop("called") for f in found] == [1, 0], "made on the first only"
    assert found[0] == found[1]
    assert found[0]["world"] == 2
    assert found[0]["first"] == "made on 0"
    assert found[0]["sums"] == [3, 2**51 + 1]
    assert found[0]["largest"] == [0, 1]
    assert found[0]["any"] == [True, False]
    assert found[0]["gather"] == [{"rank": 0}, {"rank": 1}]
    assert found[0]["total"] == [1, 10]
    assert found[0]["agreed"] == ["DataError", "only here"]
    assert found[0]["refused"] == "the first refused"
    # d/dw of w^2 (rank + 1) at w = rank: 0 and 4, on average 2.
    assert found[0]["gradient"] == [[2.0], [0.0] * 5]
    assert found[0]["layout"] is True
    alone = evaluated(Engine(torch.device("cpu"), channels_last=True))
    assert found[0]["evaluated"] == json.loads(json.dumps(alone))
    assert min(alone["attacks"]["planted"]["fooled_by"].values()) > 0, "both parts fool some"
    right = [alone[key]["correct"] for key in ("natural", "worst_case")]
    assert 50 > right[0] > right[1] > 0
    check_stopped(found[0]["stopped"], found[0]["evaluated"], tmp_path)
    assert found[0]["bytes"] == 2 * 3 * 4 * 4 * 4 + 5 * 8, "float32 and float64 once each"


def check_stopped(came: dict[str, Any], whole: dict[str, Any], folder: Path) -> None:
    """Time was up on rank 1 in its 14th forward pass: part b, second round, its batch of three."""
    assert came["first"]["attacks"] == {}
    missing = came["first"]["unfinished"]["planted"]
    assert missing["stopped_in"] == "b"
    first, *lines = [json.loads(line) for line in came["lines"]]
    assert "identity" in first
    batches = [(line["attack"], line["part"], line["batch"]) for line in lines]
    assert batches == [
        *(("planted", "a", batch) for batch in range(5)),
        *(("planted", "b", batch) for batch in range(3)),
        ("cw", "cw", 0),
    ]
    stand = sum(len(v["attacked"]) - len(v["fooled"]) for v in lines if v["part"] == "b")
    assert missing["bounds"] == [100 * stand / 50, 100 * (stand + 3) / 50]
    assert came["again"] == whole
    # One process goes on where two stopped.
    path = folder / "alone"
    path.write_text("\n".join([*came["lines"], ""]))
    with Journal(path, {}) as journal:
        alone = evaluated(Engine(torch.device("cpu"), channels_last=True), journal=journal)
        assert len(journal.results()) > len(lines)
    assert json.loads(json.dumps(alone)) == whole


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What two ranks made of every case, in one launch."""
    return together("methods", tmp_path_factory.mktemp("methods"))


def of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    path = folder / f"{name}.safetensors"
    assert path.exists(), (folder.parent / f"log{folder.name}").read_text()
    return load_file(path)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_does(name: str, both: list[Path], tmp_path: Path) -> None:
    alone, masks = trained(CASES[name], PLAIN, tmp_path)
    ranks = [of(folder, name) for folder in both]
    for rank in ranks:
        if masks:
            assert torch.equal(rank.pop("masks"), torch.cat(masks))
        assert rank.keys() == alone.keys()
        for key, value in alone.items():
            assert (rank[key].double() - value.double()).abs().max() < 1e-12, key
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), key
    # It learnt, so that the same weights are not those of the start.
    assert {value.dtype for key, value in alone.items() if "conv1.weight" in key} == {torch.float64}
    assert len({value.item() for key, value in alone.items() if key.endswith("/loss")}) == 4


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_with_batch_norm_both_ranks_are_in_one_state(name: str, both: list[Path]) -> None:
    """Each normalises by its own images; what is kept of them is the same, to the bit."""
    one, other = (of(folder, f"{name} with BatchNorm") for folder in both)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    assert one["model.bn1.running_mean"].abs().sum() > 0


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to."""
    path = tmp_path_factory.mktemp("ranks") / "run"
    ended = torchrun("train", "digits", *SETTINGS, "--folder", path)
    assert RunFolder.open(path).status().state == "finished", ended.stderr
    (path.parent / "out").write_text(ended.stdout)
    (path.parent / "err").write_text(ended.stderr)
    return path


def files(run: Path) -> set[str]:
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith(".lock")}


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{name}.safetensors")


def assert_close_runs(one: Path, other: Path) -> None:
    """The same course of training, up to the rounding of float32."""
    for part in ("natural", "."):
        mine, theirs = (RunFolder.open(run / part).metrics() for run in (one, other))
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.step == b.step
            assert a.train == pytest.approx(b.train, rel=1e-3, abs=1e-4)
            # One image of 100 may lie on the border.
            assert a.validation is not None
            assert b.validation is not None
            theirs_measured = b.validation.content()
            assert a.validation.content() == pytest.approx(theirs_measured, abs=1.01)
        for key, value in weights(one / part).items():
            torch.testing.assert_close(value, weights(other / part)[key], rtol=1e-3, atol=1e-4)


def test_a_run_of_two_ranks_is_that_of_one_process(undisturbed: Path, tmp_path: Path) -> None:
    alone = cure.train("digits", SETTINGS, run=tmp_path / "alone", quiet=True).path
    assert_close_runs(undisturbed, alone)
    assert files(undisturbed) == files(alone)
    learnt = RunFolder.open(undisturbed).metrics()
    assert learnt[-1].train["loss"] != learnt[0].train["loss"]
    assert [line.ranks for line in RunFolder.open(undisturbed).timing()] == [2, 2]
    said = [(undisturbed.parent / name).read_text() for name in ("out", "err")]
    assert said[0].count("run folder:") == 1, "only the first rank speaks"
    assert said[1].count("digits epoch 1/2") == 1


def test_an_evaluation_by_two_ranks_is_that_of_one_process(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    words = ("--attacks", "pgd3,cw", "--limit", 100, "--batch-size", 16, "--device", "cpu")
    # Time that is up before the first attack: all ranks stop, the first one says it.
    ended = torchrun("evaluate", run, *words, "--time-limit", "0.001")
    assert ended.returncode != 0
    assert ended.stderr.count("unfinished: pgd3 ran out of time") == 1, ended.stderr
    assert ended.stderr.count("the same command goes on") == 1
    assert [path.suffix for path in (run / "evaluations").iterdir()] == [".partial"]
    ended = torchrun("evaluate", run, *words)
    assert [path.suffix for path in (run / "evaluations").iterdir()] == [".json"]
    found = [result.content() for result in RunFolder.open(run).evaluations()]
    assert len(found) == 1, ended.stderr
    options: dict[str, Any] = {"attacks": "pgd3,cw", "limit": 100, "batch_size": 16}
    alone = cure.evaluate(undisturbed, **options, device="cpu")
    for part in ("natural", "attacks", "worst_case", "nrr", "data", "model"):
        assert without_seconds(found[0][part]) == json.loads(
            json.dumps(without_seconds(alone[part]))
        )
    # By one rank: the table of accuracies and that of accuracies by class.
    assert ended.stdout.count("pgd3") == 2


@pytest.fixture(scope="module")
def stopped(undisturbed: Path) -> Path:
    """The same run, of which rank 1 alone was sent a signal in its sixth step."""
    path = undisturbed.parent / "stopped"
    ended = torchrun("train", "digits", *SETTINGS, "--folder", path, task="signal")
    assert f"cure resume {path}" in ended.stderr, ended.stderr
    return path


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    undisturbed: Path, stopped: Path, tmp_path: Path
) -> None:
    # The natural start has four steps and is not disturbed.
    assert RunFolder.open(stopped).status().state == "stopped"
    assert load_state(stopped / "checkpoints" / "state.safetensors")["done"] == 6
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    ended = torchrun("resume", run)
    assert RunFolder.open(run).status().state == "finished", ended.stderr
    assert "this run was on" not in ended.stderr
    for part in ("natural", "."):
        for name in ("best", "last"):
            mine, theirs = weights(run / part, name), weights(undisturbed / part, name)
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
        lines = [(r / part / "metrics.jsonl").read_text() for r in (run, undisturbed)]
        assert lines[0] == lines[1]


def test_a_run_goes_on_with_another_number_of_ranks_and_says_what_changes(
    undisturbed: Path, stopped: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    ended = command("resume", run)
    assert ended.status == 0, ended.err
    assert "warning: this run was on 2 ranks up to step 6 and goes on with 1:" in ended.err
    assert "BatchNorm" not in ended.err, "the network has none"
    assert_close_runs(run, undisturbed)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    run = tmp_path / "run"
    words = ("train", "digits", *SETTINGS, "start=scratch", "--folder", run)
    ended = torchrun(*words, task="dies")
    assert ended.returncode != 0
    assert "rank 0 lost another rank" in ended.stderr
    assert "SIGKILL" in ended.stderr, "torchrun says which"
    assert RunFolder.open(run).status().state == "running"
    # Far below the half hour that a rank waits for one that has not died.
    assert time.monotonic() - began < 250


def test_a_mistake_on_one_rank_is_said_and_ends_all(tmp_path: Path) -> None:
    words = ("train", "digits", *SETTINGS, "start=scratch", "--folder", tmp_path / "run")
    ended = torchrun(*words, task="refuses")
    assert ended.returncode != 0
    assert "error (rank 1): rank 1 cannot read an image" in ended.stderr
    assert "error: rank 0 lost another rank" in ended.stderr


def test_what_is_refused_is_refused_once_and_makes_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = torchrun("train", "digits", *SETTINGS, "training.batch_size=63", "--folder", run)
    assert ended.returncode != 0
    sentence = (
        "error: training.batch_size: expected a multiple of the 2 ranks that share each batch"
    )
    assert ended.stderr.count("training.batch_size") == 1, ended.stderr
    assert f"{sentence}, got 63; say 62 or 64" in ended.stderr
    assert not run.exists()
