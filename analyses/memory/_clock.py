"""The log-retention clock of a recurrence, and when it has run down by half.

The clock counts nats of decay: what was written at s is worth ``exp(clock[s] - clock[t])`` at t. It only moves
forward, so every "when" is a binary search. While the decay is ``dt * A``, one sum over ``dt`` serves all states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.analyses._layers import block_entries, head_blocks, time_blocks
from ssmlens.recurrence import Recurrence

__all__ = [
    "Clock",
    "crossing_quantiles",
    "crossings",
    "elapsed",
    "half_life",
    "mean_log_decay",
    "mean_retention",
    "order_index",
    "to_half_life",
]

FORGETS = 1000.0
"""Nats that one step counts at most: exp(-1000) is exactly 0 in float64, and larger steps would drown later ones."""

TIE = 1e-12
"""Relative slack of the binary search, so that a decay of exactly one half counts as one half after rounding."""

LN2 = math.log(2.0)


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
        inputs, real = rec.inputs, rec.real[:, :, None]
        if inputs.A is not None and inputs.dt is not None and inputs.reset is None:
            # abs, not minus: a rate of -0.0 would put the half-life at minus infinity.
            rate = inputs.A[heads].double().abs()
            # A step that makes even the slowest decaying state forget need not count for more.
            slowest = rate.masked_fill(rate == 0, torch.inf).amin(1)
            dt = inputs.dt[:, :, heads].double().where(real, 0.0)
            dt = dt.minimum(FORGETS / slowest.clamp(min=torch.finfo(torch.float64).tiny))
            return cls(dt.cumsum(1).transpose(1, 2)[:, :, None].contiguous(), rate)
        nats = _nats(rec, heads).clamp(max=FORGETS)
        if inputs.reset is not None:
            nats = nats.masked_fill(inputs.reset[:, :, None, None], FORGETS)
        nats = nats.where(real[..., None], 0.0)
        return cls(nats.cumsum(1).permute(0, 2, 3, 1).contiguous(), nats.new_ones(nats.shape[2:]))

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
        t = self._search(target * (1 - TIE), right=False)
        t = torch.maximum(t, at + 1)
        found = t < self.length
        step = t.clamp(max=self.length - 1)
        tokens = (step - at).double()
        if interpolate:
            late, early = self._take(step), self._take((step - 1).clamp(min=0))
            tokens = tokens - ((late - target) / (late - early)).nan_to_num(0.0).clamp(0, 1)
        return tokens.where(found, torch.inf)

    def backward(self, at: Tensor, interpolate: bool = False) -> Tensor:
        """Age in tokens of the youngest write of which at most half is left at ``at`` (k,), (b, h, n, k).

        inf where even the first token is worth more than half.
        """
        target = self._at(at) - LN2 / self.rate[:, :, None]
        s = self._search(target + TIE * self._at(at).abs(), right=True) - 1
        s = torch.minimum(s, at - 1)
        found = s >= 0
        step = s.clamp(min=0)
        tokens = (at - step).double()
        if interpolate:
            early, late = self._take(step), self._take((step + 1).clamp(max=self.length - 1))
            tokens = tokens - ((target - early) / (late - early)).nan_to_num(0.0).clamp(0, 1)
        return tokens.where(found, torch.inf)

    def _at(self, at: Tensor) -> Tensor:
        return self.ticks[..., at]

    def _take(self, index: Tensor) -> Tensor:
        """Ticks at the positions ``index`` (b, h, n, k)."""
        ticks = self.ticks.expand(*index.shape[:3], self.length)
        return ticks.take_along_dim(index, -1)

    def _search(self, target: Tensor, right: bool) -> Tensor:
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
    return _blocks(rec, lambda heads: -_nats(rec, heads).where(real[..., None], 0.0).sum(1) / count)


def mean_retention(rec: Recurrence) -> Tensor:
    """Time mean of the decay itself, ``exp(log_decay)``, over the real tokens of each row, (b, h, n or 1)."""
    real, count = rec.real[:, :, None, None], rec.real_lengths.double()[:, None, None]
    return _blocks(rec, lambda heads: (-_nats(rec, heads)).exp().where(real, 0.0).sum(1) / count)


def crossings(rec: Recurrence, kind: str, at: Tensor, interpolate: bool) -> Tensor:
    """Half-lives of the tokens ``at`` (b, k), counted in each row, as (b, k, h, n or 1); NaN where at is -1."""
    rows = []
    for b in range(rec.batch):
        known = at[b].cpu() >= 0
        part = _crossings(_row(rec, b), kind, at[b].to(rec.device).clamp(min=0), interpolate)
        rows.append(part.movedim(-1, 0).where(known[:, None, None], torch.nan))
    return torch.stack(rows)


def crossing_quantiles(
    rec: Recurrence, kind: str, quantiles: tuple[float, ...], interpolate: bool
) -> tuple[Tensor, Tensor]:
    """Quantiles over the real tokens of each row, (b, h, n or 1, q), and the share that ended in the text.

    A quantile is the smallest half-life that at least this share of the tokens does not exceed, so that it is
    one of them, or inf. Batch rows are sorted on their own: they differ in length.
    """
    values, reached = [], []
    for b in range(rec.batch):
        part = _row(rec, b)
        tokens = torch.arange(part.length, device=part.device)

        def block(heads: slice, part: Recurrence = part, tokens: Tensor = tokens) -> Tensor:
            picks = [order_index(q, part.length) for q in quantiles]
            found = []
            # A long text has too many half-lives for all states of even one head at a time.
            for clock in Clock.of(part, heads).states(max(1, block_entries(part) // part.length)):
                times = _clocked(clock, kind, tokens, interpolate)[0]
                share = times.isfinite().double().mean(-1, keepdim=True)
                found.append(torch.cat([_ordered(times, picks, whole=not interpolate), share], -1))
            return torch.cat(found, 1)[None]

        both = _blocks(part, block, per_head=part.length * _states(part))[0]
        values.append(both[..., :-1])
        reached.append(both[..., -1:])
    return torch.stack(values), torch.stack(reached)


def _crossings(rec: Recurrence, kind: str, at: Tensor, interpolate: bool) -> Tensor:
    per_head = rec.length * (1 if rec.A is not None else _states(rec)) + len(at) * _states(rec)
    return _blocks(rec, lambda heads: _clocked(Clock.of(rec, heads), kind, at, interpolate), per_head)[0]


def _clocked(clock: Clock, kind: str, at: Tensor, interpolate: bool) -> Tensor:
    search = clock.forward if kind == "forward" else clock.backward
    return search(at, interpolate)


def _ordered(times: Tensor, picks: list[int], whole: bool) -> Tensor:
    """The entries ``picks`` of each sorted row of times (h, n, t), inf last."""
    if not whole:
        return times.sort(-1).values[..., picks]
    # Whole numbers below the length of the text: sorting int16 takes a tenth of the time of float64, and what
    # does not fit into it is counted, which is as quick.
    never = times.shape[-1]
    times = times.where(times.isfinite(), never)
    if never < torch.iinfo(torch.int16).max:
        order = times.short().sort(-1).values[..., picks].double()
    else:
        rows = times.flatten(0, 1).long()
        place = rows + torch.arange(len(rows), device=rows.device)[:, None] * (never + 1)
        below = place.flatten().bincount(minlength=len(rows) * (never + 1)).view(len(rows), -1).cumsum(-1)
        wanted = torch.tensor(picks, device=rows.device).expand(len(rows), -1).contiguous()
        order = torch.searchsorted(below, wanted, right=True).view(*times.shape[:2], -1).double()
    return order.where(order < never, torch.inf)


def _row(rec: Recurrence, b: int) -> Recurrence:
    """One batch row without its padding."""
    length = int(rec.real_lengths[b])
    if length == 0:
        raise ValueError(f"batch row {b} holds no real token: memory needs at least one")
    cut = {k: x if k == "A" else x[b : b + 1] for k, x in rec.inputs.tensors().items()}
    return Recurrence(rec.inputs.replace(**cut).slice(0, length))


def _states(rec: Recurrence) -> int:
    """Number of different decays in one head."""
    decay = rec.A if rec.A is not None else rec.inputs.log_decay
    assert decay is not None
    return decay.shape[-1]


def _nats(rec: Recurrence, heads: slice) -> Tensor:
    """Nats of decay of each step of some heads, (b, t, h, n or 1) in float64, resets not counted."""
    inputs = rec.inputs
    if inputs.log_decay is not None:
        return -inputs.log_decay[:, :, heads].double()
    assert inputs.A is not None
    assert inputs.dt is not None
    return inputs.dt[:, :, heads, None].double() * inputs.A[heads].double().abs()


def _blocks(rec: Recurrence, compute: Callable[[slice], Tensor], per_head: int | None = None) -> Tensor:
    """``compute`` over ranges of heads, joined along axis 1 on the CPU, where all results live."""
    entries = rec.batch * (per_head or rec.length * _states(rec))
    return torch.cat([compute(heads).cpu() for heads in head_blocks(rec, entries)], 1)


def order_index(q: float, count: int) -> int:
    """Index, among ``count`` sorted numbers, of the smallest that at least the share ``q`` does not exceed.

    No interpolation: between a finite half-life and an infinite one there is nothing.
    """
    return max(math.ceil(q * count * (1 - TIE)) - 1, 0)


def elapsed(rec: Recurrence, start: Tensor, stop: Tensor) -> Tensor:
    """Nats of decay from the token ``start`` (b,) to ``stop`` (b,) of each row, (b, h, n or 1) in float64."""
    start, stop = start.to(rec.device), stop.to(rec.device)
    return _blocks(rec, lambda heads: Clock.of(rec, heads).nats(start, stop))


def half_life(rec: Recurrence) -> Tensor:
    """ln 2 / mean(-log_decay) in tokens, (b, h, n or 1)."""
    return to_half_life(mean_log_decay(rec))


def to_half_life(log_decay: Tensor) -> Tensor:
    """ln 2 / -log_decay; inf for no decay, also where it is -0.0."""
    return (LN2 / -log_decay).masked_fill(log_decay == 0, torch.inf)
