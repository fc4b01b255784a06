"""The implicit attention matrix of a recurrence, without storing it unless asked.

``M[t, s] = read[t] . decay(s+1..t) . write[s]`` (dt included), so that ``y = M value`` for a zero initial
state; signed, and exactly 0 for s > t. One matrix serves every channel p of a head. The initial state of
the inputs is ignored: it is no source token.

Whole matrices come from `attention_tiles`; single rows and columns, products and everything with a delta
rule (whose transitions do not commute) from runs of the recurrence.

``impl`` is "chunked" (PyTorch), "triton" (the kernels of `fused`, without gradients) or "auto": Triton for CUDA tensors
in float32 or less of which no gradient is recorded. A delta rule always goes through `scan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import attention_lines, attention_mass, scan
from .attention_tiles import Tile, head_blocks, tiles
from .backend import resolve
from .inputs import ScanInputs
from .workers import in_parts

__all__ = ["REDUCTIONS", "adjoint", "apply", "column", "dense", "distance", "quantile", "reduce", "row", "topk"]

# Elements of all the partial maps that `reduce` keeps, one for each thread.
_PARTIAL = 2**26

Block = tuple[slice, ScanInputs]

REDUCTIONS = ("mean", "mean_abs", "max_abs", "norm")


def dense(inputs: ScanInputs, heads: slice | Sequence[int] | None = None, *, impl: str = "auto") -> Tensor:
    """The matrices of the chosen heads, (b, heads, t, s), in ``inputs.dtype``; differentiable.

    Args:
        inputs: the recurrence.
        heads: a slice or head numbers (negative ones count from the end); None means all.
        impl: see above.

    Raises:
        ValueError: no head chosen, one that does not exist, or an ``impl`` that cannot run.
    """
    chosen = _heads(inputs, heads)
    if _on_triton(impl, inputs, "tiles"):
        from .fused import tiles as fused

        return fused.dense(inputs if chosen is None else inputs.take_heads(chosen))
    count = inputs.n_heads if chosen is None else len(chosen)
    out = inputs.value.new_zeros(inputs.batch, count, inputs.length, inputs.length, dtype=inputs.dtype)

    def fill(blocks: Sequence[Block]) -> None:
        for place, x in blocks:
            for tile in _tiles(x):
                if tile.start:
                    out[:, place, tile.start : tile.stop, : tile.start] = tile.before
                out[:, place, tile.start : tile.stop, tile.start : tile.stop] = tile.diagonal

    in_parts(_blocks(inputs, chosen), fill, alone=_alone(inputs))
    return out


def row(inputs: ScanInputs, t: int, *, impl: str = "auto") -> Tensor:
    """What position t reads from every source: M[t, :], (b, h, s), at linear cost; differentiable.

    Raises:
        ValueError: t is outside the sequence, or an ``impl`` that cannot run.
    """
    t = _position(inputs, t)
    if _on_triton(impl, inputs, "lines"):
        from .fused import lines

        return lines.row(inputs, t)
    if not inputs.has_erase:
        return attention_lines.row(inputs, t)
    unit = inputs.value.new_zeros(inputs.batch, inputs.length, inputs.n_heads, 1)
    unit[:, t] = 1
    return adjoint(inputs, unit)[..., 0].transpose(1, 2)


def column(inputs: ScanInputs, s: int, *, impl: str = "auto") -> Tensor:
    """What source s gives to every position: M[:, s], (b, h, t), at linear cost; differentiable.

    Raises:
        ValueError: s is outside the sequence, or an ``impl`` that cannot run.
    """
    s = _position(inputs, s)
    if _on_triton(impl, inputs, "lines"):
        from .fused import lines

        return lines.column(inputs, s)
    if not inputs.has_erase:
        return attention_lines.column(inputs, s)
    unit = inputs.value.new_zeros(inputs.batch, inputs.length, inputs.n_heads, 1)
    unit[:, s] = 1
    return apply(inputs, unit)[..., 0].transpose(1, 2)


def apply(inputs: ScanInputs, x: Tensor) -> Tensor:
    """M x along time, at the cost of one scan; differentiable.

    Args:
        inputs: the recurrence.
        x: (b, t, h, p) with any number of channels p.

    Returns:
        like x, in the compute dtype.

    Raises:
        ValueError: x does not fit the recurrence.
    """
    _check_vector(inputs, x)
    if x.shape[3] == 0:
        return x.new_zeros(x.shape, dtype=inputs.dtype)
    y, _ = scan.run(inputs.replace(value=x.to(inputs.dtype), initial=None))
    return y


def adjoint(inputs: ScanInputs, y: Tensor) -> Tensor:
    """M^T y along time: what each source is owed by weights y on the outputs.

    Args:
        inputs: the recurrence.
        y: (b, t, h, p) with any number of channels p.

    Returns:
        like y, in the compute dtype; ``(adjoint(y) * x).sum() == (y * apply(x)).sum()``. Differentiable in
        the recurrence only with a delta rule.

    Raises:
        ValueError: y does not fit the recurrence.
    """
    _check_vector(inputs, y)
    if y.numel() == 0:
        return y.new_zeros(y.shape, dtype=inputs.dtype)
    twice = torch.is_grad_enabled() and inputs.has_erase
    # Inference mode, here or where the inputs were made, forbids the gradient that gives the adjoint.
    with torch.inference_mode(False), torch.enable_grad():
        fixed = inputs if twice else inputs.map(_recordable)
        y = _recordable(y) if y.is_inference() else y
        x = torch.zeros_like(y, dtype=inputs.dtype).requires_grad_()
        (owed,) = torch.autograd.grad(apply(fixed, x), x, y.to(inputs.dtype), create_graph=twice)
    return owed


def reduce(inputs: ScanInputs, how: str, heads: slice | Sequence[int] | None = None, *, impl: str = "auto") -> Tensor:
    """One map over heads, (b, t, s), never holding (b, h, t, s).

    Args:
        inputs: the recurrence.
        how: "mean" (signed), "mean_abs", "max_abs" or "norm" (root of the sum of squares over heads).
        heads: which heads take part, as for `dense`.
        impl: see above.

    Raises:
        ValueError: unknown ``how``, no head chosen, one that does not exist, or an ``impl`` that cannot run.
    """
    if how not in REDUCTIONS:
        raise ValueError(f"how is one of {', '.join(REDUCTIONS)}, got {how!r}")
    chosen = _heads(inputs, heads)
    if _on_triton(impl, inputs, f"reduce {how}"):
        from .fused import tiles as fused

        return fused.reduce(inputs if chosen is None else inputs.take_heads(chosen), how)
    count = inputs.n_heads if chosen is None else len(chosen)

    def reduced(blocks: Sequence[Block]) -> Tensor:
        out = inputs.value.new_zeros(inputs.batch, inputs.length, inputs.length, dtype=inputs.dtype)
        for _, x in blocks:
            for tile in _tiles(x):
                rows = slice(tile.start, tile.stop)
                _accumulate(out[:, rows, : tile.start], tile.before, how)
                _accumulate(out[:, rows, rows], tile.diagonal, how)
        return out

    most = max(1, _PARTIAL // max(1, inputs.batch * inputs.length**2))
    out, *others = in_parts(_blocks(inputs, chosen), reduced, alone=_alone(inputs), most=most)
    for other in others:
        out = torch.maximum(out, other) if how == "max_abs" else out + other
    if how == "norm":
        return out.sqrt()
    return out if how == "max_abs" else out / count


def distance(inputs: ScanInputs, rows: Sequence[int] | None = None, *, impl: str = "auto") -> Tensor:
    """Mean distance to the sources of a row, in tokens: sum_s (t - s) |M[t, s]| / sum_s |M[t, s]|.

    Args:
        inputs: the recurrence.
        rows: positions t, negative ones counted from the end; None means all.
        impl: see above.

    Returns:
        (b, h, len(rows) or t); NaN where the row is all zero. Source: DeciMamba (Ben-Kish et al. 2025),
        "Mamba mean distance", here per head and row.

    Raises:
        ValueError: a row outside the sequence.
    """
    picked = None if rows is None else [_position(inputs, t) for t in rows]
    few = picked is not None and len(picked) * 8 <= inputs.length
    if _on_triton(impl, inputs, "distance of few" if few else "distance"):
        from .fused import lines
        from .fused import tiles as fused

        if picked is not None and few:
            return lines.distance(inputs, picked)
        every = fused.distance(inputs)
        return every if picked is None else every[..., picked]
    if picked is not None and few and not inputs.has_erase:
        found = [attention_lines.distance(inputs, t) for t in picked]
        shape = (inputs.batch, inputs.n_heads, 0)
        return torch.stack(found, -1) if found else inputs.value.new_zeros(shape, dtype=inputs.dtype)
    out = inputs.value.new_zeros(inputs.batch, inputs.n_heads, inputs.length, dtype=inputs.dtype)

    def fill(blocks: Sequence[Block]) -> None:
        for place, x in blocks:
            for tile in _tiles(x):
                out[:, place, tile.start : tile.stop] = _tile_distance(tile)

    in_parts(_blocks(inputs, None), fill, alone=_alone(inputs))
    return out if picked is None else out[..., picked]


def quantile(inputs: ScanInputs, q: float | Sequence[float], rows: Sequence[int] | None = None) -> Tensor:
    """Distance in tokens within which a share q of a row's mass lies, counted back from the row.

    The smallest d with sum over s >= t - d of |M[t, s]| at least q times the sum over all s; no (b, h, t, s) buffer.

    Args:
        inputs: the recurrence.
        q: above 0 and at most 1; a sequence gives one more axis.
        rows: as for `distance`.

    Returns:
        (b, h, len(rows) or t), or (b, h, len(rows) or t, len(q)), whole numbers in ``inputs.dtype``; NaN where the row
        is all zero.

    Raises:
        ValueError: a share or a row outside its range.
    """
    single = isinstance(q, (int, float))
    shares = [float(q)] if isinstance(q, (int, float)) else [float(z) for z in q]
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"q is a share above 0 and at most 1, got {share}")
    found = attention_mass.quantile(inputs, shares, _rows(inputs, rows), lambda t: row(inputs, t))
    return found[..., 0] if single else found


def topk(inputs: ScanInputs, k: int, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The k sources of a row with the largest |M|, largest first, the nearest first among equals.

    Args:
        inputs: the recurrence.
        k: at least 1.
        rows: as for `distance`.

    Returns:
        Signed values and source positions (int64), both (b, h, len(rows) or t, k). An entry of exactly 0 is no source:
        what is left of the k is 0 at position -1.

    Raises:
        ValueError: k below 1, or a row outside the sequence.
    """
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")
    return attention_mass.topk(inputs, k, _rows(inputs, rows), lambda t: row(inputs, t))


