"""Losses as pure functions of logits, means over the samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Batch mean of KL(softmax(target) || softmax(logits)), both [B, K]; gradient through both.

    ``mean_i sum_k p_ik (log p_ik - log q_ik)``; detach ``target`` where it is to be fixed.
    """
    return F.kl_div(
        F.log_softmax(logits, dim=1),
        F.log_softmax(target, dim=1),
        reduction="batchmean",
        log_target=True,
    )
