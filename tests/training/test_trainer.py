"""The loop with methods made up here: it must need to know none of them."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cure
from cure import data
from cure.attacks import PGD, Threat
from cure.config import AveragingConfig, MethodConfig, RunConfig
from cure.data import Batch, accounting, batches, carve, sources
from cure.errors import Interrupted, TrainingStopped
from cure.methods import Context, Method, StepOutput
from cure.methods.step import holding
from cure.methods.wrappers.averaging import Averaging, recompute_statistics
from cure.models import load_weights, read_weights
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.training.trainer import Totals, Trainer
from cure.utils.engine import Engine
from helpers import bright_or_dark


class Plain(Method):
    """Cross-entropy; `wrap` lets a test change what a step returns."""

    Config = MethodConfig

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[int] = []

    def step(self, batch: Batch) -> StepOutput:
        self.steps.append(batch.step)
        loss = F.cross_entropy(self.logits(batch.image), batch.label)
        return StepOutput(loss=loss, metrics={"loss": loss.detach()})


@dataclass
class Recorder:
    """A tracker that remembers."""

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    closed: bool = False

    def start(self, steps: int, done: int) -> None: ...
    def step(self, images: int, metrics: object) -> None:
        self.steps += 1

    def epoch(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        self.records.append(record)

    def say(self, sentence: str) -> None:
        pass

    def warn(self, sentence: str) -> None: ...
    def close(self) -> None:
        self.closed = True


def config_of(*overrides: str) -> RunConfig:
    return load_recipe(
        "digits",
        [
            "training.epochs=3",
            "training.batch_size=16",
            "training.optimizer.learning_rate=0.05",
            "training.channels_last=false",
            "attack.steps=2",
            *overrides,
        ],
    )


def network(classes: int = 2) -> nn.Module:
    draws = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def context_of(config: RunConfig, steps_per_epoch: int = 4) -> Context:
    engine = Engine(torch.device("cpu"), config.training.precision)
    attack = PGD(Threat("Linf", 0.1), steps=2, step_size=0.05)
    return Context(engine, attack, config.seed, steps_per_epoch, config.training.epochs)


def trainer_of(
    path: Path, config: RunConfig, kind: type[Method] = Plain, recorder: Recorder | None = None
) -> Trainer:
    training, validation = carve(bright_or_dark(), 32, 0)
    context = context_of(config)
    method = kind(network(), MethodConfig(name="plain"), context)
    if config.training.averaging:
        method = Averaging(method, config.training.averaging)
    folder = RunFolder.create(path / "run", config, training.kind)
    trackers = [recorder] if recorder else []
    return Trainer(config, method, training, validation, context.engine, folder, trackers)


def test_the_loop_is_sgd_with_momentum_and_decay_as_in_the_book(tmp_path: Path) -> None:
    """Three steps against the update rule written out; the gradients come from autograd."""
    config = config_of("training.schedule.name=constant")
    trainer = trainer_of(tmp_path, config)
    reference = network()
    velocity = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    batches = list(
        data.epoch(trainer.training, batch_size=16, epoch=0, seed=0, augment=config.data.augment)
    )[:3]
    for batch in batches:
        trainer.train_step(batch)
        loss = F.cross_entropy(reference(batch.image), batch.label)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(reference.named_parameters(), gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + g + 5e-4 * p
                p -= 0.05 * velocity[name]
    for ours, theirs in zip(trainer.method.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_run_learns_records_and_says_what_is_best(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of(tmp_path, config_of(), recorder=recorder)
    trainer.fit()
    assert recorder.steps == 12
    assert recorder.closed
    assert trainer.method.steps == list(range(12))
    records = [record.content() for record in trainer.folder.metrics()]
    assert records == recorder.records
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"]
    assert records[-1]["validation"]["natural"] > 90
    found = [record["validation"] for record in records]
    rank = [(validation["robust"], validation["natural"]) for validation in found]
    assert trainer.best is not None
    assert trainer.best["epoch"] == 1 + rank.index(max(rank)), "the first of the best"
    assert trainer.folder.status().state == "finished"


def test_validation_happens_every_k_epochs_and_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of("training.validate_every=2"))
    trainer.fit()
    validated = [r.epoch for r in trainer.folder.metrics() if r.validation is not None]
    assert validated == [2, 3]


def test_validation_accuracies_are_those_of_the_network(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of())
    trainer.method.model.eval()
    with torch.no_grad():
        logits = trainer.method.model(trainer.validation.image.float() / 255)
    natural = 100 * (logits.argmax(dim=1) == trainer.validation.label).float().mean().item()
    trainer.method.model.train()
    measured = trainer.validate()
    assert measured["natural"] == pytest.approx(natural)
    assert measured["robust"] <= measured["natural"] + 1e-9
    assert trainer.method.model.training
    assert trainer.validate() == measured, "the same random starts every time"


class Frozen(Plain):
    """Holds one half of the first convolution still."""

    def step(self, batch: Batch) -> StepOutput:
        out = super().step(batch)
        assert out.loss is not None
        grads = self.context.engine.gradients(out.loss, self.trainable())
        mask = torch.zeros_like(grads["0.weight"], dtype=torch.bool)
        mask[:2] = True
        grads["0.weight"] = grads["0.weight"].masked_fill(mask, 0)
        return StepOutput(grads=grads, frozen={"0.weight": mask}, metrics=out.metrics)


def test_frozen_weights_do_not_move_by_momentum_or_decay(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of("training.optimizer.weight_decay=0.1"), Frozen)
    before = trainer.method.model[0].weight.detach().clone()
    trainer.fit()
    after = trainer.method.model[0].weight.detach()
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2:], after[2:])
    buffer = trainer.optimizer.state[trainer.parameters["0.weight"]]["momentum_buffer"]
    assert buffer[:2].abs().max() == 0


def test_without_holding_a_zero_gradient_does_not_freeze() -> None:
    """The reason for `holding`: momentum and decay move a weight whose gradient is zero."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    weight.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    start = weight.detach().clone()
    mask = {"weight": torch.tensor([True, False])}
    weight.grad = torch.zeros(2)
    with holding(optimizer, {"weight": weight}, mask):
        optimizer.step()
    assert weight[0] == start[0]
    assert weight[1] != start[1]
    moment = optimizer.state[weight]["momentum_buffer"]
    assert moment[0] == pytest.approx(1.1), "as the first step left it: 1 + 0.1 * 1"
    assert moment[1] == pytest.approx(0.9 * 1.1 + 0.1 * start[1].item())


