"""The ascent loop against closed forms, foolbox, torchattacks and a slow loop over samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_networks import images, linear_network, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cure.attacks import OBJECTIVES, PGD, Threat, perturb
from cure.attacks.losses import cross_entropy
from cure.errors import ConfigError, ModelError
from cure.methods.common.early_stop import EarlyStop
from cure.methods.las_at import OwnStrategy
from cure.utils.random import generator

NORMS = ("Linf", "L2")
STARTS = ("none", "gaussian", "uniform")


def lengths(change: Tensor, norm: str) -> np.ndarray:
    flat = change.double().numpy().reshape(len(change), -1)
    return np.abs(flat).max(axis=1) if norm == "Linf" else np.sqrt((flat**2).sum(axis=1))


def climb(model: nn.Module, image: Tensor, target: Tensor, threat: Threat, **options) -> Tensor:
    """perturb on cross-entropy; samples may have values of their own, as LAS-AT and FAT do."""
    own = [options.pop(name, None) for name in ("epsilon", "patience", "label")]
    radius, patience, label = own
    steps, size = options["steps"], options["step_size"]
    if patience is not None:
        options["hooks"] = EarlyStop(label, patience)
    if radius is not None:
        radius, size, steps = (
            torch.as_tensor(one, dtype=image.dtype).expand(len(image))
            for one in (radius, size, steps)
        )
        strategy = OwnStrategy(radius, steps.long(), size)
        options["hooks"] = strategy if patience is None else Both(strategy, options["hooks"])
        options |= {"steps": 0, "step_size": 0.0}
    return perturb(model, lambda logits: cross_entropy(logits, target), image, threat, **options)


class Both(OwnStrategy):
    """Strategies of samples' own, and an early stop."""

    def __init__(self, strategy: OwnStrategy, stop: EarlyStop) -> None:
        super().__init__(strategy.epsilon, strategy.own_steps, strategy.step_size)
        self.stop = stop

    def accept(self, step: int, logits: Tensor, x: Tensor, moved: Tensor) -> Tensor:
        return super().accept(step, logits, x, self.stop.accept(step, logits, x, moved))


# -- what always holds ---------------------------------------------------------------------------


@given(
    norm=st.sampled_from(NORMS),
    start=st.sampled_from(STARTS),
    seed=st.integers(0, 2**31 - 1),
    steps=st.integers(0, 3),
    epsilon=st.floats(1e-3, 1.0),
    share=st.floats(0.05, 3.0),
    objective=st.sampled_from(sorted(OBJECTIVES)),
)
@settings(max_examples=60, deadline=None)
def test_result_is_in_the_ball_and_an_image(norm, start, seed, steps, epsilon, share, objective):
    image, label = images(4, seed)
    model, draws = trained(), torch.Generator().manual_seed(seed)
    attack = PGD(Threat(norm, epsilon), steps, share * epsilon, start)
    changed = attack(model, image, label, OBJECTIVES[objective], draws)
    assert changed.shape == image.shape
    assert not changed.requires_grad
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (lengths(changed - image, norm) <= epsilon + 2e-6).all()


