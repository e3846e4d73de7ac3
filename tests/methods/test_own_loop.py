"""Methods in a training loop of one's own: the same weights as in our trainer, to the bit."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_bench import batch, build, context, small_networks, teacher_network, tiny_network
from torch import Tensor, nn

import cure
from cure.attacks import PGD, Threat
from cure.config import AveragingConfig, MethodConfig, TeacherConfig, WeightPerturbationConfig
from cure.data import Batch, ImageSet, epoch
from cure.errors import ConfigError
from cure.methods import AWP, METHODS, Averaging, Method
from cure.recipe import load_recipe
from cure.runs.folder import RunFolder
from cure.training.trainer import Trainer

SIZE, STEPS, EPOCHS = 12, 2, 3
"""Images a step, steps an epoch, epochs."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS.names()},
    "fat for trades": ("fat", {"form": "trades", "tau_rises": [0.3]}),
    "iad II": ("iad", {"form": "II", "begin": 0.3}),
    "las-at, updating": ("las-at", {"strategy": {"interval": 2}}),
    "las-at for trades": ("las-at", {"form": "trades"}),
    "cure, frozen": ("cure", {"mask": {"strict_freeze": True}, "revision": {"rate": 1.0}}),
    "cure, warm-up": ("cure", {"warmup": 0.34, "revision": {"update": "after_step"}}),
    "cure, random": ("cure", {"mask": {"kind": "random"}}),
}
WRAPPERS: dict[str, Callable[[Method], Method]] = {
    "": lambda method: method,
    "awp": lambda method: AWP(method, gamma=0.02),
    "averaging": lambda method: Averaging(method, decay=0.5),
    "swa of awp": lambda method: Averaging(
        AWP(method, start=0.34), kind="equal", every="epoch", batch_norm="recomputed"
    ),
}


@pytest.fixture(autouse=True)
def short_memory_is_not_the_subject(recwarn: pytest.WarningsRecorder) -> None:
    """CURE warns that its revision model remembers longer than six steps."""


def images() -> ImageSet:
    given = batch(count=SIZE * STEPS)
    pixels = (255 * given.image).round().to(torch.uint8)
    return ImageSet(pixels, given.label, ("a", "b", "c"), "bench", "train")


def plain(name: str, model: nn.Module, **settings: Any) -> Method:
    """The method by keyword arguments, with teachers as networks."""
    kind = METHODS[name]
    settings = small_networks(kind.Config, settings)
    form = kind.Config.model_validate(
        {
            **settings,
            **{
                key: TeacherConfig(path="a")
                for key, field in kind.Config.model_fields.items()
                if field.annotation is TeacherConfig
            },
        }
    )
    teachers = {role: teacher_network(50 + n) for n, role in enumerate(form.teachers())}
    return kind(
        model,
        attack=context().attack,
        steps=STEPS * EPOCHS,
        epochs=EPOCHS,
        images=[(batch().image, batch().label)],
        learning_rate=0.05,
        weight_decay=0.01,
        **teachers,
        **settings,
    )


def optimizer_of(method: Method) -> torch.optim.SGD:
    return torch.optim.SGD(method.trainable().values(), lr=0.05, momentum=0.9, weight_decay=0.01)


def loop(method: Method, backward: Callable[[Any], None] = lambda step: step.backward()) -> None:
    """The loop of the documentation, over the batches of our trainer."""
    optimizer = optimizer_of(method)
    for number in range(EPOCHS):
        for given in epoch(
            images(), batch_size=SIZE, epoch=number, seed=0, augment=config().data.augment
        ):
            step = method(given.image, given.label)
            optimizer.zero_grad()
            backward(step)
            with method.freeze(optimizer):
                optimizer.step()
            method.update()


def config() -> Any:
    return load_recipe(
        "digits",
        [
            f"training.batch_size={SIZE}",
            f"training.epochs={EPOCHS}",
            "training.channels_last=false",
            "training.schedule.name=constant",
            "training.optimizer.learning_rate=0.05",
            "training.optimizer.weight_decay=0.01",
            "training.threads=1",
            "training.collapse_patience=99",
        ],
    )


