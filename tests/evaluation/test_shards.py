"""Evaluations that several jobs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cure
from cure.attacks import early_exit
from cure.errors import CheckpointError, ConfigError, TrainingStopped
from cure.evaluation.evaluate import evaluate
from cure.evaluation.metrics import unpack
from cure.evaluation.shards import Shard
from cure.experiments.executors import LocalExecutor, RayExecutor, executor_for
from cure.experiments.sharded import evaluate_in_shards
from cure.runs.run import Run
from cure.training.run import train
from helpers import Command, bright_or_dark, refused

IMAGES = bright_or_dark(50)
ARGUMENTS: dict[str, Any] = {
    "data": IMAGES,
    "attacks": ["fgsm", "autoattack"],
    "epsilon": 0.3,
    "batch_size": 7,
    "per_image": True,
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with fewer steps: a linear network falls at once or not at all."""
    monkeypatch.setattr(early_exit, "STEPS", 12)
    monkeypatch.setattr(early_exit, "QUERIES", 50)


def network() -> nn.Module:
    """A linear classifier that is right on most images and can be fooled on some of them."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        level = torch.tensor([[-1.0], [1.0]]) / 8
        made[1].weight.mul_(0.2).add_(level)
        made[1].bias.copy_(torch.tensor([4.0, -4.0]))
    return made


def test_a_shard_is_every_so_many_images() -> None:
    held = torch.stack([Shard(number, 3).holds(8) for number in (1, 2, 3)])
    assert held[1].nonzero().flatten().tolist() == [1, 4, 7]
    assert bool((held.sum(dim=0) == 1).all())


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5", ""])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 2/8"):
        Shard.parse(text)


@pytest.mark.usefixtures("short")
def test_merged_shards_are_the_evaluation(tmp_path: Path) -> None:
    """Verdicts of an attack without draws are equal image by image; the rest adds up."""
    whole, output = evaluate(network(), **ARGUMENTS), tmp_path / "result.json"
    for number in (1, 2, 3):
        found = evaluate(network(), output=output, shard=f"{number}/3", **ARGUMENTS)
        assert found["images"] == (17, 17, 16)[number - 1]
        assert not output.exists()
    merged = evaluate(network(), output=output, shards=3, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "shards are removed"
    assert 0 < whole["attacks"]["fgsm"]["correct"] < whole["natural"]["correct"]
    assert merged["attacks"]["fgsm"]["right"] == whole["attacks"]["fgsm"]["right"]
    assert merged["natural"]["right"] == whole["natural"]["right"]
    found, expected = merged["attacks"]["autoattack"], whole["attacks"]["autoattack"]
    for key in ("attacked", "n", "settings"):
        assert found[key] == expected[key]
    assert sum(found["fooled_by"].values()) == found["attacked"] - found["correct"]
    # A linear classifier is fooled exactly where fgsm fools it, whatever is drawn.
    assert found["right"] == expected["right"] == whole["attacks"]["fgsm"]["right"]
    assert merged["worst_case"]["correct"] == int(unpack(found["right"], 50).sum())
    assert json.loads(output.read_text())["worst_case"]["n"] == 50


@pytest.mark.usefixtures("short")
def test_no_two_shards_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    from cure.evaluation import runner

    attacked = runner.AttackRunner._attack

    def listened(self: Any, attack: Any, part: str, prepared: Any, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return attacked(self, attack, part, prepared, number, *rest)

    monkeypatch.setattr(runner.AttackRunner, "_attack", listened)
    for number in (1, 2):
        arguments = ARGUMENTS | {"attacks": ["fgsm"]}
        evaluate(network(), output=tmp_path / "r.json", shard=f"{number}/2", **arguments)
    assert len(numbers) == len(set(numbers)) > 2


@pytest.mark.usefixtures("short")
def test_missing_stopped_and_foreign_shards_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ARGUMENTS | {"attacks": ["fgsm"]}
    evaluate(network(), output=output, shard="1/3", **arguments)
    with pytest.raises(CheckpointError, match=r"lacks shards of result.json: 2/3, 3/3"):
        evaluate(network(), output=output, shards=3, **arguments)
    for number in (2, 3):
        evaluate(network(), output=output, shard=f"{number}/3", **arguments)
    second = tmp_path / "result.json.shard-2-of-3"
    lines = second.read_bytes().splitlines(keepends=True)
    second.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"in fgsm fgsm, \d images? not attacked"):
        evaluate(network(), output=output, shards=3, **arguments)
    with pytest.raises(CheckpointError, match="another batch size"):
        evaluate(network(), output=output, shards=3, **arguments | {"batch_size": 9})
    # The shard that was stopped goes on, and nothing of the others was lost.
    evaluate(network(), output=output, shard="2/3", **arguments)
    assert len(second.read_bytes().splitlines()) == len(lines)
    assert evaluate(network(), output=output, shards=3, **arguments)["natural"]["n"] == 50


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"shard": "1/2"}, "name it"),
        ({"shard": "1/2", "shards": 2, "output": "r.json"}, "leave out shards=2"),
        ({"shards": 0, "output": "r.json"}, "1 or more"),
        ({"shard": "1/2", "output": "r.json", "time_limit": 5.0}, "time_limit is not kept"),
        ({"shards": 2, "output": "r.json", "adversarial": "a.pt"}, "adversarial is not kept"),
    ],
)
def test_what_shards_cannot_do(asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    if "output" in asked:
        asked = asked | {"output": tmp_path / "r.json"}
    with pytest.raises(ConfigError, match=words):
        evaluate(network(), **ARGUMENTS | asked)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("shards") / "run"
    settings = ["training.epochs=1", "method=at", "attack.steps=1", "start=scratch"]
    return train("digits", settings, run=folder, quiet=True)


class Here:
    """Runs calls at once, in this process."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def submit(self, function: Callable[..., str], /, *arguments: Any) -> Future[str]:
        job: Future[str] = Future()
        try:
            if self.broken and arguments[2].get("shard") == self.broken:
                raise RuntimeError("the machine went away")
            job.set_result(function(*arguments))
        except Exception as error:
            job.set_exception(error)
        return job