@given(
    norm=st.sampled_from(NORMS),
    start=st.sampled_from(STARTS),
    seed=st.integers(0, 2**31 - 1),
    epsilon=st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
    steps=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_every_sample_stays_in_its_own_ball(norm, start, seed, epsilon, steps):
    image, label = images(4, seed)
    changed = climb(
        trained(),
        image,
        label,
        Threat(norm, 0.77),
        steps=torch.tensor(steps),
        step_size=0.3,
        start=start,
        generator=torch.Generator().manual_seed(seed),
        epsilon=torch.tensor(epsilon),
    )
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (lengths(changed - image, norm) <= np.array(epsilon) + 2e-6).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_each_sample_equals_a_run_alone_with_its_own_values(norm, early_stop):
    """Per-sample radius, step length, number of steps and patience, in float64."""
    image, label = images(6, 5, torch.float64)
    label[3] = (label[3] + 1) % 4  # one sample begins misclassified
    model, threat = trained(torch.float64), Threat(norm, 0.9)
    unit = 0.05 if norm == "Linf" else 0.4
    own = {
        "epsilon": unit * torch.tensor([0.5, 1.0, 2.0, 3.0, 1.5, 0.25], dtype=torch.float64),
        "step_size": unit * torch.tensor([0.2, 0.6, 0.5, 1.0, 0.4, 0.1], dtype=torch.float64),
        "steps": torch.tensor([3, 1, 5, 2, 0, 4]),
    }
    if early_stop:
        own["patience"] = torch.tensor([0, 1, 0, 1, 2, 3])
    together = climb(model, image, label, threat, label=label, **own)
    for i in range(len(image)):
        one = {name: value[i].item() for name, value in own.items()}
        single = label[i : i + 1]
        alone = climb(model, image[i : i + 1], single, threat, label=single, **one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
    assert torch.equal(together[4], image[4])
    assert lengths((together - image)[[0, 1, 2, 3, 5]], norm).min() > 0


@pytest.mark.parametrize("norm", NORMS)
def test_no_steps_leave_the_image_untouched(norm):
    image, label = images(3)
    changed = climb(trained(), image, label, Threat(norm, 0.1), steps=0, step_size=0.1)
    assert torch.equal(changed, image)
    assert changed.data_ptr() != image.data_ptr()


def test_the_image_given_is_not_written_to_and_needs_no_gradient_mode():
    image, label = images(3)
    before, threat = image.clone(), Threat("Linf", 0.1)
    expected = climb(trained(), image, label, threat, steps=2, step_size=0.05)
    with torch.no_grad():
        changed = climb(trained(), image, label, threat, steps=2, step_size=0.05)
    assert torch.equal(image, before)
    assert not image.requires_grad
    assert torch.equal(changed, expected)


# -- closed forms --------------------------------------------------------------------------------


def linear_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draws = np.random.default_rng(3)
    weight, bias = draws.standard_normal((3, 12)), draws.standard_normal(3)
    return weight, bias, draws.uniform(0, 1, (5, 12)), draws.integers(0, 3, 5)


def linear_gradient(weight, bias, x, label) -> np.ndarray:
    """d CE / d x = W^T (softmax(W x + b) - onehot(y)), a row a sample."""
    powers = np.exp(x @ weight.T + bias)
    return (powers / powers.sum(axis=1, keepdims=True) - np.eye(3)[label]) @ weight


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_on_a_linear_network_is_the_closed_form(norm):
    """Linf: FGSM, clip(x + s sign(g)); L2: clip(x + s g / |g|); here s is below the radius."""
    weight, bias, x, label = linear_problem()
    gradient = linear_gradient(weight, bias, x, label)
    direction = np.sign(gradient)
    if norm == "L2":
        direction = gradient / np.sqrt((gradient**2).sum(axis=1, keepdims=True))
    expected = np.clip(x + 0.3 * direction, 0, 1)
    changed = climb(
        linear_network(torch.from_numpy(weight), torch.from_numpy(bias)),
        torch.from_numpy(x).reshape(5, 3, 2, 2),
        torch.from_numpy(label),
        Threat(norm, 0.4),
        steps=1,
        step_size=0.3,
    )
    np.testing.assert_allclose(changed.reshape(5, 12).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_many_steps_on_a_linear_network_against_numpy(norm):
    """Ascend, project on the ball around x, clip to [0, 1]: written out with NumPy."""
    weight, bias, x, label = linear_problem()
    radius, size, current = 0.5, 0.2, x.copy()
    for _ in range(5):
        gradient = linear_gradient(weight, bias, current, label)
        if norm == "Linf":
            change = np.clip(current + size * np.sign(gradient) - x, -radius, radius)
        else:
            gradient /= np.sqrt((gradient**2).sum(axis=1, keepdims=True))
            change = current + size * gradient - x
            length = np.sqrt((change**2).sum(axis=1, keepdims=True))
            change *= np.minimum(1, radius / length)
        current = np.clip(x + change, 0, 1)
    changed = climb(
        linear_network(torch.from_numpy(weight), torch.from_numpy(bias)),
        torch.from_numpy(x).reshape(5, 3, 2, 2),
        torch.from_numpy(label),
        Threat(norm, radius),
        steps=5,
        step_size=size,
    )
    np.testing.assert_allclose(changed.reshape(5, 12).numpy(), current, atol=1e-10)


# -- other libraries -----------------------------------------------------------------------------

# (norm, radius, step): strong enough that some samples fall and some stand.
STRENGTHS = [("Linf", 0.06, 0.015), ("L2", 0.7, 0.2)]
DTYPES = [torch.float64, torch.float32]


def verdicts(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image).argmax(dim=1) == label


def assert_same_attack(ours: Tensor, theirs: Tensor, label: Tensor, model: nn.Module) -> None:
    """Equal pixels and equal verdicts.

    In float64 every pixel agrees to rounding.  In float32 a gradient entry close to 0 may have its
    sign rounded to the other side (the libraries scale the loss differently: sum against mean), so
    a pixel in a thousand may differ.
    """
    difference = (ours - theirs).abs()
    if ours.dtype == torch.float64:
        assert difference.max() < 1e-9
    else:
        assert (difference > 1e-5).double().mean() < 1e-3
    ours_stand, theirs_stand = verdicts(model, ours, label), verdicts(model, theirs, label)
    assert torch.equal(ours_stand, theirs_stand)
    assert 0 < ours_stand.sum() < len(label), "an attack that separates the samples tests more"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "radius", "size"), STRENGTHS)
def test_equals_foolbox(norm, radius, size, dtype):
    foolbox = pytest.importorskip("foolbox")
    model = trained(dtype)
    image, label = images(48, 99, dtype)
    kind = foolbox.attacks.LinfPGD if norm == "Linf" else foolbox.attacks.L2PGD
    theirs = kind(abs_stepsize=size, steps=7, random_start=False).run(
        foolbox.PyTorchModel(model, bounds=(0, 1)),
        image,
        foolbox.criteria.Misclassification(label),
        epsilon=radius,
    )
    ours = climb(model, image, label, Threat(norm, radius), steps=7, step_size=size)
    assert_same_attack(ours, theirs, label, model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "radius", "size"), STRENGTHS)
