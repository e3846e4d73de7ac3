"""What methods with one natural and one adversarial forward pass return."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cure.methods.common.losses import accuracy
from cure.methods.step import StepOutput


def two_image_output(
    terms: Mapping[str, Tensor], natural: Tensor, adversarial: Tensor, label: Tensor
) -> StepOutput:
    """The loss among ``terms``, with all of them and both accuracies as metrics.

    Args:
        terms: "loss", and the parts that it consists of.
        natural: logits [B, K] of the natural images.
        adversarial: logits [B, K] of the adversarial images.
        label: classes [B].
    """
    return StepOutput(
        loss=terms["loss"],
        metrics={
            **{name: term.detach() for name, term in terms.items()},
            "accuracy": accuracy(natural, label),
            "robust_accuracy": accuracy(adversarial, label),
        },
    )