def _on_triton(impl: str, inputs: ScanInputs, work: str) -> bool:
    """Whether a fused kernel does this work: they take no delta rule and record no gradient."""
    if impl == "naive":
        raise ValueError("impl of attention is one of auto, chunked, triton: naive.attention is the loop")
    if inputs.has_erase or not inputs.length or not inputs.n_heads:
        resolve(impl, inputs)  # refuses what cannot run
        return False
    if resolve(impl, inputs, work=work) != "triton":
        return False
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in inputs.tensors().values())
    if recorded and impl == "triton":
        raise ValueError("impl='triton' of attention records no gradient: use impl='chunked', or torch.no_grad()")
    return not recorded and bool(inputs.batch and inputs.d_state)


def _tile_distance(tile: Tile) -> Tensor:
    """(b, h, rows) mean distance; only non-negative numbers are added, so nothing cancels."""
    before, diagonal = tile.before.abs(), tile.diagonal.abs()
    place = torch.arange(tile.stop, device=before.device, dtype=before.dtype)
    inside = place[: tile.stop - tile.start]
    since = before.sum(-1)
    far = before @ (tile.start - place[: tile.start]) + inside * since
    near = (diagonal * (inside[:, None] - inside).clamp(min=0)).sum(-1)
    return (far + near) / (since + diagonal.sum(-1))