def test_equals_torchattacks(norm, radius, size, dtype):
    torchattacks = pytest.importorskip("torchattacks")
    model = trained(dtype)
    image, label = images(48, 99, dtype)
    options = {"eps": radius, "alpha": size, "steps": 7, "random_start": False}
    if norm == "Linf":
        theirs = torchattacks.PGD(model, **options)(image, label)
    else:
        # What it adds to the length of the gradient of a mean is felt in float64.
        theirs = torchattacks.PGDL2(model, **options, eps_for_division=0)(image, label)
    ours = climb(model, image, label, Threat(norm, radius), steps=7, step_size=size)
    assert_same_attack(ours, theirs, label, model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_with_gaussian_start_equals_torchattacks_tpgd(dtype):
    """The same seed gives the same start, since both draw one standard normal image."""
    torchattacks = pytest.importorskip("torchattacks")
    model = trained(dtype)
    image, label = images(48, 98, dtype)
    torch.manual_seed(21)
    theirs = torchattacks.TPGD(model, eps=0.06, alpha=0.015, steps=7)(image, label)
    ours = PGD(Threat("Linf", 0.06), 7, 0.015, "gaussian")(
        model, image, label, OBJECTIVES["kl"], torch.Generator().manual_seed(21)
    )
    assert_same_attack(ours, theirs, label, model)


# -- early stop ----------------------------------------------------------------------------------


def friendly_attack(
    model: nn.Module, image: Tensor, label: int, steps: int, size: float, radius: float, tau: int
) -> tuple[Tensor, int]:
    """FAT for one image, as its paper says it; also how many steps were taken.

    Look at the current point; misclassified and nothing left: stop; misclassified: one less is
    left; then step.
    """
    current, left, taken = image, tau, 0
    for _ in range(steps):
        leaf = current.clone().requires_grad_(True)
        logits = model(leaf[None])[0]
        if int(logits.argmax()) != label:
            if left == 0:
                break
            left -= 1
        (logits.logsumexp(0) - logits[label]).backward()
        stepped = current.numpy() + size * np.sign(leaf.grad.numpy())
        near = np.minimum(np.maximum(stepped, image.numpy() - radius), image.numpy() + radius)
        current = torch.from_numpy(np.clip(near, 0, 1))
        taken += 1
    return current, taken


@pytest.mark.parametrize("tau", [0, 1, 2, [0, 1, 2, 3] * 4])
def test_patience_against_a_slow_loop_over_samples(tau):
    model = trained(torch.float64)
    image, label = images(16, 42, torch.float64)
    label[:3] = (label[:3] + 1) % 4  # begin misclassified
    patience = torch.tensor(tau)
    together = climb(
        model,
        image,
        label,
        Threat("Linf", 0.1),
        steps=8,
        step_size=0.02,
        label=label,
        patience=patience if isinstance(tau, list) else tau,
    )
    taken = []
    for i in range(16):
        own = tau[i] if isinstance(tau, list) else tau
        alone, count = friendly_attack(model, image[i], int(label[i]), 8, 0.02, 0.1, own)
        taken.append(count)
        np.testing.assert_allclose(together[i].numpy(), alone.numpy(), atol=1e-9)
    assert min(taken[3:]) < max(taken[3:]), "the samples should stop at different steps"


def test_patience_zero_leaves_a_misclassified_start_where_it_is():
    model = trained()
    image = images(4, 42)[0]
    wrong = (model(image).argmax(dim=1) + 1) % 4
    options = {"steps": 5, "step_size": 0.02, "label": wrong}
    changed = climb(model, image, wrong, Threat("Linf", 0.1), patience=0, **options)
    assert torch.equal(changed, image)
    moved = climb(model, image, wrong, Threat("Linf", 0.1), patience=1, **options)
    one = climb(model, image, wrong, Threat("Linf", 0.1), steps=1, step_size=0.02)
    assert torch.equal(moved, one)


def test_patience_does_not_grow_back_when_a_sample_is_right_again():
    """A path that is misclassified at its 1st and 3rd point and right at the others.

    With one more step allowed it must stop at the third point, not later.
    """
    # One pixel; the network's verdict depends on the pixel: wrong near 0 and near .2 only.
    label = torch.tensor([0])

    def forward(x: Tensor) -> Tensor:
        pixel = x.flatten(1)
        number = (pixel.detach() / 0.1).round().int()
        wrong = ((number == 0) | (number == 2)).to(pixel.dtype)
        return torch.cat([-pixel, -pixel.detach() + 2 * wrong - 1], dim=1)

    image = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    options = {"steps": 6, "step_size": 0.1, "label": label}
    ends = [
        climb(forward, image, label, Threat("Linf", 1.0), patience=tau, **options).item()
        for tau in (0, 1, 2)
    ]
    assert ends == pytest.approx([0.0, 0.2, 0.6])


# -- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_random_starts_repeat_with_the_generator(norm, start):
    image, label = images(4)

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return climb(
            trained(),
            image,
            label,
            Threat(norm, 0.05),
            steps=0,
            step_size=0.1,
            start=start,
            generator=generator,
        )

    torch.manual_seed(0)
    first = run(1)
    torch.manual_seed(1)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert not torch.equal(first, image)


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_random_start_without_a_generator_is_an_error(start):
    image, label = images(2)
    with pytest.raises(ValueError, match="generator"):
        climb(trained(), image, label, Threat("Linf", 0.1), steps=1, step_size=0.1, start=start)


def test_gaussian_start_has_a_thousandth_of_spread_and_uniform_fills_the_ball():
    image = torch.full((50, 1, 20, 20), 0.5, dtype=torch.float64)
    label = torch.zeros(50, dtype=torch.long)

    def change(start: str) -> np.ndarray:
        return (
            climb(
                nn.Flatten(),
                image,
                label,
                Threat("Linf", 0.1),
                steps=0,
                step_size=0.1,
                start=start,
                generator=torch.Generator().manual_seed(0),
            )
            - image
        ).numpy()

    gaussian, uniform = change("gaussian"), change("uniform")
    # 20,000 numbers: relative error of a standard deviation is 1 / sqrt(40,000) = 0.5 %.
    assert gaussian.std() == pytest.approx(0.001, rel=0.025)
    assert abs(gaussian.mean()) < 5 * 0.001 / 20_000**0.5
    assert uniform.std() == pytest.approx(0.1 / 3**0.5, rel=0.025)
    assert np.abs(uniform).max() == pytest.approx(0.1, rel=0.01)


def test_gaussian_start_is_projected_on_a_smaller_ball():
    image = torch.full((2, 1, 20, 20), 0.5, dtype=torch.float64)
    label = torch.zeros(2, dtype=torch.long)
    changed = climb(
        nn.Flatten(),
        image,
        label,
        Threat("Linf", 1e-4),
        steps=0,
        step_size=0.1,
        start="gaussian",
        generator=torch.Generator().manual_seed(0),
    )
    assert (changed - image).abs().max().item() == pytest.approx(1e-4)


def test_noise_after_a_step_is_what_the_generator_draws_and_is_projected() -> None:
    """A flat objective leaves the noise alone to move the image."""
    image, label = torch.full((2, 1, 3, 3), 0.5), torch.zeros(2, dtype=torch.int64)

    def moved(generator: torch.Generator | None) -> Tensor:
        return perturb(
            lambda x: x.flatten(1),
            lambda logits: logits.sum(dim=1),
            image,
            Threat("Linf", 0.1),
            steps=1,
            step_size=0.0,
            generator=generator,
            hooks=EarlyStop(label, patience=9, noise=0.2),
        )

    drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    expected = 0.5 + (0.2 * drawn).clamp(-0.1, 0.1)
    torch.testing.assert_close(moved(torch.Generator().manual_seed(3)), expected)
    with pytest.raises(ValueError, match="give a generator"):
        moved(None)


# -- alone ---------------------------------------------------------------------------------------


def test_pgd_needs_a_threat_alone() -> None:
    """Cross-entropy, 10 steps of 2.5 epsilon / 10, a uniform start keyed by the seed 0."""
    image, label = images(6, 7, torch.float64)
    model, threat = trained(torch.float64), Threat("Linf", "8/255")
    found = PGD(threat)(model, image, label)
    noise = torch.rand(image.shape, generator=generator("cpu", 0, "PGD"), dtype=torch.float64)
    radius = 8 / 255
    current = (image + radius * (2 * noise - 1)).clamp(0, 1)
    for _ in range(10):
        leaf = current.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), label), leaf)
        moved = current + 0.25 * radius * slope.sign()
        current = torch.minimum(torch.maximum(moved, image - radius), image + radius).clamp(0, 1)
    torch.testing.assert_close(found, current, rtol=0, atol=1e-12)
    assert torch.equal(PGD(threat)(model, image, label), found)
    draws = torch.Generator().manual_seed(0)
    two = [PGD(threat)(model, image, label, generator=draws) for _ in range(2)]
    assert not torch.equal(*two)


