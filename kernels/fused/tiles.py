"""Whole matrices of the implicit attention in fused kernels: written out, reduced over heads, or weighed by row."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..inputs import ScanInputs
from .tile_clock import PER_HEAD, Clocks, clocks
from .tile_kernels import reduce_kernel, rows_kernel

__all__ = ["dense", "distance", "reduce", "rows"]

# Sub-blocks of the tile on the diagonal that take one exponential per state and entry.
_SMALL = 16


def dense(x: ScanInputs) -> Tensor:
    """The matrix M of every head, (b, h, t, t) float32, exactly 0 above the diagonal."""
    return rows(x, 0, x.length)


def rows(x: ScanInputs, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of M, (b, h, stop - start, stop) float32, exactly 0 above the diagonal."""
    out = torch.empty(x.batch, x.n_heads, stop - start, stop, device=x.value.device)
    return _by_rows(x, start, stop, out, weigh=False)


def distance(x: ScanInputs) -> Tensor:
    """sum_s (t - s) |M[t, s]| / sum_s |M[t, s]| of every row t, (b, h, t) float32; NaN where the row is all zero."""
    out = torch.empty(x.batch, x.n_heads, x.length, device=x.value.device)
    return _by_rows(x, 0, x.length, out, weigh=True)


def reduce(x: ScanInputs, how: str) -> Tensor:
    """One map over heads, (b, t, t) float32: "mean", "mean_abs", "max_abs" or "norm" (root of the sum of squares)."""
    b, length, h = x.batch, x.length, x.n_heads
    if not x.value.numel():
        return torch.zeros(b, length, length, device=x.value.device)
    block, warps, stages, precision, parts = 64, 4, 1, "tf32x3", 1
    part = -(-h // parts)
    table = clocks(x, block)
    out = torch.empty(parts, b, length, length, device=x.value.device)
    scale = 1.0 / h if how.startswith("mean") else 1.0
    pieces, strides = _arguments(x, table)
    for diagonal, count in ((True, table.blocks), (False, table.blocks * (table.blocks - 1) // 2)):
        if count:
            reduce_kernel[(count, parts, b)](
                *pieces, out, length, h, part, parts, h // x.read.shape[2], h // x.write.shape[2], x.d_state,
                table.padded, table.blocks, scale, *strides, **_constants(x, table, precision),
                HOW=how, DIAGONAL=diagonal, ONE_READ=x.read.shape[2] == 1, ONE_WRITE=x.write.shape[2] == 1,
                STAGES=stages, num_warps=warps,
            )  # fmt: skip
    if how == "max_abs":
        return out.amax(0) if parts > 1 else out[0]
    total = out.sum(0) if parts > 1 else out[0]
    return total.sqrt_() if how == "norm" else total


def _by_rows(x: ScanInputs, start: int, stop: int, out: Tensor, *, weigh: bool) -> Tensor:
    block, warps, stages, precision = 64, 4, 1, "tf32x3"
    if not out.numel():
        return out
    table = clocks(x, block)
    row_blocks = -(-stop // block) - start // block
    pieces, strides = _arguments(x, table)
    h = x.n_heads
    rows_kernel[(row_blocks * x.batch * h,)](
        *pieces, out, x.length, start, stop, h, h // x.read.shape[2], h // x.write.shape[2], x.d_state,
        table.padded, table.blocks, row_blocks, *strides, **_constants(x, table, precision),
        WEIGH=weigh, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


def _arguments(x: ScanInputs, table: Clocks) -> tuple[list[Tensor | None], list[int]]:
    """The tensors that both kernels take first, with something in the place of what is absent, and their strides."""
    spare = table.rise
    rate = spare if x.A is None else x.A
    pieces = [
        x.read, x.write, rate, table.rise, table.rest, table.fall,
        spare if table.gain is None else table.gain, spare if table.count is None else table.count,
        table.start, table.start if table.starts is None else table.starts,
    ]  # fmt: skip
    return pieces, [*x.read.stride(), *x.write.stride(), *((0, 0) if x.A is None else x.A.stride())]


def _constants(x: ScanInputs, table: Clocks, precision: str) -> dict[str, Any]:
    n = max(16, triton.next_power_of_2(x.d_state))
    return {
        "KIND": table.kind, "GAIN": table.gain is not None, "COUNT": table.count is not None,
        "BLOCK": table.block, "SMALL": _SMALL, "N": n, "STEP": min(n, 32), "PRECISION": precision,
    }  # fmt: skip
