"""Whole matrices of the implicit attention in fused kernels: written out, reduced over heads, or weighed by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inputs import ScanInputs
from .device import on_its_device
from .rounding import next_power_of_2
from .tile_clock import PER_HEAD, PER_STATE, RATES, Clocks, clocks
from .tile_reduce import finish_kernel, reduce_kernel, reduce_rates_kernel
from .tile_rows import rows_kernel

__all__ = ["Tuning", "dense", "distance", "reduce", "rows"]

# Of a thread of the quick reduction, so that 4 programs share a multiprocessor: 9.5 ms against 12.1 at t = 4,096.
_REGISTERS = 128


@dataclass(frozen=True)
class Tuning:
    """Shapes of the kernels; every choice gives the same numbers up to rounding.

    Attributes:
        block: rows and columns of a tile.
        small: rows and columns of the diagonal's sub-blocks, which take one exponential per state and entry.
        warps: warps of a program; 0 takes what keeps tiles in registers.
        stages: depth of the software pipeline.
        parts: programs that share the heads of one tile of a reduction; 0 fills the chip.
        step: states that one product sums over.
        precision: of products: "split" or "tf32x3" (both as good as float32), "ieee", "tf32" (11 bits).
        registers: most registers of a thread, None for the compiler's choice.
        unroll: heads taken together where states have rates and share one group; 0 takes the general kernel.
    """

    block: int = 64
    small: int = 16
    warps: int = 0
    stages: int = 1
    parts: int = 0
    step: int = 16
    precision: str = "split"
    registers: int | None = None
    unroll: int = 1


def dense(x: ScanInputs, tuning: Tuning | None = None) -> Tensor:
    """The matrix M of every head, (b, h, t, t) float32, exactly 0 above the diagonal."""
    return rows(x, 0, x.length, tuning)


@on_its_device
def rows(x: ScanInputs, start: int, stop: int, tuning: Tuning | None = None) -> Tensor:
    """Rows ``start`` to ``stop`` of M, (b, h, stop - start, stop) float32, exactly 0 above the diagonal."""
    out = torch.empty(x.batch, x.n_heads, stop - start, stop, dtype=torch.float32, device=x.value.device)
    return _by_rows(x, start, stop, out, weigh=False, tuning=tuning)


@on_its_device
def distance(x: ScanInputs, tuning: Tuning | None = None) -> Tensor:
    """sum_s (t - s) |M[t, s]| / sum_s |M[t, s]| of every row t, (b, h, t) float32; NaN where the row is all zero."""
    out = torch.empty(x.batch, x.n_heads, x.length, dtype=torch.float32, device=x.value.device)
    return _by_rows(x, 0, x.length, out, weigh=True, tuning=tuning)


@on_its_device
def reduce(x: ScanInputs, how: str, tuning: Tuning | None = None) -> Tensor:
    """One map over heads, (b, t, t) float32: "mean", "mean_abs", "max_abs" or "norm" (root of the sum of squares)."""
    b, length, h = x.batch, x.length, x.n_heads
    if not b * length:
        return torch.zeros(b, length, length, dtype=torch.float32, device=x.value.device)
    tuned = tuning or Tuning()
    table = clocks(x, tuned.block)
    out = torch.empty(b, length, length, dtype=torch.float32, device=x.value.device)
    pieces, strides = _arguments(x, table)
    constants = _constants(x, table, tuned)
    one = x.read.shape[2] == x.write.shape[2] == 1
    quick = tuned.unroll and one and table.kind == RATES and table.count is None and constants["N"] <= 32
    scale = 1.0 / h if how.startswith("mean") else 1.0
    for diagonal, count in ((True, table.blocks), (False, table.blocks * (table.blocks - 1) // 2)):
        if not count:
            continue
        part = -(-h // _shares(tuned, count * b, h, diagonal, x.value.device))
        shares = -(-h // part)
        partial = diagonal or shares > 1
        to = (
            torch.empty(shares, b, count, tuned.block, tuned.block, dtype=out.dtype, device=out.device)
            if partial
            else out
        )
        options = {"HOW": how, "PARTIAL": partial, "maxnreg": tuned.registers}
        if quick and not diagonal:
            if constants["N"] <= 16 and tuned.warps in (0, 4):
                options["maxnreg"] = tuned.registers or _REGISTERS
            reduce_rates_kernel[(count, shares, b)](
                x.read, x.write, table.rate, table.rise, table.fall, table.rise if table.gain is None else table.gain,
                table.start, to, length, h, part, x.d_state, table.padded, table.blocks, scale,
                *(x.read.stride(i) for i in (0, 1, 3)), *(x.write.stride(i) for i in (0, 1, 3)),
                GAIN=table.gain is not None, BLOCK=table.block, N=constants["N"], PRECISION=tuned.precision,
                UNROLL=tuned.unroll, num_warps=tuned.warps or 4, **options,
            )  # fmt: skip
        else:
            reduce_kernel[(count, shares, b)](
                *pieces, to, length, h, part, h // x.read.shape[2], h // x.write.shape[2], x.d_state,
                table.padded, table.blocks, scale, *strides, **constants, DIAGONAL=diagonal,
                ONE_READ=x.read.shape[2] == 1, ONE_WRITE=x.write.shape[2] == 1, STAGES=tuned.stages,
                num_warps=_warps(x, table, tuned), **options,
            )  # fmt: skip
        if partial:
            finish_kernel[(count, 1, b)](
                to, out, length, shares, table.blocks, scale, HOW=how, DIAGONAL=diagonal, BLOCK=tuned.block
            )
    return out


def _shares(tuned: Tuning, programs: int, heads: int, diagonal: bool, device: torch.device) -> int:
    """Into how many programs the heads of a tile go: a few rounds of programs on every multiprocessor."""
    if tuned.parts:
        return min(tuned.parts, heads)
    if device.type != "cuda":
        return 1
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(heads, -(-(12 if diagonal else 9) * cores // programs)))


def _warps(x: ScanInputs, table: Clocks, tuned: Tuning) -> int:
    """4 are fastest, but where factors of states take many registers only 8 hold them."""
    many = table.kind == PER_STATE or (table.kind != PER_HEAD and x.d_state > 16)
    return tuned.warps or (8 if many else 4)


def _by_rows(x: ScanInputs, start: int, stop: int, out: Tensor, *, weigh: bool, tuning: Tuning | None) -> Tensor:
    tuned = tuning or Tuning()
    block = tuned.block
    if not out.numel():
        return out
    table = clocks(x, block)
    row_blocks = -(-stop // block) - start // block
    pieces, strides = _arguments(x, table)
    h = x.n_heads
    rows_kernel[(row_blocks * x.batch * h,)](
        *pieces, out, x.length, start, stop, h, h // x.read.shape[2], h // x.write.shape[2], x.d_state,
        table.padded, table.blocks, row_blocks, *strides, **_constants(x, table, tuned),
        WEIGH=weigh, STAGES=tuned.stages, num_warps=_warps(x, table, tuned), maxnreg=tuned.registers,
    )  # fmt: skip
    return out


def _arguments(x: ScanInputs, table: Clocks) -> tuple[list[Tensor], list[int]]:
    """The tensors that both kernels take first, with something in the place of what is absent, and their strides."""
    spare = table.rise
    pieces = [
        x.read, x.write, spare if table.rate is None else table.rate, table.rise, table.rest, table.fall,
        spare if table.gain is None else table.gain, spare if table.count is None else table.count,
        table.start, table.start if table.starts is None else table.starts,
    ]  # fmt: skip
    return pieces, [*x.read.stride(), *x.write.stride()]


def _constants(x: ScanInputs, table: Clocks, tuned: Tuning) -> dict[str, Any]:
    n = max(16, next_power_of_2(x.d_state))
    return {
        "KIND": table.kind, "GAIN": table.gain is not None, "COUNT": table.count is not None,
        "BLOCK": table.block, "SMALL": tuned.small, "N": n, "STEP": min(n, tuned.step), "PRECISION": tuned.precision,
    }  # fmt: skip
