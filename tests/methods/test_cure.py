"""CURE's step against arithmetic by hand, finite differences and a plain Algorithm 1."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch
from method_bench import (
    ADVERSARIAL,
    CLASSES,
    LABELS,
    NATURAL,
    Table,
    batch,
    build,
    context,
    fixed_attack,
    gradients_of,
    mean_ce,
    mean_kl,
    softmax,
    tiny_network,
)
from torch import Tensor, nn

from cure.attacks.losses import KL, with_cross_entropy
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods.common.losses import kl_divergence
from cure.methods.cure import mask_gradients

# -- losses by hand ------------------------------------------------------------------------------


def test_kl_divergence_by_hand():
    target = torch.tensor([[math.log(8), 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0]], dtype=torch.float64)
    # (.8, .1, .1) to thirds; thirds to (.5, .25, .25)
    first = 0.8 * math.log(2.4) + 0.2 * math.log(0.3)
    second = (math.log(1 / 1.5) + 2 * math.log(1 / 0.75)) / 3
    assert kl_divergence(target, logits).item() == pytest.approx((first + second) / 2, abs=1e-12)
    assert kl_divergence(target, target).item() == 0


def test_kl_divergence_passes_gradcheck_in_both_arguments():
    source = torch.Generator().manual_seed(0)
    target, logits = (
        torch.randn(4, 3, generator=source, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(kl_divergence, (target, logits))


REVISION_NATURAL = [[0.0, 1.0, 0.5], [1.5, -0.5, 0.0]]
REVISION_ADVERSARIAL = [[0.25, 0.75, 0.0], [0.0, 0.0, 2.0]]


def table_cure(**settings) -> tuple[nn.Module, Batch]:
    """A CURE whose four sets of logits are the constants above."""
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    # A rate this small draws no update.
    settings.setdefault("revision", {"rate": 1e-12})
    within = context(attack=fixed_attack(unit[2:]))
    method = build("cure", Table([*NATURAL, *ADVERSARIAL]), within, **settings)
    if method.revision is not None:
        columns = torch.tensor([*REVISION_NATURAL, *REVISION_ADVERSARIAL], dtype=torch.float64)
        method.revision.network.weight.data = columns.T.contiguous()
    return method, Batch(unit[:2], torch.tensor(LABELS), torch.arange(2), 0)


@pytest.mark.parametrize("term", ["kl", "ce"])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (5.0, 0.5), (0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("kind", ["prominence", "none"])
def test_total_loss_of_two_samples_and_three_classes(beta, gamma, term, kind):
    """L = CE(x) + beta [KL(p(x) || p(x_adv)) or CE(x_adv)] + gamma L_CR."""
    method, given = table_cure(beta=beta, gamma=gamma, adversarial_term=term, mask={"kind": kind})
    metrics = method.step(given).metrics
    natural = mean_ce(NATURAL, LABELS)
    kl, ce = mean_kl(NATURAL, ADVERSARIAL), mean_ce(ADVERSARIAL, LABELS)
    adversarial = kl if term == "kl" else ce
    consistency = 0.0
    if gamma:
        consistency = mean_kl(REVISION_NATURAL, NATURAL)
        consistency += mean_kl(REVISION_ADVERSARIAL, ADVERSARIAL)
    assert metrics["natural_loss"].item() == pytest.approx(natural, abs=1e-12)
    assert metrics["adversarial_loss"].item() == pytest.approx(adversarial, abs=1e-12)
    assert metrics["consistency"].item() == pytest.approx(consistency, abs=1e-12)
    total = natural + beta * adversarial + gamma * consistency
    assert metrics["loss"].item() == pytest.approx(total, abs=1e-12)
    # Largest logits: 1 and 0 on x, 0 and 1 on x_adv, where the labels are 1 and 0.
    assert metrics["accuracy"].item() == 1.0
    assert metrics["robust_accuracy"].item() == 0.0


@pytest.mark.parametrize("kind", ["prominence", "none"])
@pytest.mark.parametrize("term", ["kl", "ce"])
def test_natural_weight_and_natural_target(kind, term):
    """L = w CE(x) + 2 [KL or CE(x_adv)] + 0.5 [KL(rev(x) || p(x)) + KL(rev(x) || p(x_adv))]."""
    settings = {"natural_weight": 0.25, "revision_target": "natural"}
    method, given = table_cure(
        beta=2.0, gamma=0.5, adversarial_term=term, mask={"kind": kind}, percent=0, **settings
    )
    step = method.step(given)
    natural = mean_ce(NATURAL, LABELS)
    other = mean_kl(NATURAL, ADVERSARIAL) if term == "kl" else mean_ce(ADVERSARIAL, LABELS)
    consistency = mean_kl(REVISION_NATURAL, NATURAL) + mean_kl(REVISION_NATURAL, ADVERSARIAL)
    total = 0.25 * natural + 2 * other + 0.5 * consistency
    assert step.metrics["loss"].item() == pytest.approx(total, abs=1e-12)

    # The gradient that is composed of parts is that of the whole loss.
    logits = torch.tensor([*NATURAL, *ADVERSARIAL], dtype=torch.float64).requires_grad_()
    targets = torch.tensor(REVISION_NATURAL, dtype=torch.float64)
    pair = logits[:2], logits[2:]
    adversarial = (
        kl_divergence(*pair)
        if term == "kl"
        else torch.nn.functional.cross_entropy(pair[1], torch.tensor(LABELS))
    )
    loss = 0.25 * torch.nn.functional.cross_entropy(pair[0], torch.tensor(LABELS))
    loss = loss + 2 * adversarial
    loss = loss + 0.5 * sum(kl_divergence(targets, side) for side in pair)
    loss.backward()
    (found,) = gradients_of(method, step).values()
    torch.testing.assert_close(found, logits.grad.T, rtol=1e-10, atol=1e-12)


def test_scores_per_image_are_those_of_the_loss_of_each_image():
    """RGP = alpha |grad of natural terms| + (1 - alpha) |grad of adversarial terms|."""
    settings = {"adversarial_term": "ce", "natural_weight": 0.5, "beta": 2.0, "gamma": 0.5}
    method, given = table_cure(mask={"source": "per_image"}, percent=50, alpha=0.3, **settings)
    step = method.step(given)
    logits = torch.tensor([*NATURAL, *ADVERSARIAL], dtype=torch.float64).requires_grad_()
    label = torch.tensor(LABELS)
    parts = []
    for rows, targets, weight in (
        (slice(0, 2), REVISION_NATURAL, 0.5),
        (slice(2, 4), REVISION_ADVERSARIAL, 2.0),
    ):
        loss = weight * torch.nn.functional.cross_entropy(logits[rows], label)
        loss = loss + 0.5 * kl_divergence(torch.tensor(targets, dtype=torch.float64), logits[rows])
        parts.append(torch.autograd.grad(loss, logits)[0].T)
    scores = 0.3 * parts[0].abs() + 0.7 * parts[1].abs()
    limit = np.percentile(scores.numpy(), 50)
    expected = (parts[0] + parts[1]).masked_fill(scores < limit, 0)
    (found,) = gradients_of(method, step).values()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigError, match="per_image needs a loss"):
        table_cure(mask={"source": "per_image"})


def test_total_loss_as_numbers():
    """The same at the defaults, as numbers: CE 0.6092, KL 0.6076, L_CR 0.9106."""
    method, given = table_cure()
    assert method.step(given).metrics["loss"].item() == pytest.approx(2.127407157718, abs=1e-11)


def test_gradient_in_closed_form():
    """Softmax and cross-entropy alone (beta = gamma = 0): dL/dz = (p - onehot) / B."""
    method, given = table_cure(beta=0.0, gamma=0.0, mask={"kind": "none"})
    gradient = method.step(given).grads["weight"]
    expected = np.zeros((3, 4))
    for column, (row, label) in enumerate(zip(NATURAL, LABELS, strict=True)):
        expected[:, column] = softmax(row)
        expected[label, column] -= 1
    np.testing.assert_allclose(gradient.numpy(), expected / 2, atol=1e-12)


SETTINGS = {
    "default": {},
    "beta 5": {"beta": 5.0},
    "gamma .5": {"gamma": 0.5},
    "gamma 0": {"gamma": 0.0},
    "signed": {"mask": {"score": "signed"}},
    "conv1": {"mask": {"layers": "conv1"}},
    "matrices": {"mask": {"layers": "matrices"}},
    "convs": {"mask": {"layers": "convs"}},
    "not linear": {"mask": {"layers": "not_linear"}},
    "adversarial loss kl": {"mask": {"adversarial_loss": "kl"}},
    "adversarial loss kl, beta 5": {"beta": 5.0, "mask": {"adversarial_loss": "kl"}},
    "global": {"mask": {"scope": "global"}},
    "own gradient": {"mask": {"source": "own_gradient"}},
    "own gradient, signed": {"mask": {"source": "own_gradient", "score": "signed"}},
    "none": {"mask": {"kind": "none"}},
    "term ce": {"adversarial_term": "ce"},
    "term ce, beta 2, gamma 0": {"adversarial_term": "ce", "beta": 2.0, "gamma": 0.0},
    "term ce, scored by kl": {"adversarial_term": "ce", "mask": {"adversarial_loss": "kl"}},
    "beta 0": {"beta": 0.0},
    "beta 0, gamma 0": {"beta": 0.0, "gamma": 0.0},
    "kl, beta 0, gamma 0": {"beta": 0.0, "gamma": 0.0, "mask": {"adversarial_loss": "kl"}},
    "percent 80, alpha .7": {"percent": 80.0, "alpha": 0.7},
    "percent 0": {"percent": 0.0},
    "released code, nearly": {
        "beta": 5.0,
        "alpha": 0.5,
        "mask": {"score": "signed", "layers": "conv1", "adversarial_loss": "kl"},
    },
    "attack ce+kl": {"attack_loss": "ce+kl", "alpha": 0.4},
}


def prepared(name: str, **more) -> tuple[nn.Module, Batch]:
    """A CURE in float64 whose revision model differs from the network and moves at every step."""
    settings = {**SETTINGS[name], "revision": {"rate": 1.0, "decay": 0.7}, **more}
    method = build("cure", tiny_network(1, torch.float64), **settings)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return method, batch(step=5, count=9, dtype=torch.float64)


def mean_kl_of(target: Tensor, logits: Tensor) -> Tensor:
    p, q = torch.softmax(target, dim=1), torch.softmax(logits, dim=1)
    return (p * (p / q).log()).sum(dim=1).mean()


def mean_ce_of(logits: Tensor, label: Tensor) -> Tensor:
    return -torch.softmax(logits, dim=1)[torch.arange(len(label)), label].log().mean()


def algorithm_one(
    network: nn.Module, revision: nn.Module | None, given: Batch, x_adv: Tensor, options: dict
) -> dict[str, np.ndarray]:
    """Algorithm 1, a line at a time: every gradient by its own forward and backward passes."""
    x, y = given.image, given.label
    mask = {
        "kind": "prominence",
        "scope": "layer",
        "score": "absolute",
        "adversarial_loss": "ce",
        "source": "prominence",
        "layers": "all",
        **options.get("mask", {}),
    }
    beta, gamma = options.get("beta", 1.0), options.get("gamma", 1.0)
    alpha, percent = options.get("alpha", 0.1), options.get("percent", 30.0)

    def gradient_of(loss) -> dict[str, np.ndarray]:
        net = copy.deepcopy(network).train()
        loss(net).backward()
        return {name: parameter.grad.numpy() for name, parameter in net.named_parameters()}

    if revision is not None:
        revision = copy.deepcopy(revision).train()  # here: batch statistics; it has no dropout
        with torch.no_grad():
            for own, new in zip(revision.parameters(), network.parameters(), strict=True):
                own.copy_(0.7 * own + 0.3 * new)

    def total(net: nn.Module) -> Tensor:
        natural, adversarial = net(x), net(x_adv)
        if options.get("adversarial_term", "kl") == "kl":
            term = mean_kl_of(natural, adversarial)
        else:
            term = mean_ce_of(adversarial, y)
        loss = mean_ce_of(natural, y) + beta * term
        if revision is not None:
            with torch.no_grad():
                teacher, teacher_adv = revision(x), revision(x_adv)
            loss = loss + gamma * mean_kl_of(teacher, natural)
            loss = loss + gamma * mean_kl_of(teacher_adv, adversarial)
        return loss

    gradient = gradient_of(total)
    size = np.abs if mask["score"] == "absolute" else np.array
    if mask["source"] == "own_gradient":
        score = {name: size(value) for name, value in gradient.items()}
    else:
        by_natural = gradient_of(lambda net: mean_ce_of(net(x), y))
        if mask["adversarial_loss"] == "ce":
            by_adversarial = gradient_of(lambda net: mean_ce_of(net(x_adv), y))
        else:
            by_adversarial = gradient_of(lambda net: mean_kl_of(net(x), net(x_adv)))
        score = {
            name: alpha * size(by_natural[name]) + (1 - alpha) * size(by_adversarial[name])
            for name in gradient
        }
    if mask["kind"] == "none":
        score = {}
    allowed = {
        "all": list(gradient),
        "matrices": [n for n in gradient if gradient[n].ndim > 1],
        "convs": [n for n in gradient if gradient[n].ndim == 4],
        "conv1": ["block.conv1.weight"],
        "not_linear": [n for n in gradient if not n.startswith("linear.")],
    }[mask["layers"]]
    score = {name: value for name, value in score.items() if name in allowed}
    if mask["scope"] == "global":
        everything = np.concatenate([value.ravel() for value in score.values()])
        limits = dict.fromkeys(score, np.percentile(everything, percent))
    else:
        limits = {name: np.percentile(value, percent) for name, value in score.items()}
    return {
        name: np.where(score[name] < limits[name], 0.0, value) if name in score else value
        for name, value in gradient.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_masked_gradient_equals_a_plain_algorithm_one(name):
    method, given = prepared(name)
    network = copy.deepcopy(method.model)
    revision = copy.deepcopy(method.revision.network) if method.revision else None
    options = SETTINGS[name]
    attacked = copy.deepcopy(network)
    objective = with_cross_entropy(0.4) if options.get("attack_loss") == "ce+kl" else KL
    draws = method.context.generator("attack", 5)
    x_adv = method.context.attack(attacked, given.image, given.label, objective, draws)
    expected = algorithm_one(network, revision, given, x_adv, options)
    out = method.step(given)
    assert out.loss is None
    assert out.grads.keys() == expected.keys()
    zeros = 0
    for key, gradient in out.grads.items():
        found = gradient.numpy()
        np.testing.assert_array_equal(found == 0, expected[key] == 0, err_msg=key)
        np.testing.assert_allclose(found, expected[key], rtol=1e-8, atol=1e-12, err_msg=key)
        zeros += int((found == 0).sum())
    total = sum(gradient.numel() for gradient in out.grads.values())
    assert out.metrics["conserved"].item() == pytest.approx(zeros / total)
    if name == "default":
        # Share below the 30th percentile, tensor by tensor: ceil(.3 (n - 1)) of n.
        sizes = [gradient.numel() for gradient in out.grads.values()]
        assert zeros == sum(math.ceil(0.3 * (n - 1) - 1e-9) for n in sizes)


def test_the_step_masks_by_the_public_functions(monkeypatch):
    """What the card shows is what runs: a change of either function changes the step."""
    observed = {"within": context(observed=lambda step: True)}
    method = build("cure", tiny_network(1, torch.float64), **observed)
    out = method.step(batch(dtype=torch.float64))
    expected = mask_gradients(out.masking.unmasked, out.masking.mask)
    for name, gradient in out.grads.items():
        assert torch.equal(gradient, expected[name])
        assert not torch.equal(gradient, out.masking.unmasked[name])
    module = sys.modules["cure.methods.cure"]
    monkeypatch.setattr(module, "mask_gradients", lambda gradients, masks: (gradients, masks))
    _, masks = build("cure", tiny_network(1, torch.float64)).step(batch(dtype=torch.float64)).grads
    assert all(torch.equal(masks[name], mask) for name, mask in out.masking.mask.items())


@pytest.mark.parametrize("term", ["kl", "ce"])
@pytest.mark.parametrize("percent", [None, 0.0])
def test_gradient_of_the_total_loss_by_central_differences(term, percent):
    """Of the loss that the step itself reports, in every weight of two tensors.

    The attack's answer and the revision model are held.
    """
    mask = {"kind": "none"} if percent is None else {"kind": "prominence"}
    given = batch(count=6, dtype=torch.float64)
    source = torch.Generator().manual_seed(8)
    noise = torch.randn(given.image.shape, generator=source, dtype=torch.float64)
    within = context(attack=fixed_attack((given.image + 0.1 * noise).clamp(0, 1)))
    method = build(
        "cure",
        tiny_network(1, torch.float64),
        within,
        beta=2.0,
        gamma=0.5,
        percent=percent or 0.0,
        adversarial_term=term,
        mask=mask,
        revision={"rate": 1e-12},
    )
    with torch.no_grad():
        method.model.linear.weight.mul_(1.5)
    gradients = method.step(given).grads
    width = 1e-6
    for name in ("conv1.weight", "block.bn1.weight"):
        parameter = dict(method.model.named_parameters())[name]
        flat = parameter.data.flatten()
        slopes = []
        for position in range(0, flat.numel(), 3):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[position] += sign * width
                parameter.data = moved.reshape(parameter.shape)
                ends.append(method.step(given).metrics["loss"].item())
            slopes.append((ends[0] - ends[1]) / (2 * width))
        parameter.data = flat.reshape(parameter.shape)
        found = gradients[name].flatten()[::3].numpy()
        np.testing.assert_allclose(found, slopes, rtol=1e-5, atol=1e-8)


def test_total_loss_passes_gradcheck_in_the_logits():
    """As a function of the table of logits, natural and adversarial at once."""
    method, given = table_cure(beta=3.0, gamma=0.5, mask={"kind": "none"})
    unit = torch.eye(4, dtype=torch.float64)
    revision = method.revision.network.weight.detach()

    def total(weight: Tensor) -> Tensor:
        natural, adversarial = unit[:2] @ weight.T, unit[2:] @ weight.T
        targets = unit[:2] @ revision.T, unit[2:] @ revision.T
        consistency = kl_divergence(targets[0], natural) + kl_divergence(targets[1], adversarial)
        loss = nn.functional.cross_entropy(natural, given.label)
        return loss + 3 * kl_divergence(natural, adversarial) + 0.5 * consistency

    weight = method.model.weight.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(total, (weight,))
    out = method.step(given)
    assert out.metrics["loss"].item() == pytest.approx(total(weight).item(), abs=1e-12)
    (expected,) = torch.autograd.grad(total(weight), weight)
    torch.testing.assert_close(out.grads["weight"], expected)


# -- random masks and what may be masked ---------------------------------------------------------


def zero_pattern(method: nn.Module, given: Batch) -> dict[str, Tensor]:
    return {name: gradient == 0 for name, gradient in method.step(given).grads.items()}


def test_random_masks_have_the_size_of_the_paper_s_and_change_with_the_step():
    paper, given = prepared("default")
    random, _ = prepared("default", mask={"kind": "random"})
    other_seed = build(
        "cure", copy.deepcopy(random.model), context(seed=1), mask={"kind": "random"}
    )
    wanted = {name: int(zero.sum()) for name, zero in zero_pattern(paper, given).items()}
    first = zero_pattern(random, given)
    assert {name: int(zero.sum()) for name, zero in first.items()} == wanted
    again = zero_pattern(random, given)
    assert all(torch.equal(first[name], again[name]) for name in first)
    later = Batch(given.image, given.label, given.index, 6)
    for changed in (zero_pattern(random, later), zero_pattern(other_seed, given)):
        assert {name: int(zero.sum()) for name, zero in changed.items()} == wanted
        assert not torch.equal(first["block.conv1.weight"], changed["block.conv1.weight"])


def test_random_masks_have_one_size_with_global_scope_too():
    paper, given = prepared("default", mask={"scope": "global"})
    random, _ = prepared("default", mask={"kind": "random", "scope": "global"})
    totals = [
        sum(int(zero.sum()) for zero in zero_pattern(method, given).values())
        for method in (paper, random)
    ]
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("conv1", ["block.conv1.weight"]),
        ("convs", ["conv1.weight", "block.conv1.weight", "block.conv2.weight"]),
        (
            "matrices",
            ["conv1.weight", "block.conv1.weight", "block.conv2.weight", "linear.weight"],
        ),
    ],
)
def test_layers_by_name_and_shape(layers, expected):
    method, given = prepared("default", mask={"layers": layers})
    touched = [name for name, zero in zero_pattern(method, given).items() if zero.any()]
    assert touched == expected


def test_layers_that_select_nothing_are_an_error():
    with pytest.raises(ConfigError, match=r"method\.mask\.layers.*matrices"):
        build("cure", Table([*NATURAL, *ADVERSARIAL]), mask={"layers": "convs"})


@pytest.mark.parametrize("kind", ["prominence", "random", "none"])
def test_strict_freeze_hands_the_mask_to_the_trainer(kind):
    method, given = prepared("default", mask={"kind": kind, "strict_freeze": True})
    out = method.step(given)
    assert out.frozen is not None
    assert out.frozen.keys() == ({} if kind == "none" else out.grads).keys()
    for name, frozen in out.frozen.items():
        assert torch.equal(frozen, out.grads[name] == 0)
    loose, given = prepared("default", mask={"kind": kind})
    assert loose.step(given).frozen is None


# -- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 10 steps and the natural logits; x and x_adv; CE(x) 1, CE(x_adv) 1, the rest of L 2.
        ({}, (13, 14, 2)),
        ({"gamma": 0.0}, (13, 14, 0)),
        ({"mask": {"kind": "none"}}, (13, 12, 2)),
        ({"mask": {"kind": "random"}}, (13, 12, 2)),
        ({"mask": {"source": "own_gradient"}}, (13, 12, 2)),
        # KL reaches both graphs (2), and so does what is left of L.
        ({"mask": {"adversarial_loss": "kl"}}, (13, 15, 2)),
        ({"attack_loss": "ce+kl"}, (13, 14, 2)),
    ],
)
def test_passes_of_a_step(settings, expected):
    """Forward passes of the network, gradients that reach its logits, revision passes."""
    method = build("cure", within=context(steps=10), **settings)
    counts = {"forward": 0, "backward": 0, "revision": 0}

    def arrived(gradient: Tensor) -> None:
        counts["backward"] += 1

    def passed(module: nn.Module, inputs: object, output: Tensor) -> None:
        counts["forward"] += 1
        if output.requires_grad:
            output.register_hook(arrived)

    def revised(module: nn.Module, inputs: object, output: Tensor) -> None:
        counts["revision"] += 1
        assert not output.requires_grad

    method.model.register_forward_hook(passed)
    if method.revision is not None:
        method.revision.network.register_forward_hook(revised)
    method.step(batch())
    assert tuple(counts.values()) == expected


def test_batch_norm_sees_the_two_images_of_the_loss_and_nothing_of_the_attack():
    method = build("cure", within=context(steps=10))
    method.step(batch())
    assert int(method.model.bn1.num_batches_tracked) == 2


# -- warm-up -------------------------------------------------------------------------------------


def test_warm_up_trains_naturally_and_then_copies_once():
    """2 of 4 epochs of 10 steps: natural up to step 19, the copy is made at step 20."""
    method = build("cure", warmup=0.5, revision={"rate": 1e-12})
    for number in (0, 19):
        given = batch(number)
        logits = copy.deepcopy(method.model)(given.image).detach().double().tolist()
        out = method.step(given)
        assert out.grads is None
        assert out.loss.requires_grad
        expected = mean_ce(logits, given.label.tolist())
        assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter += torch.randn_like(parameter)
    out = method.step(batch(20))
    assert out.grads is not None
    # Equal weights on equal batches: no disagreement, and the same running statistics after them.
    assert out.metrics["consistency"].abs() < 1e-6
    state, copied = method.model.state_dict(), method.revision.network.state_dict()
    assert state.keys() == copied.keys()
    assert all(torch.equal(state[name], copied[name]) for name in state)
    own = {value.data_ptr() for value in copied.values()}
    assert own.isdisjoint({value.data_ptr() for value in state.values()})
    assert not any(p.requires_grad for p in method.revision.network.parameters())
    # From here on it no longer follows the network.
    kept = [parameter.clone() for parameter in method.revision.network.parameters()]
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter += torch.randn_like(parameter)
    method.after_step(20)
    for number in (21, 30):
        method.on_epoch(number // 10)
        assert method.step(batch(number)).metrics["consistency"] > 0.01
        method.after_step(number)
        for own, before in zip(method.revision.network.parameters(), kept, strict=True):
            assert torch.equal(own, before)


def test_the_revision_model_does_not_move_during_the_warm_up():
    for update in ("before_losses", "after_step"):
        method = build("cure", warmup=0.5, revision={"rate": 1.0, "decay": 0.5, "update": update})
        method.on_epoch(0)
        with torch.no_grad():
            method.model.linear.weight += 1
        before = method.revision.network.linear.weight.clone()
        method.step(batch())
        method.after_step(0)
        assert torch.equal(method.revision.network.linear.weight, before)


@pytest.mark.parametrize(
    ("warmup", "epochs", "natural"), [(0.395, 200, 79), (0.0, 4, 0), (0.5, 4, 2), (0.9, 10, 9)]
)
def test_length_of_the_warm_up_in_whole_epochs(warmup, epochs, natural):
    """0.395 of 200: 79 natural epochs, as in the released code."""
    method = build("cure", within=context(epochs=epochs), warmup=warmup)
    boundary = 10 * natural
    for step in sorted({max(0, boundary - 1), boundary, boundary + 1}):
        method.on_epoch(step // 10)
        assert (method.step(batch(step)).grads is None) == (step < boundary)


@pytest.mark.parametrize("done", [20, 21, 30])
def test_a_run_resumed_around_the_switch_goes_on_with_the_same_bits(done):
    """The trainer calls on_epoch again with the same number when it resumes inside an epoch."""
    settings = {"warmup": 0.5, "revision": {"rate": 1.0, "decay": 0.9}}
    method = build("cure", **settings)

    def train(one: nn.Module, first: int, last: int) -> None:
        one.on_epoch(first // 10)
        for number in range(first, last):
            if number % 10 == 0:
                one.on_epoch(number // 10)
            gradients = gradients_of(one, one.step(batch(number, seed=number)))
            with torch.no_grad():
                for name, parameter in one.trainable().items():
                    parameter -= 0.5 * gradients[name]
            one.after_step(number)

    train(method, 18, done)
    resumed = build("cure", tiny_network(9), **settings)
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    train(method, done, done + 2)
    train(resumed, done, done + 2)
    for name, value in method.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# -- advice --------------------------------------------------------------------------------------


def test_warning_when_the_revision_model_remembers_longer_than_the_run():
    [sentence] = build("cure").warnings()  # 5,000 steps against 40
    assert "5,000" in sentence
    assert "40" in sentence
    assert "method.revision.horizon" in sentence
    assert len(build("cure", within=context(epochs=490)).warnings()) == 1  # against 4,900


def test_the_revision_model_has_the_steps_after_the_warm_up():
    """Of 600 epochs of 10 steps 240 are a warm-up: 5,000 steps against 3,600."""
    [sentence] = build("cure", within=context(epochs=600), warmup=0.4).warnings()
    assert "remembers 5,000 steps but the run has only 3,600" in sentence


@pytest.mark.parametrize(("warmup", "epochs"), [(0.6, 1), (0.9, 4), (0.95, 10)])
def test_a_warm_up_that_leaves_no_epoch_is_told(warmup, epochs):
    """Rounded to epochs it takes all of them: no step is CURE's, and the run naturally trained."""
    method = build("cure", within=context(epochs=epochs), warmup=warmup)
    last = batch(step=10 * epochs - 1)
    assert torch.equal(method.make_adversarial(last).image, last.image)
    [sentence] = method.warnings()
    assert f"method.warmup: {warmup} of the run" in sentence
    assert "no epoch" in sentence


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"revision": {"horizon": 0.5}}, 4),
        ({"revision": {"decay": 0.5}}, 4),
        ({"revision": {"ramp": True}}, 4),
        ({"gamma": 0.0}, 4),
        ({}, 600),
    ],
)
def test_no_warning_when_the_memory_fits(settings, epochs):
    assert build("cure", within=context(epochs=epochs), **settings).warnings() == []


@pytest.mark.parametrize("epochs", [10, 15, 17, 19, 40])
def test_no_warning_when_the_memory_is_asked_to_be_the_whole_run(epochs):
    """A horizon of 1 is a memory of exactly the run, whatever rounding makes of it."""
    within = context(steps_per_epoch=1, epochs=epochs)
    assert build("cure", within=within, revision={"horizon": 1.0}).warnings() == []


def test_the_network_has_the_classes_of_the_bench():
    assert tiny_network()(batch().image).shape == (24, CLASSES)
