"""Single rows and columns of the implicit attention in three launches, for sequences of a million tokens.

    M[t, s] = dt[s] sum_n read[t, n] write[s, n] exp(sum of log-decays over s + 1 .. t)

Sums of log-decays start at the line itself and run outward, backwards from t for a row and forwards from s for a
column, so that only numbers of one sign are added and no difference is taken. Time is cut into blocks. The first
launch sums the steps of every block, the second carries the sums outward over blocks in float64, and in the third
every block of tokens and heads adds its own running sum to what lies between it and the line and takes the
exponentials. A block that has underflowed for every state writes zeros and reads nothing. Where the decay is dt * A
one sum of dt serves all states of a head.

A step that forgets everything (log-decay -inf) counts as `_FORGET` nats: sums that do not contain it never see it,
and sums that do are zero decay. A reset cuts the line off at one position per batch row.

Steps are channel-contiguous, lines are time-contiguous: tiles (time, heads) are loaded along heads and transposed on
chip when they are stored. Where the states of a head share their decay, read times write is summed over them once per
group. Memory beyond the result: two numbers for each block and head, and that sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import ScanInputs
from ..segments import base2
from .device import on_its_device
from .line_kernels import carry_outward, line_kernel, sum_blocks, weigh
from .rounding import cdiv, next_power_of_2

__all__ = ["Tuning", "column", "distance", "row"]

# States of a head that shares its decay from which on read times write is summed ahead, once per group.
_WEIGHED = 8


@dataclass(frozen=True)
class Tuning:
    """Sizes of tiles: ``tokens`` x ``heads`` with ``warps`` for the line, ``unroll`` states at once, and ``channels``
    of steps to sum with ``sum_warps``."""

    tokens: int = 64
    heads: int = 32
    warps: int = 4
    unroll: int = 8
    channels: int = 64
    sum_warps: int = 4


@on_its_device
def row(x: ScanInputs, t: int, tuning: Tuning | None = None) -> Tensor:
    """M[t, :], (b, h, s) in float32; entries after t are exactly 0.

    Args:
        x: a recurrence without a delta rule on a CUDA device, at most float32; groups, resets and any strides.
        t: 0 <= t < length.
        tuning: sizes of tiles, chosen by shape when None.
    """
    line = _Line(x, t, True, tuning)
    out = torch.empty(x.batch, x.n_heads, x.length, dtype=torch.float32, device=x.value.device)
    line.write(out)
    return out


@on_its_device
def column(x: ScanInputs, s: int, tuning: Tuning | None = None) -> Tensor:
    """M[:, s], (b, h, t) in float32; entries before s are exactly 0. Arguments as for `row`."""
    line = _Line(x, s, False, tuning)
    out = torch.empty(x.batch, x.n_heads, x.length, dtype=torch.float32, device=x.value.device)
    line.write(out)
    return out


@on_its_device
def distance(x: ScanInputs, rows: Sequence[int], tuning: Tuning | None = None) -> Tensor:
    """Mean distance of chosen rows in tokens, (b, h, len(rows)) in float32; NaN where a row is all zero.

    sum_s (t - s) |M[t, s]| / sum_s |M[t, s]|, without holding a row: every block adds up its own part.
    """
    found = [_Line(x, t, True, tuning).moments() for t in rows]
    if not found:
        return torch.empty(x.batch, x.n_heads, 0, dtype=torch.float32, device=x.value.device)
    return torch.stack(found, -1).to(torch.float32)


class _Line:
    """The arguments of one line's launches."""

    def __init__(self, x: ScanInputs, at: int, is_row: bool, tuning: Tuning | None) -> None:
        log = x.log_decay is not None
        steps = x.log_decay if x.log_decay is not None else x.dt[..., None]  # type: ignore[index]
        rate = None if x.A is None else base2(x.A.to(torch.float32)).t().contiguous()  # (m, h)
        wide = (steps if rate is None else x.A).shape[-1] > 1  # type: ignore[union-attr]
        fixed, moving = (x.read[:, at], x.write) if is_row else (x.write[:, at], x.read)
        self.x, self.at, self.is_row, self.steps = x, at, is_row, steps
        self.tuning = tuning = _tuned(x, wide) if tuning is None else tuning
        # Blocks between the line and the end of its side.
        self.first = 0 if is_row else at // tuning.tokens
        self.blocks = cdiv(at + 1 if is_row else x.length, tuning.tokens) - self.first
        self.channels = x.n_heads * steps.shape[-1]
        carry = self._carry(log)
        gain = x.dt if is_row or x.dt is None else x.dt[:, at:]
        strides, groups = (*fixed.stride(), *moving.stride()), (fixed.shape[1], moving.shape[2])
        weighed = not wide and x.d_state >= _WEIGHED
        if weighed:
            moving = self._weights(fixed, moving)
            strides = (0, 0, 0, moving.stride(0), 1, moving.stride(1), 0)
            groups = (1, moving.shape[1])
        shared = all(g == 1 or (x.n_heads // g) % tuning.heads == 0 for g in groups)
        self.arguments = (
            steps, carry, moving if rate is None else rate, moving if gain is None else gain, fixed, moving,
            moving if x.reset is None else self._edge(x.reset), at, x.length, x.n_heads, self.first, self.blocks,
            *steps.stride(), *((0, 0, 0) if gain is None else gain.stride()), *strides, *groups,
        )  # fmt: skip
        self.options = {
            "ROW": is_row, "LOG": log, "WIDE": wide, "GAIN": gain is not None, "RESET": x.reset is not None,
            "SHARED": shared, "WEIGHED": weighed, "N": x.d_state, "S": tuning.tokens, "H": tuning.heads,
            "U": tuning.unroll, "num_warps": tuning.warps,
        }  # fmt: skip

    def write(self, out: Tensor) -> None:
        blocks = cdiv(self.x.length, self.tuning.tokens) * cdiv(self.x.n_heads, self.tuning.heads)
        line_kernel[(blocks, self.x.batch)](*self.arguments, out, out, 0, MOMENTS=False, **self.options)

    def moments(self) -> Tensor:
        """Mean distance of the row, (b, h) in float64."""
        shape = (self.x.batch, self.blocks, self.x.n_heads)
        weight, far = (torch.empty(shape, dtype=torch.float32, device=self.x.value.device) for _ in range(2))
        blocks = self.blocks * cdiv(self.x.n_heads, self.tuning.heads)
        line_kernel[(blocks, self.x.batch)](*self.arguments, weight, far, self.first, MOMENTS=True, **self.options)
        return far.sum(1, dtype=torch.float64) / weight.sum(1, dtype=torch.float64)

    def _carry(self, log: bool) -> Tensor:
        """Nats (or time) of the steps between each block and the line, (b, blocks, channels)."""
        x, tuning = self.x, self.tuning
        sums, carry = (
            torch.empty(x.batch, self.blocks, self.channels, dtype=torch.float32, device=x.value.device)
            for _ in range(2)
        )
        m = self.steps.shape[-1]
        grid = (self.blocks * cdiv(self.channels, tuning.channels), x.batch)
        sum_blocks[grid](
            self.steps, sums, self.at, x.length, self.channels, self.first, self.blocks, *self.steps.stride(),
            ROW=self.is_row, LOG=log, M=m, S=tuning.tokens, C=tuning.channels, num_warps=tuning.sum_warps,
        )  # fmt: skip
        few = 8
        grid = (cdiv(self.channels, few), x.batch)
        carry_outward[grid](sums, carry, self.channels, self.blocks, ROW=self.is_row, K=256, C=few, num_warps=4)
        return carry

    def _weights(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """read times write of every token summed over the states, (b, groups, t); only what the line reaches is set."""
        x, few = self.x, 64
        groups = math.lcm(fixed.shape[1], moving.shape[2])
        weights = torch.empty(x.batch, groups, x.length, dtype=torch.float32, device=x.value.device)
        low, high = (0, self.at) if self.is_row else (self.at, x.length - 1)
        grid = (cdiv(high - low + 1, few), groups, x.batch)
        weigh[grid](
            fixed, moving, weights, low, high, x.length, *fixed.stride(), *moving.stride(), groups, fixed.shape[1],
            moving.shape[2], N=x.d_state, NB=min(32, next_power_of_2(x.d_state)), S=few, num_warps=4,
        )  # fmt: skip
        return weights

    def _edge(self, reset: Tensor) -> Tensor:
        """(b,) the outermost position that the line reaches before a reset cuts it off."""
        length, at = self.x.length, self.at
        place = torch.arange(length, device=reset.device)
        if self.is_row:
            return torch.where(reset & (place <= at), place, 0).amax(1)
        return torch.where(reset & (place > at), place, length).amin(1) - 1


def _tuned(x: ScanInputs, wide: bool) -> Tuning:
    """What was fastest on an H100 (NOTES.md): 2048 entries a tile; where states decay apart, heads of one group."""
    heads = min(32, next_power_of_2(x.n_heads))
    for g in (x.read.shape[2], x.write.shape[2]) if wide else ():
        while g > 1 and heads > 8 and (x.n_heads // g) % heads:
            heads //= 2
    tokens = min(2048 // heads, max(16, next_power_of_2(x.length)))
    # As many states at once as registers hold: addresses of every head's own read and write, and the steps of
    # log-decays, which differ by state, take many.
    shared = all(g == 1 or (x.n_heads // g) % heads == 0 for g in (x.read.shape[2], x.write.shape[2]))
    unroll = (8 if x.log_decay is None else 4) if shared else 1
    return Tuning(tokens=tokens, heads=heads, unroll=unroll, channels=min(64, 8192 // tokens))
