"""Planted failures are caught, sound networks pass, and a network comes back as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from planted import MEAN, STD, THREAT
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

import cure
from cure.attacks import PGD, Threat
from cure.data import ImageSet
from cure.errors import ConfigError, DataError, ModelError
from cure.evaluation.diagnosis import CHECKS, CheckContext, cheap_checks, run_checks
from cure.evaluation.diagnosis.context import logit_ratio
from cure.evaluation.diagnosis.table import LEVEL, beyond
from cure.models import MODELS, Normalised, core
from cure.models.checkpoint import save_weights
from cure.utils.engine import Engine
from cure.utils.stats import at_least
from helpers import Command, refused

ENGINE = Engine(torch.device("cpu"))
Networks = dict[str, nn.Module]
CHEAP = [
    *("input", "finite", "logits", "evaluation_mode", "determinism", "batch_dependence"),
    *("normalisation", "natural_accuracy", "one_class", "gradients", "gradient_direction"),
]
ATTACKS = [
    *("single_step", "convergence", "families", "precision", "smoothed_gradient", "noise"),
    *("black_box", "transfer", "growing_epsilon", "training_mode", "total_gap"),
]


def statuses(
    model: nn.Module,
    images: ImageSet,
    names: list[str],
    threat: Threat = THREAT,
    **more: Any,
) -> dict[str, str]:
    context = CheckContext(model, images, threat, engine=ENGINE, **more)
    found = run_checks(context, names)
    return {item["name"]: item["status"] for item in found["checks"]}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """200 digits that no network here was trained on."""
    return planted.digits(1500, 1700)


@pytest.fixture(scope="module")
def trained() -> dict[str, nn.Module]:
    """A plain and an adversarially trained network, both of standardised images."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Normalised(MODELS["small_cnn"](10, 1, (8, 8)), [MEAN], [STD])
        plain = planted.train(plain, 5, None)
        robust = planted.train(copy.deepcopy(plain), 5, PGD(THREAT, 3, 0.08, "uniform"))
    return {"plain": plain, "robust": robust}


# Sound networks.


@pytest.mark.parametrize("which", ["plain", "robust"])
def test_sound_networks_pass_every_check(trained: Networks, images: ImageSet, which: str) -> None:
    other = trained["robust" if which == "plain" else "plain"]
    told: list[tuple[str, int, int]] = []
    result = cure.diagnose(
        trained[which],
        data=images,
        epsilon=0.15,
        device="cpu",
        transfer=other,
        progress=lambda *words: told.append(words),
    )
    found = {item["name"]: item["status"] for item in result["checks"]}
    assert found == dict.fromkeys([*CHEAP, *ATTACKS], "pass")
    assert list(found) == list(CHECKS)
    assert result["verdict"] == "pass"
    assert result["left_out"] == {}
    assert all(item["meaning"].endswith(".") and item["measured"] for item in result["checks"])
    assert [word for word in told if word[1]] == [(name, 200, 200) for name in CHECKS]
    assert json.loads(json.dumps(result)) == result
    # The attacks had something to do.
    by_name = {item["name"]: item["measured"] for item in result["checks"]}
    curve = list(by_name["growing_epsilon"]["accuracy_by_epsilon"].values())
    assert (curve[0] > 30) == (which == "robust")
    assert curve[-1] == 0


def test_sound_networks_pass_in_the_l2_ball(trained: Networks, images: ImageSet) -> None:
    few = images.subset(slice(0, 60))
    found = statuses(trained["robust"], few, [*CHEAP, *ATTACKS], Threat("L2", 0.4))
    assert found == dict.fromkeys([name for name in CHECKS if name != "transfer"], "pass")