def trained(path: Path, method: Method) -> Method:
    """By our trainer."""
    folder = RunFolder.create(path / "run", config(), images().kind)
    engine = method.context.engine
    trainer = Trainer(config(), method, images(), images(), engine, folder)
    trainer._is_alive = lambda validation: True  # Six steps may end at chance.
    trainer.fit()
    return method


def ours(name: str, model: nn.Module, wrapper: str, **settings: Any) -> Method:
    within = context(
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        learning_rate=lambda step: 0.05,
        weight_decay=0.01,
    )
    method = build(name, model, within, **settings)
    if "awp" in wrapper:
        start = 0.34 if "swa" in wrapper else 0.0
        gamma = 0.01 if "swa" in wrapper else 0.02
        method = AWP(method, WeightPerturbationConfig(gamma=gamma, start=start))
    if wrapper == "averaging":
        method = Averaging(method, AveragingConfig(decay=0.5))
    if "swa" in wrapper:
        section = AveragingConfig(kind="equal", every="epoch", batch_norm="recomputed")
        method = Averaging(method, section)
    return method


WRAPPED = [(case, name) for case in ("cure, frozen", "act", "trades") for name in WRAPPERS if name]


@pytest.mark.parametrize(("case", "wrapper"), [*((case, "") for case in CASES), *WRAPPED])
def test_weights_are_equal_to_the_bit_in_the_loop_and_in_our_trainer(tmp_path, case, wrapper):
    name, settings = CASES[case]
    free = WRAPPERS[wrapper](plain(name, tiny_network(3), **copy.deepcopy(settings)))
    loop(free)
    in_trainer = trained(tmp_path, ours(name, tiny_network(3), wrapper, **copy.deepcopy(settings)))
    found, expected = free.state_dict(), in_trainer.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    start = tiny_network(3).state_dict()
    assert not torch.equal(free.model.state_dict()["linear.weight"], start["linear.weight"])
    first, second = free.inference_model(), in_trainer.inference_model()
    for key, value in second.state_dict().items():
        assert torch.equal(first.state_dict()[key], value), key


@pytest.mark.parametrize("name", METHODS.names())
def test_the_loss_gives_the_gradients_of_the_step(name):
    """``step.loss.backward()`` is ``step.backward()``, also with gradients of the method's own."""
    for wrap in (lambda method: method, lambda method: AWP(method, gamma=0.02)):
        by_loss, by_step = (wrap(plain(name, tiny_network(3))) for _ in range(2))
        given = batch(count=SIZE)
        loss = by_loss(given.image, given.label).loss
        loss.backward()
        step = by_step(given.image, given.label)
        step.backward()
        assert loss.item() == pytest.approx(step.metrics["loss"].item(), rel=1e-6)
        assert step.adversarial.shape == given.image.shape
        pairs = zip(by_loss.trainable().items(), by_step.trainable().values(), strict=True)
        for (key, one), other in pairs:
            # What does not reach the loss has no gradient by the first way, and 0 by the second.
            gradient = torch.zeros_like(one) if one.grad is None else one.grad
            assert torch.equal(gradient, other.grad), key


@pytest.mark.parametrize("name", METHODS.names())
def test_gradients_of_batches_accumulate_and_batches_draw_anew(name):
    given = batch(count=SIZE)
    method = plain(name, tiny_network(3))
    steps = [method(given.image, given.label) for _ in range(2)]
    gradients = [{k: g.clone() for k, g in step.gradients().items()} for step in steps[1:]]
    both = plain(name, tiny_network(3))
    for _ in range(2):
        both(given.image, given.label).backward(0.5)
    single = plain(name, tiny_network(3))
    first = single(given.image, given.label).gradients()
    for key, parameter in both.trainable().items():
        expected = 0.5 * first[key] + 0.5 * gradients[0][key]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-8)
    same = torch.equal(steps[0].adversarial, steps[1].adversarial)
    assert same == (name == "natural"), "each batch has a start of its own"
    assert method.progress.done == 0
    method.update()
    assert (method.progress.done, method.progress.part) == (1, 0)