def _accumulate(out: Tensor, part: Tensor, how: str) -> None:
    if how == "mean":
        out += part.sum(1)
    elif how == "mean_abs":
        out += part.abs().sum(1)
    elif how == "norm":
        out += part.square().sum(1)
    elif part.shape[-1]:
        torch.maximum(out, part.abs().amax(1), out=out)


def _blocks(inputs: ScanInputs, heads: list[int] | None) -> list[Block]:
    return list(head_blocks(inputs.cast(), heads)) if inputs.length and inputs.batch else []


def _alone(inputs: ScanInputs) -> bool:
    """Whether work on these inputs stays on this thread: a GPU has its own, and a graph is recorded here."""
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in inputs.tensors().values())
    return inputs.value.device.type != "cpu" or recorded


def _tiles(x: ScanInputs) -> Iterator[Tile]:
    """Tiles of a block of heads; with a delta rule one tile, the responses to every unit value."""
    with torch.autocast(x.value.device.type, enabled=False):
        if not x.has_erase:
            yield from tiles(x)
            return
        unit = torch.eye(x.length, dtype=x.dtype, device=x.value.device)
        units = unit[None, :, None].expand(x.batch, x.length, x.n_heads, x.length)
        full = apply(x, units).transpose(1, 2)
        yield Tile(0, x.length, full.new_zeros(*full.shape[:3], 0), full.tril())


def _heads(inputs: ScanInputs, heads: slice | Sequence[int] | None) -> list[int] | None:
    if heads is None:
        return None
    n = inputs.n_heads
    chosen = list(range(n)[heads]) if isinstance(heads, slice) else [int(i) for i in heads]
    if not chosen:
        raise ValueError(f"heads chooses none of the {n} heads: {heads}")
    for i in chosen:
        if not -n <= i < n:
            raise ValueError(f"head {i} does not exist: heads are 0 to {n - 1}")
    return [i % n for i in chosen]


def _position(inputs: ScanInputs, t: int) -> int:
    length = inputs.length
    if not -length <= t < length:
        raise ValueError(f"position {t} is outside the sequence of {length} tokens")
    return t % length


def _rows(inputs: ScanInputs, rows: Sequence[int] | None) -> Sequence[int]:
    return range(inputs.length) if rows is None else [_position(inputs, t) for t in rows]


def _recordable(x: Tensor) -> Tensor:
    """Without a graph, and free of inference mode."""
    return x.clone() if x.is_inference() else x.detach()


def _check_vector(inputs: ScanInputs, x: Tensor) -> None:
    wanted = (inputs.batch, inputs.length, inputs.n_heads)
    if x.ndim != 4 or tuple(x.shape[:3]) != wanted:
        raise ValueError(f"a vector is (b={wanted[0]}, t={wanted[1]}, h={wanted[2]}, p), got {tuple(x.shape)}")