class RefusesOtherValues(nn.Module):
    """A network that checks its input, as one should."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        if image.min() < 0 or image.max() > 1:
            raise ValueError("expected values in [0, 1]")
        logits: Tensor = self.network(image)
        return logits


def test_no_check_needs_images_beyond_their_range(trained: Networks, images: ImageSet) -> None:
    few = images.subset(slice(0, 30))
    left_out = ("black_box", "transfer", "total_gap")
    names = [name for name in [*CHEAP, *ATTACKS] if name not in left_out]
    context = CheckContext(RefusesOtherValues(trained["robust"]), few, THREAT, engine=ENGINE)
    found = {item["name"]: item for item in run_checks(context, names)["checks"]}
    assert {name: item["status"] for name, item in found.items()} == dict.fromkeys(names, "pass")
    refused = ["standardised", "from_0_to_255", "from_-1_to_1"]
    assert found["normalisation"]["measured"]["refused_by_the_network"] == refused
    result = cure.evaluate(RefusesOtherValues(trained["robust"]), data=few, attacks="pgd2")
    assert result["natural"]["n"] == 30


# Planted failures: what must be found, on which network, among how many images.

Plant = Callable[[nn.Module], nn.Module]
MASKED = {"black_box": "fail", "smoothed_gradient": "fail", "growing_epsilon": "fail"}
PLANTED: dict[str, tuple[Plant, str, int, dict[str, str]]] = {
    "quantised": (
        planted.Quantised,
        "plain",
        100,
        {"gradients": "fail", "gradient_direction": "fail", "noise": "fail"},
    ),
    "quantised, robust": (planted.Quantised, "robust", 60, {"gradients": "fail"}),
    "large logits": (
        planted.Scaled,
        "plain",
        200,
        {"gradients": "fail", "precision": "fail", "families": "fail", "noise": "fail"},
    ),
    "large logits, robust": (planted.Scaled, "robust", 100, {"precision": "fail"}),
    "softmax": (planted.Softmax, "plain", 200, {"logits": "fail"}),
    "decisions": (planted.Decisions, "plain", 200, {"logits": "fail"}),
    "sigmoid": (planted.Sigmoid, "plain", 200, {"logits": "warn"}),
    "dropout": (
        planted.Dropout,
        "plain",
        200,
        {"determinism": "fail", "batch_dependence": "fail"},
    ),
    "dropout, robust": (planted.Dropout, "robust", 60, {"determinism": "fail"}),
    "random resizing": (planted.RandomResizing, "plain", 200, {"determinism": "fail"}),
    "stopped": (planted.Stopped, "plain", 100, {"gradients": "fail", **MASKED}),
    "stopped, robust": (planted.Stopped, "robust", 100, {"gradients": "fail", "black_box": "fail"}),
    "shattered": (
        planted.Shattered,
        "plain",
        100,
        {"gradients": "pass", "gradient_direction": "fail", "smoothed_gradient": "fail"},
    ),
    "shattered, robust": (planted.Shattered, "robust", 60, {"gradient_direction": "fail"}),
    "rippled": (
        planted.Rippled,
        "plain",
        100,
        {"gradients": "pass", "gradient_direction": "fail", "single_step": "fail"},
    ),
    "noisy gradient": (planted.NoisyGradient, "plain", 100, {"convergence": "fail"}),
    "another gradient": (
        planted.WrongGradient,
        "robust",
        60,
        {"gradients": "pass", "gradient_direction": "fail"},
    ),
    "jpeg": (planted.Jpeg, "plain", 30, {"gradients": "fail", "gradient_direction": "fail"}),
    "jpeg in numpy": (planted.Numpy, "plain", 30, {"gradients": "fail"}),
    "stuck in training mode": (
        planted.StuckInTraining,
        "plain",
        200,
        {"evaluation_mode": "fail", "batch_dependence": "fail"},
    ),
    "in training mode only": (planted.TrainingOnly, "plain", 200, {"training_mode": "warn"}),
    "in training mode only, robust": (
        planted.TrainingOnly,
        "robust",
        200,
        {"training_mode": "warn"},
    ),
    "in place": (planted.InPlace, "plain", 200, {"determinism": "fail"}),
    "infinite gradient": (planted.SquareRoot, "plain", 200, {"finite": "fail"}),
    "infinite on noise": (planted.Brittle, "plain", 200, {"finite": "warn"}),
    "standardised twice": (
        lambda model: Normalised(model, [MEAN], [STD]),
        "plain",
        200,
        {"normalisation": "fail"},
    ),
    "standardised twice, robust": (
        lambda model: Normalised(model, [MEAN], [STD]),
        "robust",
        200,
        {"normalisation": "warn"},
    ),
    "not standardised": (core, "plain", 200, {"normalisation": "fail"}),
    "half precision": (planted.Half, "plain", 200, {"input": "warn"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_failures_are_caught(trained: Networks, images: ImageSet, name: str) -> None:
    plant, which, count, expected = PLANTED[name]
    model = plant(copy.deepcopy(trained[which])).eval()
    found = statuses(model, images.subset(slice(0, count)), list(expected))
    assert found == expected


# Defences that were broken by adaptive attacks.


@pytest.fixture(scope="module")
def robust_layers() -> nn.Sequential:
    """An adversarially trained network with its activations in modules."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = planted.train(planted.convolutional(nn.ReLU), 5, None)
        model = planted.train(model, 5, PGD(THREAT, 3, 0.08, "uniform"))
    assert isinstance(model, nn.Sequential)
    return model


