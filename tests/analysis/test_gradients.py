"""Gradients that are recorded while a run trains, and what is told of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cure
from cure.analysis import gradients as study_module
from cure.analysis.gradients import by_chance, frequencies, gradients, overlap
from cure.analysis.study import STUDIES
from cure.errors import CheckpointError, ConfigError
from cure.methods import Masking
from cure.methods.cure import CURE, rgp_mask
from cure.models import read_weights
from cure.runs.folder import RunFolder
from cure.training.gradient_logger import GradientLogger
from cure.training.trainer import Trainer
from helpers import Command, refused

SETTINGS = [
    *("data.limit=400", "data.validation=100", "start=scratch", "attack.steps=1"),
    *("training.epochs=3", "training.validation_steps=1", "training.checkpoint_every=3"),
    *("method.percent=30", "method.revision.horizon=0.8"),
]
RECORDED = "training.record_gradients=2"
STEPS = 12


def trained(path: Path, *settings: str, plain: bool = False) -> Path:
    given = [word for word in SETTINGS if not (plain and word.startswith("method."))]
    return cure.train("digits", [*given, *settings], run=path, quiet=True).path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gradients")


@pytest.fixture(scope="module")
def scores() -> list[dict[str, Tensor]]:
    """What CURE scored at every step of the run, seen beside the recorder."""
    return []


@pytest.fixture(scope="module")
def run(workshop: Path, scores: list[dict[str, Tensor]]) -> Path:
    """CURE with a record every two steps."""
    scores_of = CURE._scores

    def seen(self: CURE, *arguments: Any) -> Any:
        found = scores_of(self, *arguments)
        scores.append({name: score.clone() for name, score in found.items()})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CURE, "_scores", seen)
        return trained(workshop / "run", RECORDED)


@pytest.fixture(scope="module")
def plain(workshop: Path) -> Path:
    """Adversarial training with the same records."""
    return trained(workshop / "plain", RECORDED, "method=at", plain=True)


def weights(run: Path) -> dict[str, Tensor]:
    return read_weights(RunFolder.open(run).weights("last"))


# The recorder.


@pytest.mark.parametrize("method", ["cure", "at"])
def test_a_recorded_run_is_the_run_that_is_not_recorded(
    method: str, run: Path, plain: Path, tmp_path: Path
) -> None:
    with_records = run if method == "cure" else plain
    words = ["method=at"] if method == "at" else []
    other = trained(tmp_path / "other", *words, plain=method == "at")
    assert not (other / "gradients.jsonl").exists()
    assert not (other / "gradients.safetensors").exists()
    assert (other / "metrics.jsonl").read_bytes() == (with_records / "metrics.jsonl").read_bytes()
    ours, theirs = weights(with_records), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_steps_are_counted_by_hand(tmp_path: Path, run: Path) -> None:
    """Two tensors of 4 and 2 weights, whose gradients and masks are written down here."""
    folder = RunFolder(tmp_path)
    parameters = {"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(2))}
    recorder = GradientLogger(10, parameters, folder)
    recorder.start()

    def masks(a: list[int], b: list[int]) -> dict[str, Tensor]:
        return {"a": torch.tensor(a).bool().reshape(2, 2), "b": torch.tensor(b).bool()}

    before = {"a": torch.tensor([[1.0, -2.0], [0.0005, 0.0]]), "b": torch.tensor([2e-4, 2e-5])}
    used = masks([0, 0, 1, 1], [0, 1])
    after = {name: value.masked_fill(used[name], 0) for name, value in before.items()}
    both = {"layer": used, "global": masks([0, 0, 0, 1], [1, 1])}
    recorder.step(0, after, Masking(before, used, both))
    recorder.step(1, after, Masking(before, masks([1, 0, 1, 0], [0, 1]), both))
    recorder.step(2, after, Masking(before, used, both))  # Not its turn.
    recorder.step(10, after, Masking(before, masks([0, 1, 1, 0], [1, 0]), both))
    recorder.step(11, before, None)
    recorder.step(20, before, None)
    first, zero, one, ten, twenty = (line.content() for line in folder.gradients())
    assert first["tensors"] == ["a", "b"]
    assert (first["shapes"], first["every"]) == ([[2, 2], [2]], 10)
    assert [line["step"] for line in (zero, one, ten, twenty)] == [0, 1, 10, 20]
    assert zero["before"] == pytest.approx([3.0005 / 4, 1.1e-4])
    assert zero["after"] == pytest.approx([3 / 4, 1e-4])
    assert zero["above"] == {"1e-05": [0.75, 1], "0.0001": [0.75, 0.5], "0.001": [0.5, 0]}
    assert zero["conserved"] == {"layer": [2, 1], "global": [1, 2]}
    assert zero["mask"] == [2, 1]
    assert "again" not in zero
    assert (one["mask"], one["again"]) == ([2, 1], [1, 1])
    assert (ten["mask"], ten["again"]) == ([2, 1], [1, 0]), "against step 0, not step 1"
    assert twenty["after"] == twenty["before"]
    assert "mask" not in twenty
    recorder.save()
    counts = load_file(tmp_path / "gradients.safetensors")
    assert counts["a"].tolist() == [[0, 1], [2, 1]]
    assert counts["b"].tolist() == [1, 1]


def test_a_mask_of_layer_scope_conserves_p_percent_of_every_tensor(
    run: Path, scores: list[dict[str, Tensor]]
) -> None:
    folder = RunFolder.open(run)
    header, *lines = (line.content() for line in folder.gradients())
    assert [line["step"] for line in lines] == list(range(STEPS)), "every two, and the step after"
    sizes = [int(np.prod(shape)) for shape in header["shapes"]]
    exact = [int(np.ceil(0.3 * (size - 1))) for size in sizes]
    for line in lines:
        assert line["mask"] == pytest.approx(exact, abs=0)
        if line["step"] % 2:
            continue
        assert line["conserved"]["layer"] == exact
        # One threshold for the network, from the same scores, by numpy.
        at = {name: score.numpy() for name, score in scores[line["step"]].items()}
        limit = np.percentile(np.concatenate([s.ravel() for s in at.values()]).astype("f8"), 30)
        expected = [int((at[name] < limit).sum()) for name in header["tensors"]]
        assert line["conserved"]["global"] == expected
        assert len(set(line["conserved"]["global"])) > 1
    # What the masks themselves say of successive steps.
    masks = [rgp_mask(score, 30.0) for score in scores]
    for number in range(1, STEPS):
        now, then = masks[number], masks[number - 1 if number % 2 else number - 2]
        expected = [int((now[name] & then[name]).sum()) for name in header["tensors"]]
        assert lines[number]["again"] == expected
    counts = load_file(run / "gradients.safetensors")
    for name in header["tensors"]:
        assert torch.equal(counts[name].long(), sum(mask[name].long() for mask in masks[::2]))


@pytest.mark.parametrize("at", [7, 9], ids=["inside an epoch", "before a state is written"])
def test_a_killed_run_records_the_same(
    at: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def dies(self: Trainer, batch: Any) -> Any:
        found = step(self, batch)
        if batch.step == at:
            raise RuntimeError("power cut")
        return found

    path = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            trained(path, RECORDED)
    assert len(RunFolder.open(path).gradients()) == 1 + at + 1
    with (path / "gradients.jsonl").open("a") as file:
        file.write('{"step": 9, "befo')  # Cut short.
    cure.resume(path, quiet=True)
    for name in ("gradients.jsonl", "metrics.jsonl"):
        assert (path / name).read_bytes() == (run / name).read_bytes()
    ours, theirs = (load_file(folder / "gradients.safetensors") for folder in (path, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_steps_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    compute_loss = CURE.compute_loss

    def seen(self: CURE, batch: Any, attacked: Any) -> Any:
        out = compute_loss(self, batch, attacked)
        if out.masking is not None:
            asked.append(batch.step)
        return out

    monkeypatch.setattr(CURE, "compute_loss", seen)
    trained(tmp_path / "run", "training.record_gradients=5")
    assert asked == [0, 1, 5, 6, 10, 11]


def test_a_perturbed_and_averaged_method_is_recorded_too(tmp_path: Path) -> None:
    path = trained(
        tmp_path / "run",
        "training.record_gradients=6",
        "training.weight_perturbation.gamma=0.01",
        "training.averaging.decay=0.9",
    )
    lines = [line.content() for line in RunFolder.open(path).gradients()]
    assert [line["step"] for line in lines] == [-1, 0, 1, 6, 7]
    assert all("mask" in line for line in lines[1:])
    assert any(a < b for a, b in zip(lines[1]["after"], lines[1]["before"], strict=True))


# The numbers.


def test_frequencies_are_counted_by_hand() -> None:
    found = frequencies(torch.tensor([[0, 0, 3], [5, 10, 10]]), 10, bars=5)
    assert found["mean"] == pytest.approx(100 * 28 / 60)
    assert (found["never"], found["always"]) == pytest.approx((100 / 3, 100 / 3))
    assert found["histogram"] == pytest.approx([100 / 3, 100 / 6, 100 / 6, 0, 100 / 3])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_chance_is_the_binomial_distribution(share: float) -> None:
    mass = scipy.stats.binom.pmf(np.arange(39), 38, share)
    expected = [0.0] * 10
    for count, probability in enumerate(mass):
        expected[min(count * 10 // 38, 9)] += 100 * probability
    assert by_chance(share, 38) == pytest.approx(expected)


def test_overlap_by_hand_and_for_masks_drawn_anew() -> None:
    found = overlap([2, None, 1], [2, None, 1], [1, None, 1], [4, 7, 2])
    assert found == pytest.approx(
        {"again": 200 / 3, "chance": 50, "jaccard": 50, "jaccard_chance": 100 * 1.5 / 4.5}
    )
    assert overlap([0], [0], [0], [5]) is None
    draws = torch.Generator().manual_seed(0)
    one, other = (torch.rand(100_000, generator=draws) < 0.3 for _ in range(2))
    counts = [[int(mask.sum())] for mask in (one, other, one & other)]
    drawn = overlap(*counts, [100_000])
    assert drawn is not None
    # Three standard errors of 30,000 weights at 30 %: 0.8 points.
    assert drawn["again"] == pytest.approx(drawn["chance"], abs=0.8)
    assert drawn["chance"] == pytest.approx(30, abs=0.5)
    assert drawn["jaccard_chance"] == pytest.approx(100 * 0.3 / 1.7, abs=0.5)


# The study.


def test_the_command_tells_of_runs_with_and_without_a_mask(
    run: Path, plain: Path, tmp_path: Path, command: Command
) -> None:
    output = tmp_path / "found.json"
    ended = command("analyse", "gradients", run, plain, "--output", output)
    assert ended.status == 0, ended
    assert "by chance); plain" in ended.out
    result = json.loads(output.read_text())
    masked, free = result["runs"]
    assert (masked["records"], masked["every"], masked["last_step"]) == (6, 2, 10)
    header, *lines = (line.content() for line in RunFolder.open(run).gradients())
    assert masked["sizes"]["steps"] == [0, 2, 4, 6, 8, 10]
    assert masked["sizes"]["before"][3] == pytest.approx(lines[6]["before"], rel=1e-3)
    assert masked["phases"]["first"]["steps"] == [0, 0]
    assert masked["phases"]["last"]["steps"] == [10, 10]
    size, held = np.prod(header["shapes"][0]), lines[10]["conserved"]["global"][0]
    assert masked["phases"]["last"]["global"][0] == pytest.approx(100 - 100 * held / size)
    assert masked["phases"]["last"]["moved"] == masked["phases"]["last"]["layer"]
    assert masked["frequency"]["records"] == 6
    assert masked["frequency"]["all"]["mean"] == pytest.approx(30, abs=0.5)
    assert [len(masked["overlap"][key]) for key in ("record_before", "step_before")] == [5, 6]
    assert set(free["phases"]["first"]["moved"]) == {100}
    assert "frequency" not in free
    assert "overlap" not in free
    view = STUDIES["gradients"].view(result)
    assert [row[-2:] == ["-", "-"] for row in view.tables[0].rows] == [False, True]
    names = [picture.name for picture in view.pictures()]
    assert names == [
        *("gradients-sizes", "gradients-moved-1", "gradients-conserved-1", "gradients-overlap-1"),
        "gradients-moved-2",
    ]
    assert len(list(tmp_path.glob("found-*.svg"))) == len(names)
    assert len(view.tables[0].rows) == 2
    assert len(view.tables[1].rows) == len(header["tensors"])


def test_a_warm_up_has_no_mask_until_it_ends(tmp_path: Path) -> None:
    path = trained(tmp_path / "run$1$", RECORDED, "method.warmup=0.4")
    result = gradients(path, output=tmp_path / "found.json")
    (this,) = result["runs"]
    assert "layer" not in this["phases"]["first"]
    assert "layer" in this["phases"]["last"]
    assert this["frequency"]["records"] == 4, "eight of twelve steps have a mask"
    view = STUDIES["gradients"].view(json.loads((tmp_path / "found.json").read_text()))
    assert "run$1$" in view.finding
    assert not any("threshold moves first" in head for head in view.tables[1].header)
    assert ">run$1$" in (tmp_path / "found-sizes.svg").read_text()


def test_weights_all_move_in_the_steps_of_a_phase_that_have_no_mask() -> None:
    """Two tensors of 4 and 2 weights: a step of the warm-up, and one that holds 3 of the first."""
    sizes: dict[str, Any] = {"before": [1.0, 1.0], "after": [1.0, 1.0], "above": {}}
    held = {"mask": [3, None], "conserved": {"layer": [3, None], "global": [1, None]}}
    phase = study_module._phase([{"step": 0} | sizes, {"step": 2} | sizes | held], [4, 2])
    # Of twice four weights three are held.
    assert phase["moved"] == [62.5, 100.0]
    assert (phase["layer"], phase["global"]) == ([25.0, None], [75.0, None])


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, command: Command) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "gradients.jsonl").unlink()
    refused(command("analyse", "gradients", bare), "training.record_gradients=20")
    refused(command("analyse", "gradients", tmp_path), "no run")
    refused(command("train", "digits", "training.record_gradients=0"), "record_gradients")
    (tmp_path / "there.json").write_text("mine")
    refused(command("analyse", "gradients", run, "--output", tmp_path / "there.json"), "exists")
    assert not (bare / "studies").exists()
    assert not (run / "studies").exists()
    (bare / "gradients.jsonl").write_text('{"step": 0, "before": [1]}\n')
    with pytest.raises(CheckpointError, match="damaged"):
        gradients(bare)
    shutil.copy(run / "gradients.jsonl", bare)
    (bare / "gradients.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        gradients(bare)
    with pytest.raises(ConfigError, match="one or more runs"):
        gradients([])
