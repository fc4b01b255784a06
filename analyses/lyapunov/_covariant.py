"""Covariant Lyapunov vectors: the directions that grow at exactly one exponent each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._frames import frame, orthonormalise
from ssmlens.analyses.lyapunov._spectrum import Inputs, drive, whole
from ssmlens.analyses.lyapunov._tangent import pushing, widest
from ssmlens.errors import SsmlensError

__all__ = ["covariant_vectors"]


def covariant_vectors(
    map: Callable[..., Any],
    state: Any,
    steps: int,
    k: int | None = None,
    *,
    inputs: Inputs | None = None,
    discard: int | None = None,
    tail: int | None = None,
    keep: int = 1,
    dt: float = 1.0,
    derivative: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """The k leading covariant vectors along an orbit (Ginelli et al. 2007).

    Forwards, orthonormal frames Q and their R are found as for `spectrum`; backwards, upper triangular C <- R^-1 C
    with columns of length one settle, and v = Q C. Each vector is carried into itself by the map, grows at its own
    exponent, and does not depend on the norm: unlike the frames of `spectrum`.

    Args:
        map: ``x -> x``, or ``(x, u) -> x`` when driven.
        state: where the orbit starts, any shape; n numbers.
        steps: steps for which vectors are found.
        k: vectors; all n by default.
        inputs: as for `spectrum`; discard + steps + tail of them are used.
        discard: steps before, in which the frames settle; by default as many as ``steps``, at most 1000.
        tail: steps after, in which C settles backwards; by default the same.
        keep: only every keep-th vector is kept: steps / keep * k * n numbers.
        dt: time of one step.
        derivative: as for `spectrum`.
        seed: of the first frame and of the last C.
        progress: called with the steps done and the steps there are.

    Returns:
        Value (time, vector, coordinate): unit vectors, sign free, with the columns ``exponent`` (1, k, 1), the mean
        growth of each vector in nats per unit of time, and ``angle`` (time, 1, 1) in degrees: the smallest between
        the span of the growing and that of the shrinking vectors, NaN where there is only one kind. Angles near 0 are
        near tangencies: the orbit is not uniformly hyperbolic.

    Raises:
        SsmlensError: where a direction vanishes (its exponent is -inf), or the orbit diverges.
    """
    steps = whole("steps", steps)
    settle = min(1000, steps)
    discard, tail = settle if discard is None else discard, settle if tail is None else tail
    for name, given, low in (("steps", steps, 1), ("discard", discard, 0), ("tail", tail, 0), ("keep", keep, 1)):
        if given < low:
            raise SsmlensError(f"{name} is at least {low}, got {given}")
    total = discard + steps + tail
    at = drive(inputs, total)
    x = widest(map, state, at(0))
    k = x.numel() if k is None else k
    _, push, chosen = pushing(map, x, [at(t) for t in range(min(3, total))], derivative)
    q, kept, triangles = frame(k, x, seed), {}, []
    with torch.no_grad():
        for t in range(total):
            if discard <= t < discard + steps and (t - discard) % keep == 0:
                kept[t] = q.reshape(k, -1).double().cpu()
            x, moved = push(x, q, at(t))
            if not bool(moved.isfinite().all()):
                raise SsmlensError(f"the orbit leaves the finite numbers at step {t}")
            flat, _, lost = orthonormalise(moved)
            if t >= discard:
                if bool(lost.any()):
                    raise SsmlensError(f"a direction vanishes at step {t}: ask for fewer vectors than k = {k}")
                triangles.append((flat @ moved.reshape(k, -1).double().T).triu().cpu())
            q = flat.view_as(q).to(q.dtype)
            if progress is not None:
                progress(t + 1, total)
    vectors, growth = _backwards(triangles, kept, discard, steps, seed)
    growth = growth / dt
    times = sorted(kept)
    value = torch.stack([vectors[t] for t in times])
    return Result(
        name="covariant_vectors",
        value=value,
        dims=("time", "vector", "coordinate"),
        units="1",
        coords={"time": times, "vector": list(range(1, k + 1))},
        columns={"exponent": growth[None, :, None], "angle": _angles(value, growth)[:, None, None]},
        settings={
            "study": "covariant_vectors",
            "steps": steps,
            "k": k,
            "discard": discard,
            "tail": tail,
            "keep": keep,
            "dt": dt,
            "seed": seed,
            "derivative": chosen,
            "dimensions": x.numel(),
        },
        assumes=(
            "discard and tail are long enough for both sweeps to settle, which takes longest between near exponents",
        ),
        checked_by="constant Jacobian: its eigenvectors to 1e-10, tests/analyses/lyapunov/test_covariant.py",
    )


def _backwards(
    triangles: list[Tensor], kept: dict[int, Tensor], discard: int, steps: int, seed: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Vectors (k, n) at the kept times, and the mean growth (k,) of each over the steps."""
    k = len(triangles[0])
    generator = torch.Generator().manual_seed(seed + 1)
    c = torch.eye(k, dtype=torch.float64) + torch.randn(k, k, generator=generator, dtype=torch.float64).triu(1)
    c = c / c.norm(dim=0)
    vectors, growth = {}, torch.zeros(k, dtype=torch.float64)
    for number in reversed(range(len(triangles))):
        c = torch.linalg.solve_triangular(triangles[number], c, upper=True)
        size = c.norm(dim=0)
        c = c / size
        if number < steps:
            growth -= size.log()
        t = discard + number
        if t in kept:
            vectors[t] = c.T @ kept[t]
    return vectors, growth / steps


def _angles(vectors: Tensor, growth: Tensor) -> Tensor:
    """Smallest principal angle (time,) in degrees between the growing and the shrinking vectors."""
    up, down = vectors[:, growth > 0], vectors[:, growth < 0]
    if not up.shape[1] or not down.shape[1]:
        return torch.full((len(vectors),), math.nan, dtype=torch.float64)
    a, b = (torch.linalg.qr(x.mT).Q for x in (up, down))
    # The sine by the complement: the cosine loses small angles to rounding.
    small, large = (a, b) if a.shape[2] <= b.shape[2] else (b, a)
    sine = torch.linalg.svdvals(small - large @ (large.mT @ small))[:, -1].clamp(max=1.0)
    return torch.rad2deg(torch.asin(sine))
