"""Evaluation against closed forms, against other libraries, and against planted failures."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import recall_score
from torch import Tensor, nn

import cure
from cure.analysis.study import find_study
from cure.api import MODULES
from cure.attacks import Threat
from cure.attacks.autoattack import package_part
from cure.attacks.early_exit import PlainLayout, early_exit, projection, standard_part
from cure.attacks.registry import EvaluationAttack, Part, evaluation_attack
from cure.data import ImageSet
from cure.errors import (
    CheckpointError,
    ConfigError,
    CureError,
    CureNote,
    DataError,
    ModelError,
)
from cure.evaluation.evaluate import evaluate
from cure.evaluation.journal import Journal
from cure.evaluation.metrics import accuracy_of, by_class, nrr
from cure.evaluation.runner import measure
from cure.models import digest
from cure.models.checks import check_outputs
from cure.runs.results import EvaluationRecord
from cure.utils.random import generator
from cure.utils.stats import wilson
from linear_models import ENGINE, image_set, linear, linear_case, unit

# The module, under whatever name: `cure.evaluate` is the function of the public interface.
EVALUATION = sys.modules[measure.__module__]
Result = dict[str, Any]


def digits(start: int, stop: int) -> ImageSet:
    bunch = load_digits()
    image = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    label = torch.from_numpy(bunch.target.astype(np.int64))
    return image_set(image[start:stop], label[start:stop], 10)


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """A small network that reads digits well and withstands a little noise; in training mode."""
    images = digits(0, 1200)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * 16, 10),
        ).train()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(200):
            index = torch.randint(len(images), (64,))
            image = unit(images)[index]
            noisy = (image + 0.1 * torch.randn_like(image).sign()).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(noisy), images.label[index]).backward()
            optimizer.step()
        optimizer.zero_grad()
    return model


class Spy(nn.Module):
    """Passes on, and keeps every batch: of which attacks asked a gradient, and all."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.attacked: list[Tensor] = []
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        if image.requires_grad:
            self.attacked.append(image.detach().clone())
        return self.network(image)


def plant(monkeypatch: pytest.MonkeyPatch, attacks: dict[str, Callable[..., Tensor]]) -> None:
    """Let ``measure`` find these functions (image, label) -> adversarial under their names."""

    def find(name: str, source: object = None) -> EvaluationAttack:
        def run(
            model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
        ) -> Tensor:
            return attacks[name](image, label)

        return EvaluationAttack(name, "", {}, {name: Part(run)})

    monkeypatch.setattr(EVALUATION, "evaluation_attack", find)


def without_seconds(result: Any) -> Any:
    if isinstance(result, dict):
        return {k: without_seconds(v) for k, v in result.items() if k != "seconds"}
    return result


# Numbers.


@pytest.mark.parametrize(
    ("correct", "count"), [(0, 1), (1, 1), (0, 100), (100, 100), (37, 100), (8676, 10000), (1, 7)]
)
def test_wilson_agrees_with_scipy(correct: int, count: int) -> None:
    expected = scipy.stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson(correct, count) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=1e-9
    )


def test_wilson_by_hand() -> None:
    # z = 2, 5 of 10: centre (0.5 + 4/20)/(1 + 4/10) = 0.5, half sqrt(0.025 + 0.01)/... = 0.2672612
    half = 2 / 1.4 * math.sqrt(0.25 / 10 + 4 / 400)
    assert half == pytest.approx(0.2672612, abs=1e-7)
    assert wilson(5, 10, z=2) == pytest.approx((100 * (0.5 - half), 100 * (0.5 + half)))


@pytest.mark.parametrize(
    ("natural", "robust", "expected"),
    [(86.76, 52.48, 65.40), (0, 0, 0), (80, 0, 0), (50, 50, 50), (100, 50, 66.67)],
)
def test_natural_robust_ratio_by_hand(natural: float, robust: float, expected: float) -> None:
    assert nrr(natural, robust) == pytest.approx(expected, abs=0.005)


def test_accuracy_of_counts_truths() -> None:
    truths = torch.tensor([True, False, True, True])
    result = accuracy_of(truths, 1.23456)
    assert result == {
        "accuracy": 75.0,
        "interval": list(wilson(3, 4)),
        "correct": 3,
        "n": 4,
        "seconds": 1.23,
    }


def test_accuracy_by_class_agrees_with_scikit_learn() -> None:
    draws = torch.Generator().manual_seed(1)
    label = torch.randint(4, (200,), generator=draws).clamp(max=2)  # no image of class 3
    predicted = torch.randint(4, (200,), generator=draws)
    found = by_class(predicted == label, label, 4)
    recall = recall_score(label, predicted, labels=[0, 1, 2], average=None, zero_division=0)
    assert found["accuracy_by_class"][:3] == pytest.approx(list(100 * recall))
    assert found["accuracy_by_class"][3] is None
    expected = 100 * recall.mean()
    assert found["balanced_accuracy"] == pytest.approx(expected)
    low, high = found["balanced_interval"]
    assert low < expected < high


def test_a_network_that_always_names_the_largest_class() -> None:
    label = torch.tensor([0] * 18 + [1] * 2)
    images = ImageSet(
        torch.zeros((20, 1, 4, 4), dtype=torch.uint8), label, ("healthy", "ill"), "ward", "test"
    )
    always = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(always[1].weight)
    always[1].bias.data = torch.tensor([2.0, -1.0])
    result = evaluate(always, data=images, attacks=["pgd20"], device="cpu")
    assert result["majority"] == {"class": "healthy", "accuracy": 90.0}
    for part in (result["natural"], result["attacks"]["pgd20"], result["worst_case"]):
        assert part["accuracy"] == 90.0
        assert part["balanced_accuracy"] == 50.0
        assert part["accuracy_by_class"] == [100.0, 0.0]
    assert result["data"]["images_by_class"] == [18, 2]