def sparse_means(layers: nn.Sequential) -> nn.Module:
    image = planted.digits(0, 500).image / 255
    with torch.no_grad():
        first, second = (
            planted.SparseMean(layers[:2](image), 0.6),
            planted.SparseMean(layers[:4](image), 0.6),
        )
    return nn.Sequential(*layers[:2], first, *layers[2:4], second, *layers[4:]).eval()


def freshly(activation: Callable[[], nn.Module]) -> Plant:
    def make(layers: nn.Module) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return planted.train(planted.convolutional(activation), 6, None)

    return make


LITERATURE: dict[str, tuple[Plant, list[str]]] = {
    "k winners take all": (freshly(planted.KWinners), ["black_box", "total_gap"]),
    "thresholded activations": (freshly(planted.Thresholded), ["gradients"]),
    "sparsified means": (sparse_means, ["black_box", "total_gap"]),
    "stable ODE": (
        lambda layers: nn.Sequential(*layers, planted.StableODE(10)).eval(),
        ["precision", "families", "gradients", "total_gap"],
    ),
}


@pytest.mark.parametrize("name", LITERATURE)
def test_broken_defences_of_the_literature_are_caught(
    robust_layers: nn.Sequential, images: ImageSet, name: str
) -> None:
    plant, names = LITERATURE[name]
    few = images.subset(slice(0, 60))
    found = statuses(plant(copy.deepcopy(robust_layers)), few, names)
    assert {"warn", "fail"} & set(found.values()), found


def test_the_network_without_the_defence_passes(
    robust_layers: nn.Sequential, images: ImageSet
) -> None:
    names = ["gradients", "precision", "families", "black_box", "total_gap"]
    # All 200: of fewer, the three points of gap of a sound network can be five by chance.
    assert statuses(robust_layers, images, names) == dict.fromkeys(names, "pass")


def test_units_that_never_fire_are_named(robust_layers: nn.Sequential, images: ImageSet) -> None:
    dead = copy.deepcopy(robust_layers)
    dead[2].bias.data.fill_(-1e3)
    context = CheckContext(dead, images, THREAT, engine=ENGINE)
    (item,) = run_checks(context, ["gradients"])["checks"]
    # One class is named for all images; those that are right have no gradient.
    assert item["status"] == "fail"
    assert "Units that never fire on these images: 16 of 16 in '3'" in item["meaning"]
    few = copy.deepcopy(robust_layers)
    few[2].bias.data[:3] = -1e3
    context = CheckContext(few, images, THREAT, engine=ENGINE)
    (item,) = run_checks(context, ["gradients"])["checks"]
    with torch.no_grad():
        fired = few[:4](images.image / 255).amax(dim=(0, 2, 3)) > 0
    assert not fired[:3].any()
    named = item["measured"]["units_that_never_fire"]
    assert named["3"] == f"{int((~fired).sum())} of 16"


# One class.


def test_one_class_named_always(images: ImageSet) -> None:
    draws = torch.Generator().manual_seed(0)
    label = torch.tensor([0] * 180 + [1] * 20)[torch.randperm(200, generator=draws)]
    ward = ImageSet(images.image, label, ("healthy", "ill"), "ward", "test")
    always = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    nn.init.normal_(always[1].weight, std=1e-3, generator=draws)
    always[1].bias.data = torch.tensor([2.0, -1.0])
    names = ["natural_accuracy", "one_class"]
    assert statuses(always, ward, names) == dict.fromkeys(names, "fail")
    # Where the data is that class, so may the answers be.
    healthy = ImageSet(images.image, 0 * label, ("healthy", "ill"), "ward", "test")
    assert statuses(always, healthy, names) == dict.fromkeys(names, "pass")


