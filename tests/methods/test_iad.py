"""IAD against arithmetic by hand: how far the teacher is trusted, when, and with which images."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_bench import (
    ADVERSARIAL,
    LABELS,
    NATURAL,
    batch,
    build,
    context,
    gradients_of,
    mean_ce,
    mean_kl,
    softmax,
    table_method,
    tiny_network,
)
from pydantic import ValidationError
from test_ard import (
    NATURAL_TEACHER_ADVERSARIAL,
    TEACHER_ADVERSARIAL,
    TEACHER_NATURAL,
    assert_teachers_stay,
    cost,
    mean_distillation,
    seen_by_teachers,
    tables,
)

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import TeacherConfig
from cure.methods.iad import IadConfig, teacher_reliability
from cure.recipe import load_recipe

both_forms = pytest.mark.parametrize("form", ["I", "II"])


def trust(beta: float) -> list[float]:
    """A of each sample."""
    rows = zip(TEACHER_ADVERSARIAL, LABELS, strict=True)
    return [softmax(row)[label] ** beta for row, label in rows]


def introspection(naturals: list[list[float]], others: list[list[float]], beta: float) -> float:
    rows = zip(trust(beta), naturals, others, strict=True)
    return sum((1 - a) * mean_kl([p], [q]) for a, p, q in rows) / 2


def trusted(others: list[list[float]], targets: list[list[float]], beta: float, t: float) -> float:
    rows = zip(trust(beta), targets, others, strict=True)
    return sum(a * mean_distillation([target], [row], t) for a, target, row in rows) / 2


def form_one(
    naturals, others, *, a: float, beta: float, t: float, weighted: bool, begun: bool = True
) -> float:
    teacher = mean_distillation(TEACHER_NATURAL, others, t)
    if weighted and begun:
        teacher = trusted(others, TEACHER_NATURAL, beta, t)
    own = introspection(naturals, others, beta) if begun else 0.0
    return a * (teacher + own) + (1 - a) * mean_ce(naturals, LABELS)


def form_two(
    naturals, others, *, a: float, b: float, beta: float, t: float, begun: bool = True
) -> float:
    teacher = mean_distillation(TEACHER_ADVERSARIAL, others, t)
    own = 0.0
    if begun:
        teacher = trusted(others, TEACHER_ADVERSARIAL, beta, t)
        own = t**2 * introspection(naturals, others, beta)
    natural_teacher = mean_distillation(NATURAL_TEACHER_ADVERSARIAL, others, t)
    labelled = mean_ce(others, LABELS)
    return a * (teacher + own) + b * natural_teacher + (1 - a - b) * labelled


# -- the loss ------------------------------------------------------------------------------------


def test_reliability_as_a_number():
    """Chances .25 and .0625 of the label to the power of one half."""
    logits = torch.tensor([[0.25, 0.5, 0.25], [0.0625, 0.5, 0.4375]], dtype=torch.float64).log()
    assert teacher_reliability(logits, torch.tensor([2, 0]), 0.5).tolist() == pytest.approx(
        [0.5, 0.25]
    )
    sure = torch.tensor([[1000.0, 0.0, 0.0]])
    assert teacher_reliability(sure, torch.tensor([0]), 0.1).tolist() == [1.0]
    assert teacher_reliability(sure, torch.tensor([1]), 0.1).tolist() == [0.0]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("a", "t"), [(1.0, 1.0), (0.7, 1.0), (0.7, 3.0)])
def test_form_one_of_two_samples_and_three_classes(a, t, weighted, begun):
    begin = 0.0 if begun else 1.0
    settings = {"alpha": a, "temperature": t, "weight_teacher": weighted, "begin": begin}
    method, given = table_method("iad", tables(), beta=0.4, **settings)
    out = method.step(given)
    options = {"beta": 0.4, "t": t, "weighted": weighted, "begun": begun}
    expected = form_one(NATURAL, ADVERSARIAL, a=a, **options)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)
    teacher = mean_distillation(TEACHER_NATURAL, ADVERSARIAL, t)
    if weighted and begun:
        teacher = trusted(ADVERSARIAL, TEACHER_NATURAL, 0.4, t)
    metrics = {"loss": expected, "distillation": teacher, "robust_accuracy": 0.0}
    if begun:
        metrics["reliability"] = sum(trust(0.4)) / 2
        metrics["introspection"] = introspection(NATURAL, ADVERSARIAL, 0.4)
    if a < 1:
        metrics["natural_loss"] = mean_ce(NATURAL, LABELS)
    if a < 1 or begun:
        metrics["accuracy"] = 1.0
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("a", "b", "t"), [(0.5, 0.25, 1.0), (0.3, 0.6, 3.0), (0.8, 0.2, 1.0)])
def test_form_two_of_two_samples_and_three_classes(a, b, t, begun):
    settings = {"alpha": a, "natural_teacher_weight": b, "temperature": t}
    settings["begin"] = 0.0 if begun else 1.0
    method, given = table_method("iad", tables(), form=2, beta=0.4, **settings)
    out = method.step(given)
    expected = form_two(NATURAL, ADVERSARIAL, a=a, b=b, beta=0.4, t=t, begun=begun)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)
    teacher = mean_distillation(TEACHER_ADVERSARIAL, ADVERSARIAL, t)
    metrics = {
        "loss": expected,
        "distillation": trusted(ADVERSARIAL, TEACHER_ADVERSARIAL, 0.4, t) if begun else teacher,
        "natural_distillation": mean_distillation(NATURAL_TEACHER_ADVERSARIAL, ADVERSARIAL, t),
        "adversarial_loss": mean_ce(ADVERSARIAL, LABELS),
        "robust_accuracy": 0.0,
    }
    if begun:
        metrics["reliability"] = sum(trust(0.4)) / 2
        metrics["introspection"] = introspection(NATURAL, ADVERSARIAL, 0.4)
        metrics["accuracy"] = 1.0
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@both_forms
def test_gradient_of_a_step_by_central_differences(form, weighted, begun):
    """Through p(x) too, in every logit of the student."""

    def total(table: np.ndarray) -> float:
        rows = table.T.tolist()
        if form == "I":
            options = {"a": 0.7, "beta": 0.4, "t": 2.0, "weighted": weighted, "begun": begun}
            return form_one(rows[:2], rows[2:], **options)
        return form_two(rows[:2], rows[2:], a=0.7, b=0.25, beta=0.4, t=2.0, begun=begun)

    settings = {"alpha": 0.7, "beta": 0.4, "temperature": 2.0, "weight_teacher": weighted}
    method, given = table_method(
        "iad", tables(), form=form, begin=0.0 if begun else 1.0, **settings
    )
    found = gradients_of(method, method.step(given))["weight"].numpy()
    table, slopes = np.array([*NATURAL, *ADVERSARIAL]).T, np.zeros((3, 4))
    for place in np.ndindex(3, 4):
        move = np.zeros((3, 4))
        move[place] = 1e-6
        slopes[place] = (total(table + move) - total(table - move)) / 2e-6
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_before_it_begins_form_one_is_ard_bit_for_bit(alpha):
    within, given = context(steps=3), batch(step=9)
    ours = build("iad", tiny_network(2), within, alpha=alpha)
    ard = build("ard", tiny_network(2), within, alpha=alpha, temperature=1.0)
    outs = [method.step(given) for method in (ours, ard)]
    found, expected = (gradients_of(m, o) for m, o in zip((ours, ard), outs, strict=True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert outs[0].metrics.keys() == outs[1].metrics.keys()
    for name, buffer in ours.model.named_buffers():
        assert torch.equal(buffer, ard.model.get_buffer(name)), name


# -- when it begins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "epochs", "first"),
    [
        ({}, 200, 60),
        ({"form": "II"}, 200, 40),
        ({}, 10, 3),
        ({}, 50, 15),
        ({"form": "II"}, 10, 2),
        ({"begin": 0.5}, 4, 2),
        ({"begin": 0.6}, 4, 3),
        ({"begin": 0.07}, 100, 7),
        ({"begin": 0.0}, 4, 0),
        ({"begin": 1.0}, 4, 4),
    ],
)
def test_when_introspection_begins(settings, epochs, first):
    config = IadConfig(teacher="runs/at", **settings)
    assert [config.introspects(epoch, epochs) for epoch in range(epochs)] == [
        epoch >= first for epoch in range(epochs)
    ]


@both_forms
def test_the_step_s_number_alone_decides(form):
    """Ten steps an epoch and introspection from the third: step 20, whatever came before."""
    method = build("iad", form=form, begin=0.5)
    begun = ["reliability" in method.step(batch(step)).metrics for step in (0, 19, 20, 39, 19)]
    assert begun == [False, False, True, True, False]


@both_forms
def test_a_method_resumed_after_it_began_repeats_bit_for_bit(form):
    first, second = (build("iad", tiny_network(n), form=form, begin=0.25) for n in (3, 4))
    first.step(batch(10))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.on_epoch(1)
    outs = [gradients_of(method, method.step(batch(11))) for method in (first, second)]
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])


# -- teachers, attack, cost ----------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("begin", [0.0, 1.0])
def test_what_the_teachers_see(form, begin):
    given = batch(count=6)
    later = (given.image + 0.5).clamp(0, 1)
    within = context(attack=lambda *others, **options: later)
    method = build("iad", tiny_network(), within, form=form, begin=begin)
    seen = seen_by_teachers(method, lambda: method.step(given))
    if form == "I":
        expected = {"teacher": [given.image, later] if begin == 0 else [given.image]}
    else:
        expected = {"teacher": [later], "natural_teacher": [later]}
    assert seen.keys() == expected.keys()
    for role, images in expected.items():
        assert len(seen[role]) == len(images)
        assert all(torch.equal(a, b) for a, b in zip(seen[role], images, strict=True))


@both_forms
def test_the_teachers_never_change(form):
    assert_teachers_stay("iad", form=form, begin=0.0)


@both_forms
def test_the_attack_climbs_cross_entropy_in_the_run_s_settings(form):
    asked = []

    def attack(model, image, label, objective, generator, **options):
        asked.append((objective, options))
        return image

    build("iad", within=context(attack=attack), form=form, begin=0.0).step(batch())
    assert asked == [(CROSS_ENTROPY, {})]


@pytest.mark.parametrize(
    ("settings", "count", "teachers"),
    [
        ({"begin": 0.0}, 12, {"teacher": 2}),
        ({"begin": 0.0, "alpha": 0.5}, 12, {"teacher": 2}),
        ({"begin": 0.0, "weight_teacher": True}, 12, {"teacher": 2}),
        ({"begin": 1.0}, 11, {"teacher": 1}),
        ({"begin": 1.0, "alpha": 0.5}, 12, {"teacher": 1}),
        ({"form": "II", "begin": 0.0}, 12, {"teacher": 1, "natural_teacher": 1}),
        ({"form": "II", "begin": 1.0}, 11, {"teacher": 1, "natural_teacher": 1}),
    ],
)
def test_passes_of_a_step(settings, count, teachers):
    assert cost("iad", **settings) == ((count, count), teachers)


@both_forms
@pytest.mark.parametrize("begin", [0.0, 1.0])
def test_adversarial_images_pass_first_and_natural_ones_only_if_they_count(form, begin):
    """BatchNorm's running statistics remember which came last."""
    given = batch(count=6)
    later = (given.image + 0.5).clamp(0, 1)
    within = context(attack=lambda *others, **options: later)
    method = build("iad", tiny_network(), within, form=form, begin=begin)
    network = tiny_network()
    method.step(given)
    with torch.no_grad():
        network(later)
        if begin == 0:
            network(given.image)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, method.model.get_buffer(name)), name