class Noted(nn.Module):
    """Half precision, of which the trial gives a note."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 2).half()

    def forward(self, image: Tensor) -> Tensor:
        return self.last(image.flatten(1))


def test_notes_are_kept_in_the_result(tmp_path: Path) -> None:
    with pytest.warns(CureNote, match="converted to float32"):
        result = evaluate(
            Noted(),
            data=linear_case(2, 0.05)[1],
            attacks=["pgd20"],
            output=tmp_path / "noted.json",
        )
    (note,) = result["notes"]
    assert "float16 and are converted to float32" in note
    assert EvaluationRecord.read(tmp_path / "noted.json").notes == [note]


# One model, one set of images.


@pytest.mark.parametrize("attack", ["pgd20", "cw"])
@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.1])
def test_linf_accuracy_of_a_linear_model_is_its_closed_form(attack: str, epsilon: float) -> None:
    model, images, right, robust = linear_case(2, epsilon)
    result = measure(model, images, [attack], Threat("Linf", epsilon), engine=ENGINE)
    assert result["natural"]["correct"] == int(right.sum())
    assert result["attacks"][attack]["correct"] == int(robust.sum())
    assert result["attacks"][attack]["attacked"] == int(right.sum())
    assert result["attacks"][attack]["largest_change"] == pytest.approx(epsilon, abs=1e-6)
    assert 0 < int(robust.sum()) < int(right.sum()) < len(images)


@pytest.mark.parametrize("attack", ["pgd20", "cw"])
def test_l2_accuracy_of_a_linear_model_is_its_closed_form(attack: str) -> None:
    model, images, right, robust = linear_case(2, 0.2, dual=2, gap=0.05)
    result = measure(model, images, [attack], Threat("L2", 0.2), engine=ENGINE)
    assert result["natural"]["correct"] == int(right.sum())
    assert result["attacks"][attack]["correct"] == int(robust.sum())


def test_what_is_wrong_as_it_is_counts_as_lost_and_is_not_attacked() -> None:
    plain, images, right, _ = linear_case(2, 0.05)
    model = Spy(plain)
    measure(model, images, ["pgd20"], Threat("Linf", 0.05), engine=ENGINE)
    assert len(model.attacked) == 20
    clean = unit(images)[right]
    for batch in model.attacked:
        assert batch.shape == clean.shape
        assert float((batch - clean).abs().max()) <= 0.05 + 1e-6


def test_an_attack_that_mends_a_wrong_image_wins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, images, right, _ = linear_case(2, 0.05)
    weight = plain[1].weight.detach()
    given: list[int] = []

    def mend(image: Tensor, label: Tensor) -> Tensor:
        given.append(len(image))
        helpful = (weight[label] - weight[1 - label]).sign().reshape(image.shape)
        return image + 0.05 * helpful

    whole = unit(images)
    assert int((plain(mend(whole, images.label)).argmax(dim=1) == images.label).sum()) > int(
        right.sum()
    ), "the planted attack mends nothing"
    given.clear()
    plant(monkeypatch, {"mend": mend})
    result = measure(plain, images, ["mend"], Threat("Linf", 0.05), engine=ENGINE, batch_size=7)
    assert result["attacks"]["mend"]["correct"] == result["natural"]["correct"] == int(right.sum())
    assert sum(given) == int(right.sum())
    assert max(given) == 7


def test_the_worst_case_combines_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, images, right, robust = linear_case(2, 0.1)
    weight = plain[1].weight.detach()
    falls = (~robust[right]).nonzero().flatten()
    assert len(falls) >= 4

    def fooling(positions: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def run(image: Tensor, label: Tensor) -> Tensor:
            harmful = -(weight[label] - weight[1 - label]).sign().reshape(image.shape)
            changed = image.clone()
            changed[positions] += 0.1 * harmful[positions]
            return changed

        return run

    plant(monkeypatch, {"first": fooling(falls[:3]), "second": fooling(falls[2:4])})
    result = measure(plain, images, ["first", "second"], Threat("Linf", 0.1), engine=ENGINE)
    natural = int(right.sum())
    assert result["attacks"]["first"]["correct"] == natural - 3
    assert result["attacks"]["second"]["correct"] == natural - 2
    assert result["worst_case"]["correct"] == natural - 4
    assert result["worst_case"]["over"] == ["first", "second"]


@pytest.mark.parametrize("change", [0.11, -0.11])
def test_an_attack_that_leaves_the_ball_gives_no_number(
    monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    plain, images, _, _ = linear_case(2, 0.1)
    plant(monkeypatch, {"far": lambda image, label: image + change})
    with pytest.raises(RuntimeError, match="outside what the threat allows"):
        measure(plain, images, ["far"], Threat("Linf", 0.1), engine=ENGINE)


def test_an_attack_that_leaves_the_images_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, images, _, _ = linear_case(2, 0.1)
    plant(monkeypatch, {"dark": lambda image, label: image - 0.9})
    with pytest.raises(RuntimeError, match="outside what the threat allows"):
        measure(plain, images, ["dark"], Threat("Linf", 1.0), engine=ENGINE)


@pytest.mark.parametrize("threat", [Threat("Linf", 0.1), Threat("L2", 0.7)])
@pytest.mark.parametrize("attack", ["pgd20", "cw"])
def test_attacks_stay_in_the_ball_and_in_the_image(
    network: nn.Sequential, threat: Threat, attack: str
) -> None:
    images = digits(1200, 1264)
    network.eval()
    try:
        run = evaluation_attack(attack).parts[attack].run
        adversarial = run(network, unit(images), images.label, threat, 0, 0)
    finally:
        network.train()
    change = (adversarial - unit(images)).flatten(1)
    length = change.norm(p=math.inf if threat.norm == "Linf" else 2, dim=1)
    assert float(length.max()) <= threat.epsilon * (1 + 1e-5)
    assert float(length.max()) > 0.5 * threat.epsilon
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


def test_modes_come_back_and_evaluation_mode_is_used(network: nn.Sequential) -> None:
    images = digits(1200, 1264)
    network[1].eval()
    try:
        before = [module.training for module in network.modules()]
        result = measure(network, images, ["pgd2"], Threat("Linf", 0.1), engine=ENGINE)
        assert [module.training for module in network.modules()] == before
        assert before.count(False) == 1
        network.eval()
        expected = (network(unit(images)).argmax(dim=1) == images.label).sum()
    finally:
        network.train()
    assert result["natural"]["correct"] == int(expected)


def test_modes_come_back_after_a_refusal() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 2), nn.Softmax(dim=1)).train()
    model[1].eval()
    _, images, _, _ = linear_case(2, 0.1)
    with pytest.raises(ModelError):
        measure(model, images, ["pgd20"], Threat("Linf", 0.1), engine=ENGINE)
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training


def test_an_unknown_attack_is_refused_before_anything_is_computed() -> None:
    plain, images, _, _ = linear_case(2, 0.1)
    model = Spy(plain)
    with pytest.raises(ConfigError, match="did you mean 'pgd20'"):
        measure(model, images, ["cw", "pdg20"], Threat("Linf", 0.1), engine=ENGINE)
    assert model.calls == 0


@pytest.mark.parametrize("name", ["pgd0", "pgd", "pgd-", "pgd020", "PGD20", "aa", ""])
def test_names_that_are_no_attack(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown attack"):
        evaluation_attack(name)


def test_what_is_no_number_is_not_right() -> None:
    """A network whose logits are NaN away from the images themselves."""

    class Breaks(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            level = image.flatten(1).mean(dim=1, keepdim=True)
            near = (level * 255 - (level * 255).round()).abs() < 1e-3
            scores = torch.cat([1 - level, level], dim=1) * 4
            return torch.where(near, scores, torch.nan)

    images = image_set(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.zeros(6).long(), 2)
    found = measure(Breaks(), images, ["noise"], Threat("Linf", 0.1), engine=ENGINE)
    assert found["natural"]["correct"] == 6
    assert found["attacks"]["noise"]["correct"] == 0


def test_a_curve_is_refused_before_any_attack_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, *_ = linear_case(4, 0.03)
    monkeypatch.setattr(EVALUATION.AttackRunner, "run", None)
    with pytest.raises(ConfigError, match="pgd20"):
        evaluate(model, data=images, norm="L1", attacks=["apgd-ce"], curve="pgd20")


def test_a_radius_of_a_curve_counts_once() -> None:
    model, images, *_ = linear_case(4, 0.03)
    found = evaluate(model, data=images, attacks=[], curve="pgd2", epsilons=["8/255", "8/255"])
    assert len(found["curve"]["points"]) == 1


def test_no_image_is_refused() -> None:
    plain, images, _, _ = linear_case(2, 0.1)
    with pytest.raises(DataError, match="no image"):
        measure(plain, images.subset(slice(0, 0)), [], Threat("Linf", 0.1), engine=ENGINE)


def test_a_seed_repeats_and_another_differs(network: nn.Sequential) -> None:
    images = digits(1200, 1300)
    model = Spy(network)

    def run(seed: int) -> tuple[Result, Tensor]:
        model.attacked.clear()
        result = measure(
            model, images, ["pgd3", "cw"], Threat("Linf", 0.1), engine=ENGINE, seed=seed
        )
        return without_seconds(result), torch.cat(model.attacked)

    torch.manual_seed(1)
    first, batches = run(5)
    torch.manual_seed(2)
    again, same = run(5)
    assert first == again
    assert torch.equal(batches, same)
    assert first["attacks"]["cw"]["seed"] == 5
    _, other = run(6)
    assert not torch.equal(batches, other)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_no_verdict(network: nn.Sequential, batch_size: int) -> None:
    images = digits(1200, 1250)
    network.eval()
    expected = int((network(unit(images)).argmax(dim=1) == images.label).sum())
    network.train()
    result = measure(network, images, [], Threat("Linf", 0.1), engine=ENGINE, batch_size=batch_size)
    assert result["natural"]["correct"] == expected
    assert "worst_case" not in result
    model, images, _, robust = linear_case(2, 0.05)
    result = measure(
        model, images, ["pgd20"], Threat("Linf", 0.05), engine=ENGINE, batch_size=batch_size
    )
    assert result["attacks"]["pgd20"]["correct"] == int(robust.sum())


def test_pgd20_agrees_with_foolbox_from_the_same_start(network: nn.Sequential) -> None:
    foolbox = pytest.importorskip("foolbox")
    eagerpy = pytest.importorskip("eagerpy")
    images = digits(1200, 1296)
    epsilon, threat = 0.12, Threat("Linf", 0.12)
    network.eval()
    try:
        right = network(unit(images)).argmax(dim=1) == images.label
        image, label = unit(images)[right], images.label[right]
        noise = threat.sample(image, generator("cpu", 3, "pgd20", 0))
        assert float(noise.abs().max()) <= epsilon

        class FromThere(foolbox.attacks.LinfPGD):  # type: ignore[misc]
            def get_random_start(self, x0: Any, epsilon: float) -> Any:
                return eagerpy.astensor(image + noise)

        attack = FromThere(rel_stepsize=0.25, steps=20, random_start=True)
        wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        _, found, fooled = attack(wrapped, image, label, epsilons=epsilon)
        run = evaluation_attack("pgd20").parts["pgd20"].run
        adversarial = run(network, image, label, threat, 3, 0)
        verdict = network(adversarial).argmax(dim=1) != label
    finally:
        network.train()
    assert torch.equal(verdict, fooled)
    assert 5 < int(fooled.sum()) < len(fooled) - 5
    assert float(((adversarial - found).abs() < 1e-5).float().mean()) > 0.99
    result = measure(network, images, ["pgd20"], threat, engine=ENGINE, seed=3)
    assert result["attacks"]["pgd20"]["correct"] == int((~fooled).sum())


# AutoAttack.


def package_verdicts(
    network: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, batch_size: int
) -> tuple[Tensor, dict[str, list[int]]]:
    """Which images pyautoattack, as it is, cannot fool [N], and whom each part fooled."""
    from pyautoattack import AutoAttack

    stands = torch.ones(len(label), dtype=torch.bool)
    fooled: dict[str, list[int]] = {}
    with torch.random.fork_rng():
        suite = AutoAttack(
            network, norm=threat.norm, eps=threat.epsilon, seed=seed, version="standard"
        )
        for part in ("apgd-ce", "apgd-t", "fab-t", "square"):
            rows = stands.nonzero().flatten()
            suite.attacks_to_run = [part]
            _, said = suite.run_standard_evaluation(image[rows], label[rows], batch_size=batch_size)
            fallen = rows[said != label[rows]]
            stands[fallen] = False
            fooled[part] = fallen.tolist()
    return stands, fooled


def brief_suite(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """Let Square, of the package and of ours, ask fewer queries than 5000."""
    import pyautoattack

    monkeypatch.setattr("cure.attacks.early_exit.QUERIES", queries)
    made = pyautoattack.AutoAttack.__init__

    def brief(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.square.n_queries = queries

    monkeypatch.setattr(pyautoattack.AutoAttack, "__init__", brief)


class Asked(nn.Module):
    """Passes on, and keeps what it was asked: with gradient, and without."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.asked: dict[bool, list[Tensor]] = {True: [], False: []}

    def forward(self, image: Tensor) -> Tensor:
        self.asked[image.requires_grad].append(image.detach().clone())
        return self.network(image)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_each_part_asks_the_network_the_images_that_its_package_asks(
    network: nn.Sequential, part: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a ball so small that nobody is fooled, so that nobody leaves."""
    import pyautoattack

    brief_suite(monkeypatch, 250)
    # Another layout rounds otherwise, and a sign takes up the smallest difference.
    monkeypatch.setattr(PlainLayout, "forward", lambda self, image: self.model(image))
    images = digits(1200, 1210)
    threat = Threat("Linf", 0.002) if norm == "Linf" else Threat("L2", 0.01)
    network.eval()
    try:
        right = network(unit(images)).argmax(dim=1) == images.label
        image, label = unit(images)[right], images.label[right]
        theirs, own = Asked(network), Asked(network)
        with torch.random.fork_rng():
            suite = pyautoattack.AutoAttack(
                theirs, norm=norm, eps=threat.epsilon, seed=5, version="standard"
            )
            suite.attacks_to_run = [part]
            _, said = suite.run_standard_evaluation(image, label, batch_size=64)
            found = standard_part(part, own, image, label, threat, 5)
    finally:
        network.train()
    assert torch.equal(said, label)
    assert torch.equal(found, image)
    count = {"apgd-ce": 101, "apgd-t": 9 * 101, "fab-t": 9 * 100, "square": 250}[part]
    kind = part != "square"
    expected, came = theirs.asked[kind], own.asked[kind]
    if not kind:
        # Both end with the verdict on what was found; the queries are what comes before.
        expected, came = expected[-count - 2 : -2], came[-count - 1 : -1]
    assert len(expected) == len(came) == count
    apart = [float((a - b).abs().max()) for a, b in zip(expected, came, strict=True)]
    if part == "fab-t":
        # It projects in another way, whose rounding the steps of an image may take up, towards
        # one class or two; how much depends on the processor.
        assert sorted(apart)[int(0.8 * count)] < 1e-5
        assert max(apart) < 0.05
    else:
        assert max(apart) < 1e-6
    assert sorted(apart)[len(apart) // 2] < 1e-5


@pytest.mark.parametrize(
    ("threat", "batch_size"), [(Threat("Linf", 0.09), 10), (Threat("L2", 0.6), 64)]
)
def test_autoattack_gives_the_verdicts_of_its_package(
    network: nn.Sequential,
    threat: Threat,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Image by image and part by part, and nothing of the network or of chance is touched."""
    # All but the last two sizes of its squares, for both sides.
    brief_suite(monkeypatch, 1200)
    images = digits(1200, 1218)
    network.zero_grad()
    network[0].bias.requires_grad_(False)
    network[3].bias.grad = torch.full_like(network[3].bias, 7.0)
    learning = [parameter.requires_grad for parameter in network.parameters()]
    state = torch.get_rng_state()
    journal = Journal()
    try:
        result = measure(
            network,
            images,
            ["autoattack"],
            threat,
            engine=ENGINE,
            seed=3,
            batch_size=batch_size,
            journal=journal,
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert [parameter.requires_grad for parameter in network.parameters()] == learning
        grads = {name for name, value in network.named_parameters() if value.grad is not None}
        assert grads == {"3.bias"}
        assert bool((network[3].bias.grad == 7.0).all())
    finally:
        network[0].bias.requires_grad_(True)
        network[3].bias.grad = None

    network.eval()
    try:
        right = (network(unit(images)).argmax(dim=1) == images.label).nonzero().flatten()
        stands, fooled = package_verdicts(
            network, unit(images)[right], images.label[right], threat, 3, batch_size
        )
    finally:
        network.train()
    expected = {part: right[rows].tolist() for part, rows in fooled.items()}
    came: dict[str, list[int]] = {part: [] for part in expected}
    for verdict in journal.results():
        came[verdict.part] += verdict.fooled
    # Rounding may move an image from one part to another or save it: none here.
    assert came == expected
    part = result["attacks"]["autoattack"]
    assert part["correct"] == int(stands.sum())
    assert 3 <= part["correct"] < part["attacked"]
    assert part["fooled_by"] == {part: len(rows) for part, rows in expected.items()}
    assert list(part["fooled_by"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert result["nrr"]["autoattack"] == nrr(result["natural"]["accuracy"], part["accuracy"])
    assert result["nrr"]["cw"] is None


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize("classes", [4, 20])
def test_each_part_has_the_settings_of_its_package(part: str, classes: int) -> None:
    network, image = nn.Flatten(), torch.zeros(2, 1, 1, classes)
    threat = Threat("L2", 0.5)
    ours = early_exit(part, network, image, threat, 3)
    theirs = package_part("standard", part, network, image, threat, 3)
    assert type(theirs) in type(ours).__mro__[1:]
    apart = {"logger"}
    assert {k: v for k, v in vars(ours).items() if k not in apart} == {
        k: v for k, v in vars(theirs).items() if k not in apart
    }


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cure.attacks.early_exit.version", lambda name: "0.3.1")
    model, images, _, _ = linear_case(4, 0.03, count=9)
    with pytest.raises(ConfigError, match=r"expected pyautoattack 0.2.0, .* got 0.3.1; pip inst"):
        measure(model, images, ["autoattack"], Threat("Linf", 0.03), engine=ENGINE)


@pytest.mark.parametrize(("step", "period"), [(21, 22), (40, 19), (99, 6)])
def test_steps_are_halved_where_the_package_halves_them(step: int, period: int) -> None:
    """Also at the first check, which looks at the row before the first: the last, zeros."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(nn.Identity(), eps=0.1, version="standard").apgd
    losses = torch.randn(100, 4000, generator=torch.Generator().manual_seed(step))
    # Mostly rising, so that many are at the limit.
    losses = losses + 0.75 * torch.arange(100)[:, None]
    losses[step + 1 :] = 0
    expected = attack.check_oscillation(losses, step, period, None, k3=attack.thr_decr) > 0
    ours = early_exit("apgd-ce", nn.Identity(), torch.zeros(1, 2), Threat("Linf", 0.1), 0)
    state = {
        "losses": losses.T.contiguous(),
        "reduced": torch.ones(4000),
        "best_loss": torch.zeros(4000),
        "best_loss_checked": torch.zeros(4000),
        "step_size": torch.ones(4000, 1, 1, 1),
        "point": torch.zeros(4000, 1, 1, 1),
        "best": torch.ones(4000, 1, 1, 1),
        "gradient": torch.zeros(4000, 1, 1, 1),
        "best_gradient": torch.ones(4000, 1, 1, 1),
    }
    ours._check_step_size(state, step, period)
    assert 100 < int(expected.sum()) < 3900
    assert torch.equal(state["step_size"].flatten() == 0.5, expected)
    assert torch.equal(state["point"].flatten() == 1, expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_projection_of_fab_is_that_of_its_package(norm: str) -> None:
    """And of a solver that knows nothing of either, on hyperplanes near, far and out of reach."""
    from pyautoattack.fab_projections import projection_l2, projection_linf

    draws = torch.Generator().manual_seed(0)
    point = torch.rand(40, 12, generator=draws)
    point[:8] = point[:8].round()
    normal = torch.randn(40, 12, generator=draws)
    normal[:, 3] = 0
    size = torch.linspace(-6, 6, 40)
    offset = (normal * point).sum(dim=1) + size
    came = projection(point, normal, offset, norm)
    package = projection_linf if norm == "Linf" else projection_l2
    assert torch.allclose(came, package(point, normal.clone(), offset), atol=1e-5)
    assert float((point + came).min()) >= -1e-6
    assert float((point + came).max()) <= 1 + 1e-6
    reached = ((normal * (point + came)).sum(dim=1) - offset).abs() < 1e-4
    assert 10 < int(reached.sum()) < 40
    for row in range(0, 40, 3):
        if norm == "Linf" and reached[row]:
            # min t: -t <= d <= t, normal . d = size, 0 <= point + d <= 1, as a linear programme.
            eye, ones = np.eye(12), -np.ones((12, 1))
            solved = scipy.optimize.linprog(
                [0.0] * 12 + [1.0],
                A_ub=np.block([[eye, ones], [-eye, ones]]),
                b_ub=np.zeros(24),
                A_eq=[[*normal[row].tolist(), 0.0]],
                b_eq=[float(size[row])],
                bounds=[(-float(p), 1 - float(p)) for p in point[row]] + [(0, None)],
            )
            assert solved.fun == pytest.approx(float(came[row].abs().max()), abs=1e-4)
        elif norm == "L2" and reached[row]:
            # Along the normal, cut off at 0 and 1: the length by bisection in float64.
            away = normal[row].double() * (1 if size[row] > 0 else -1)
            start, low, high = point[row].double(), 0.0, 1e6
            for _ in range(200):
                middle = (low + high) / 2
                change = (start + middle * away).clamp(0, 1) - start
                far = float(away @ change) > abs(float(size[row]))
                low, high = (low, middle) if far else (middle, high)
            assert torch.allclose(came[row].double(), change, atol=1e-4)
    flat = projection(point, torch.zeros_like(normal), offset, norm)
    assert torch.equal(flat, torch.zeros_like(flat))


@pytest.mark.parametrize("classes", [4, 5, 9])
def test_autoattack_works_with_few_classes(classes: int) -> None:
    model, images, right, robust = linear_case(classes, 0.03, count=9, gap=0.02)
    result = measure(model, images, ["autoattack"], Threat("Linf", 0.03), engine=ENGINE)
    part = result["attacks"]["autoattack"]
    assert part["correct"] == int(robust.sum())
    assert part["attacked"] == int(right.sum())
    assert sum(part["fooled_by"].values()) == int((right & ~robust).sum())


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_with_two_and_three_classes_leaves_out_what_is_not_defined(classes: int) -> None:
    model, images, right, robust = linear_case(classes, 0.03, count=9, gap=0.02)
    result = measure(model, images, ["autoattack"], Threat("Linf", 0.03), engine=ENGINE)
    part = result["attacks"]["autoattack"]
    assert part["correct"] == int(robust.sum())
    assert part["settings"]["parts"] == ["apgd-ce", "fab-t", "square"]
    assert part["settings"]["left_out"] == {"apgd-t": "needs 4 classes"}
    assert sum(part["fooled_by"].values()) == int((right & ~robust).sum())


def test_an_attack_without_a_part_for_so_few_classes_says_so() -> None:
    model, images, _, _ = linear_case(3, 0.05)
    with pytest.raises(ConfigError, match=r"apgd-t needs at least 4 classes, the data has 3"):
        measure(model, images, ["apgd-t"], Threat("Linf", 0.05), engine=ENGINE)


# Planted models.


class Constant(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, image: Tensor) -> Any:
        return self.output(image)


PLANTED: dict[str, tuple[nn.Module, str]] = {
    "softmax": (nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Softmax(dim=1)), "probabilities"),
    "nan": (Constant(lambda x: torch.full((len(x), 2), math.nan)), "not finite"),
    "infinite": (Constant(lambda x: torch.full((len(x), 2), math.inf)), "not finite"),
    "too many": (nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), "5 logits but the data has 2"),
    "too few": (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), "1 logits but the data has 2"),
    "flat": (
        Constant(lambda x: x.mean(dim=(1, 2, 3))),
        r"expected logits of shape \[4, 2\], got \[4\]; return",
    ),
    "one for all": (Constant(lambda x: torch.randn(1, 2)), r"got \[1, 2\]"),
    "dictionary": (Constant(lambda x: {"logits": x.flatten(1)[:, :2]}), "got dict"),
    "channels": (nn.Conv2d(3, 2, 3), r"failed on images of shape .*1, 4, 4"),
    "size": (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), r"failed on images of shape"),
}


def test_labels_without_names_may_lack_the_last_classes_of_the_network() -> None:
    """A thousand logits, and images of the first few classes: labels are positions."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 7))
    image = torch.rand(20, 3, 4, 4)
    with torch.no_grad():
        named = network(image).argmax(dim=1)
    label = torch.arange(20) % 3
    result = evaluate(network, data=(image, label), attacks=["fgsm"], epsilon=0.01)
    # The eighth bit that images are rounded to changes no prediction here.
    assert result["natural"]["correct"] == int((named == label).sum()) > 0
    assert result["data"]["classes"] == ["0", "1", "2", "3", "4", "5", "6"]
    given = ImageSet((255 * image).round().to(torch.uint8), label, ("a", "b", "c"), "three", "test")
    with pytest.raises(ModelError, match="7 logits but the data has 3 classes"):
        evaluate(network, data=given, attacks=["fgsm"], epsilon=0.01)
    with pytest.raises(ModelError, match=r"\(labels count from 0, not from 1\)"):
        evaluate(network, data=(image, label + 5), attacks=["fgsm"], epsilon=0.01)
    fewer = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ModelError, match="2 logits but the data has 3 classes"):
        evaluate(fewer, data=(image, label), attacks=["fgsm"], epsilon=0.01)


@pytest.mark.parametrize("kind", PLANTED)
def test_what_attacks_would_misread_is_refused(kind: str) -> None:
    model, words = PLANTED[kind]
    with pytest.raises(ModelError, match=words):
        check_outputs(model, torch.rand(4, 1, 4, 4), 2)
    _, images, _, _ = linear_case(2, 0.05)
    spy = Spy(model)
    with pytest.raises(ModelError):
        measure(spy, images, ["pgd20"], Threat("Linf", 0.05), engine=ENGINE)
    assert not spy.attacked


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x.flatten(1)[:, :2] - 0.5,
        lambda x: x.flatten(1)[:, :2] + 1,
        lambda x: x.flatten(1)[:, :2].log_softmax(dim=1),
    ],
)
def test_logits_pass(output: Callable[[Tensor], Tensor]) -> None:
    check_outputs(Constant(output), torch.rand(8, 1, 4, 4), 2)


# The Python API.


def test_the_verbs_of_the_package_are_callable_again_and_again() -> None:
    """A submodule of the same name would take the place of the function once it is imported."""
    for _ in range(2):
        for name in set(cure.__all__) - {"__version__", *MODULES}:
            assert callable(getattr(cure, name)), f"cure.{name} is {getattr(cure, name)!r}"
        for name, module in MODULES.items():
            assert getattr(cure, name).__name__ == module


def test_evaluate_a_module_on_images_in_memory() -> None:
    model, images, right, robust = linear_case(2, 0.05)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate(model, data=images, attacks=["pgd20", "cw"], epsilon=0.05)
    assert result["natural"]["correct"] == int(right.sum())
    assert result["attacks"]["pgd20"]["correct"] == int(robust.sum())
    assert result["nrr"]["cw"] == pytest.approx(
        nrr(100 * float(right.double().mean()), 100 * float(robust.double().mean()))
    )
    assert result["data"] == {
        "name": "made",
        "split": "test",
        "n": len(images),
        "limit": None,
        "own": None,
        "classes": ["0", "1"],
        "classes_present": 2,
        "images_by_class": images.label.bincount().tolist(),
        "size": [1, 4, 4],
        "sha256": digest({"image": images.image, "label": images.label}),
    }
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_mean_and_std_standardise_once(network: nn.Sequential) -> None:
    images = digits(1200, 1400)

    class Inside(nn.Module):
        """The network as one that expects standardised images, standardising them itself."""

        def __init__(self, network: nn.Module, doubled: bool) -> None:
            super().__init__()
            self.network, self.doubled = network, doubled

        def forward(self, image: Tensor) -> Tensor:
            return self.network(2.5 * image + 0.9)

    model = Inside(network, False)
    # (image - mean) / std with mean 0.36 and std 0.4 is 2.5 image - 0.9.
    network.eval()
    expected = {}
    for name, image in {
        "once": 2.5 * unit(images) + 0.9,
        "undone": 2.5 * (unit(images) + 0.36) / 0.4 + 0.9,
        "twice": 2.5 * (2.5 * unit(images) - 0.9) + 0.9,
    }.items():
        expected[name] = int((network(image).argmax(dim=1) == images.label).sum())
    network.train()
    assert expected["once"] != expected["twice"]
    plain = evaluate(model, data=images, attacks=[])
    standardised = evaluate(model, data=images, attacks=[], mean=[0.36], std=[0.4])
    assert plain["natural"]["correct"] == expected["once"]
    assert standardised["natural"]["correct"] == expected["twice"]


@pytest.mark.parametrize(
    "how",
    [
        {"mean": [0.5]},
        {"std": [0.5]},
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5], "std": [0.5, 0.5]},
        {"mean": [0.5] * 3, "std": [0.5] * 3},
        {"mean": [math.nan], "std": [0.5]},
    ],
)
def test_mean_and_std_that_do_not_fit_are_refused(how: dict[str, Any]) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    with pytest.raises(ConfigError):
        evaluate(model, data=images, attacks=[], **how)