def test_clipping_limits_the_whole_gradient(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of("training.clip_norm=0.001"))
    batch = next(data.epoch(trainer.training, batch_size=16, epoch=0, seed=0, augment=None))
    trainer.train_step(batch)
    norms = [p.grad.norm() for p in trainer.parameters.values() if p.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(0.001, rel=1e-3)


class WithDropout(Plain):
    """A network that draws random numbers of its own."""

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        super().__init__(nn.Sequential(*model, nn.Dropout(0.5)), *arguments)


def test_chance_inside_the_network_is_repeated_after_a_restart(tmp_path: Path) -> None:
    config = config_of("training.checkpoint_every=2")
    whole = trainer_of(tmp_path / "whole", config, WithDropout)
    before = torch.get_rng_state()
    whole.fit()
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is untouched"

    part = trainer_of(tmp_path / "part", config, WithDropout)
    step = part.train_step

    def dies(batch: Batch) -> Any:
        if batch.step == 7:
            raise RuntimeError("power cut")
        return step(batch)

    part.train_step = dies  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        part.fit()
    torch.manual_seed(1234)
    again = trainer_of(tmp_path / "again", config, WithDropout)
    again.folder = part.folder
    again.fit()
    assert again.method.steps[0] == 6
    for one, other in zip(
        whole.method.state_dict().values(), again.method.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_of_equal_robust_accuracies_the_more_natural_one_is_best(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of())
    for epoch, natural, robust in (
        (1, 77.0, 12.5),
        (2, 93.5, 12.5),
        (3, 93.5, 12.5),
        (4, 99.0, 9.0),
    ):
        validation = {"natural": natural, "robust": robust}
        trainer._save_weights({"epoch": epoch, "validation": validation})
    assert trainer.best == {"epoch": 2, "validation": {"natural": 93.5, "robust": 12.5}}


class Exploding(Plain):
    """A loss that is not a number from step 6 on."""

    def step(self, batch: Batch) -> StepOutput:
        out = super().step(batch)
        assert out.loss is not None
        bad = out.loss * float("nan") if batch.step >= 6 else out.loss
        return StepOutput(loss=bad, metrics={"loss": bad.detach()})


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of(), Exploding)
    with pytest.raises(TrainingStopped, match=r"step 6 \(epoch 2.*learning_rate") as caught:
        trainer.fit()
    assert "last.safetensors" in str(caught.value)
    kept = read_weights(trainer.folder.weights("last"))
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert trainer.folder.status().state == "failed"
    assert [record.epoch for record in trainer.folder.metrics()] == [1]


class Forgetful(Plain):
    """A network that loses everything in its third epoch."""

    def after_step(self, step: int) -> dict[str, Tensor]:
        if step >= 8:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()
        return {}


def test_a_network_that_falls_to_chance_keeps_its_last_good_state(tmp_path: Path) -> None:
    config = config_of("training.epochs=9", "training.collapse_patience=3")
    trainer = trainer_of(tmp_path, config, Forgetful)
    with pytest.raises(TrainingStopped, match=r"chance .* 3 times in a row up to epoch 5"):
        trainer.fit()
    assert read_weights(trainer.folder.weights("last"))["4.weight"].abs().sum() > 0
    again = trainer_of(tmp_path / "again", config)
    again.folder = trainer.folder
    again.restore()
    assert again.done == 8, "the state of the second epoch"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_measurement_stops_the_run(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what follows, such as the evaluation of a plan, would go on."""
    trainer = trainer_of(tmp_path, config_of())
    monkeypatch.setattr(trainer, "_measure_end", lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 12 of 12; continue with `cure"):
        trainer.fit()
    assert trainer.folder.status().state == "stopped"
    assert signal.getsignal(number) is before
    again = trainer_of(tmp_path / "again", config_of())
    again.folder = trainer.folder
    again.fit()
    assert again.folder.status().state == "finished"
    assert again.method.steps == [], "no step is repeated"


class Lost(Plain):
    """A network that loses everything in its first step."""

    def after_step(self, step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        return {}


def test_a_start_that_was_good_and_falls_to_chance_is_told_of_at_once(tmp_path: Path) -> None:
    good = trainer_of(tmp_path / "good", config_of("training.epochs=6"))
    good.fit()
    told: list[str] = []
    recorder = Recorder()
    recorder.warn = told.append  # type: ignore[method-assign]
    config = config_of("training.epochs=3", "training.collapse_patience=2")
    trainer = trainer_of(tmp_path, config, Lost, recorder)
    trainer.method.model.load_state_dict(read_weights(good.folder.weights("last")))
    with pytest.raises(TrainingStopped, match="2 times in a row up to epoch 2"):
        trainer.fit()
    assert ["fell to chance" in line and "epoch 1" in line for line in told] == [True]


@pytest.mark.parametrize("attack", ["pgd", "n-fgsm"])
def test_a_run_killed_in_its_first_epoch_knows_that_its_start_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    good = trainer_of(tmp_path / "good", config_of("training.epochs=6"))
    good.fit()
    config = config_of(f"attack.name={attack}", *["attack.check_every=9"] * (attack == "n-fgsm"))
    killed = trainer_of(tmp_path, config)
    killed.method.model.load_state_dict(read_weights(good.folder.weights("last")))

    def kill(self: Trainer, number: int) -> None:
        raise Interrupted("planted")

    monkeypatch.setattr(Trainer, "_train_epoch", kill)
    with pytest.raises(Interrupted):
        killed.fit()
    again = Trainer(
        config, killed.method, killed.training, killed.validation, killed.engine, killed.folder
    )
    if attack == "n-fgsm":
        again.restore()  # As after catastrophic overfitting in the first epoch.
    else:
        with pytest.raises(Interrupted):
            again.fit()
    assert again.collapse.learnt_at_start


def test_a_network_that_ends_at_chance_after_learning_is_a_failure(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of("training.epochs=3"), Forgetful)
    with pytest.raises(TrainingStopped, match="1 times in a row up to epoch 3"):
        trainer.fit()


def test_averages_are_those_of_the_formula(tmp_path: Path) -> None:
    context = context_of(config_of())
    method = Averaging(
        Plain(network(), MethodConfig(name="plain"), context),
        AveragingConfig(decay=0.75, start=0.25),
    )
    weight = method.inner.model[4].weight
    assert method.inference_model() is method.inner.model
    history = []
    for step in range(5):
        with torch.no_grad():
            weight.fill_(float(step))
        method.after_step(step)
        history.append(method.inference_model()[4].weight[0, 0].item())
    # Twelve steps in the run, so averaging begins at step 3 with a copy.
    assert history[:3] == [0, 1, 2]
    assert history[3] == pytest.approx(3)
    assert history[4] == pytest.approx(0.75 * 3 + 0.25 * 4)
    assert method.model is method.inner.model


def test_an_averaged_run_saves_and_validates_the_average(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config_of("training.averaging.decay=0.5"))
    trainer.fit()
    saved = read_weights(trainer.folder.weights("last"))["4.weight"]
    assert isinstance(trainer.method, Averaging)
    assert torch.equal(saved, trainer.method.average[4].weight)
    assert not torch.equal(saved, trainer.method.inner.model[4].weight)


@pytest.mark.parametrize("precision", ["bf16", "bf16_attack"])
def test_lower_precision_trains(tmp_path: Path, precision: str) -> None:
    run = cure.train(
        "digits",
        [
            f"training.precision={precision}",
            "training.epochs=2",
            "natural.epochs=3",
            "data.limit=400",
            "attack.steps=2",
            "method.revision={rate: 1.0, horizon: 1.0}",
        ],
        run=tmp_path / "run",
        quiet=True,
    )
    weights = read_weights(run.path / "checkpoints" / "last.safetensors")
    assert all(t.dtype in (torch.float32, torch.int64) for t in weights.values())
    assert run.metrics[-1]["train"]["loss"] < 3


def test_training_only_compares_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account hashes test images; what is trained does not depend on them."""
    opened = []
    load = accounting.load

    def spy(config: Any, split: str, **more: Any) -> Any:
        opened.append(split)
        return load(config, split, **more)

    monkeypatch.setattr(accounting, "load", spy)
    monkeypatch.setattr(sources, "load", None)
    draws = np.random.default_rng(0)
    image, label = draws.integers(0, 256, (300, 8, 8), np.uint8), np.arange(300) % 10
    runs = []
    for number in range(3):
        np.savez(
            tmp_path / "data.npz",
            x_train=image,
            y_train=label,
            x_test=draws.integers(0, 256, (20, 8, 8), np.uint8) if number else image[:20],
            y_test=label[:20],
        )
        overrides = ["training.epochs=1", "natural.epochs=1", "data.validation=50"]
        runs.append(
            cure.train(
                "digits",
                [*overrides, "method.gamma=0", f"data.source={tmp_path / 'data.npz'}"],
                run=tmp_path / f"run{number}",
                quiet=number == 2,
            )
        )
    # A quiet run does not read the test images at all.
    assert opened == ["test", "test"]
    assert runs[0].metrics == runs[1].metrics == runs[2].metrics
    last = [read_weights(run.path / "checkpoints" / "last.safetensors") for run in runs]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    found = [json.loads((run.path / "data.json").read_text())["account"] for run in runs]
    counted = sum(found[0]["duplicates"].get(f"{a} and test", 0) for a in ("train", "validation"))
    assert counted == 20
    assert found[1]["duplicates"] == {}


def test_totals_remember_the_first_bad_step_across_good_ones() -> None:
    totals = Totals(torch.device("cpu"))
    for step, value in enumerate([1.0, float("inf"), 2.0, float("nan")]):
        totals.add({"loss": torch.tensor(value)}, step)
    assert totals.first_bad() == 1


def test_weights_between_validations_have_statistics_of_their_own(tmp_path: Path) -> None:
    settings = {
        "model.name": "small_cnn",
        "start": "scratch",
        "method": "at",
        "data.validation": 16,
        "attack.steps": 1,
        "training.epochs": 2,
        "training.validate_every": 2,
        "training.keep_every": 1,
        "training.batch_norm": "train",
        "training.batch_size": 16,
        "training.threads": 1,
    }
    images = bright_or_dark()
    run = cure.train("digits", settings, data=images, run=tmp_path / "run", quiet=True)
    folder = RunFolder.open(run.path)
    first = next(path for path in folder.checkpoints.iterdir() if "1" in path.stem)
    network = run.model()
    load_weights(network, first)
    training, _ = carve(images, 16, run.config.data.split_seed)
    before = {name: value.clone() for name, value in network.named_buffers()}
    recompute_statistics(network, (batch.image for batch in batches(training, 16)))
    for name, value in network.named_buffers():
        if "running" in name:
            torch.testing.assert_close(before[name], value, rtol=0.05, atol=0.01)
