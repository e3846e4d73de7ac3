"""Every method as a LightningModule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cure.attacks import PGD
from cure.errors import ConfigError, ModelError
from cure.methods import Method, Step
from cure.models.checks import predicted
from cure.utils.io import first_line


def _lightning() -> Any:
    """``lightning.pytorch``, or ``pytorch_lightning`` where that one is imported or installed."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return import_module(name)
        except ImportError as reason:
            error = reason
    raise ModelError(
        f"cure.integrations.lightning needs lightning ({first_line(error)}); "
        "pip install 'cure-at[lightning]'"
    ) from error


class RobustModule(_lightning().LightningModule):  # type: ignore[misc]
    """A method of :mod:`cure.methods` for ``Trainer.fit``, by automatic optimisation.

    Accumulation, clipping and precision are the trainer's.  It logs the metrics of the method
    (``train_loss``, ...), and in validation ``val_natural`` and, with ``attack``, ``val_robust``:
    accuracies in percent of the network that the method evaluates (:meth:`forward`).  Several
    processes are refused, as Lightning averages gradients after the method made its masks.

    Args:
        method: built with the network and ``steps=len(loader) * epochs``.
        optimizer: from the parameters to the optimiser; or override ``configure_optimizers``.
        schedule: from the optimiser to a learning-rate scheduler, which steps once an epoch.
        attack: for validation, such as ``cure.attacks.PGD(threat, steps=20)``.

    .. code-block:: python

        method = cure.methods.TRADES(model, threat=cure.Threat("Linf", "4/255"), beta=6)
        module = RobustModule(method, lambda weights: torch.optim.SGD(weights, 0.1))
        lightning.pytorch.Trainer(max_epochs=5).fit(module, loader, validation_loader)
    """

    def __init__(
        self,
        method: Method,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Callable[[Optimizer], Any] | None = None,
        attack: PGD | None = None,
    ) -> None:
        super().__init__()
        self.method, self.attack = method, attack
        self._optimizer, self._schedule = optimizer, schedule
        self._frozen = ExitStack()

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of the network that the method evaluates."""
        logits: Tensor = self.method.inference_model()(image)
        return logits

    def configure_optimizers(self) -> Any:
        """The optimiser of all parameters that the method trains, and its schedule."""
        optimizer = self._optimizer(list(self.method.trainable().values()))
        if self._schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer)}

    def on_fit_start(self) -> None:
        """Training mode; several processes are refused."""
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"RobustModule: expected one process, got {self.trainer.world_size}; say "
                "Trainer(devices=1), or train on several with torchrun and cure train"
            )
        self.method.train()

    def training_step(self, batch: Sequence[Tensor], number: int) -> Tensor:  # noqa: ARG002
        """The loss of the method; its ``backward()`` gives the method's gradients."""
        step: Step = self.method(batch[0], batch[1])
        self.log_dict({f"train_{name}": value for name, value in step.metrics.items()})
        return step.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Frozen weights stay as they are from here to the end of the optimiser's step."""
        self._frozen.enter_context(self.method.freeze(optimizer))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, then the method's moving averages and schedules."""
        with self._frozen:
            super().optimizer_step(*args, **kwargs)
        self.method.update()

    def validation_step(self, batch: Sequence[Tensor], number: int) -> None:  # noqa: ARG002
        """Natural accuracy, and accuracy under the attack."""
        # Lightning validates in inference mode, whose tensors have no gradient.
        with torch.inference_mode(False), torch.enable_grad():
            image, label = batch[0].clone(), batch[1].clone()
            images = {"natural": image}
            if self.attack is not None:
                network = self.method.inference_model()
                images["robust"] = self.attack(network, image, label)
        for name, tried in images.items():
            right = (predicted(self(tried)) == label).float().mean()
            self.log(f"val_{name}", 100 * right, batch_size=len(label), prog_bar=True)

    def predict_step(self, batch: Any, number: int) -> Tensor:  # noqa: ARG002
        """Logits [B, K] of images, or of images with labels."""
        image = batch[0] if isinstance(batch, tuple | list) else batch
        logits: Tensor = self(image)
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The number of steps, on which all draws and schedules depend."""
        checkpoint["cure_done"] = self.method.progress.done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`on_save_checkpoint`."""
        self.method.resume(checkpoint["cure_done"])
