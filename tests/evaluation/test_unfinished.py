"""Evaluations that run out of time or are killed: what is claimed, and how they go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.registry import EvaluationAttack, Part
from cure.data import ImageSet
from cure.errors import CheckpointError, ConfigError, ModelError
from cure.evaluation.evaluate import evaluate
from cure.evaluation.journal import Journal
from cure.evaluation.runner import Meter, measure
from cure.runs.run import Run
from cure.training.run import train
from helpers import Command, bright_or_dark, refused

EVALUATION = sys.modules[measure.__module__]
THREAT = {"epsilon": 0.1, "norm": "Linf"}

NO_CHECKS = {"verdict": "pass", "checks": [], "left_out": {}}


class Brightness(nn.Module):
    """Right on every grey image of two classes; an image of brightness 1/2 is on the boundary."""

    def forward(self, image: Tensor) -> Tensor:
        level = image.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-level, level], dim=1)


def plant(
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, Callable[[Tensor], Tensor]],
    settings: dict[str, Any] | None = None,
) -> list[tuple[str, int]]:
    """An attack "planted": each part makes nearly dark the images that its function picks."""
    calls: list[tuple[str, int]] = []

    def part(name: str, pick: Callable[[Tensor], Tensor]) -> Part:
        def run(
            model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
        ) -> Tensor:
            calls.append((name, number))
            model(image)
            changed = image.clone()
            fooling = pick(label)
            changed[fooling] = 1 - image[fooling]
            return changed

        return Part(run, 1)

    made = {name: part(name, pick) for name, pick in parts.items()}
    attack = EvaluationAttack("planted", "", settings or {}, made)
    monkeypatch.setattr(EVALUATION, "evaluation_attack", lambda name, source=None: attack)
    monkeypatch.setattr("cure.evaluation.evaluate.check_attacks", lambda names: None)
    return calls


def every(step: int) -> Callable[[Tensor], Tensor]:
    return lambda label: torch.arange(len(label)) % step == 0


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int, calls: list[tuple[str, int]]) -> None:
    """Time that is up as soon as so many batches are done."""
    before = len(calls)
    now = EVALUATION.time.monotonic

    class Clock:
        perf_counter = staticmethod(EVALUATION.time.perf_counter)

        @staticmethod
        def monotonic() -> float:
            return float("inf") if len(calls) - before > units else now()

    monkeypatch.setattr(EVALUATION, "time", Clock)


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same, however often an evaluation was stopped."""
    part = {k: v for k, v in result["attacks"]["planted"].items() if k != "seconds"}
    return part | {"natural": result["natural"]["correct"], "n": result["data"]["n"]}


def grey(count: int = 40) -> ImageSet:
    return bright_or_dark(count)