# Clamped inputs.


class Contrast(nn.Module):
    """Clamps its input, and is right on images of full contrast only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image.clamp(0, 1))


def test_a_network_that_clamps_is_not_said_to_expect_another_range(
    trained: Networks, images: ImageSet
) -> None:
    pale = altered(images, images.image // 40)
    context = CheckContext(Contrast(trained["plain"]), pale, THREAT, engine=ENGINE)
    (item,) = run_checks(context, ["normalisation"])["checks"]
    assert item["status"] == "warn"
    assert "clamps its input to [0, 1]" in item["meaning"]
    assert "0 to 255" not in item["meaning"]


def test_what_is_said_tells_what_to_do(trained: Networks, images: ImageSet) -> None:
    model = planted.Numpy(copy.deepcopy(trained["plain"])).eval()
    context = CheckContext(model, images.subset(slice(0, 8)), THREAT, engine=ENGINE)
    (item,) = run_checks(context, ["gradients"])["checks"]
    assert item["measured"]["connected"] is False
    assert "numpy()" in item["measured"]["error"]
    assert "BPDA" in item["meaning"]


def test_images_made_on_another_network(trained: Networks, images: ImageSet) -> None:
    stopped = planted.Stopped(trained["plain"])
    assert statuses(stopped, images, ["transfer"], other=trained["plain"]) == {"transfer": "fail"}


def test_attacks_are_left_out_where_nothing_is_finite(trained: Networks, images: ImageSet) -> None:
    model = planted.SquareRoot(trained["plain"])
    found = run_checks(CheckContext(model, images, THREAT, engine=ENGINE))
    assert found["verdict"] == "fail"
    assert list(found["left_out"]) == ["gradients", "gradient_direction", *ATTACKS]
    assert set(found["left_out"].values()) == {"what the network returns is not finite"}


# Images and accuracy.


def altered(images: ImageSet, image: Tensor) -> ImageSet:
    return ImageSet(image, images.label, images.classes, images.name, images.split)


def test_images_stored_wrongly(trained: Networks, images: ImageSet) -> None:
    cast = altered(images, (images.image / 255).to(torch.uint8))
    assert statuses(trained["plain"], cast, ["input"]) == {"input": "fail"}
    dark = altered(images, images.image // 8)
    assert statuses(trained["plain"], dark, ["input"]) == {"input": "warn"}


def test_a_network_that_guesses(trained: Networks, images: ImageSet) -> None:
    shuffled = ImageSet(
        images.image, (images.label + 1) % 10, images.classes, images.name, images.split
    )
    found = statuses(trained["plain"], shuffled, ["natural_accuracy"])
    assert found == {"natural_accuracy": "fail"}
    # Of images of one class nothing can be said.
    one = shuffled.subset(shuffled.label == 3)
    assert statuses(trained["plain"], one, ["natural_accuracy"]) == {"natural_accuracy": "pass"}


def test_far_below_the_accuracy_that_is_known(trained: Networks, images: ImageSet) -> None:
    label = images.label.clone()
    label[:60] = (label[:60] + 1) % 10
    spoilt = ImageSet(images.image, label, images.classes, images.name, images.split)
    for expected, status in ((70.0, "pass"), (95.0, "fail")):
        found = statuses(trained["plain"], spoilt, ["natural_accuracy"], expected=expected)
        assert found == {"natural_accuracy": status}
    found = statuses(trained["plain"], images, ["natural_accuracy"], expected=95.0)
    assert found == {"natural_accuracy": "pass"}


# How a count is judged.


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("count", [0, 1, 7, 100, 200])
def test_tail_of_the_binomial(count: int, share: float) -> None:
    expected = scipy.stats.binom.sf(count - 1, 200, share)
    assert at_least(count, 200, share) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_limits_that_are_just_kept_are_rarely_taken_for_broken() -> None:
    assert [beyond(count, 200) for count in (6, 7, 18, 19)] == ["pass", "warn", "warn", "fail"]
    for trials in (50, 200, 1000):
        for limit, status in ((0.01, "warn"), (0.05, "fail")):
            reached = [count for count in range(trials + 1) if beyond(count, trials) == status]
            reached += [count for count in range(trials + 1) if beyond(count, trials) == "fail"]
            least = min(reached)
            assert scipy.stats.binom.sf(least - 1, trials, limit) < LEVEL
            # And no limit is wider than it need be.
            assert scipy.stats.binom.sf(least - 2, trials, limit) >= LEVEL


def test_ratio_of_logits_is_that_of_autoattack() -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=draws)
    label = torch.randint(7, (50,), generator=draws)
    expected = APGDAttack.dlr_loss(None, logits, label)
    assert torch.allclose(logit_ratio(logits, label), expected, rtol=1e-5)


# What is lent comes back.


def test_cheap_checks_change_nothing(trained: Networks, images: ImageSet) -> None:
    model = planted.StuckInTraining(copy.deepcopy(trained["plain"]))
    next(model.parameters()).requires_grad_(False)
    model.train()
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    found = cheap_checks(model, images, THREAT, engine=ENGINE)
    assert [item["name"] for item in found["checks"]] == CHEAP
    assert found["verdict"] == "fail"
    assert found["checks"][1]["measured"]["of"] == 64
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("which", ["plain", "robust"])
def test_cheap_checks_pass_sound_networks(trained: Networks, images: ImageSet, which: str) -> None:
    found = cheap_checks(trained[which], images, THREAT, engine=ENGINE)
    assert {item["name"]: item["status"] for item in found["checks"]} == dict.fromkeys(
        CHEAP, "pass"
    )


def test_the_same_seed_gives_the_same_numbers(trained: Networks, images: ImageSet) -> None:
    def once(seed: int) -> list[dict[str, Any]]:
        context = CheckContext(
            planted.Dropout(trained["plain"]), few, THREAT, engine=ENGINE, seed=seed
        )
        names = ["determinism", "convergence", "noise", "black_box"]
        found: list[dict[str, Any]] = run_checks(context, names)["checks"]
        return found

    few = images.subset(slice(0, 40))
    first = once(0)
    torch.rand(3)
    assert once(0) == first
    assert once(1) != first


# The command.


@pytest.fixture(scope="module")
def weights(trained: Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The robust network's weights."""
    path = tmp_path_factory.mktemp("weights") / "robust.safetensors"
    save_weights(core(trained["robust"]), path, {})
    return path


