"""Blocks of heads and tiles of rows of the implicit attention (no delta rule).

For rows of chunk c and a source s in an earlier chunk k the decay is cut at the chunk ends::

    exp(S[t] - S[s]) = exp(S[t] - start of c) * exp(start of c - end of k) * exp(end of k - S[s])

every factor at most 1, so a tile off the diagonal is a rank-n product; tiles on the diagonal take the
exact difference. Sums are float64. Layout: time last, (b, h, n, t), so a tile is a plain matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import ScanInputs
from .segments import base2, split_forgets

__all__ = ["Tile", "head_blocks", "tiles"]

# Rows of a tile. Diagonal tiles cost n exponentials an entry, the others a multiplication per column.
_ROWS = 16
# Elements of the columns (h, n, t) of one block of heads, and of one diagonal batch (h, n, c, l, l).
_CPU_BLOCK, _GPU_BLOCK = 2**19, 2**25
_CPU_DIAGONAL, _GPU_DIAGONAL = 2**18, 2**26


@dataclass(frozen=True)
class Tile:
    """Rows ``start`` to ``stop`` of M for one block of heads.

    Attributes:
        before: (b, h, stop - start, start) columns left of the diagonal tile.
        diagonal: (b, h, stop - start, stop - start), exactly 0 above its diagonal.
    """

    start: int
    stop: int
    before: Tensor
    diagonal: Tensor


def head_blocks(x: ScanInputs, heads: Sequence[int] | None = None) -> Iterator[tuple[slice, ScanInputs]]:
    """Blocks of the chosen heads (all when None), each with its place in the choice.

    A block holds at most about `_CPU_BLOCK` (h, n, t) elements and, where that costs little, lies within
    one group, whose ``read`` and ``write`` then stay shared.
    """
    count = x.n_heads if heads is None else len(heads)
    budget = _GPU_BLOCK if x.value.is_cuda else _CPU_BLOCK
    size = max(1, budget // max(1, x.batch * x.d_state * x.length))
    per_group = x.n_heads // max(x.write.shape[2], x.read.shape[2])
    if size >= per_group > 1:
        size = size // per_group * per_group
    elif per_group > 1:
        size = next(i for i in range(size, 0, -1) if per_group % i == 0)
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        yield place, x.select_heads(place) if heads is None else x.take_heads(heads[place])


def tiles(x: ScanInputs) -> Iterator[Tile]:
    """Every row of M for the heads of ``x``, top to bottom, `_ROWS` at a time."""
    length = x.length
    rows = min(_ROWS, length)
    if not rows:
        return
    c = -(-length // rows)
    parts = _Parts.of(x, c, rows)
    diagonal = parts.diagonal()  # (b, h, c, l, l)
    rising, falling = parts.rising(), parts.falling()
    for i in range(c):
        start, stop = i * rows, min((i + 1) * rows, length)
        k = stop - start
        if not i:
            before = diagonal.new_zeros(*diagonal.shape[:2], k, 0)
        elif parts.wide:
            columns = (falling[..., :i, :] * parts.gap(i)).flatten(3, 4)  # (b, h, n, start)
            before = rising[..., i, :k].transpose(2, 3) @ columns
        else:
            shared = parts.read[..., i, :k].transpose(2, 3) @ parts.write[..., :i, :].flatten(3, 4)
            kept = (falling[..., :i, :] * parts.gap(i)).flatten(3, 4)  # (b, h, 1, start)
            before = rising[..., i, :k].transpose(2, 3) * kept * shared
        yield Tile(start, stop, before, diagonal[:, :, i, :k, :k])


@dataclass(frozen=True)
class _Parts:
    """The pieces of a block of heads, time cut into c chunks of l; padded tokens write and read nothing.

    The base-2 log-decay is ``clock`` alone, or ``clock * rate`` where the model factorises it; m is 1 or n.
    """

    read: Tensor  # (b, g, n, c, l), g = 1 or h
    write: Tensor  # (b, g, n, c, l)
    gain: Tensor | None  # (b, h, 1, c, l) dt as a factor of the source
    clock: Tensor  # (b, h, m, c, l) float64, restarts in every chunk
    rate: Tensor | None  # (h, n, 1, 1)
    marks: Tensor | None  # (b, 1 | h, 1 | m, c, l) resets so far inside the chunk

    @classmethod
    def of(cls, x: ScanInputs, c: int, rows: int) -> _Parts:
        x = x.cast()
        missing = c * rows - x.length

        def fold(z: Tensor) -> Tensor:
            z = z.permute(0, 2, 3, 1)
            if missing:
                z = torch.nn.functional.pad(z, (0, missing))
            return z.reshape(*z.shape[:3], c, rows)

        def shared(z: Tensor) -> Tensor:
            groups = z.shape[2]
            return z if groups in (1, x.n_heads) else z.repeat_interleave(x.n_heads // groups, 2)

        reset = None if x.reset is None else x.reset[:, :, None, None]
        marks, rate = None, None
        if x.log_decay is None:
            assert x.dt is not None
            assert x.A is not None
            clock, rate = fold(x.dt[..., None].double()), base2(x.A)[:, :, None, None]
            if reset is not None:
                marks = fold(reset).cumsum(-1, dtype=torch.int32)
        else:
            steps, forgets = split_forgets(x.log_decay, reset)
            clock, marks = fold(steps), fold(forgets).cumsum(-1, dtype=torch.int32)
        gain = None if x.dt is None else fold(x.dt[..., None])
        read, write = fold(shared(x.read)), fold(shared(x.write))
        return cls(read, write, gain, clock.cumsum(-1), rate, marks)

    @property
    def wide(self) -> bool:
        """Whether the n states of a head decay apart."""
        return (self.clock if self.rate is None else self.rate).shape[2 if self.rate is None else 1] > 1

    def decay(self, steps: Tensor, connected: Tensor | None) -> Tensor:
        """The decay between two clocks, exactly 0 where not connected."""
        dtype = self.read.dtype
        if self.rate is None:
            if connected is not None:
                steps = steps.masked_fill(~connected, -torch.inf)
            return steps.to(dtype).exp2()
        rate = self.rate.view(*self.rate.shape[:2], *([1] * (steps.ndim - 3)))
        kept = (steps.to(dtype) * rate).exp2_()
        # A reset must not enter the exponent: inf * 0 is NaN where the rate is 0.
        return kept if connected is None else _times(kept, connected)

    def rising(self) -> Tensor:
        """Decay since the chunk began, times read where states decay apart: (b, h, 1 | n, c, l)."""
        kept = self.decay(self.clock, None if self.marks is None else self.marks == 0)
        return _times(kept, self.read) if self.wide else kept

    def falling(self) -> Tensor:
        """Decay until the chunk ends times dt, and write where states decay apart: (b, h, 1 | n, c, l)."""
        connected = None if self.marks is None else self.marks[..., -1:] == self.marks
        kept = self.decay(self.clock[..., -1:] - self.clock, connected)
        if self.gain is not None:
            kept = kept * self.gain
        return kept * self.write if self.wide else kept

    def gap(self, i: int) -> Tensor:
        """Decay from the end of each earlier chunk to the start of chunk i, (b, h, 1 | n, i, 1)."""
        # Whole chunks summed from the last one back: no difference of long sums is taken.
        past = _sum_after(self.clock[..., :i, -1:])
        return self.decay(past, None if self.marks is None else _sum_after(self.marks[..., :i, -1:]) == 0)

    def diagonal(self) -> Tensor:
        """The tiles on the diagonal, exactly: (b, h, c, l, l)."""
        b, h, _, c, rows = self.clock.shape
        n = self.read.shape[2]
        causal = torch.ones(rows, rows, dtype=torch.bool, device=self.read.device).tril()
        budget = _GPU_DIAGONAL if self.read.is_cuda else _CPU_DIAGONAL
        some = max(1, budget // (b * c * rows * rows * (n if self.wide else 1)))
        products = self.products() if self.read.shape[1] == 1 else None
        found = []
        for start in range(0, h, some):
            part = self.heads(slice(start, start + some))
            # Above the diagonal the difference has the wrong sign and could overflow: it becomes 0 first.
            between = (part.clock[..., :, None] - part.clock[..., None, :]).masked_fill(~causal, 0.0)
            connected = None
            if part.marks is not None:
                connected = part.marks[..., :, None] == part.marks[..., None, :]
            kept = part.decay(between, connected)
            if part.wide:
                tile = _times(kept, part.products() if products is None else products).sum(2)
            else:
                tile = (kept * (part.products() if products is None else products)).squeeze(2)
            if part.gain is not None:
                tile = _times(tile, part.gain[:, :, 0, :, None, :])
            found.append(tile.tril())
        return torch.cat(found, 1)

    def products(self) -> Tensor:
        """read[l] * write[s] of every diagonal pair, (b, g, n, c, l, s); summed over n (then 1) unless wide."""
        if self.wide:
            return self.read[..., :, None] * self.write[..., None, :]
        return (self.read.permute(0, 1, 3, 4, 2) @ self.write.transpose(2, 3))[:, :, None]

    def heads(self, block: slice) -> _Parts:
        """A range of heads; shared pieces stay shared."""

        def cut(z: Tensor) -> Tensor:
            return z if z.shape[1] == 1 else z[:, block]

        return _Parts(
            cut(self.read),
            cut(self.write),
            None if self.gain is None else self.gain[:, block],
            self.clock[:, block],
            None if self.rate is None else self.rate[block],
            None if self.marks is None else cut(self.marks),
        )


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, in x's own memory where no gradient needs x."""
    return x * factor if x.requires_grad or factor.requires_grad else x.mul_(factor)


def _sum_after(x: Tensor) -> Tensor:
    """Sum over the later entries of dimension 3, the entry itself left out."""
    later = x[..., 1:, :].flip(3).cumsum(3).flip(3)
    return torch.cat([later, torch.zeros_like(x[..., :1, :])], 3)
