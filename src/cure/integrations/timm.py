"""Every method as a training task of timm."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cure.errors import ConfigError, ModelError
from cure.methods import Method
from cure.models import Normalised
from cure.utils.io import first_line

try:
    # Tasks own their checkpoints since the version that has the second name.
    from timm.task import TrainingTask, resume_task_checkpoint  # noqa: F401
except Exception as error:  # beside some builds of PyTorch its torchvision does not import
    raise ModelError(
        f"cure.integrations.timm needs timm 1.0.27 or newer ({first_line(error)}); "
        "pip install 'cure-at[timm]' with the torchvision that fits this PyTorch"
    ) from error


class RobustTask(TrainingTask):  # type: ignore[misc]
    """A method of :mod:`cure.methods` where a training script of timm has ``ClassificationTask``.

    timm's loaders standardise images, attacks need [0, 1]: give the method the network inside
    ``cure.models.Normalised(network, mean, std)`` with the loader's constants.  The task undoes the
    standardisation (values are clipped to [0, 1]); what timm evaluates and saves is the network
    itself.  A network that is not inside ``Normalised`` needs a loader with mean 0 and std 1.

    The method's ``update()`` follows each step of the optimiser by itself.  Several processes are
    refused, as timm averages gradients after the method made its masks.

    Args:
        method: built with ``steps``, the optimiser steps of the whole training.
        optimizer: of the parameters of the network (of ``ACT``: ``method.trainable()``).
        options: ``device``, ``dtype`` and ``verbose`` of timm's tasks.

    .. code-block:: python

        network = timm.create_model("resnet18", num_classes=10)
        optimizer = timm.optim.create_optimizer_v2(network, opt="sgd", lr=0.05)
        method = cure.methods.TRADES(cure.models.Normalised(network, mean, std), beta=6)
        task = RobustTask(method, optimizer)
        task(images, labels)["loss"].backward()
    """

    def __init__(self, method: Method, optimizer: Optimizer, **options: Any) -> None:
        super().__init__(**options)
        self.method = method
        self.trainable_module = _inside(method.model)
        self._frozen = ExitStack()
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The method's metrics, and ``loss``, whose ``backward()`` gives the method's gradients."""
        image, outside = input, self.method.model
        if isinstance(outside, Normalised):
            if self.method.progress.done == 0 and input.min() >= 0:
                raise ConfigError(
                    "RobustTask: expected standardised images, as the network is inside "
                    f"Normalised, got values from {float(input.min()):.3g}; standardise them in "
                    "the loader, or give the method the network without Normalised"
                )
            image = (input * outside.std + outside.mean).clamp(0, 1)
        step = self.method(image, target)
        return {**step.metrics, "loss": step.loss}

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._frozen.enter_context(self.method.freeze(optimizer))

    def _after_step(self, *_: Any) -> None:
        self._frozen.close()
        self.method.update()

    def prepare_distributed(self, *_: Any, **__: Any) -> RobustTask:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "RobustTask: expected one process; train on several with torchrun and cure train"
        )

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """The network that the method evaluates; takes images as the loader gives them."""
        if module is not None or ema:
            return super().get_eval_model(module, ema)
        return _inside(self.method.inference_model())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """State of the method and number of steps, for checkpoints."""
        if module is not None or ema:
            return {}
        return {"method": self.method.state_dict(), "done": self.method.progress.done}

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,  # noqa: ARG002
        ema: bool = False,  # noqa: ARG002
    ) -> None:
        """See :meth:`get_task_state`; a checkpoint without it holds weights alone."""
        if state:
            self.method.load_state_dict(state["method"], strict=strict)
            self.method.resume(state["done"])


def _inside(network: nn.Module) -> nn.Module:
    return network.network if isinstance(network, Normalised) else network