def test_a_teacher_that_is_always_right_needs_no_introspection():
    """Chances of 1 for the labels: A = 1, and both readings of form I are ARD."""
    given, sure = batch(), tiny_network(7)
    with torch.no_grad():
        sure.linear.weight.zero_()
        sure.linear.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    given.label.zero_()
    found = []
    for settings in ({"begin": 1.0}, {"begin": 0.0}, {"begin": 0.0, "weight_teacher": True}):
        within = replace(context(), teachers={"teacher": copy.deepcopy(sure)})
        out = build("iad", tiny_network(2), within, **settings).step(given)
        found.append(out.metrics["loss"].item())
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])


# -- settings ------------------------------------------------------------------------------------


def test_form_one_asks_for_one_teacher():
    assert IadConfig(teacher="runs/at").teachers() == {"teacher": TeacherConfig(path="runs/at")}
    assert IadConfig(teacher="runs/at", form="II").teachers() == {
        "teacher": TeacherConfig(path="runs/at"),
        "natural_teacher": TeacherConfig(path="natural"),
    }


@pytest.mark.parametrize(
    ("given", "form"), [("I", "I"), (1, "I"), ("1", "I"), ("II", "II"), (2, "II"), ("2", "II")]
)
def test_names_of_the_forms(given, form):
    assert IadConfig(teacher="runs/at", form=given).form == form