@pytest.mark.parametrize("case", ["act", "fat for trades", "las-at, updating", "cure, warm-up"])
def test_a_loop_that_is_resumed_ends_with_the_same_weights(case):
    (name, settings), done = CASES[case], 3
    parts = [
        given
        for number in range(EPOCHS)
        for given in epoch(images(), batch_size=SIZE, epoch=number, seed=0, augment=None)
    ]

    def steps(method: Method, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
        for given in batches:
            step = method(given.image, given.label)
            optimizer.zero_grad()
            step.backward()
            with method.freeze(optimizer):
                optimizer.step()
            method.update()

    whole = plain(name, tiny_network(3), **settings)
    steps(whole, optimizer_of(whole), parts)
    first = plain(name, tiny_network(3), **settings)
    steps(first, optimizer := optimizer_of(first), parts[:done])
    second = plain(name, tiny_network(4), **settings)
    second.load_state_dict(first.state_dict())
    second.resume(first.progress.done)
    continued = optimizer_of(second)
    continued.load_state_dict(optimizer.state_dict())
    steps(second, continued, parts[done:])
    assert second.progress.done == whole.progress.done == STEPS * EPOCHS
    for key, tensor in whole.inference_model().state_dict().items():
        assert torch.equal(tensor, second.inference_model().state_dict()[key]), key


def test_awp_takes_each_batch_of_a_step_at_the_unperturbed_weights():
    given, model = batch(count=SIZE), tiny_network(3)
    before = copy.deepcopy(model.state_dict())
    method = AWP(cure.methods.AT(model), gamma=0.1)
    for _ in range(3):
        method(given.image, given.label).backward()
    assert not torch.equal(model.linear.weight, before["linear.weight"])
    method.update()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key


def test_frozen_weights_do_not_move_and_forgetting_to_freeze_is_an_error():
    given, model = batch(count=SIZE), tiny_network(3)
    method = cure.methods.CURE(model, steps=6, mask={"strict_freeze": True})
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step = method(given.image, given.label)
        optimizer.zero_grad()
        step.backward()
        with method.freeze(optimizer):
            optimizer.step()
        method.update()
        for name, parameter in model.named_parameters():
            mask = step.frozen[name]
            assert mask.any()
            assert torch.equal(parameter[mask], before[name][mask])
            assert not torch.equal(parameter, before[name])
    method(given.image, given.label).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"with method.freeze\(optimizer\)"):
        method.update()


def test_of_accumulated_batches_what_all_of_them_freeze_is_frozen():
    given = batch(count=SIZE)
    method = cure.methods.CURE(tiny_network(3), steps=6, mask={"strict_freeze": True})
    masks = [method(given.image, given.label).frozen for _ in range(2)]
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    for name, mask in method.progress.frozen.items():
        assert torch.equal(mask, masks[0][name] & masks[1][name])


def test_under_autocast_a_step_is_finite_and_weights_stay_float32():
    given, model = batch(count=SIZE), tiny_network(3)
    for method in (cure.methods.CURE(model, steps=6), cure.methods.TRADES(model)):
        with torch.autocast("cpu", torch.bfloat16):
            step = method(given.image, given.label)
        step.backward()
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


