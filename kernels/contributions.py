"""What every source token adds to every output of a mixer, as vectors, norms or ALTI weights, never all pairs at once.

Around the matrix M of a recurrence a mixer has a short convolution before, and a skip, a gate and a projection
behind. With those held fixed it is linear, and token s adds to output t the vector::

    T[t, s] = weight @ (gate[t] * sum_k (M + skip I)[t, s + k] * sources[s, k])         (d,)

where ``sources[s, k]`` is what token s gives to the scan's value k steps later (LaTIM: Pitorro and Treviso, 2025).
All pairs are t^2 d numbers, so they come in tiles of rows and columns: an operand (e, rows, columns), one matrix
product with ``weight``, and what is asked of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import scan
from .backend import resolve
from .contribution_tiles import Terms, tiles
from .inputs import expand_groups

__all__ = ["Terms", "alti", "diagonal", "norms", "norms_by", "total", "vectors"]


def norms(terms: Terms, p: float = 2, rows: Sequence[int] | None = None, *, impl: str = "auto") -> Tensor:
    """Norm of every contribution, (b, len(rows) or t, s), in the compute dtype; exactly 0 for s > t.

    Args:
        terms: the mixer.
        p: order of the norm, at least 1; infinity gives the largest entry.
        rows: output positions (negative ones count from the end); all when None.
        impl: "chunked" is PyTorch, "triton" fuses the operands and multiplies split float32 on matrix units;
            "auto" chooses by device and dtype.

    Raises:
        ValueError: a row that does not exist, or p < 1, or an ``impl`` that cannot run.
    """
    if not p >= 1:
        raise ValueError(f"p is at least 1, got {p}")
    return norms_by(_fused(impl, terms), terms, p, rows)


def norms_by(kernels: ModuleType | None, terms: Terms, p: float = 2, rows: Sequence[int] | None = None) -> Tensor:
    """As `norms`, by the kernels of `fused.contributions` or, with None, by PyTorch."""
    weight = terms.weight.detach().to(terms.inputs.dtype)
    if p == 2 and weight.shape[0] > weight.shape[1]:
        # An orthogonal factor does not change lengths: e rows are enough.
        weight = torch.linalg.qr(weight, mode="r").R

    def measure(product: Tensor, row: Tensor) -> Tensor:
        return torch.linalg.vector_norm(product, ord=p, dim=0)

    return _by_tiles(terms, weight, rows, measure, kernels)


def alti(
    terms: Terms, output: Tensor, rows: Sequence[int] | None = None, *, own: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """How much nearer to each output a contribution brings the sum, as a share of the row, (b, len(rows) or t, s).

    ``max(0, |o[t]|_1 - |o[t] - T[t, s]|_1)`` over its sum along s (Ferrando, Gallego and Costa-jussa 2022, on the
    mixer's output as in LaTIM). A row in which nothing brings it nearer is all zero.

    Args:
        terms: the mixer.
        output: (b, t, d) what the contributions are parts of.
        rows, impl: as for `norms`.
        own: (b, t, d) added to what a token contributes to itself, as a residual stream does; None for nothing.

    Raises:
        ValueError: a row that does not exist, an output of another shape, or an ``impl`` that cannot run.
    """
    wanted = (terms.inputs.batch, terms.inputs.length, terms.width)
    if tuple(output.shape) != wanted:
        raise ValueError(f"output is (b={wanted[0]}, t={wanted[1]}, d={wanted[2]}), got {tuple(output.shape)}")
    weight = terms.weight.detach().to(terms.inputs.dtype)

    def measure(product: Tensor, row: Tensor) -> Tensor:
        # Entry by entry, so that a zero contribution brings exactly nothing.
        goal = row.mT[..., None]  # (d, rows, 1)
        return goal.abs().sub(product.sub_(goal).abs_()).sum(0).clamp_(min=0)

    output = output.detach().to(terms.inputs.dtype)
    nearer = _by_tiles(terms, weight, rows, measure, _fused(impl, terms), output)
    if own is not None:
        picked = _rows(terms, rows)
        goal = output[:, picked]
        itself = diagonal(terms)[:, picked] + own.detach().to(output.dtype)[:, picked]
        at = torch.tensor(picked, device=nearer.device)[:, None].expand(len(nearer), -1, 1)
        nearer = nearer.scatter(2, at, (goal.abs() - (goal - itself).abs()).sum(-1, keepdim=True).clamp(min=0))
    return nearer / nearer.sum(-1, keepdim=True).clamp(min=torch.finfo(nearer.dtype).tiny)


def vectors(terms: Terms, rows: Sequence[int] | None = None) -> Tensor:
    """The contributions themselves, (b, len(rows) or t, s, d): 4 t^2 d bytes and more when all rows are asked for."""
    weight = terms.weight.detach().to(terms.inputs.dtype)
    picked = _rows(terms, rows)
    out = weight.new_zeros(terms.inputs.batch, len(picked), terms.inputs.length, terms.width)
    for tile in tiles(terms, picked, terms.width, None):
        out[tile.batch, tile.place, tile.left : tile.right] = _product(weight, tile.operand).permute(1, 2, 0)
    return out


def diagonal(terms: Terms) -> Tensor:
    """What each token contributes to its own output, (b, t, d), at linear cost."""
    x = terms.inputs.map(torch.detach).cast()
    with torch.no_grad(), torch.autocast(x.value.device.type, enabled=False):
        matrix = (expand_groups(x.read, x.n_heads) * expand_groups(x.write, x.n_heads)).sum(-1)  # (b, t, h)
        matrix = (matrix if x.dt is None else matrix * x.dt)[..., None]
        if terms.skip is not None:
            matrix = matrix + terms.skip.detach().to(x.dtype).view(x.n_heads, -1)
        operand = (matrix * terms.sources[:, 0].detach().to(x.dtype).view(x.value.shape)).flatten(2)
        return (operand * terms.gate.detach().to(x.dtype)) @ terms.weight.detach().to(x.dtype).mT


def total(terms: Terms) -> Tensor:
    """All contributions to every output together, (b, t, d), at the cost of one scan."""
    x = terms.inputs.map(torch.detach).cast()
    sources = terms.sources.detach().to(x.dtype)
    value = sources[:, 0].clone()
    for k in range(1, min(sources.shape[1], x.length)):
        value[:, k:] += sources[:, k, :-k]
    return behind(terms, value.view_as(x.value))


def behind(terms: Terms, value: Tensor, initial: Tensor | None = None) -> Tensor:
    """What a scan value (b, t, h, p) and a first state (b, h, p, n) become in the output, (b, t, d); linear."""
    x = terms.inputs.map(torch.detach).cast().replace(value=value, initial=initial)
    y, _ = scan.run(x)
    if terms.skip is not None:
        skip = terms.skip.detach().to(x.dtype)
        y = y + value * (skip[:, None] if skip.ndim == 1 else skip)
    with torch.autocast(y.device.type, enabled=False):
        return (y.flatten(2) * terms.gate.detach().to(x.dtype)) @ terms.weight.detach().to(x.dtype).mT


def _by_tiles(
    terms: Terms,
    weight: Tensor,
    rows: Sequence[int] | None,
    measure: Callable[[Tensor, Tensor], Tensor],
    fused: ModuleType | None,
    beside: Tensor | None = None,
) -> Tensor:
    """``measure`` of every tile's product (d, rows, columns) and the rows of ``beside`` (rows, d), put together."""
    picked = _rows(terms, rows)
    out = weight.new_zeros(terms.inputs.batch, len(picked), terms.inputs.length)
    product, count = _product, weight.shape[0]
    if fused is not None:
        weight, product = fused.weight_planes(weight), fused.product
    for tile in tiles(terms, picked, count, fused):
        goal = weight if beside is None else beside[tile.batch, tile.start : tile.stop]
        found = product(weight, tile.operand)[..., : tile.right - tile.left]
        out[tile.batch, tile.place, tile.left : tile.right] = measure(found, goal)
    return out


def _fused(impl: str, terms: Terms) -> ModuleType | None:
    """The kernels that make operands, or None where PyTorch does."""
    if impl == "naive":
        raise ValueError("contributions have no impl='naive': choose 'auto', 'chunked' or 'triton'")
    if resolve(impl, terms.inputs, work="contributions") != "triton":
        return None
    from .fused import contributions as kernels

    return kernels


def _product(weight: Tensor, operand: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        return (weight @ operand.flatten(1)).view(-1, *operand.shape[1:])


def _rows(terms: Terms, rows: Sequence[int] | None) -> list[int]:
    length = terms.inputs.length
    if rows is None:
        return list(range(length))
    for t in rows:
        if not -length <= t < length:
            raise ValueError(f"position {t} is outside the sequence of {length} tokens")
    return [t % length for t in rows]