@pytest.mark.parametrize("units", range(7))
def test_a_stopped_evaluation_claims_bounds_only_and_goes_on_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, units: int
) -> None:
    parts = {"first": every(4), "second": every(5)}
    arguments: dict[str, Any] = {"data": grey(), "attacks": ["planted"], "batch_size": 10}
    arguments |= {"epsilon": 1.0}
    with monkeypatch.context() as patch:
        plant(patch, parts)
        expected = evaluate(Brightness(), **arguments)
    # 40 images: 4 batches of the first part fool 3 of 10, 28 stand: 3 batches of the second,
    # which fool 2, 2 and 2 of 10, 10 and 8.
    assert expected["attacks"]["planted"]["fooled_by"] == {"first": 12, "second": 6}
    output = tmp_path / "result.json"
    with monkeypatch.context() as patch:
        calls = plant(patch, parts)
        stop_after(patch, units, calls)
        stopped = evaluate(Brightness(), output=output, time_limit=1000, **arguments)
    assert "planted" not in stopped["attacks"]
    assert "worst_case" not in stopped
    part = stopped["unfinished"]["planted"]
    low, high = [round(bound * 40 / 100) for bound in part["bounds"]]
    fooled = 3 * min(units, 4) + 2 * max(0, units - 4)
    assert high == 40 - fooled
    assert low == 8 * max(0, units - 4)
    assert part["undecided"] == high - low
    assert part["stopped_in"] == ("first" if units < 4 else "second")
    assert low <= expected["attacks"]["planted"]["correct"] <= high
    assert json.loads(output.read_text())["unfinished"]["planted"]["bounds"] == part["bounds"]

    calls = plant(monkeypatch, parts)
    again = evaluate(Brightness(), output=output, **arguments)
    assert len(calls) == 7 - units, "a batch that was decided is not attacked again"
    assert plain(again) == plain(expected)
    assert "unfinished" not in json.loads(output.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_attacks_never_begun_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    stop_after(monkeypatch, -1, calls)
    result = evaluate(Brightness(), data=grey(), attacks=["pgd20", "cw"], time_limit=5)
    assert result["attacks"] == {}
    assert result["nrr"] == {"cw": None, "autoattack": None}
    for name in ("pgd20", "cw"):
        assert result["unfinished"][name]["bounds"] == [0.0, 100.0]
        assert result["unfinished"][name]["undecided"] == 40


def test_time_that_suffices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = plant(monkeypatch, {"first": every(3)})
    result = evaluate(Brightness(), data=grey(), attacks=["planted"], epsilon=1.0, time_limit=1e6)
    assert "unfinished" not in result
    assert len(calls) == 1
    assert result["attacks"]["planted"]["correct"] == 40 - 14


def test_an_image_that_fools_only_the_prepared_network_is_attacked_as_it_is() -> None:
    given: list[tuple[bool, int]] = []
    network = Brightness()

    class Brighter(nn.Module):
        """Reads every image as bright."""

        def forward(self, image: Tensor) -> Tensor:
            return network(image) + torch.tensor([0.0, 10.0])

    def run(
        model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
    ) -> Tensor:
        assert isinstance(model, Meter)
        itself = model.network is network
        given.append((itself, len(image)))
        # On the network itself this attack fools half of what it is given.
        return (
            image
            if not itself
            else torch.where(
                (torch.arange(len(image)) % 2 == 0)[:, None, None, None], 1 - image, image
            )
        )

    attack = EvaluationAttack(
        "planted", "", {}, {"planted": Part(run)}, prepare=lambda model, image: Brighter()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EVALUATION, "evaluation_attack", lambda name, source=None: attack)
        result = measure(network, grey(), ["planted"], Threat("Linf", 1.0), engine=ENGINE)
    # Brighter misreads the 20 dark ones, of which the second run fools 10.
    assert given == [(False, 40), (True, 20)]
    assert result["attacks"]["planted"]["correct"] == 30


def test_what_fools_in_bfloat16_only_is_attacked_in_float32() -> None:
    given: list[tuple[bool, int]] = []

    class Coarse(Brightness):
        """Misreads the bright images in bfloat16."""

        def forward(self, image: Tensor) -> Tensor:
            lower = torch.is_autocast_enabled("cpu")
            return super().forward(image) - torch.tensor([0.0, 10.0 * lower])

    def run(
        model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
    ) -> Tensor:
        given.append((torch.is_autocast_enabled("cpu"), len(image)))
        changed = image.clone()
        changed[:5] = 1 - image[:5]
        return changed

    attack = EvaluationAttack("planted", "", {"steps": 1}, {"planted": Part(run)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EVALUATION, "evaluation_attack", lambda name, source=None: attack)
        engine = EVALUATION.Engine(torch.device("cpu"), "bf16_attack")
        result = measure(Coarse(), grey(), ["planted"], Threat("Linf", 1.0), engine=engine)
    part = result["attacks"]["planted"]
    # The first run fools 5 of 40, 2 of them bright.  The other 18 bright ones are misread in
    # bfloat16 only, and the second run fools 5 of them.
    assert given == [(True, 40), (False, 18)]
    assert part["correct"] == 30
    assert part["settings"] == {"steps": 1, "precision": "bf16_attack"}


ENGINE = EVALUATION.Engine(torch.device("cpu"))


# A kill.

KILLED = """
import os, signal, sys
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads(1)
from cure.evaluation.journal import Journal
from cure.evaluation.evaluate import evaluate
from test_unfinished import Brightness, grey
add, count = Journal.add, 0
def dying(self, verdict):
    global count
    count += 1
    if count == 3:
        if {half}:
            self._file.write(b'{{"attack": "pgd3", "par')
            self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, verdict)
Journal.add = dying
evaluate(Brightness(), data=grey(), attacks=["pgd3"], batch_size=8, output=sys.argv[1], epsilon=0.3)
"""


@pytest.mark.parametrize("half", [False, True], ids=["between", "while writing"])
def test_a_killed_evaluation_goes_on(
    tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    program = KILLED.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], half=half)
    partial = tmp_path / "result.json.partial"
    for decided in (2, 4):
        ended = subprocess.run([sys.executable, "-c", program, str(output)], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert partial.read_bytes().count(b"\n") == 1 + decided
    arguments: dict[str, Any] = {
        "data": grey(),
        "attacks": ["pgd3"],
        "batch_size": 8,
        "epsilon": 0.3,
    }
    seen = 0

    class Counting(Brightness):
        def forward(self, image: Tensor) -> Tensor:
            nonlocal seen
            # Passes of the attack: the trial pass before it has fewer images.
            seen += image.requires_grad and len(image) == 8
            return super().forward(image)

    Counting.__name__ = Counting.__qualname__ = "Brightness"
    with monkeypatch.context() as without_checks:
        without_checks.setattr("cure.evaluation.evaluate.cheap_checks", lambda *_, **__: NO_CHECKS)
        result = evaluate(Counting(), output=output, **arguments)
    # Four of five batches were decided; a batch takes three steps.
    assert seen == 3
    whole = evaluate(Brightness(), **arguments)
    for name in ("correct", "attacked", "largest_change"):
        assert result["attacks"]["pgd3"][name] == whole["attacks"]["pgd3"][name]
    assert not partial.exists()


def test_an_unfinished_evaluation_of_a_run_lies_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {
        "data.validation": 20,
        "data.augment.crop_padding": 0,
        "model.options.width": 2,
        "training.epochs": 1,
        "training.batch_size": 16,
        "method": {"name": "natural"},
        "start": "scratch",
    }
    run: Run = train("digits", settings, run=tmp_path / "run", data=grey(80), quiet=True)
    folder = tmp_path / "run" / "evaluations"
    arguments: dict[str, Any] = {"data": grey(), "attacks": ["pgd2"], "batch_size": 8}
    calls: list[tuple[str, int]] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, v: (calls.append(("", 0)), add(self, v))[1])
    stop_after(monkeypatch, 0, calls)
    assert "unfinished" in evaluate(run, time_limit=5, **arguments)
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    monkeypatch.undo()
    # Another evaluation of the same run is another file.
    evaluate(run, **arguments | {"seed": 7})
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".partial"]
    evaluate(run, **arguments)
    assert sorted(path.name for path in folder.iterdir()) == [
        "best-train-1.json",
        "best-train-2.json",
    ]