def test_under_autocast_passes_see_weights_that_change_inside_a_step():
    """Autocast keeps weights in lower precision until its block ends: AWP did nothing there."""
    given = batch(count=SIZE)
    losses = []
    for enabled in (False, True):
        method = AWP(cure.methods.AT(tiny_network(3)), gamma=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(2):  # two batches before one step of the optimiser
                metrics = method(given.image, given.label).metrics
                losses += [metrics["loss"], metrics["perturbed_loss"]]
    torch.testing.assert_close(losses[:4], losses[4:], rtol=0.05, atol=0)
    assert losses[1] > 1.1 * losses[0]


def test_under_autocast_las_at_looks_at_the_network_after_the_step():
    given = batch(count=SIZE)
    settings = small_networks(cure.methods.LASAT.Config, {})
    method = cure.methods.LASAT(
        tiny_network(3), steps=6, images=[given.image], learning_rate=1.0, **settings
    )
    with torch.autocast("cpu", torch.bfloat16):
        future, _ = method._after_one_step(given, method.make_adversarial(given))
        inside = future.eval()(given.image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(future(given.image), inside)


def test_schedules_change_at_any_step_without_epochs():
    """FAT's tau grows at 50/120 and 90/120 of 12 steps."""
    given, method = batch(count=SIZE), cure.methods.FAT(tiny_network(3), steps=12)
    found = []
    for _ in range(12):
        found.append(method.tau)
        method(given.image, given.label).backward()
        method.update()
    assert found == [0] * 5 + [1] * 4 + [2] * 3


def test_the_method_takes_soft_labels_where_its_loss_does():
    given = batch(count=SIZE)
    soft = nn.functional.one_hot(given.label, 3).float()
    hard, by_soft = (cure.methods.TRADES(tiny_network(3)) for _ in range(2))
    expected = hard(given.image, given.label).loss
    torch.testing.assert_close(by_soft(given.image, soft).loss, expected)
    with pytest.raises(ConfigError, match="MART takes no soft labels"):
        cure.methods.MART(tiny_network(3))(given.image, soft)


def test_what_the_user_should_know_is_warned_of_at_once():
    with pytest.warns(UserWarning, match=r"remembers 5,000 steps but the run has only 6"):
        cure.methods.CURE(tiny_network(), steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cure.methods.CURE(tiny_network(), steps=60, revision={"horizon": 0.5})


@pytest.mark.parametrize(
    ("build_it", "sentence"),
    [
        (lambda m: cure.methods.TRADES(m, bta=3), "unknown setting 'bta'.*beta"),
        (lambda m: cure.methods.TRADES(m, beta=-1), "TRADES: beta: input .* equal to 0, got -1"),
        (lambda m: cure.methods.CURE(m), r"CURE.*say steps=len\(loader\) \* epochs"),
        (lambda m: cure.methods.AT(m, steps=7, epochs=2), "multiple of the 2 epochs, got 7"),
        (lambda m: cure.methods.ARD(m), "ARD: needs teacher=, a trained network"),
        (lambda m: cure.methods.ARD(m, teacher="runs/at"), r"cure.Run\(path\).model\(\)"),
        (lambda m: cure.methods.LASAT(m), "say images=loader"),
        (lambda m: AWP(cure.methods.AT(m), start=0.5), "AWP: give the method inside steps"),
        (lambda m: Averaging(cure.methods.AT(m), every="epoch"), "inside epochs"),
        (lambda m: Averaging(cure.methods.AT(m), dcay=0.5), "unknown setting 'dcay'"),
        (
            lambda m: cure.methods.AT(
                m, threat=cure.Threat("L2", 1), attack=cure.attacks.PGD(cure.Threat())
            ),
            "give the attack alone",
        ),
        (lambda m: cure.methods.AT("resnet18"), "AT: expected model as a torch.nn.Module"),
        (
            lambda m: cure.methods.AT(nn.Sequential(nn.Flatten(), nn.LazyLinear(3))),
            "AT: the model has layers whose size is not known yet; call it once on a batch of im",
        ),
        (lambda m: cure.methods.AT(m, threat="Linf"), "threat as a cure.Threat, got 'Linf'"),
        (lambda m: cure.methods.AT(m, attack="pgd20"), "attack as a cure.attacks.PGD, got 'pgd20'"),
        (lambda m: AWP(m, gamma=0.1), "AWP: expected a method, such as .*, got "),
    ],
)
def test_mistakes_are_told_in_a_sentence(build_it, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_it(tiny_network())


@pytest.mark.parametrize("wrap", [lambda method: method, lambda method: AWP(method, gamma=0.1)])
def test_forgetting_to_update_is_an_error(wrap):
    given, model = batch(count=SIZE), tiny_network()
    method = wrap(cure.methods.AT(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method(given.image, given.label).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"say method.update\(\) after each"):
        method(given.image, given.label)


def test_an_optimiser_without_the_second_network_of_act_is_an_error():
    given, model = batch(count=SIZE), tiny_network()
    method = cure.methods.ACT(model)
    optimizer = torch.optim.Adam(model.parameters())
    method(given.image, given.label).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"give it method.trainable\(\)"):
        method.update()


def test_images_that_are_standardised_are_refused():
    given = batch(count=SIZE)
    with pytest.raises(ConfigError, match=r"expected images in \[0, 1\].*Normalised"):
        cure.methods.AT(tiny_network())(2 * given.image - 1, given.label)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda image, label: (image[:0], label[:0]), "images as a tensor of one or more"),
        (lambda image, label: (image.numpy(), label), "images as a tensor.*numpy"),
        (lambda image, label: (image.to("meta"), label), "on cpu, where the network is.*meta"),
        (lambda image, label: (image.double(), label), r"torch.float32, got torch.float64"),
        (lambda image, label: (image, label[:5]), "a label for each of 12 images, got 5"),
        (lambda image, label: (image, label[:, None]), r"classes \[B\].*\[12, 1\]"),
    ],
)
def test_a_first_batch_that_does_not_fit_is_refused(change, sentence):
    given = batch(count=SIZE)
    with pytest.raises(ConfigError, match=sentence):
        cure.methods.AT(tiny_network())(*change(given.image, given.label))


def test_a_teacher_of_other_classes_or_images_is_refused():
    given = batch(count=SIZE)
    values = given.image[0].numel()
    for teacher, sentence in (
        (nn.Sequential(nn.Flatten(), nn.Linear(values, 5)), "teacher with 3 logits.*got 5"),
        (nn.Sequential(nn.Flatten(), nn.Linear(values + 1, 3)), "failed on images of shape"),
    ):
        method = cure.methods.ARD(tiny_network(), teacher=teacher)
        with pytest.raises(cure.CureError, match=sentence):
            method(given.image, given.label)


def test_a_network_without_weights_is_refused():
    given = batch(count=SIZE)
    with pytest.raises(cure.CureError, match="no weight of the network may change"):
        cure.methods.AT(nn.Flatten())(given.image, given.label)


def test_a_teacher_is_copied_and_frozen():
    teacher = teacher_network()
    method = cure.methods.ARD(tiny_network(), teacher=teacher)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


def test_a_method_of_one_s_own_works_in_the_loop_without_more() -> None:
    class Config(MethodConfig):
        name: str = "mine"
        weight: float = 2.0

    class Mine(cure.methods.Method):
        def make_adversarial(self, given: Batch) -> Any:
            return cure.methods.AdversarialBatch(given.image)

        def compute_loss(self, given: Batch, attacked: Any) -> Any:
            loss = self.config.weight * nn.functional.cross_entropy(
                self.logits(attacked.image), given.label
            )
            return cure.methods.StepOutput(loss=loss, metrics={"loss": loss.detach()})

    Mine.Config = Config
    given, model = batch(count=SIZE), tiny_network(3)
    expected: Tensor = 3 * nn.functional.cross_entropy(
        copy.deepcopy(model)(given.image), given.label
    )
    found = Mine(model, weight=3.0)(given.image, given.label).loss
    assert found.item() == pytest.approx(expected.item())


def test_a_method_follows_its_network_to_another_device() -> None:
    method = cure.methods.AWP(
        cure.methods.AT(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), gamma=0.01
    ).to("meta")
    with contextlib.suppress(Exception):  # the meta device has no numbers
        method(torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, dtype=torch.long))
    assert method.context.engine.device.type == "meta"
    assert method.inner.context.engine.device.type == "meta"


def test_images_of_a_moved_method_are_where_its_network_is() -> None:
    images = [(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    method = cure.methods.Averaging(cure.methods.AT(network, images=images))
    method._follow(torch.device("meta"))
    assert next(method.context.natural_images()).device.type == "meta"


def test_restarts_are_refused_where_a_method_changes_the_steps() -> None:
    attack = PGD(Threat("Linf", "8/255"), 3, "2/255", restarts=2)
    assert attack.length == 2 / 255
    method = cure.methods.FAT(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), attack=attack, steps=9)
    with pytest.raises(ConfigError, match="restarts: expected 1"):
        method(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