def test_a_shard_that_fails_leaves_the_others(run: Run, tmp_path: Path) -> None:
    output, told = tmp_path / "out.json", []
    arguments: dict[str, Any] = {"attacks": ["fgsm"], "limit": 40, "output": output}
    with pytest.raises(TrainingStopped, match="1 of 3 shards failed: shard 2/3: the machine"):
        evaluate_in_shards(run, 3, executor=Here("2/3"), tell=told.append, **arguments)
    assert told[0] == "shard 1/3: done"
    assert len(list(tmp_path.iterdir())) == 2
    merged = evaluate_in_shards(run, 3, executor=Here(), **arguments)
    whole = cure.evaluate(run, attacks=["fgsm"], limit=40)
    assert merged["attacks"]["fgsm"]["correct"] == whole["attacks"]["fgsm"]["correct"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    newest = max((run.path / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.is_file(), "the merged result is kept in the run as well"


def test_jobs_beside_one_another_share_the_cores(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs with all threads each wait for one another."""
    given: list[int | None] = []

    class Listening(LocalExecutor):
        def submit(self, function: Callable[..., str], /, *arguments: Any) -> Any:
            given.append(arguments[-1])
            return Here().submit(function, *arguments)

    monkeypatch.setattr("os.cpu_count", lambda: 5)
    for jobs, threads in ((1, None), (2, 2), (8, 1)):
        given.clear()
        output = tmp_path / f"{jobs}.json"
        arguments: dict[str, Any] = {"attacks": ["fgsm"], "limit": 20, "output": output}
        evaluate_in_shards(run, 2, executor=Listening(jobs), **arguments)
        assert given == [threads] * 3


def test_a_network_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="network in memory"):
        evaluate_in_shards(network(), 2, output=tmp_path / "r.json")  # type: ignore[arg-type]


def test_a_run_of_a_network_in_memory_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot receive a network in memory.*got Run"):
        cure.evaluate_in_shards(
            Run(run.path, nn.Flatten()), 2, output=tmp_path / "result.json", attacks="noise"
        )


def test_the_command(run: Run, tmp_path: Path, command: Command) -> None:
    output = tmp_path / "result.json"
    words = ["evaluate", run.path, "--attacks", "fgsm", "--limit", "30", "--output", output]
    refused(command(*words, "--jobs", "2"), "--shards")
    refused(command(*words[:-2], "--shards", "2"), "--output")
    ended = command(*words, "--shard", "1/2")
    assert (ended.status, "shard 1/2: 15 images" in ended.out + ended.err) == (0, True), ended
    ended = command(*words, "--shards", "2", "--jobs", "2")
    assert ended.status == 0, ended
    assert json.loads(output.read_text())["attacks"]["fgsm"]["n"] == 30


def test_executors_by_name(tmp_path: Path) -> None:
    assert isinstance(executor_for(2, None, tmp_path, {}), LocalExecutor)
    with pytest.raises(ConfigError, match="goes with --cluster"):
        executor_for(2, None, tmp_path, {"num_gpus": 1})


def test_submitit_s_local_cluster(run: Run, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("submitit")
    output = tmp_path / "r.json"
    words = ["evaluate", run.path, "--attacks", "fgsm", "--limit", "21", "--shards", "2"]
    cluster = ["--cluster", "local", "--cluster-option", "timeout_min=5"]
    ended = command(*words, *cluster, "--output", output)
    assert ended.status == 0, ended
    merged = json.loads(output.read_text())
    whole = cure.evaluate(run, attacks=["fgsm"], limit=21)
    assert merged["attacks"]["fgsm"]["correct"] == whole["attacks"]["fgsm"]["correct"]
    assert merged["natural"]["n"] == 21
    assert not list(tmp_path.glob("r.json.shard*")), "shards are removed"
    assert list(tmp_path.glob("r.json.jobs/*.out")), "the jobs' logs stay"


def test_ray(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    executor = executor_for(1, "ray", tmp_path, {"num_cpus": 1})
    assert isinstance(executor, RayExecutor)
    result = evaluate_in_shards(
        run, 2, executor=executor, output=tmp_path / "r.json", attacks=["fgsm"], limit=20
    )
    assert result["natural"]["n"] == 20
    with pytest.raises(TrainingStopped, match="unknown attack"):
        evaluate_in_shards(
            run, 2, executor=executor, output=tmp_path / "s.json", attacks=["nothing"], limit=20
        )
    with pytest.raises(ConfigError, match="--cluster ray"):
        executor_for(1, "ray", tmp_path, {"no_such_option": 1})


@pytest.mark.usefixtures("short")
def test_unseen_threats_are_shared_too(tmp_path: Path) -> None:
    output, arguments = tmp_path / "result.json", ARGUMENTS | {"attacks": ["fgsm"], "unseen": True}
    whole = evaluate(network(), **arguments)
    for number in (1, 2):
        evaluate(network(), output=output, shard=f"{number}/2", **arguments)
    merged = evaluate(network(), output=output, shards=2, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    for norm in ("L2", "L1"):
        found = merged["unseen"][norm]["attacks"]["apgd-ce"]
        expected = whole["unseen"][norm]["attacks"]["apgd-ce"]
        assert found["attacked"] == expected["attacked"]
        # Random starts may decide on an image at the very edge.
        assert abs(found["correct"] - expected["correct"]) <= 1
    assert merged["unseen"]["all_threats"]["n"] == 50


@pytest.mark.usefixtures("short")
def test_unseen_threats_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cure.evaluation import runner

    arguments = ARGUMENTS | {"attacks": ["fgsm"], "unseen": True}
    attacked, calls = runner.AttackRunner._attack, 0
    dies_at: int | None = None

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        return attacked(*given)

    monkeypatch.setattr(runner.AttackRunner, "_attack", counted)
    whole, needed = evaluate(network(), **arguments), calls
    output = tmp_path / "result.json"
    calls, dies_at = 0, needed - 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(network(), output=output, **arguments)
    calls, dies_at = 0, None
    again = evaluate(network(), output=output, **arguments)
    assert calls == 3, "what was finished, in another norm too, is not attacked again"
    for norm in ("L2", "L1"):
        one, other = again["unseen"][norm]["attacks"], whole["unseen"][norm]["attacks"]
        assert one["apgd-ce"]["correct"] == other["apgd-ce"]["correct"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