# What is refused.


def test_a_refused_evaluation_leaves_nothing(tmp_path: Path) -> None:
    class Probabilities(Brightness):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).softmax(dim=1)

    with pytest.raises(ModelError, match="probabilities"):
        evaluate(Probabilities(), data=grey(), attacks=["pgd2"], output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_one_time_limit_holds_for_all_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []

    def noted(*arguments: Any, **options: Any) -> dict[str, Any]:
        ends.append(options["ends"])
        return measure(*arguments, **options)

    for module in ("evaluate", "unseen"):
        monkeypatch.setattr(f"cure.evaluation.{module}.measure", noted)
    evaluate(Brightness(), data=grey(8), attacks=["fgsm"], unseen=True, time_limit=600)
    assert len(ends) == 3
    assert len(set(ends)) == 1


def partial(tmp_path: Path, **asked: Any) -> Path:
    """An output whose evaluation was stopped after its first batch."""
    output = tmp_path / "result.json"
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        add = Journal.add
        patch.setattr(Journal, "add", lambda self, v: (calls.append(("", 0)), add(self, v))[1])
        stop_after(patch, 0, calls)
        arguments = {"data": grey(), "attacks": ["pgd2"], "batch_size": 8} | asked
        evaluate(Brightness(), output=output, time_limit=5, **arguments)
    assert (tmp_path / "result.json.partial").is_file()
    return output


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "another seed"),
        ({"batch_size": 9}, "another batch size"),
        ({"epsilon": 0.2}, "another threat"),
        ({"precision": "bf16_attack"}, "another attacks"),
        ({"data": grey(48)}, "another images"),
        ({"attacks": ["pgd3"]}, "another attacks"),
    ],
)
def test_another_command_does_not_go_on(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    output = partial(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {"data": grey(), "attacks": ["pgd2"], "batch_size": 8} | changed
    with pytest.raises(CheckpointError, match=f"unfinished evaluation with {words};.*delete it"):
        evaluate(Brightness(), output=output, **arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_curve_goes_on_and_is_told_with_the_precision_of_its_attack(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"attacks": [], "curve": "pgd2", "epsilons": [0.1]}
    output = partial(tmp_path, **asked)
    arguments = {"data": grey(), "batch_size": 8, "precision": "bf16_attack"} | asked
    with pytest.raises(CheckpointError, match="unfinished evaluation with another curve;"):
        evaluate(Brightness(), output=output, **arguments)
    settings = evaluate(Brightness(), **arguments)["curve"]["settings"]
    assert settings["precision"] == "bf16_attack"


@pytest.mark.parametrize(
    "content",
    [
        b"precious\n",
        b'{"format": "another"}\n',
        b"[1, 2]\n",
        b'{"format": "cure-evaluation-partial-1", "identity": {}}\n{"attack": "pgd2"}\n',
        b"\xff\xfe\n",
    ],
)
def test_a_damaged_partial_file_is_kept_and_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json.partial"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged; delete it or name another"):
        evaluate(Brightness(), data=grey(), attacks=["pgd2"], output=tmp_path / "result.json")
    assert path.read_bytes() == content


def test_verdicts_on_other_images_are_refused(tmp_path: Path) -> None:
    output = partial(tmp_path)
    path = tmp_path / "result.json.partial"
    first, line = path.read_text().splitlines()
    record = json.loads(line)
    record["attacked"][0] = 39
    path.write_text(first + "\n" + json.dumps(record) + "\n")
    with pytest.raises(CheckpointError, match="where rounding differs"):
        evaluate(Brightness(), data=grey(), attacks=["pgd2"], batch_size=8, output=output)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "result.json.partial", {}),
        pytest.raises(CheckpointError, match="being written by another evaluation"),
    ):
        evaluate(Brightness(), data=grey(), attacks=["pgd2"], output=tmp_path / "result.json")


