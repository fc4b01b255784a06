"""Segment sums of log-decays: exact differences, and no NaN whatever the decay.

``exp`` of a difference of two running sums is only as good as the sums: in float32 a one-step decay at
t = 4096 had a relative error of 2e-4. Here sums are float64, restart in every chunk, and a log-decay
below ``FORGET`` (also -inf) counts as ``FORGET``, whose exponential is exactly zero in float64; so no
difference of infinities is ever formed and gradients there are zero, as they are in exact arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ScanInputs

__all__ = ["FORGET", "log_decay64", "segment_decay"]

# exp(-746) is already 0 in float64; a larger figure would only cost digits of the running sum.
FORGET = -800.0


def log_decay64(x: ScanInputs) -> Tensor:
    """(b, t, h, 1 | n) log-decay in float64, resets included, at least ``FORGET``; differentiable."""
    if x.log_decay is not None:
        decay = x.log_decay.double()
    else:
        assert x.dt is not None
        assert x.A is not None
        decay = x.dt.double()[..., None] * x.A.double()
    if x.reset is not None:
        decay = decay.masked_fill(x.reset[:, :, None, None], FORGET)
    return decay.clamp(min=FORGET)


def segment_decay(later: Tensor, earlier: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(later - earlier)`` in ``dtype`` where ``allowed``, exactly 0 elsewhere; NaN-free gradients.

    Args:
        later, earlier: running sums in float64, broadcastable; ``later <= earlier`` where allowed.
        allowed: bool, broadcastable.
        dtype: of the result; the difference itself is taken in float64.
    """
    return (later - earlier).masked_fill(~allowed, -torch.inf).to(dtype).exp()
