"""What an attack does to the network that it borrows: nothing that stays, nothing for nothing."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from attack_networks import images, trained, untrained
from torch import Tensor, nn

from cure.attacks import OBJECTIVES, PGD, Hooks, PerSample, Threat, attack_mode, perturb
from cure.attacks.losses import with_cross_entropy
from cure.methods.common.early_stop import EarlyStop

MODES = ("eval", "train")


def unusual() -> nn.Sequential:
    """In training, but with one BatchNorm in evaluation mode and one tensor that does not learn."""
    model = untrained().train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a network that an attack could disturb."""
    return {
        "modes": [module.training for module in model.modules()],
        "learning": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [(id(p.grad), p.grad.clone()) for p in model.parameters()],
        "weights": [(p.data_ptr(), p.detach().clone()) for p in model.parameters()],
        "buffers": [(b.data_ptr(), b.clone()) for b in model.buffers()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after["modes"] == before["modes"]
    assert after["learning"] == before["learning"]
    for part in ("gradients", "weights", "buffers"):
        for (place, value), (old_place, old_value) in zip(after[part], before[part], strict=True):
            assert place == old_place
            assert torch.equal(value, old_value)


def run(model: nn.Module, mode: str = "eval", name: str = "kl", steps: int = 3) -> Tensor:
    image, label = images(6)
    attack = PGD(Threat("Linf", 0.1), steps, 0.03, "uniform", mode)
    return attack(model, image, label, OBJECTIVES[name], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_network_comes_back_as_it_was(mode, name):
    model = unusual()
    before = snapshot(model)
    run(model, mode, name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("failing_pass", [1, 2, 4])
def test_the_network_comes_back_as_it_was_when_it_raises(mode, failing_pass):
    """In the natural pass (1), in the first and in the last step, behind the BatchNorm layers."""
    model = unusual()
    before = snapshot(model)
    passes = 0

    def fail(module: nn.Module, inputs: object) -> None:
        nonlocal passes
        passes += 1
        if passes == failing_pass:
            raise RuntimeError("planted")

    model[8].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(model, mode)
    assert passes == failing_pass
    assert_unchanged(model, before)


def test_batch_norm_really_moves_in_train_mode_before_it_is_put_back():
    """Without this, that buffers come back in train mode would say nothing."""
    model = unusual().train()
    seen = []
    model[4].register_forward_hook(
        lambda module, inputs, output: seen.append(int(module.num_batches_tracked))
    )
    run(model, "train", steps=3)
    assert seen == [1, 2, 3, 4]
    assert int(model[4].num_batches_tracked) == 0
    seen.clear()
    run(model, "eval", steps=3)
    assert seen == [0, 0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_mode_and_learning_of_every_module_while_the_attack_runs(mode):
    model = unusual()
    seen = []

    def look(module: nn.Module, inputs: object) -> None:
        seen.append(
            ({m.training for m in model.modules()}, {p.requires_grad for p in model.parameters()})
        )

    model.register_forward_pre_hook(look)
    run(model, mode)
    assert seen == [({mode == "train"}, {False})] * 4


@pytest.mark.parametrize("mode", MODES)
def test_crafting_is_a_context_of_its_own(mode):
    model = unusual()
    before = snapshot(model)
    with attack_mode(model, mode):
        model(images(4)[0])
    assert_unchanged(model, before)


def count_passes(model: nn.Module) -> dict[str, int]:
    """Forward passes, and gradients that reach the logits: one a backward pass."""
    counts = {"forward": 0, "graphs": 0, "backward": 0}

    def arrived(gradient: Tensor) -> None:
        counts["backward"] += 1

    def passed(module: nn.Module, inputs: object, output: Tensor) -> None:
        counts["forward"] += 1
        if output.requires_grad:
            counts["graphs"] += 1
            output.register_hook(arrived)

    model.register_forward_hook(passed)
    return counts


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", [*sorted(OBJECTIVES), "ce+kl"])
def test_passes(name, steps):
    """A forward and a backward pass a step; KL looks at the natural image once, without a graph."""
    model = untrained()
    counts = count_passes(model)
    image, label = images(4)
    objective = with_cross_entropy(0.1) if name == "ce+kl" else OBJECTIVES[name]
    attack = PGD(Threat("Linf", 0.1), steps, 0.03, "none")
    attack(model, image, label, objective, None)
    assert counts == {"forward": steps + ("kl" in name), "graphs": steps, "backward": steps}


def test_no_gradient_of_a_weight_is_computed():
    """A hook on each weight would fire if autograd went there."""
    model, image = trained().train(), images(4)[0]
    fired = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: fired.append(gradient))
    run(model)
    assert fired == []
    model(image).sum().backward()
    assert len(fired) == len(list(model.parameters())), "the hooks do work"


def test_hooks_replace_the_settings_of_the_run():
    # One change a case, against the plain loop with that setting.
    model = trained()
    image, label = images(4, 7)
    objective = OBJECTIVES["cross_entropy"]
    attack = PGD(Threat("Linf", 0.1), 3, 0.02, "none")

    def plain(steps: int, size: float, radius: float) -> Tensor:
        return perturb(
            model,
            lambda logits: objective(logits, label, None),
            image,
            Threat("Linf", radius),
            steps=steps,
            step_size=size,
        )

    def own(radius: float, size: float) -> PerSample:
        return PerSample(torch.full((4,), radius), torch.full((4,), size))

    assert torch.equal(attack(model, image, label, objective, None), plain(3, 0.02, 0.1))
    fewer = Hooks()
    fewer.steps = 1
    for hooks, expected in (
        (fewer, plain(1, 0.02, 0.1)),
        (own(0.1, 0.01), plain(3, 0.01, 0.1)),
        (own(0.03, 0.02), plain(3, 0.02, 0.03)),
    ):
        changed = attack(model, image, label, objective, None, hooks=hooks)
        assert torch.equal(changed, expected)
        assert not torch.equal(changed, plain(3, 0.02, 0.1))
    wrong = (label + 1) % 4
    stopped = attack(model, image, wrong, objective, None, hooks=EarlyStop(wrong, 0))
    assert torch.equal(stopped, image)


def test_precision_surrounds_every_pass_and_the_result_keeps_the_image_s_type():
    entered, types = 0, []

    @contextmanager
    def lower():
        nonlocal entered
        entered += 1
        with torch.autocast("cpu", torch.bfloat16):
            yield

    model = trained()
    model.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    image, label = images(4)
    attack = PGD(Threat("Linf", 0.1), 2, 0.03, "none", precision=lower)
    changed = attack(model, image, label, OBJECTIVES["kl"], None)
    assert entered == 3
    assert types == [torch.bfloat16] * 3
    assert changed.dtype == torch.float32


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler")
def test_a_compiled_attack_is_the_same_attack():
    model = trained()
    image, label = images(6)
    came = []
    for compiled in (False, True):
        attack = PGD(Threat("L2", 0.5), 3, 0.2, "uniform", fold=True, compile=compiled)
        # Twice, at other weights: nothing of the first call may be kept.
        for factor in (1.0, 1.5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
            draws = torch.Generator().manual_seed(0)
            came.append(attack(model, image, label, OBJECTIVES["kl"], draws))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(1.5)
    assert not torch.equal(came[0], came[1])
    torch.testing.assert_close(came[0], came[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(came[1], came[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
def test_a_network_that_overwrites_its_last_result_is_attacked_alike(monkeypatch, objective):
    # As CUDA graphs do: every pass writes where the last one wrote.
    image, label = images(6)
    came = []
    for overwrites in (False, True):
        last = []

        def compiled(model, overwrites=overwrites, last=last):
            def forward(x):
                for logits in last if overwrites else ():
                    logits.data.fill_(torch.nan)
                last[:] = [model(x)]
                return last[0]

            return forward

        monkeypatch.setattr(sys.modules["cure.attacks.pgd"], "_compiled", compiled)
        attack = PGD(Threat("Linf", 0.1), 3, 0.03, "uniform", compile=True)
        draws = torch.Generator().manual_seed(0)
        came.append(attack(trained(), image, label, OBJECTIVES[objective], draws))
    assert torch.equal(*came)