def test_limit_takes_the_first_images() -> None:
    model, images, right, _ = linear_case(2, 0.05)
    result = evaluate(model, data=images, attacks=[], limit=17)
    assert result["data"]["n"] == result["natural"]["n"] == 17
    assert result["natural"]["correct"] == int(right[:17].sum())
    whole = evaluate(model, data=images, attacks=[], limit=10_000)
    assert whole["natural"]["n"] == len(images)


def test_a_keyword_that_does_not_exist_is_refused() -> None:
    model, images, _, _ = linear_case(2, 0.05)
    with pytest.raises(TypeError, match="unknown keyword argument 'limt'; did you mean 'limit'"):
        evaluate(model, data=images, limt=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"split": "Test"}, "split: expected one of train, validation, test; got 'Test'"),
        ({"split": "valid"}, "got 'valid'"),
        ({"checkpoint": "final"}, "checkpoint: expected one of best, last; got 'final'"),
        ({"limit": "10"}, "limit: expected a whole number, got '10'"),
        ({"limit": 10.0}, "limit: expected a whole number, got 10.0"),
        ({"batch_size": "8"}, "batch_size: expected a whole number, got '8'"),
        ({"seed": "a"}, "seed: expected a whole number, got 'a'"),
    ],
)
def test_values_of_another_kind_are_refused(how: dict[str, Any], words: str) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    calls: list[Callable[..., object]] = [evaluate, cure.diagnose, cure.corruptions]
    for call in [*calls, find_study("cka"), find_study("landscape")]:
        with pytest.raises(ConfigError, match=re.escape(words)):
            call(model, data=images, **how)


