"""A batch in parts gives the step of the whole batch, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_bench import batch, build, context
from torch import Tensor, nn

import cure
from cure.config import AveragingConfig, WeightPerturbationConfig
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods import METHODS, AdversarialBatch, Method, StepOutput
from cure.methods.wrappers.averaging import Averaging
from cure.methods.wrappers.awp import AWP

PARTS = 4
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS.names() if METHODS[name].splits),
    ("at", {"natural_share": 0.5}),
    ("act", {"attack_reduction": "even"}),
    ("ard", {"alpha": 0.5}),
    ("fat", {"form": "trades", "omega": 0.01}),
    ("fat", {"form": "mart"}),
    ("iad", {"form": "II", "begin": 0}),
    ("iad", {"begin": 0, "weight_teacher": True}),
    ("cure", {"mask": {"adversarial_loss": "kl", "scope": "global"}}),
    ("cure", {"mask": {"source": "per_image"}, "adversarial_term": "ce", "gamma": 0}),
    ("cure", {"mask": {"source": "own_gradient", "score": "signed"}, "beta": 0}),
    ("cure", {"mask": {"kind": "random", "strict_freeze": True}}),
    ("cure", {"mask": {"kind": "none"}, "natural_weight": 0.5}),
]


def network() -> nn.Module:
    """Without batch statistics, in float64."""
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)
    return nn.Sequential(*layers).double()


def teachers(name: str, settings: dict[str, Any]) -> dict[str, nn.Module]:
    del settings
    fields = METHODS[name].Config.model_fields
    return {key: network().eval() for key in fields if key.endswith("teacher")}


def one(name: str, start: str = "gaussian", **settings: Any) -> Method:
    from cure.attacks import PGD, Threat

    attack = PGD(Threat("Linf", 0.1), 2, 0.05, start)  # type: ignore[arg-type]
    within = context(attack=attack, teachers=teachers(name, settings))
    return build(name, network(), within, **settings).double()


def given(step: int = 0) -> Batch:
    return batch(step, dtype=torch.float64)


def close(whole: Any, split: Any) -> None:
    """Equal up to rounding: gradients, metrics, what is frozen."""
    ours, theirs = split.gradients(), whole.gradients()
    assert any(gradient.abs().sum() > 0 for gradient in theirs.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(split.metrics, whole.metrics, rtol=1e-9, atol=1e-12)
    assert split.frozen.keys() == whole.frozen.keys()
    assert all(torch.equal(mask, whole.frozen[key]) for key, mask in split.frozen.items())


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda value: str(value))
def test_parts_give_the_step_of_the_batch(name: str, settings: dict[str, Any], start: str) -> None:
    whole, split = one(name, start, **settings), one(name, start, **settings)
    close(whole.take_step(given(5)), split.take_step(given(5), PARTS))


@pytest.mark.parametrize("name", ["at", "trades", "cure", "act", "hat"])
def test_awp_perturbs_by_the_whole_batch(name: str) -> None:
    def wrapped() -> Method:
        inner = AWP(one(name), WeightPerturbationConfig(gamma=0.05))
        return Averaging(inner, AveragingConfig())

    whole, split = wrapped(), wrapped()
    close(whole.take_step(given()), split.take_step(given(), PARTS))
    for (key, first), second in zip(
        whole.trainable().items(), split.trainable().values(), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12, msg=key)


def test_weighted_and_soft_labels_are_split() -> None:
    soft = torch.softmax(torch.randn(24, 3, dtype=torch.float64), dim=1)
    labels = Batch(given().image, given().label, given().index, 0, soft, weighted=soft * 2)
    close(one("at").take_step(labels), one("at").take_step(labels, PARTS))
    with pytest.raises(ValueError, match="no 5 equal parts"):
        labels.split(5)


def test_only_one_part_is_in_memory() -> None:
    """The largest batch that the network sees has the size of a part."""
    sizes: list[int] = []
    method = one("cure")
    method.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    method.take_step(given(), PARTS)
    assert set(sizes) == {24 // PARTS}


def test_finished_gradients_of_a_method_of_one_s_own_are_refused() -> None:
    class Own(Method):
        Config = cure.methods.AT.Config

        def make_adversarial(self, batch: Batch) -> AdversarialBatch:
            return AdversarialBatch(batch.image)

        def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
            gradients = {k: torch.zeros_like(p) for k, p in self.trainable().items()}
            return StepOutput(grads=gradients, metrics={"loss": Tensor([0.0])})

    method = Own(network(), METHODS["at"].Config(), context())
    method.take_step(given())
    with pytest.raises(ConfigError, match="cannot be added over parts"):
        method.take_step(given(), PARTS)


def test_las_at_is_refused_with_the_reason(tmp_path: Any, brightness: Any) -> None:
    settings = {
        "method": {"name": "las-at", "strategy": {"model": "small_cnn"}},
        "training.batch_size": 16,
        "training.accumulation_steps": 2,
        "data.validation": 20,
    }
    with pytest.raises(ConfigError, match="rewards strategies by the whole batch"):
        cure.train("digits", settings, run=tmp_path / "run", data=brightness, quiet=True)
    settings |= {"method": "at", "training.accumulation_steps": 5}
    with pytest.raises(ConfigError, match="a divisor of the 16 images of a batch, got 5; say 4"):
        cure.train("digits", settings, run=tmp_path / "run", data=brightness, quiet=True)


def test_a_run_in_parts_ends_with_the_accuracy_of_the_whole(tmp_path: Any, brightness: Any) -> None:
    """Through the trainer, in float32: nearly the same weights after six steps."""
    settings = {
        "start": "model",
        "method": "trades",
        "attack.steps": 2,
        "training.epochs": 1,
        "training.batch_size": 12,
        "training.validation_steps": 1,
        "data.validation": 24,
    }
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2))
    found = []
    for parts in (1, 3):
        run = cure.train(
            "digits",
            settings | {"training.accumulation_steps": parts},
            run=tmp_path / str(parts),
            data=brightness,
            model=net,
            quiet=True,
        )
        found.append(run.model("last").state_dict())
    moved = (found[0]["1.weight"] - net[1].weight).abs().max()
    assert moved > 0.01
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)