def test_defaults_of_the_forms():
    one, two = (IadConfig(teacher="runs/at", form=form) for form in ("I", "II"))
    assert (one.distillation_weight, two.distillation_weight) == (1.0, 0.5)
    assert (two.natural_teacher_weight, two.beta, two.temperature) == (0.25, 0.1, 1.0)
    assert not one.weight_teacher


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "III"},
        {"form": 3},
        {"alpha": 0.0},
        {"alpha": 1.1},
        {"beta": 0.0},
        {"begin": -0.1},
        {"begin": 1.1},
        {"temperature": 0.0},
        {"natural_teacher_weight": 0.0},
        {"form": "II", "alpha": 0.8},
        {"form": "II", "natural_teacher_weight": 0.6},
    ],
)
def test_values_out_of_range_are_errors(wrong):
    with pytest.raises(ValidationError):
        IadConfig(teacher="runs/at", **wrong)


def test_a_teacher_is_required():
    with pytest.raises(ValidationError, match="teacher"):
        IadConfig(form="II")


def test_settings_from_a_recipe():
    words = ["method={name: iad, form: 2, teacher: runs/at, natural_teacher: runs/plain}"]
    run = load_recipe("cifar10-mini", words)
    assert run.method == IadConfig(form="II", teacher="runs/at", natural_teacher="runs/plain")
    assert run.method.teachers().keys() == {"teacher", "natural_teacher"}