@pytest.mark.parametrize("how", [{"time_limit": "9"}, {"smoothing": "0.25"}, {"smoothing": True}])
def test_numbers_of_another_kind_are_refused(how: dict[str, Any]) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    with pytest.raises(ConfigError, match=f"{next(iter(how))}: expected a number, got "):
        evaluate(model, data=images, attacks=[], **how)


def test_numbers_of_numpy_are_written(tmp_path: Path) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    file, how = tmp_path / "result.json", {"limit": np.int64(10), "seed": np.uint8(3)}
    evaluate(model, data=images, attacks=["fgsm"], epsilon=0.05, output=file, **how)  # type: ignore[arg-type]
    content = json.loads(file.read_text())
    assert (content["data"]["limit"], content["seed"]) == (10, 3)


@pytest.mark.parametrize("how", [{"limit": 0}, {"limit": -1}, {"batch_size": 0}])
def test_counts_below_one_are_refused(how: dict[str, int]) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    with pytest.raises(ConfigError):
        evaluate(model, data=images, attacks=[], **how)


def test_a_negative_batch_size_is_refused() -> None:
    model, images, _, _ = linear_case(2, 0.05)
    with pytest.raises(ConfigError):
        evaluate(model, data=images, attacks=[], batch_size=-1)


@pytest.mark.parametrize(
    ("given", "text", "number"),
    [("8/255", "8/255", 8 / 255), ("0.1", "0.1", 0.1), (0.25, "0.25", 0.25), (None, "8/255", 0)],
)
def test_epsilon_is_kept_as_text_and_as_number(given: Any, text: str, number: float) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    threat = evaluate(model, data=images, attacks=[], epsilon=given)["threat"]
    assert threat == {"norm": "Linf", "epsilon": number or 8 / 255, "epsilon_text": text}


