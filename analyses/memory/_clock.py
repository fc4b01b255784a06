"""The log-retention clock of a recurrence.

The clock counts nats of decay: what was written at s is worth ``exp(clock[s] - clock[t])`` at t. It only moves
forward, so every "when" is a binary search. While the decay is ``dt * A``, one sum over ``dt`` serves all states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.analyses._layers import head_blocks, time_blocks
from ssmlens.recurrence import Recurrence

__all__ = [
    "LN2",
    "TIE",
    "Clock",
    "Steps",
    "blocks",
    "elapsed",
    "half_life",
    "mean_log_decay",
    "mean_retention",
    "order_index",
    "states_per_head",
    "to_half_life",
]

FORGETS = 1000.0
"""Nats that one step counts at most: exp(-1000) is exactly 0 in float64, and larger steps would drown later ones."""

TIE = 1e-12
"""Relative slack of the binary search, so that a decay of exactly one half counts as one half after rounding."""

LN2 = math.log(2.0)


@dataclass(frozen=True, eq=False)
class Steps:
    """What decides how much each step forgets, of a range of heads: dt and A, or the log decay.

    Args:
        real: (b, t) bool, False where a step is padding and forgets nothing.
        dt, A, log_decay: (b, t, h), (h, n or 1) and (b, t, h, n or 1) as in `ScanInputs`.
        reset: (b, t) bool, True where a packed sequence begins, or None.
    """

    real: Tensor
    dt: Tensor | None = None
    A: Tensor | None = None
    log_decay: Tensor | None = None
    reset: Tensor | None = None

    @classmethod
    def of(cls, rec: Recurrence, heads: slice | Tensor = slice(None)) -> Steps:
        """The steps of some heads, a slice or their indices (h,)."""
        whole = cls(rec.real, rec.inputs.dt, rec.inputs.A, rec.inputs.log_decay, rec.inputs.reset)
        return whole.heads(heads)

    def heads(self, heads: slice | Tensor) -> Steps:
        """Those of some heads, a slice or their indices (h,)."""
        dt, log_decay = (None if x is None else x[:, :, heads] for x in (self.dt, self.log_decay))
        return Steps(self.real, dt, None if self.A is None else self.A[heads], log_decay, self.reset)

    def windows(self, index: Tensor, inside: Tensor, heads: Tensor) -> Steps:
        """Of one row, the steps at the positions ``index`` (k, w) as k rows; padding where not ``inside`` (k, w)."""
        dt, log_decay = (None if x is None else x[0, index[..., None], heads] for x in (self.dt, self.log_decay))
        reset = None if self.reset is None else self.reset[0, index]
        return Steps(inside, dt, None if self.A is None else self.A[heads], log_decay, reset)

    @property
    def factorised(self) -> bool:
        """Whether one clock a head, of dt alone, serves all of its states."""
        return self.A is not None and self.dt is not None and self.reset is None

    @property
    def rate(self) -> Tensor:
        """(h, n or 1) nats of one tick of the clock, in float64."""
        if self.factorised:
            assert self.A is not None
            # abs, not minus: a rate of -0.0 would put the half-life at minus infinity.
            return self.A.double().abs()
        decay = self.A if self.log_decay is None else self.log_decay[0, 0]
        assert decay is not None
        return torch.ones_like(decay, dtype=torch.float64)

    def ticks(self) -> Tensor:
        """How far each step moves the clock, (b, h, m, t) in float64; m is 1 where one clock serves all states."""
        real = self.real[:, :, None]
        if self.factorised:
            assert self.dt is not None
            # A step that makes even the slowest decaying state forget need not count for more.
            slowest = self.rate.masked_fill(self.rate == 0, torch.inf).amin(1)
            dt = self.dt.double().where(real, 0.0)
            dt = dt.minimum(FORGETS / slowest.clamp(min=torch.finfo(torch.float64).tiny))
            return dt.transpose(1, 2)[:, :, None].contiguous()
        nats = self.nats().clamp(max=FORGETS)
        if self.reset is not None:
            nats = nats.masked_fill(self.reset[:, :, None, None], FORGETS)
        return nats.where(real[..., None], 0.0).permute(0, 2, 3, 1).contiguous()

    def nats(self) -> Tensor:
        """Nats of decay of each step, (b, t, h, n or 1) in float64, resets not counted."""
        if self.log_decay is not None:
            return -self.log_decay.double()
        assert self.A is not None
        assert self.dt is not None
        return self.dt.double()[..., None] * self.A.double().abs()

    def clock(self) -> Clock:
        # Time last: along any other axis a GPU sums with one thread a column, token after token.
        return Clock(self.ticks().cumsum(-1), self.rate)


@dataclass(frozen=True, eq=False)
class Clock:
    """Cumulative decay of a range of heads.

    Args:
        ticks: (b, h, m, t) float64, never decreasing; m is 1 where all states share it.
        rate: (h, n) nats per tick, with n = 1 where all states share the decay.
    """

    ticks: Tensor
    rate: Tensor

    @classmethod
    def of(cls, rec: Recurrence, heads: slice = slice(None)) -> Clock:
        """The clock of some heads. Padding does not move it; an initial state is older than its first tick."""
        return Steps.of(rec, heads).clock()

    @property
    def length(self) -> int:
        return self.ticks.shape[-1]

    def states(self, width: int) -> Iterator[Clock]:
        """The clocks of ``width`` states at a time."""
        for start in range(0, self.rate.shape[1], width):
            some = slice(start, start + width)
            yield Clock(self.ticks if self.ticks.shape[2] == 1 else self.ticks[:, :, some], self.rate[:, some])

    def nats(self, start: Tensor, stop: Tensor) -> Tensor:
        """Nats of decay from the token ``start`` (b,) to ``stop`` (b,) of each row, (b, h, n)."""
        first, last = (self.ticks.take_along_dim(i[:, None, None, None], -1)[..., 0] for i in (start, stop))
        return (last - first) * self.rate

    def forward(self, at: Tensor, interpolate: bool = False) -> Tensor:
        """Tokens after ``at`` (k,) until half is left, (b, h, n, k); inf where the text ends before."""
        start = self._at(at)
        target = start + LN2 / self.rate[:, :, None]  # (b, h, n, k)
        t = self.search(target * (1 - TIE), right=False)
        t = torch.maximum(t, at + 1)
        found = t < self.length
        step = t.clamp(max=self.length - 1)
        tokens = (step - at).double()
        if interpolate:
            late, early = self.take(step), self.take((step - 1).clamp(min=0))
            tokens = tokens - ((late - target) / (late - early)).nan_to_num(0.0).clamp(0, 1)
        return tokens.where(found, torch.inf)

    def backward(self, at: Tensor, interpolate: bool = False) -> Tensor:
        """Age in tokens of the youngest write of which at most half is left at ``at`` (k,), (b, h, n, k).

        inf where even the first token is worth more than half.
        """
        target = self._at(at) - LN2 / self.rate[:, :, None]
        s = self.search(target + TIE * self._at(at).abs(), right=True) - 1
        s = torch.minimum(s, at - 1)
        found = s >= 0
        step = s.clamp(min=0)
        tokens = (at - step).double()
        if interpolate:
            early, late = self.take(step), self.take((step + 1).clamp(max=self.length - 1))
            tokens = tokens - ((target - early) / (late - early)).nan_to_num(0.0).clamp(0, 1)
        return tokens.where(found, torch.inf)

    def _at(self, at: Tensor) -> Tensor:
        return self.ticks[..., at]

    def take(self, index: Tensor) -> Tensor:
        """Ticks at the positions ``index`` (b, h, n, k)."""
        ticks = self.ticks.expand(*index.shape[:3], self.length)
        return ticks.take_along_dim(index, -1)

    def search(self, target: Tensor, right: bool) -> Tensor:
        """First position whose tick is at least (right: more than) the target, (b, h, n, k)."""
        b, h, m = self.ticks.shape[:3]
        n, k = target.shape[2:]
        flat = target.reshape(b, h, m, n // m * k).contiguous()
        return torch.searchsorted(self.ticks, flat, right=right).reshape(b, h, n, k)


def mean_log_decay(rec: Recurrence) -> Tensor:
    """Time mean of the log decay over the real tokens of each row, (b, h, n or 1) in float64, <= 0.

    Boundaries between packed sequences are no decay of the model and do not count.
    """
    real, count = rec.real[:, :, None], rec.real_lengths.double()[:, None, None]
    if rec.A is not None and rec.dt is not None:
        total = torch.zeros(rec.batch, rec.n_heads, dtype=torch.float64, device=rec.device)
        for block in time_blocks(rec, rec.batch * rec.n_heads):
            total += rec.dt[:, block].where(real[:, block], 0.0).sum(1, dtype=torch.float64)
        return (total[..., None] / count * rec.A.double()).cpu()
    return blocks(rec, lambda heads: -Steps.of(rec, heads).nats().where(real[..., None], 0.0).sum(1) / count)


def mean_retention(rec: Recurrence) -> Tensor:
    """Time mean of the decay itself, ``exp(log_decay)``, over the real tokens of each row, (b, h, n or 1)."""
    real, count = rec.real[:, :, None, None], rec.real_lengths.double()[:, None, None]
    return blocks(rec, lambda heads: (-Steps.of(rec, heads).nats()).exp().where(real, 0.0).sum(1) / count)


def states_per_head(rec: Recurrence) -> int:
    """Number of different decays in one head."""
    decay = rec.A if rec.A is not None else rec.inputs.log_decay
    assert decay is not None
    return decay.shape[-1]


def blocks(rec: Recurrence, compute: Callable[[slice], Tensor], per_head: int | None = None) -> Tensor:
    """``compute`` over ranges of heads, joined along axis 1 on the CPU, where all results live."""
    entries = rec.batch * (per_head or rec.length * states_per_head(rec))
    return torch.cat([compute(heads).cpu() for heads in head_blocks(rec, entries)], 1)


def order_index(q: float, count: int) -> int:
    """Index, among ``count`` sorted numbers, of the smallest that at least the share ``q`` does not exceed.

    No interpolation: between a finite half-life and an infinite one there is nothing.
    """
    return max(math.ceil(q * count * (1 - TIE)) - 1, 0)


def elapsed(rec: Recurrence, start: Tensor, stop: Tensor) -> Tensor:
    """Nats of decay from the token ``start`` (b,) to ``stop`` (b,) of each row, (b, h, n or 1) in float64."""
    start, stop = start.to(rec.device), stop.to(rec.device)
    return blocks(rec, lambda heads: Clock.of(rec, heads).nats(start, stop))


def half_life(rec: Recurrence) -> Tensor:
    """ln 2 / mean(-log_decay) in tokens, (b, h, n or 1)."""
    return to_half_life(mean_log_decay(rec))


def to_half_life(log_decay: Tensor) -> Tensor:
    """ln 2 / -log_decay; inf for no decay, also where it is -0.0."""
    return (LN2 / -log_decay).masked_fill(log_decay == 0, torch.inf)