def test_a_start_that_is_not_clamped_leaves_the_cube_and_the_result_does_not() -> None:
    """On white images: the first gradient is taken beyond 1, where the released codes take it."""
    image, label = torch.ones(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :4]

    for clamp in (True, False):
        changed = perturb(
            forward,
            lambda logits: cross_entropy(logits, label),
            image,
            Threat("Linf", 0.1),
            steps=2,
            step_size=0.01,
            start="uniform",
            generator=torch.Generator().manual_seed(0),
            clamp_start=clamp,
        )
        assert changed.max() <= 1
        assert (seen[0].max() > 1.05) == (not clamp)
        if not clamp:
            draws = torch.Generator().manual_seed(0)
            noise = 0.1 * (2 * torch.rand(image.shape, generator=draws) - 1)
            assert torch.equal(seen[0], image + noise)
        assert seen[1].max() <= 1
        seen.clear()


def test_restarts_keep_the_result_with_the_highest_objective() -> None:
    image, label = images(8, 5)
    model, threat = trained(), Threat("Linf", 0.06)
    draws = torch.Generator().manual_seed(4)
    single = PGD(threat, 2, 0.02)
    three = [single(model, image, label, generator=draws) for _ in range(3)]
    losses = torch.stack([cross_entropy(model(one), label) for one in three]).detach()
    best = PGD(threat, 2, 0.02, restarts=3)(
        model, image, label, generator=torch.Generator().manual_seed(4)
    )
    chosen = losses.argmax(dim=0)
    assert len(set(chosen.tolist())) > 1
    for number, choice in enumerate(chosen.tolist()):
        assert torch.equal(best[number], three[choice][number])