@pytest.mark.parametrize(
    ("given", "norm"),
    [
        ("linf", "Linf"),
        ("L_inf", "Linf"),
        ("inf", "Linf"),
        ("l2", "L2"),
        ("L_2", "L2"),
        ("2", "L2"),
        ("l_1", "L1"),
    ],
)
def test_norms_have_other_names(given: str, norm: str) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    result = evaluate(model, data=images, attacks=[], norm=given, epsilon=0.05)
    assert result["threat"]["norm"] == norm
    with pytest.raises(ConfigError, match="norm"):
        evaluate(model, data=images, attacks=[], norm="L3")


def test_the_output_file_holds_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    model, images, right, robust = linear_case(2, 0.05)
    source = tmp_path / "pictures.npz"
    np.savez(
        source,
        x_train=images.image[:, 0],
        y_train=images.label,
        x_test=images.image[:, 0],
        y_test=images.label,
    )
    weights = tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    output = tmp_path / "result.json"
    blank = linear(torch.zeros(2, 16), torch.zeros(2))
    result = evaluate(
        blank,
        data=source,
        weights=weights,
        attacks=["pgd20", "cw"],
        epsilon="1/20",
        output=output,
        seed=4,
    )
    text = output.read_text()
    stored = json.loads(text)
    assert stored == json.loads(json.dumps(result))
    assert stored["format"] == "cure-evaluation-1"
    assert stored["natural"]["accuracy"] == pytest.approx(100 * float(right.double().mean()))
    for name in ("pgd20", "cw"):
        attack = stored["attacks"][name]
        assert attack["accuracy"] == pytest.approx(100 * float(robust.double().mean()))
        assert attack["interval"] == list(wilson(int(robust.sum()), len(images)))
    assert stored["nrr"]["cw"] == pytest.approx(
        nrr(stored["natural"]["accuracy"], stored["attacks"]["cw"]["accuracy"])
    )
    assert stored["nrr"]["autoattack"] is None
    assert stored["threat"] == {"norm": "Linf", "epsilon": 0.05, "epsilon_text": "1/20"}
    assert stored["data"]["name"] == "pictures"
    assert stored["model"]["weights"] == "weights.pt"
    assert stored["model"]["parameters"] == 2 * 16 + 2
    assert stored["seed"] == 4
    assert stored["environment"]["packages"]["torch"] == torch.__version__
    for folder in (tmp_path, Path.home(), Path(__file__).parents[2]):
        assert str(folder) not in text or folder == Path("/")


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    _, images, _, _ = linear_case(2, 0.05)
    output = tmp_path / "result.json"
    output.write_text("precious")

    class Untouched(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            raise AssertionError("computed before it was refused")

    with pytest.raises(ConfigError, match="exists and is kept"):
        evaluate(Untouched(), data=images, attacks=[], output=output)
    assert output.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


class Counted(nn.Module):
    """Counts over its copies, as evaluation copies the network that it is given."""

    calls = 0

    def forward(self, image: Tensor) -> Tensor:
        type(self).calls += 1
        return image.flatten(1)[:, :2]


def test_a_result_is_not_lost_to_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """Hours of attacks end in this file: either its folder is made, or it is refused first."""
    _, images, _, _ = linear_case(2, 0.05)
    output = tmp_path / "missing" / "result.json"
    Counted.calls = 0
    try:
        evaluate(Counted(), data=images, attacks=[], output=output)
    except CureError:
        assert Counted.calls == 0
    else:
        assert json.loads(output.read_text())["format"] == "cure-evaluation-1"


def test_a_radius_of_the_curve_that_is_too_large_is_refused_before_any_attack() -> None:
    model, images, _, _ = linear_case(2, 0.05)
    told: list[str] = []
    with pytest.raises(ConfigError, match="images in"):
        evaluate(
            model,
            data=images,
            attacks=[],
            curve="pgd20",
            epsilons=["1/255", "2"],
            progress=lambda name, *_: told.append(name),
        )
    assert not told


def test_a_network_without_images_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    model, images, _, _ = linear_case(2, 0.05)
    with pytest.raises(ConfigError, match="a model needs images"):
        evaluate(model)
    with pytest.raises(ConfigError, match="without weights is random"):
        evaluate("small_cnn", data=images)
    with pytest.raises(ConfigError, match="weights_key: 'ema' is a set of weights in a file"):
        evaluate(model, data=images, weights_key="ema")
    torch.save(linear(torch.zeros(3, 16), torch.zeros(3)).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="of another shape"):
        evaluate(model, data=images, weights=tmp_path / "other.pt")


def test_autoattack_sees_gradients_in_the_layout_it_can_reshape() -> None:
    """With the channel innermost its check for zero gradients fails on ``grad.view``."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    network = network.to(memory_format=torch.channels_last)
    gradients = []
    for model in (network, PlainLayout(network)):
        image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        image.requires_grad_(True)
        gradients.append(torch.autograd.grad(model(image)[:, 0].sum(), image)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert not gradients[0].is_contiguous(), "else the wrapper is not needed any more"
    assert gradients[1].is_contiguous()


def test_a_caller_in_inference_mode_gets_the_same_figures() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images, labels = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    options = {"data": (images, labels), "epsilon": 0.1}
    expected = cure.evaluate(network, attacks="pgd5", **options)["attacks"]["pgd5"]["correct"]
    with torch.inference_mode():
        found = cure.evaluate(network, attacks="pgd5", **options)
        assert cure.diagnose(network, **options)["n"] == 12
    assert found["attacks"]["pgd5"]["correct"] == expected
