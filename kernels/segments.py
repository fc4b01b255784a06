"""Segment sums of log-decays: exact differences, and no NaN whatever the decay.

``exp`` of a difference of two running sums is only as good as the sums: in float32 a one-step decay at
t = 4096 had a relative error of 2e-4. Here sums are float64 and restart in every chunk, and a decay of
exactly zero (a reset, or a log-decay of -inf) is no number of the sum but a count beside it: two
positions are connected where their counts agree. So no difference of infinities is ever formed, and
gradients across a reset are zero, as they are in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import ScanInputs

__all__ = ["FORGET", "LOG2_E", "Clock", "base2", "running_clock", "split_forgets"]

LOG2_E = math.log2(math.e)
"""Clocks run in halvings: torch's exp2 is as exact as its exp and four times faster on a CPU."""

# exp(-746) is 0 in float64: below, a decay is a reset.
FORGET = -746.0


def base2(rate: Tensor) -> Tensor:
    """A natural decay rate per step in halvings, kept finite: a step of 0 times infinity would be NaN."""
    return (rate * LOG2_E).clamp(min=torch.finfo(rate.dtype).min)


def split_forgets(log_decay: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Base-2 log-decay in float64 with zeros where it forgets everything, and where that is (bool).

    Args:
        log_decay: natural, any shape, any floating dtype.
        reset: bool, broadcastable to it, or None.
    """
    decay = log_decay.double()
    forgets = decay < FORGET
    if reset is not None:
        forgets = forgets | reset
    return decay.masked_fill(forgets, 0.0) * LOG2_E, forgets


class Clock(NamedTuple):
    """Halvings since some start, and how often everything was forgotten since then.

    Attributes:
        time: running sum of base-2 log-decays, float64, any shape.
        resets: running count of the same shape; None where nothing ever resets.
    """

    time: Tensor
    resets: Tensor | None

    def map(self, view: Callable[[Tensor], Tensor]) -> Clock:
        """The same view of both."""
        return Clock(view(self.time), None if self.resets is None else view(self.resets))

    def since(self, earlier: Clock | None, dtype: torch.dtype, allowed: Tensor | None = None) -> Tensor:
        """Decay from ``earlier`` (the start when None) to here, exactly 0 across a reset.

        Args:
            earlier: broadcastable; not later than this clock where ``allowed``.
            dtype: of the result; the difference itself is taken in float64.
            allowed: bool, broadcastable: elsewhere the result is exactly 0, with a gradient of 0.
        """
        steps = self.time if earlier is None else self.time - earlier.time
        connected = allowed
        if self.resets is not None:
            before = None if earlier is None else earlier.resets
            same = self.resets.eq(0 if before is None else before)
            connected = same if allowed is None else same & allowed
        if connected is not None:
            steps = steps.masked_fill(~connected, -torch.inf)
        return steps.to(dtype).exp2()


def running_clock(x: ScanInputs, fold: Callable[[Tensor], Tensor], dim: int) -> Clock:
    """The clock of a recurrence, from its steps (b, t, h, 1 | n) brought into shape by ``fold``; differentiable.

    Args:
        x: the recurrence.
        fold: cuts time into chunks.
        dim: the dimension along which a folded clock runs.
    """
    reset = None if x.reset is None else x.reset[..., None, None]
    if x.log_decay is None and reset is None:
        assert x.dt is not None
        assert x.A is not None
        # A product of finite factors never needs the count; a longer step forgets everything just as well.
        steps = (x.dt.double()[..., None] * x.A.double()).clamp(min=FORGET) * LOG2_E
        return Clock(fold(steps).cumsum(dim), None)
    log_decay = x.log_decay
    if log_decay is None:
        assert x.dt is not None
        assert x.A is not None
        log_decay = x.dt.double()[..., None] * x.A.double()
    steps, forgets = split_forgets(log_decay, reset)
    return Clock(fold(steps).cumsum(dim), fold(forgets).cumsum(dim, dtype=torch.int32))
