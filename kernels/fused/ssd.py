"""Scan with one decay per head and several channels (Mamba-2, retention), on matrix units.

Three launches: the clocks (`ssd_clock`); the state entering every chunk, one program for a tile of a head's
state that walks the chunks in order; the outputs, every chunk for itself. The states between chunks are a result, not
a by-product: analyses read them, and `ssd_backward` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..inputs import ScanInputs
from .device import on_its_device
from .products import INTERPRET, blocks, parts_of
from .ssd_clock import Clocks, clocks
from .ssd_kernels import _carry, _outputs, _outputs_shared, _picked

__all__ = ["Scanned", "carry", "forward", "heads_together", "prepared"]


class Scanned(NamedTuple):
    """What `forward` returns.

    Attributes:
        y: (b, t, h, p) outputs; None where they were not wanted.
        final: (b, h, p, n) float32 state after the last token.
        states: (b, k, h, p, n) float32 states after the picked tokens; None without picks.
        boundaries: (b, c, h, p, n) state entering each chunk.
        chunk: tokens per chunk.
    """

    y: Tensor | None
    final: Tensor
    states: Tensor | None
    boundaries: Tensor
    chunk: int


_CHUNKS = (16, 32, 64, 128)


def prepared(x: ScanInputs) -> ScanInputs:
    """The inputs with a contiguous last axis, and `initial` contiguous; checked for what the kernels can do."""
    if x.has_erase or x.value.dtype == torch.float64 or x.length == 0:
        raise ValueError("ssd runs recurrences without a delta rule, of at least one token, in float32 or narrower")
    decay = x.A if x.A is not None else x.log_decay
    if decay is None or decay.shape[-1] != 1:
        raise ValueError("ssd runs recurrences with one decay per head")
    tight = x.initial is None or x.initial.is_contiguous()
    if tight and x.value.stride(3) == x.write.stride(3) == x.read.stride(3) == 1:
        return x
    loose = {"value": x.value, "write": x.write, "read": x.read}
    fixed: dict[str, Tensor | None] = {k: z if z.stride(3) == 1 else z.contiguous() for k, z in loose.items()}
    return x.replace(**fixed, initial=None if x.initial is None else x.initial.contiguous())


def heads_together(x: ScanInputs, most: int) -> int:
    """How many neighbouring heads one program takes: they share a read group and a write group."""
    shared = math.gcd(x.n_heads // x.write.shape[2], x.n_heads // x.read.shape[2])
    return max(k for k in range(1, min(most, shared) + 1) if shared % k == 0)


def key_tile(x: ScanInputs, parts: int, narrow: int) -> int:
    """States that a program reads at a time: fewer where read or write come in parts, for want of registers."""
    return narrow if max(parts_of(x.read.dtype, parts), parts_of(x.write.dtype, parts)) > 1 else 128


def carry(
    value: Tensor, write: Tensor, weight: Tensor, through: Tensor, initial: Tensor | None, parts: int,
    *, dtype: torch.dtype = torch.float32, reverse: bool = False,
    picks: Tensor | None = None, dstates: Tensor | None = None,
    tiles: tuple[int, int] = (64, 64), rows: int | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """States between chunks (b, c, h, p, n), and the one behind the last (or before the first, in reverse).

    ``state = through[c] * state + (value * weight)^T @ write`` over the chunks c; see `Clocks` for the shapes. For
    gradients, ``weight * dstates`` joins in where states were handed out: ``picks`` is `ssd_backward`'s table.
    """
    b, t, h, p = value.shape
    n = write.shape[3]
    chunks, length = weight.shape[2:]
    every = value.new_empty((b, chunks, h, p, n), dtype=dtype)
    final = value.new_empty((b, h, p, n), dtype=torch.float32)
    (bp, p_tiles), (bn, n_tiles) = blocks(p, tiles[0]), blocks(n, tiles[1])
    # What an operand is before it is cut into parts has to fit the registers too.
    narrow = value.dtype == write.dtype == torch.bfloat16
    rows = min(length, rows or ((64 if narrow else 32) if parts > 1 else (length if narrow else 64)))
    _carry[(b * h, p_tiles, n_tiles)](
        value, write, weight, through, initial, picks, dstates, every, final,
        t, h, h // write.shape[2], chunks, 0 if dstates is None else dstates.shape[1], p, n,
        *value.stride()[:3], *write.stride()[:3],
        L=length, ROWS=rows, BP=bp, BN=bn,
        HAS_INITIAL=initial is not None, HAS_PICKS=picks is not None, REVERSE=reverse,
        A=parts, B=parts_of(write.dtype, parts), INTERPRET=INTERPRET,
        **({"num_warps": 8 if parts == 1 else 4, "num_stages": 3} | options),
    )  # fmt: skip
    return every, final


@on_its_device
def forward(
    x: ScanInputs, picks: Sequence[int] | Literal["all"] | None = None, *,
    precision: str = "fp32", chunk: int | None = None, out_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None, want_output: bool = True, tuning: dict[str, Any] | None = None,
) -> Scanned:  # fmt: skip
    """Outputs, final state, states after picked tokens and the states between chunks.

    Args:
        x: one decay per head, no delta rule, any floating dtype but float64, t >= 1.
        picks: token positions in any order, repeats allowed; "all" for every token.
        precision: "fp32" (relative error about 1e-6) or "bf16" (operands rounded to bfloat16: about 3e-3).
        chunk: tokens per chunk, 16 to 128, a power of two; None is 128.
        out_dtype: dtype of y.
        want_output: False skips y, which is None then.
        state_dtype: dtype of the boundaries; by default float32, with precision "bf16" bfloat16.

    Raises:
        ValueError: inputs that other kernels run, unknown precision or chunk.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 6.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is fp32 or bf16, got {precision!r}")
    if chunk is not None and chunk not in _CHUNKS:
        raise ValueError(f"chunk is a power of two from 16 to 128, got {chunk}")
    x = prepared(x)
    tune: dict[str, Any] = {"chunk": 128, "parts": 3, "outputs": {}, "carry": {}} | (tuning or {})
    chunk = chunk or tune["chunk"]
    parts = 1 if precision == "bf16" else tune["parts"]
    if state_dtype is None:
        state_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    clock = clocks(x, chunk)
    every, final = carry(
        x.value, x.write, clock.to_end, clock.through, x.initial, parts, dtype=state_dtype, **tune["carry"]
    )
    y = _read_out(x, clock, every, parts, out_dtype, **tune["outputs"]) if want_output else None
    chosen = range(x.length) if picks == "all" else picks
    states = None if chosen is None else _states(x, clock, every, chosen, parts)
    return Scanned(y, final, states, every, chunk)


