"""Gradients of `ssd.forward`: the carry of the state's gradient in reverse, then every chunk for itself.

Sums over the heads of a group are taken in a fixed order, in one program or over partial results: two runs agree to
the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..inputs import ScanInputs
from .device import on_its_device
from .products import INTERPRET, blocks, parts_of
from .ssd import carry, heads_together, key_tile, prepared
from .ssd_backward_kernels import _keys, _rates, _values
from .ssd_clock import Clocks, clocks

__all__ = ["backward"]


@on_its_device
def backward(
    x: ScanInputs, dy: Tensor | None, dfinal: Tensor | None = None, dstates: Tensor | None = None,
    picks: Sequence[int] | Literal["all"] | None = None, boundaries: Tensor | None = None, chunk: int | None = None,
    precision: str = "fp32", tuning: dict[str, Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of a loss with respect to every floating input.

    Args:
        x: what `ssd.forward` was given.
        dy: (b, t, h, p) gradient of y; None is zero, as below.
        dfinal: (b, h, p, n) gradient of the final state.
        dstates: (b, k, h, p, n) gradient of the picked states.
        picks: the tokens that were picked.
        boundaries: (b, c, h, p, n) state entering each chunk, as the forward pass returned them.
        chunk: tokens per chunk of the forward pass.
        precision: "fp32" (relative error about 1e-6) or "bf16" (operands rounded to bfloat16).

    Returns:
        By name; float32, value's gradient in value's dtype.

    Raises:
        ValueError: inputs that other kernels run, unknown precision, no boundaries.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is fp32 or bf16, got {precision!r}")
    if boundaries is None or chunk is None:
        raise ValueError("the gradient needs the boundaries and the chunk that ssd.forward returned")
    x = prepared(x)
    tune: dict[str, Any] = {"parts": 3, "carry": {}, "values": {}, "keys": {}} | (tuning or {})
    parts = 1 if precision == "bf16" else tune["parts"]
    clock = clocks(x, chunk)
    b, t, h, p = x.value.shape
    # A row of zeros that is every row costs no memory.
    dy = x.value.new_zeros(p).expand(b, t, h, p) if dy is None else (dy if dy.stride(-1) == 1 else dy.contiguous())
    table = None
    if dstates is not None and dstates.shape[1]:
        table = _table(range(t) if picks == "all" or picks is None else picks, clock.high.shape[2], chunk, dy.device)
        dstates = dstates.contiguous()
    else:
        dstates = None
    final = None if dfinal is None else dfinal.contiguous()
    after, dinitial = carry(
        dy, x.read, clock.from_start, clock.through, final, parts,
        reverse=True, picks=table, dstates=dstates, **tune["carry"],
    )  # fmt: skip
    found = {} if x.initial is None else {"initial": dinitial}
    dvalue, direct, crossed = _value_gradients(x, clock, dy, after, table, dstates, parts, **tune["values"])
    dread, start, *_ = _key_gradients(x, clock, dy, boundaries, boundaries, None, None, parts, False, **tune["keys"])
    dwrite, end, met, picked = _key_gradients(
        x, clock, dy, after, boundaries, table, dstates, parts, True, **tune["keys"]
    )
    rates = _rate_gradients(x, clock, direct, crossed, start, end, met, table, picked)
    return found | {"value": dvalue, "write": dwrite, "read": dread} | rates


def _table(picks: Sequence[int], chunks: int, chunk: int, device: torch.device) -> Tensor:
    """int32: where each chunk's picks begin (chunks + 1), the picked tokens in order (k), which pick each is (k)."""
    order = sorted(range(len(picks)), key=picks.__getitem__)
    begins = [0] * (chunks + 1)
    for i in picks:
        begins[i // chunk + 1] += 1
    for c in range(chunks):
        begins[c + 1] += begins[c]
    return torch.tensor([*begins, *(picks[k] for k in order), *order], dtype=torch.int32, device=device)


def _value_gradients(
    x: ScanInputs, clock: Clocks, dy: Tensor, after: Tensor, table: Tensor | None, dstates: Tensor | None, parts: int,
    *, rows: int = 64, sums: int = 2, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d value; d dt but for the decays (p tiles, b, h, c, l); d log_decay from pairs (p tiles, parts, b, h, c, l)."""
    b, t, h, p = x.value.shape
    n = x.d_state
    chunks, length = clock.high.shape[2:]
    rows = min(rows, length)
    (bp, p_tiles), (bn, n_tiles) = blocks(p, 64), blocks(n, key_tile(x, parts, 32))
    dvalue = x.value.new_empty((b, t, h, p))
    direct = x.value.new_empty((p_tiles, b, h, chunks, length), dtype=torch.float32)
    crossed = x.value.new_empty((p_tiles, length // rows, b, h, chunks, length), dtype=torch.float32)
    _values[(h * b * chunks * (length // rows), p_tiles)](
        x.value, x.write, x.read, dy, clock.high, clock.low, clock.forgets, clock.dt, after,
        table, dstates, dvalue, direct, crossed,
        b, t, h, h // x.write.shape[2], h // x.read.shape[2], chunks, 0 if dstates is None else dstates.shape[1], p, n,
        *x.value.stride()[:3], *x.write.stride()[:3], *x.read.stride()[:3], *dy.stride()[:3],
        L=length, ROWS=rows, BP=bp, BN=bn, TILES=n_tiles,
        HAS_DT=x.dt is not None, COUNT=clock.forgets is not None, HAS_PICKS=table is not None,
        R=parts_of(x.read.dtype, parts), W=parts_of(x.write.dtype, parts), V=parts_of(x.value.dtype, parts), F=parts,
        Z=min(sums, parts), INTERPRET=INTERPRET, **({"num_warps": 4, "num_stages": 1} | options),
    )  # fmt: skip
    return dvalue, direct, crossed


def _key_gradients(
    x: ScanInputs, clock: Clocks, dy: Tensor, state: Tensor, entering: Tensor, table: Tensor | None,
    dstates: Tensor | None, parts: int, write: bool,
    *, rows: int = 64, together: int | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """d write or d read; what each token shares with the chunk's end or start; H met G; the same of picks."""
    b, t, h, p = x.value.shape
    n = x.d_state
    chunks, length = clock.high.shape[2:]
    rows = min(rows, length)
    (bp, p_tiles), (bn, n_tiles) = blocks(p, 64), blocks(n, key_tile(x, parts, 64))
    programs = b * chunks * (length // rows) * n_tiles
    together = heads_together(x, together or max(4, h * programs // _PROGRAMS))
    splits, k = h // together, 0 if dstates is None else dstates.shape[1]
    new = x.value.new_empty
    partial = new((b, t, splits, n), dtype=torch.float32)
    side = new((n_tiles, b, h, chunks, length), dtype=torch.float32)
    met = new((n_tiles, b, h, chunks), dtype=torch.float32)
    picked = new((n_tiles, k, b, h, length + 1), dtype=torch.float32) if write and k else None
    mine, other, key, far = (x.value, dy, x.write, x.read) if write else (dy, x.value, x.read, x.write)
    _keys[(splits * b * chunks * (length // rows), n_tiles)](
        mine, other, key, far, clock.high, clock.low, clock.forgets, clock.dt, state, entering,
        table, dstates, partial, side, met, picked,
        b, t, h, h // key.shape[2], h // far.shape[2], chunks, k, p, n,
        *mine.stride()[:3], *other.stride()[:3], *key.stride()[:3], *far.stride()[:3],
        L=length, ROWS=rows, BP=bp, BN=bn, P_TILES=p_tiles, TOGETHER=together,
        HAS_DT=x.dt is not None, COUNT=clock.forgets is not None, HAS_PICKS=table is not None, WRITE=write,
        M=parts_of(mine.dtype, parts), Q=parts_of(other.dtype, parts), K=parts_of(far.dtype, parts), F=parts,
        INTERPRET=INTERPRET, **({"num_warps": 8, "num_stages": 1} | options),
    )  # fmt: skip
    groups = key.shape[2]
    total = partial.view(b, t, groups, splits // groups, n)
    return (total[:, :, :, 0] if splits == groups else total.sum(3)), side, met, picked


# Heads are split over more programs until there are about this many: a few for each multiprocessor.
_PROGRAMS = 512


def _rate_gradients(
    x: ScanInputs, clock: Clocks, direct: Tensor, crossed: Tensor, start: Tensor, end: Tensor, met: Tensor,
    table: Tensor | None, picked: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """d log_decay, or d dt and d A; d dt also where dt only scales the write."""
    b, t, h, _ = x.value.shape
    chunks, length = clock.high.shape[2:]
    new = x.value.new_empty
    has_log, has_dt = x.log_decay is not None, x.dt is not None
    dlog = new((b, t, h, 1), dtype=torch.float32) if has_log else None
    ddt = new((b, t, h), dtype=torch.float32) if has_dt else None
    da = None if has_log else new((b, chunks, h), dtype=torch.float32)
    _rates[(b * h * chunks,)](
        clock.high, clock.forgets, clock.dt, x.A, clock.through, direct, crossed, start, end, met,
        table, picked, dlog, ddt, da,
        b, t, h, chunks, 0 if picked is None else picked.shape[1], 0 if x.A is None else x.A.stride(0),
        L=length, ROWS=length // crossed.shape[1], P_TILES=crossed.shape[0], N_TILES=met.shape[0],
        HAS_LOG=has_log, HAS_DT=has_dt, COUNT=clock.forgets is not None, HAS_PICKS=picked is not None, num_warps=4,
    )  # fmt: skip
    found = {"log_decay": dlog, "dt": ddt, "A": None if da is None else da.sum((0, 1))[:, None]}
    return {k: z for k, z in found.items() if z is not None}
