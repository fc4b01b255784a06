"""Some consecutive rows of the implicit attention, at the cost of those rows alone.

Every decay is cut at the boundary before the first row of the block::

    M[t, s] = sum_n  read[t] exp(start .. t)  *  exp(s+1 .. start-1) dt[s] write[s]       s before the block

so that the part left of the block is a rank-n product with factors at most 1. Both sums of log-decays start
at the boundary and run outward in float64: no difference of long sums is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention
from .inputs import ScanInputs
from .segments import base2, split_forgets

__all__ = ["Boundary", "rows"]


def rows(inputs: ScanInputs, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of every head, (b, h, stop - start, stop), exactly 0 above the diagonal.

    Args:
        inputs: the recurrence; its initial state is ignored.
        start, stop: 0 <= start < stop <= t.

    Raises:
        ValueError: the rows are none, or outside the sequence.
    """
    if not 0 <= start < stop <= inputs.length:
        raise ValueError(f"rows {start} to {stop} are no rows of a sequence of {inputs.length} tokens")
    x = inputs.cast()
    if x.has_erase:
        return _unit_rows(x, start, stop)
    near = attention.dense(x.slice(start, stop))
    if not start:
        return near
    with torch.autocast(x.value.device.type, enabled=False):
        return torch.cat([Boundary.before(x, start, stop).far(), near], -1)


def _unit_rows(x: ScanInputs, start: int, stop: int) -> Tensor:
    """The same with a delta rule: what weights of one on the output of each row owe to every source."""
    unit = x.value.new_zeros(x.batch, stop, x.n_heads, stop - start)
    place = torch.arange(stop - start, device=unit.device)
    unit[:, start + place, :, place] = 1
    return attention.adjoint(x.slice(0, stop), unit).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Boundary:
    """The boundary before token ``start``: decays from every earlier source to it, and from it to every row.

    Time last; m is 1 or n, as the decays are one per head or one per state.

    Attributes:
        read: (b, g, n, rows) what the rows read.
        write: (b, g, n, start) what the sources write, g as in the inputs.
        gain: (b, h, 1, start) dt of the sources; None where the write has it.
        risen: (b, h, m, rows) decay from the boundary to each row, the row's own included.
        past: (b, h, 1 | m, start) float64 base-2 log-decay from each source to the boundary, before the rate.
        rate: (h, m, 1) base-2 rate that multiplies it, or None.
        forgets: (b, 1 | h, 1 | m, start) whether anything between source and boundary forgets, or None.
    """

    read: Tensor
    write: Tensor
    gain: Tensor | None
    risen: Tensor
    past: Tensor
    rate: Tensor | None
    forgets: Tensor | None

    @classmethod
    def before(cls, x: ScanInputs, start: int, stop: int) -> Boundary:
        """For rows ``start`` to ``stop`` of a recurrence without a delta rule, all in the compute dtype."""
        inside, earlier = x.slice(start, stop), x.slice(0, start)
        steps, rate, forgets = _steps(inside)
        blocked = None if forgets is None else forgets.cumsum(-1) > 0
        risen = _decay(steps.cumsum(-1), rate, blocked, x.dtype)
        steps, rate, forgets = _steps(earlier)
        return cls(
            read=inside.read.permute(0, 2, 3, 1),
            write=earlier.write.permute(0, 2, 3, 1),
            gain=None if earlier.dt is None else earlier.dt.transpose(1, 2)[:, :, None],
            risen=risen,
            past=_later(steps),
            rate=rate,
            forgets=None if forgets is None else _later(forgets) > 0,
        )

    def rising(self) -> Tensor:
        """Decay from the boundary times read, (b, h, n, rows)."""
        return self.risen * _to_heads(self.read, self.risen.shape[1])

    def falling(self, left: int, right: int) -> Tensor:
        """Sources ``left`` to ``right``: dt and write times the decay to the boundary, (b, h, n, right - left)."""
        write = _to_heads(self.write[..., left:right], self.risen.shape[1])
        kept = self._kept(left, right)
        return kept * write if kept.shape[2] < write.shape[2] else _times(kept, write)

    def far(self) -> Tensor:
        """The rows left of the block, (b, h, rows, start)."""
        start = self.past.shape[-1]
        if self.risen.shape[2] > 1:
            return self.rising().mT @ self.falling(0, start)
        h, groups = self.risen.shape[1], max(self.read.shape[1], self.write.shape[1])
        scores = _to_heads(self.read, groups).mT @ _to_heads(self.write, groups)  # (b, g, rows, start)
        return _to_heads(scores, h) * self.risen.mT * self._kept(0, start)

    def _kept(self, left: int, right: int) -> Tensor:
        """Decay from sources to the boundary times dt, (b, h, m, right - left)."""
        forgets = None if self.forgets is None else self.forgets[..., left:right]
        kept = _decay(self.past[..., left:right], self.rate, forgets, self.risen.dtype)
        return kept if self.gain is None else _times(kept, self.gain[..., left:right])


def _steps(x: ScanInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Base-2 log-decays (b, h, 1 | m, t) in float64 before the rate, the rate (h, m, 1), and what forgets."""
    reset = None if x.reset is None else x.reset[:, :, None, None]
    if x.log_decay is None:
        assert x.dt is not None
        assert x.A is not None
        forgets = None if reset is None else reset.permute(0, 2, 3, 1)
        return x.dt.double().transpose(1, 2)[:, :, None], base2(x.A)[:, :, None], forgets
    steps, forgets = split_forgets(x.log_decay, reset)
    return steps.permute(0, 2, 3, 1), None, forgets.permute(0, 2, 3, 1)


def _later(x: Tensor) -> Tensor:
    """Sum over the later entries of the last dimension, the entry itself left out."""
    return torch.nn.functional.pad(x[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))


def _decay(steps: Tensor, rate: Tensor | None, forgets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """2 to the power of summed steps, exactly 0 where something forgets."""
    kept = steps.to(dtype)
    kept = kept.exp2() if rate is None else (kept * rate).exp2_()
    # Not as an exponent: inf * 0 is NaN where the rate is 0.
    return kept if forgets is None else kept * ~forgets


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, in x's own memory where no gradient needs x."""
    return x * factor if x.requires_grad or factor.requires_grad else x.mul_(factor)


def _to_heads(x: Tensor, n_heads: int) -> Tensor:
    """(b, g, ...) for each of the heads; one group stays shared."""
    return x if x.shape[1] in (1, n_heads) else x.repeat_interleave(n_heads // x.shape[1], 1)
