"""Where the mass of a row of the implicit attention lies: quantiles of distance, and the largest sources.

Rows come in blocks, never as a whole matrix. A few chosen rows cost t n each. Many come as tiles (`attention_tiles`, or
the fused row blocks on a GPU), and with a delta rule from walking the adjoint states of several rows back in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .attention_tiles import head_blocks, tiles
from .backend import resolve
from .inputs import ScanInputs, expand_groups
from .workers import in_parts

__all__ = ["LineOf", "Rows", "quantile", "row_blocks", "topk"]

LineOf = Callable[[int], Tensor]
"""M[t, :] (b, h, s) of a position t, at linear cost."""

# Elements of a block of rows that is looked at in one go; sums in float64 and orders of it are held beside it.
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**25

# Fewer rows than one in this many are taken one by one.
_FEW = 8

# Relative slack of a cumulative sum that is compared with a share of its total.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Rows:
    """Some rows of M for a block of heads.

    Attributes:
        heads: which heads.
        at: positions t of the rows, ascending.
        block: (b, heads, len(at), width) columns 0 to width - 1, exactly 0 after t; every t is below width.
    """

    heads: slice
    at: Sequence[int]
    block: Tensor


@torch.no_grad()
def quantile(x: ScanInputs, shares: Sequence[float], rows: Sequence[int], line: LineOf) -> Tensor:
    """Distance within which each share of a row's mass lies, (b, h, len(rows), len(shares)).

    Args:
        x: the recurrence.
        shares: above 0, at most 1.
        rows: positions, any order, repeats allowed.
        line: gives single rows.
    """
    (found,) = _collect(x, rows, line, lambda part: (_quantiles(part, shares),))
    return found.to(x.dtype)


@torch.no_grad()
def topk(x: ScanInputs, k: int, rows: Sequence[int], line: LineOf) -> tuple[Tensor, Tensor]:
    """Signed values and positions of the k largest sources, (b, h, len(rows), k) each; 0 and -1 where none is left."""
    values, sources = _collect(x, rows, line, lambda part: _largest(part, k))
    return values, sources


def _quantiles(part: Rows, shares: Sequence[float]) -> Tensor:
    """(b, heads, rows, shares) in float64."""
    width = part.block.shape[-1]
    back = part.block.abs().flip(-1).cumsum(-1, dtype=torch.float64)
    total = back[..., -1:]
    # Entry i of the cumulative sum lies i - (width - 1 - t) tokens back; those after t add nothing.
    late = width - 1 - torch.tensor(part.at, dtype=torch.float64, device=back.device)
    known = (total[..., 0] > 0) & total[..., 0].isfinite()
    found = [(back < q * (1 - _ROUNDING) * total).sum(-1) - late for q in shares]
    return torch.stack([d.where(known, torch.nan) for d in found], -1)


def _largest(part: Rows, k: int) -> tuple[Tensor, Tensor]:
    width = part.block.shape[-1]
    near = part.block.flip(-1)  # nearest source first
    mass, some = near.abs(), min(k, width)
    limit = mass.topk(some, -1).values[..., -1:]
    # Of those equal to the smallest chosen one, topk takes any: count off the nearest.
    above, level = mass > limit, mass == limit
    chosen = above | (level & (level.cumsum(-1) <= some - above.sum(-1, keepdim=True)))
    order = torch.arange(width, 0, -1, device=near.device)
    place = width - (chosen * order).topk(some, -1).values  # ascending distance
    value = near.gather(-1, place)
    by_mass = value.abs().sort(dim=-1, descending=True, stable=True).indices
    value, place = value.gather(-1, by_mass), place.gather(-1, by_mass)
    # An entry that is exactly zero is no source.
    source = (width - 1 - place).masked_fill(value == 0, -1)
    missing = (0, k - some)
    return torch.nn.functional.pad(value, missing), torch.nn.functional.pad(source, missing, value=-1)


def _collect(
    x: ScanInputs, rows: Sequence[int], line: LineOf, look: Callable[[Rows], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What ``look`` finds in each row of each head, (b, heads, rows, ...) tensors put together."""
    wanted = sorted(set(rows))
    place = {t: i for i, t in enumerate(wanted)}
    nothing = look(Rows(slice(0, x.n_heads), [], x.value.new_zeros(x.batch, x.n_heads, 0, 1, dtype=x.dtype)))
    out = [z.new_empty(x.batch, x.n_heads, len(wanted), *z.shape[3:]) for z in nothing]

    def fill(jobs: Sequence[Callable[[], Iterator[Rows]]]) -> None:
        with torch.autocast(x.value.device.type, enabled=False):
            for job in jobs:
                for part in job():
                    # The rows of a block follow each other among those that are wanted.
                    start = place[part.at[0]]
                    for whole, found in zip(out, look(part), strict=True):
                        whole[:, part.heads, start : start + len(part.at)] = found

    in_parts(row_blocks(x, wanted, line), fill, alone=x.value.device.type != "cpu")
    picks = torch.tensor([place[t] for t in rows], dtype=torch.long, device=x.value.device)
    return tuple(z.index_select(2, picks) for z in out)