def words(weights: Path, *more: object) -> list[object]:
    """The command on a few test images of digits."""
    return [
        *("diagnose", "--model", "small_cnn", "--weights", weights, "--data", "digits"),
        *("--epsilon", 0.15, "--device", "cpu", "--limit", 50, *more),
    ]


def test_command(command: Command, weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "diagnosis.json"
    ended = command(*words(weights, "--mean", MEAN, "--std", STD, "--output", output))
    result = json.loads(output.read_text())
    assert ended.status == 0, ended
    assert result["format"] == "cure-diagnosis-1"
    assert result["verdict"] == "pass"
    assert [item["name"] for item in result["checks"]] == [
        name for name in CHECKS if name != "transfer"
    ]
    assert {tuple(item) for item in result["checks"]} == {("name", "status", "measured", "meaning")}
    assert result["left_out"] == {"transfer": "no other network was given (--transfer)"}
    assert (result["n"], result["seed"], result["norm"]) == (50, 0, "Linf")
    assert (result["epsilon"], result["epsilon_text"]) == (0.15, "0.15")
    assert result["environment"]["packages"]["torch"]
    assert result["model"]["weights"] == "robust.safetensors"
    for name in CHECKS:
        assert name in ended.out
    assert "left out transfer" in ended.out


def test_command_ends_with_status_1_when_a_check_fails(
    command: Command, weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "diagnosis.json"
    ended = command(*words(weights, "--mean", 0, "--std", 1 / 255, "--output", output))
    assert ended.status == 1
    assert json.loads(output.read_text())["verdict"] == "fail"
    assert "fail normalisation: The network is more accurate on images" in ended.out


def test_a_run_knows_its_validation_accuracy(tmp_path: Path) -> None:
    settings = {
        **{"method": {"name": "natural"}, "start": "scratch", "training.epochs": 2},
        **{"training.validation_steps": 1},
    }
    run = cure.train("digits", settings, run=tmp_path / "run", quiet=True)
    epochs = [record["validation"]["natural"] for record in run.metrics]

    def measured(**more: Any) -> dict[str, Any]:
        result = cure.diagnose(run, limit=40, **more)
        return {item["name"]: item for item in result["checks"]}["natural_accuracy"]

    known = measured(checkpoint="last")
    assert known["measured"]["expected"] == epochs[-1]
    # Of other images it knows nothing.
    assert measured(data="digits", split="train")["measured"]["expected"] is None
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"natural": ', '"natural": 99.0, "was": '))
    assert measured()["measured"]["expected"] == 99.0
    # Each diagnosis is kept with the run, under the first free number.
    kept = sorted(file.name for file in (tmp_path / "run" / "diagnoses").iterdir())
    assert kept == ["best-test-1.json", "best-train-1.json", "last-test-1.json"]
    cure.corruptions(run, only="fog", severity=1, limit=4, data_options={"resize": 32})
    (file,) = (tmp_path / "run" / "corruptions").iterdir()
    assert json.loads(file.read_text())["format"] == "cure-corruptions-1"


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "limit": ({"limit": 0}, ConfigError, "limit: expected 1 or more images, got 0"),
    "batch_size": ({"batch_size": 0}, ConfigError, "batch_size: expected 1 or more"),
    "norm": ({"norm": "L7"}, ConfigError, "norm"),
    "output": ({"output": "nowhere/diagnosis.json"}, ConfigError, "does not exist"),
    "data": ({"data": None}, ConfigError, "needs images"),
    "transfer": ({"transfer": "nowhere"}, cure.CureError, "nowhere does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused(trained: Networks, images: ImageSet, name: str) -> None:
    settings, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        cure.diagnose(trained["plain"], **{"data": images, "device": "cpu", **settings})


def test_a_network_for_other_images_is_refused(images: ImageSet) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="3 logits but the data has 10 classes"):
        cure.diagnose(flat, data=images, device="cpu")
    with pytest.raises(DataError, match="no image"):
        cure.diagnose(flat, data=images.subset(slice(0, 0)), device="cpu")


def test_command_needs_a_target(command: Command) -> None:
    refused(command("diagnose"), "expected a run folder, or --model NAME")
    refused(command("diagnose", "run", "--mean", 0), "go with --model")


class Brightness(nn.Module):
    """Two classes, dark and bright, by the mean of all pixels."""

    def forward(self, image: Tensor) -> Tensor:
        mean = 20 * (image.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-mean, mean], dim=1)


@pytest.mark.parametrize("threat", [Threat("L2", 1.0), Threat("L1", 20.0)])
def test_images_whose_range_is_a_ball_that_no_threat_may_have(threat: Threat) -> None:
    """24x24: from black to white it is 24 in L2, and the first tiles of Square are cut off."""
    label = torch.arange(16) % 2
    pixels = (0.1 + 0.8 * label).view(-1, 1, 1, 1).expand(-1, 1, 24, 24)
    found = statuses(
        Brightness(),
        ImageSet.of(pixels.contiguous(), label, ("dark", "bright")),
        ["black_box", "growing_epsilon", "families"],
        threat,
    )
    assert found == {"families": "pass", "black_box": "pass", "growing_epsilon": "pass"}


def test_few_images_and_classes(images: ImageSet) -> None:
    """Two classes, three images, all wrong or all right: every check has something to say."""
    two = images.subset(images.label < 2)
    two = ImageSet(two.image[:3], two.label[:3], ("0", "1"), "two", "test")

    class Always(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return F.one_hot(torch.full((len(image),), 1), 2) + 0.1 * image.mean(dim=(1, 2, 3))[
                :, None
            ] * torch.tensor([1.0, 2.0])

    result = cure.diagnose(Always(), data=two, device="cpu")
    assert result["n"] == 3
    assert {item["name"] for item in result["checks"]} >= {"growing_epsilon", "families"}