def test_a_finished_output_is_kept_even_beside_a_partial_file(tmp_path: Path) -> None:
    output = partial(tmp_path)
    content = json.loads(output.read_text())
    del content["unfinished"]
    output.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="exists and is kept"):
        evaluate(Brightness(), data=grey(), attacks=["pgd2"], batch_size=8, output=output)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_time_limit_must_be_a_time(limit: float) -> None:
    with pytest.raises(ConfigError, match="expected seconds above 0"):
        evaluate(Brightness(), data=grey(), attacks=[], time_limit=limit)


def test_the_command_says_what_is_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey_network.py").write_text(
        "from test_unfinished import Brightness\ndef build():\n    return Brightness()\n"
    )
    images = grey()
    np.savez(tmp_path / "grey.npz", image=images.image[:, 0], label=images.label)
    words = ["evaluate", "--model", "grey_network:build", "--data", "grey.npz", "--split", "train"]
    words += ["--data-option", "validation=8", "--attacks", "pgd2", "--output", "out.json"]
    refused(command(*words, "--time-limit", "0"), "time_limit", "above 0")
    refused(command(*words, "--time-limit", "nan"), "time_limit")
    with monkeypatch.context() as patch:
        stop_after(patch, -1, [])
        ended = command(*words, "--time-limit", "9")
    assert ended.status == 3, ended
    assert "unfinished: 0.0 to 100.0" in ended.out
    assert "pgd2 ran out of time; 24 of 24 images are undecided" in ended.err
    assert "the same command goes on" in ended.err
    assert command(*words).status == 0
    assert json.loads((tmp_path / "out.json").read_text())["attacks"]["pgd2"]["n"] == 24