def row_blocks(x: ScanInputs, wanted: Sequence[int], line: LineOf) -> list[Callable[[], Iterator[Rows]]]:
    """The ascending rows ``wanted`` of all heads: independent jobs, each an iterator over blocks of rows."""
    if not wanted or not x.batch or not x.n_heads:
        return []
    x = x.replace(initial=None)
    if x.has_erase:
        return [partial(_walked, *block, wanted) for block in _erasing_blocks(x.cast())]
    if len(wanted) * _FEW <= x.length:
        return [partial(_single, x, wanted, line)]
    if resolve("auto", x, work="tiles") == "triton":
        return [partial(_fused, x, wanted)]
    return [partial(_tiled, *block, wanted) for block in head_blocks(x.cast())]


def _budget(x: ScanInputs) -> int:
    return _GPU_BLOCK if x.value.is_cuda else _CPU_BLOCK


def _single(x: ScanInputs, wanted: Sequence[int], line: LineOf) -> Iterator[Rows]:
    for t in wanted:
        whole = line(t)
        size = max(1, _budget(x) // (x.batch * (t + 1)))
        for start in range(0, x.n_heads, size):
            heads = slice(start, min(start + size, x.n_heads))
            yield Rows(heads, [t], whole[:, heads, None, : t + 1])


def _tiled(heads: slice, x: ScanInputs, wanted: Sequence[int]) -> Iterator[Rows]:
    start = 0
    for tile in tiles(x):
        stop = next((i for i in range(start, len(wanted)) if wanted[i] >= tile.stop), len(wanted))
        if stop > start:
            at = wanted[start:stop]
            inside = [t - tile.start for t in at]
            block = torch.cat([tile.before, tile.diagonal], -1)
            yield Rows(heads, at, block if len(at) == block.shape[2] else block[:, :, inside])
        start = stop


def _fused(x: ScanInputs, wanted: Sequence[int]) -> Iterator[Rows]:
    """Row blocks of one launch each; heads in blocks where even a few rows of all of them are too many."""
    from .fused import tiles as fused

    size = min(x.n_heads, max(1, _budget(x) // (x.batch * x.length * min(16, x.length))))
    for first in range(0, x.n_heads, size):
        heads = slice(first, min(first + size, x.n_heads))
        some = x.select_heads(heads) if size < x.n_heads else x
        count = max(1, _budget(x) // (x.batch * some.n_heads * x.length))
        start = 0
        while start < len(wanted):
            low = wanted[start]
            stop = next((i for i in range(start, len(wanted)) if wanted[i] >= low + count), len(wanted))
            at = wanted[start:stop]
            block = fused.rows(some, low, at[-1] + 1)
            yield Rows(heads, at, block if len(at) == block.shape[2] else block[:, :, [t - low for t in at]])
            start = stop


def _erasing_blocks(x: ScanInputs) -> Iterator[tuple[slice, ScanInputs]]:
    """Blocks of heads whose rows fit the budget 16 at a time."""
    size = max(1, _budget(x) // (x.batch * max(x.length, x.d_state) * 16))
    for start in range(0, x.n_heads, size):
        heads = slice(start, min(start + size, x.n_heads))
        yield heads, x.select_heads(heads)


def _walked(heads: slice, x: ScanInputs, wanted: Sequence[int]) -> Iterator[Rows]:
    """With a delta rule: the adjoint states of several rows, walked back through the transposed transitions."""
    count = max(16, _budget(x) // (x.batch * x.n_heads * max(x.length, x.d_state)))
    for first in range(0, len(wanted), count):
        at = wanted[first : first + count]
        yield Rows(heads, at, _walk_back(x.slice(0, at[-1] + 1), at))


def _walk_back(x: ScanInputs, at: Sequence[int]) -> Tensor:
    """Rows ``at`` of M, (b, h, len(at), t), t being the last of them plus one."""
    assert x.erase_read is not None
    assert x.erase_write is not None
    read, write = expand_groups(x.read, x.n_heads), x.full_write()  # (b, t, h, n)
    erase_read, erase_write = (expand_groups(z, x.n_heads) for z in (x.erase_read, x.erase_write))
    out = x.value.new_zeros(x.batch, x.n_heads, len(at), x.length)
    owed = x.value.new_zeros(x.batch, x.n_heads, len(at), x.d_state)
    place = {t: i for i, t in enumerate(at)}
    for s in range(x.length - 1, -1, -1):
        if s in place:
            owed[:, :, place[s]] = read[:, s]
        out[..., s] = (owed @ write[:, s, :, :, None])[..., 0]
        owed = owed - (owed @ erase_write[:, s, :, :, None]) * erase_read[:, s, :, None]
        owed = owed * x.slice(s, s + 1).full_log_decay()[:, 0, :, None].exp()
    return out
