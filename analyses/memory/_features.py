"""What a probe looks at: the states of a layer, token by token, whitened and cut to their largest components."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssmlens.recurrence import Recurrence

__all__ = ["FEATURES", "Blocks", "Whitened", "of_layer", "of_tensor", "state_blocks", "whiten"]

FEATURES = ("state", "output", "residual")
"""What of a layer is probed: its state h, what it reads from it (y without the skip), or the residual stream before
the layer."""

Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]
"""A pass over time: stretches of positions in order, with (b, positions, n) numbers."""

BLOCK_ENTRIES = 2**23
"""States held at once: 32 MiB in float32."""

EXACT_WIDTH = 1024
"""Up to so many features their covariance is diagonalised as it is."""

OVERSAMPLING = 32
"""Random directions beyond those wanted, which make the found ones those of largest variance."""


NOISE = 16
"""Units in the last place of a typical feature vector, below which variation is rounding."""


@dataclass(frozen=True, eq=False)
class Whitened:
    """Features on their principal axes, of mean 0 and variance 1 where they were fitted.

    Args:
        z: (b, t, r) float64.
        scales: (r,) standard deviation of the features along each axis.
        explained: share of the variance that the r axes hold.
        width: features before.
    """

    z: Tensor
    scales: Tensor
    explained: float
    width: int


def state_blocks(rec: Recurrence, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[slice, Tensor]]:
    """Stretches of time with their states (b, positions, h, p, n), carried from one to the next."""
    width = max(1, entries // max(1, rec.batch * rec.n_heads * rec.head_dim * rec.d_state))
    state = rec.initial
    for start in range(0, rec.length, width):
        stretch = slice(start, min(start + width, rec.length))
        part = Recurrence(rec.inputs.slice(stretch.start, stretch.stop).replace(initial=state))
        states = part.states()
        state = states[:, -1]
        yield stretch, states


def of_layer(rec: Recurrence, residual: Tensor | None, features: str) -> Blocks:
    """The features of one layer, as `FEATURES` names them."""
    if features == "state":
        return lambda: ((stretch, h.flatten(2)) for stretch, h in state_blocks(rec))
    if features == "output":
        return of_tensor(replace(rec, D=None).run().flatten(2))
    if residual is None:
        raise ValueError("only a whole trace knows the residual stream: pass the trace, or choose state or output")
    return of_tensor(residual)


def of_tensor(x: Tensor) -> Blocks:
    """Features that are already there, (b, t, n)."""
    return lambda: iter([(slice(0, x.shape[1]), x)])


def whiten(blocks: Blocks, fit: Tensor, rank: int, seed: int) -> Whitened:
    """Features on the ``rank`` axes of largest variance, scaled to variance 1.

    Up to 1024 features their axes are exact. Beyond, they are found by one step of subspace iteration from random
    directions (Halko, Martinsson and Tropp 2011), which never holds the covariance. Axes whose
    variance is rounding noise are left out.

    Args:
        blocks: the features, passed over three or four times.
        fit: (b, t) bool, where mean and axes are fitted.
        rank: most axes that are kept.
        seed: of the random directions.
    """
    mean, scale, width, dtype = _mean(blocks, fit)
    if width > max(EXACT_WIDTH, 2 * rank):
        g = torch.Generator().manual_seed(seed)
        start = torch.randn(width, rank + OVERSAMPLING, generator=g, dtype=dtype).to(mean.device)
        found = _covariance(blocks, fit, mean, start)
        basis = torch.linalg.qr(found)[0]
        z = _project(blocks, fit, mean, basis)
    else:
        z = _project(blocks, fit, mean, None)
    fitted = z[fit]
    centre = fitted.mean(0)
    # Singular values, not those of the covariance: half of the digits would be lost in the squares.
    _, s, axes = torch.linalg.svd(fitted - centre, full_matrices=False)
    # The features came rounded, mean and all: an axis along which they vary by less is made of rounding.
    size = (scale / len(fitted) + float(mean.square().sum())) ** 0.5
    keep = s > NOISE * torch.finfo(dtype).eps * size * len(fitted) ** 0.5
    keep[rank:] = False
    if not keep.any():
        raise ValueError("the features do not vary over the tokens that they are fitted on: nothing can be read")
    s, axes = s[keep], axes[keep]
    explained = float(s.square().sum()) / scale if scale else 0.0
    scales = s / len(fitted) ** 0.5
    z = (z - centre) @ (axes.mT / scales)
    return Whitened(z, scales, min(1.0, explained), width)


def _mean(blocks: Blocks, fit: Tensor) -> tuple[Tensor, float, int, torch.dtype]:
    """Mean over the fitted tokens (n,) in float64, their sum of squares around it, n, and the dtype."""
    total: Tensor | None = None
    squares: Tensor | None = None
    first: Tensor | None = None
    count = 0
    for stretch, x in blocks():
        some = x[fit[:, stretch]]
        if not bool(some.isfinite().all()):
            raise ValueError("the features hold NaN or infinite numbers")
        if total is None or squares is None:
            total, squares = (torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device) for _ in range(2))
        if len(some) == 0:
            continue
        if first is None:
            # Around one of the tokens: sums of squares around zero would lose small variances beside a large mean.
            first = some[0].double()
        some = some.double() - first
        total, squares, count = total + some.sum(0), squares + some.square().sum(0), count + len(some)
    if total is None or squares is None or first is None or not count:
        raise ValueError("there are no tokens to fit the features on")
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    scale = float((squares - total.square() / count).clamp(min=0).sum())
    return first + total / count, scale, len(total), dtype


def _covariance(blocks: Blocks, fit: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Covariance of the features times ``directions`` (n, r), up to a factor."""
    out = torch.zeros_like(directions)
    for stretch, x in blocks():
        some = x[fit[:, stretch]].to(directions.dtype) - mean.to(directions.dtype)
        out += some.mT @ (some @ directions)
    return out


def _project(blocks: Blocks, fit: Tensor, mean: Tensor, basis: Tensor | None) -> Tensor:
    """All features minus the mean, on ``basis`` (n, r) where there is one: (b, t, r) in float64 on the CPU."""
    parts = []
    for _, x in blocks():
        if basis is None:
            parts.append((x.double() - mean).cpu())
        else:
            parts.append(((x.to(basis.dtype) - mean.to(basis.dtype)) @ basis).double().cpu())
    return torch.cat(parts, 1)