def _read_out(
    x: ScanInputs, clock: Clocks, every: Tensor, parts: int, dtype: torch.dtype,
    *, rows: int = 64, together: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    b, t, h, p = x.value.shape
    n = x.d_state
    chunks, length = clock.high.shape[2:]
    y = x.value.new_empty((b, t, h, p), dtype=dtype)
    (bp, p_tiles), (bn, n_tiles) = blocks(p, 64), blocks(n, key_tile(x, parts, 32))
    rows = min(rows, length)
    if together is None:
        narrow = x.value.dtype == x.write.dtype == x.read.dtype == torch.bfloat16
        together = (8 if b * chunks >= 64 else 4) if parts == 1 and narrow and n_tiles == 1 else 0
    together = heads_together(x, together) if together else 0
    kernel = _outputs_shared if together else _outputs
    kernel[(h // max(1, together) * b * chunks * (length // rows), p_tiles)](
        x.value, x.write, x.read, clock.high, clock.low, clock.forgets, clock.dt, every, y,
        t, h, h // x.write.shape[2], h // x.read.shape[2], chunks, p, n,
        *x.value.stride()[:3], *x.write.stride()[:3], *x.read.stride()[:3],
        L=length, ROWS=rows, BP=bp, BN=bn, TILES=n_tiles, **({"TOGETHER": together} if together else {}),
        HAS_DT=x.dt is not None, COUNT=clock.forgets is not None, LOW=parts > 1,
        R=parts_of(x.read.dtype, parts), W=parts_of(x.write.dtype, parts), V=parts_of(x.value.dtype, parts), F=parts,
        INTERPRET=INTERPRET, **({"num_warps": 4, "num_stages": 2 if together else 1} | options),
    )  # fmt: skip
    return y


def _states(x: ScanInputs, clock: Clocks, every: Tensor, picks: Sequence[int], parts: int) -> Tensor:
    b, _, h, p = x.value.shape
    n = x.d_state
    states = x.value.new_empty((b, len(picks), h, p, n), dtype=torch.float32)
    if not len(picks):
        return states
    at = torch.tensor(list(picks), dtype=torch.int32, device=x.value.device)
    (bp, p_tiles), (bn, n_tiles) = blocks(p, 64), blocks(n, 64)
    chunks, length = clock.high.shape[2:]
    _picked[(len(picks) * b * h, p_tiles, n_tiles)](
        x.value, x.write, clock.high, clock.low, clock.forgets, clock.dt, every, at, states,
        h, h // x.write.shape[2], chunks, len(picks), p, n, *x.value.stride()[:3], *x.write.stride()[:3],
        L=length, BP=bp, BN=bn, HAS_DT=x.dt is not None, COUNT=clock.forgets is not None,
        V=parts, W=parts_of(x.write.dtype, parts), INTERPRET=INTERPRET,
    )  # fmt: skip
    return states