@pytest.mark.parametrize(
    ("threat", "options", "sentence"),
    [
        ("Linf", {}, "expected threat as a cure.Threat, got 'Linf'"),
        (Threat(), {"start": "random"}, "start as one of gaussian, uniform, none, got 'random'"),
        (Threat(), {"mode": "test"}, "mode as one of eval, train, got 'test'"),
        (Threat(), {"steps": -1}, "steps of 0 or more, got -1"),
        (Threat(), {"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        (Threat(), {"steps": "10"}, "steps: expected a whole number, got '10'"),
        (Threat(), {"restarts": 0}, "restarts of 1 or more, got 0"),
        (Threat(), {"step_size": [0.1]}, "step_size: "),
        (Threat(), {"step_size": "a"}, "step_size: expected a number"),
        (Threat(), {"step_size": -0.1}, "step_size of 0 or more, got -0.1"),
    ],
)
def test_what_an_attack_cannot_do_is_refused(threat, options, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PGD(threat, **options)


def test_images_that_an_attack_would_clip_and_l1_are_refused() -> None:
    image, label = images(4)
    for wrong in (2 * image - 1, (255 * image).byte(), image * float("nan")):
        with pytest.raises(ConfigError, match=r"expected images in \[0, 1\]"):
            PGD(Threat())(trained(), wrong, label)
    PGD(Threat())(trained(), image * (1 + 1e-6), label)
    with pytest.raises(ConfigError, match="Linf and L2, got L1"):
        PGD(Threat("L1", 1))(trained(), image, label)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (torch.tensor([0.0, 1.0]), r"labels in int64, got torch\.float32; say labels\.long\(\)"),
        (torch.tensor([[0], [1]]), r"labels as classes \[B\] or probabilities .*, got \[2, 1\]"),
        (torch.tensor([0, 1, 1]), "a label for each of 2 images, got 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(label: Tensor, sentence: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ConfigError, match=sentence):
        PGD(Threat("Linf", 0.1), 1)(network, torch.rand(2, 1, 2, 2), label)


def test_a_network_without_a_gradient_is_refused() -> None:
    class Detached(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1)[:, :4].detach()

    image, label = images(4)
    with pytest.raises(ModelError, match="no gradient reaches the images"):
        PGD(Threat())(Detached(), image, label)


def test_an_attack_works_in_inference_mode_and_on_its_tensors() -> None:
    image, label = images(4)
    model, attack = trained(), PGD(Threat(), 3)
    expected = attack(model, image, label)
    with torch.inference_mode():
        assert torch.equal(attack(model, image, label), expected)
        of_the_mode = image.clone(), label.clone()
    assert torch.equal(attack(model, *of_the_mode), expected)
