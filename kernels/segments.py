"""Segment sums of log-decays: exact differences, and no NaN whatever the decay.

``exp`` of a difference of two running sums is only as good as the sums: in float32 a one-step decay at
t = 4096 had a relative error of 2e-4. Here sums are float64 and restart in every chunk, and a decay of
exactly zero (a reset, or a log-decay of -inf) is no number of the sum but a count beside it: two
positions are connected where their counts agree. So no difference of infinities is ever formed, and
gradients across a reset are zero, as they are in exact arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ScanInputs

__all__ = ["FORGET", "log_decay_of", "split_forgets", "within"]

# exp(-746) is 0 in float64: below, a decay is a reset.
FORGET = -746.0


def split_forgets(log_decay: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-decay in float64 with zeros where it forgets everything, and where that is (bool).

    Args:
        log_decay: any shape, any floating dtype.
        reset: bool, broadcastable to it, or None.
    """
    decay = log_decay.double()
    forgets = decay < FORGET
    if reset is not None:
        forgets = forgets | reset
    return decay.masked_fill(forgets, 0.0), forgets


def within(later: Tensor, earlier: Tensor, connected: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(later - earlier)`` in ``dtype`` where ``connected``, exactly 0 elsewhere; NaN-free gradients.

    Args:
        later, earlier: running sums in float64, broadcastable; ``later <= earlier`` where connected.
        connected: bool, broadcastable.
        dtype: of the result; the difference itself is taken in float64.
    """
    return (later - earlier).masked_fill(~connected, -torch.inf).to(dtype).exp()


def log_decay_of(x: ScanInputs) -> Tensor:
    """(b, t, h, 1 | n) log-decay in float64, resets not included; differentiable."""
    if x.log_decay is not None:
        return x.log_decay.double()
    assert x.dt is not None
    assert x.A is not None
    return x.dt.double()[..., None] * x.A.double()
