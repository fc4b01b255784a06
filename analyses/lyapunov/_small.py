"""Maps of a few dimensions: many steps at once, by their Jacobians.

One call of torch costs more than all arithmetic of such a step. So the orbit is run ahead, the Jacobians at all its
points come from one vectorised call, and the frames go through them in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses.lyapunov._benettin import Interval, Progress
from ssmlens.analyses.lyapunov._frames import orthonormal_columns, surviving
from ssmlens.analyses.lyapunov._tangent import slope
from ssmlens.errors import SsmlensError

__all__ = ["SMALL", "Jacobians", "Matrices", "jacobians"]

SMALL = 32
"""Dimensions up to which Jacobians are formed."""

AHEAD = 500
"""Intervals that one call runs ahead."""

SAME = 1e-6
"""Largest relative distance of a step taken alone and among many."""

Jacobians = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""States (B, *state) and inputs (B, ...) or None to the next states and the Jacobians (B, n, n)."""


def jacobians(step: Callable[[Tensor, Any], Tensor], driven: bool) -> Jacobians:
    """The vectorised step and derivative of a map; raises where the map's code cannot be vectorised."""

    def one(x: Tensor, u: Any) -> tuple[Tensor, Tensor]:
        basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape)
        pair: Any = torch.func.vmap(lambda v: slope(lambda at: step(at, u), x, v))(basis)
        return pair[0][0], pair[1].reshape(len(basis), -1).T

    return torch.func.vmap(one, in_dims=(0, 0 if driven else None))


class Matrices:
    """A stride of many intervals through the Jacobians of a map.

    Args:
        step: the map, (x, u) -> x.
        every: its vectorised step and derivative.
        at: the input of a step, None for none.
    """

    most = AHEAD

    def __init__(
        self, step: Callable[[Tensor, Any], Tensor], every: Jacobians, at: Callable[[int], Any] | None
    ) -> None:
        self.step, self.every, self.at = step, every, at

    def __call__(self, now: Progress, intervals: Sequence[Interval]) -> None:
        first, stop = intervals[0].first, intervals[-1].first + intervals[-1].count
        now.state, matrices = self.ahead(now.state, first, stop)
        frames = [x.reshape(len(x), -1).double().cpu().numpy().T for x in now.frames]
        eps = torch.finfo(now.state.dtype).eps
        removed = torch.arange(len(now.frames[0])) >= self.dimensions(matrices, eps)
        for i in intervals:
            for t in range(i.first - first, i.first - first + i.count):
                # An orbit that diverges is refused by the run, in a sentence.
                with np.errstate(over="ignore", invalid="ignore"):
                    frames = [matrices[t] @ z for z in frames]
            for number in range(len(frames) if i.both else 1):
                if not np.isfinite(frames[number]).all():
                    break
                frames[number], logs, lost = orthonormal_columns(frames[number], eps)
                if i.measured:
                    now.record(number, torch.from_numpy(logs), torch.from_numpy(lost) | removed)
        now.frames = [torch.from_numpy(np.ascontiguousarray(z.T)).view_as(x).to(x) for z, x in zip(frames, now.frames)]

    def dimensions(self, matrices: np.ndarray, eps: float) -> int:
        """Dimensions that survive n of these steps, the most of three stretches: 0 with a derivative that is 0."""
        steps, n = matrices.shape[:2]
        starts = {0, max(0, (steps - n) // 2), max(0, steps - n)}
        parts = [matrices[start : start + n] for start in starts]
        # An orbit that diverges is refused by the run.
        return max(surviving(part, eps) if np.isfinite(part).all() else n for part in parts)

    def ahead(self, state: Tensor, first: int, stop: int) -> tuple[Tensor, np.ndarray]:
        """The state after these steps, and the Jacobian of each (steps, n, n).

        Raises:
            SsmlensError: when the map does not give the same alone and among others.
        """
        states, inputs = [state], [None if self.at is None else self.at(t) for t in range(first, stop)]
        with torch.no_grad():
            for u in inputs:
                states.append(self.step(states[-1], u))
            driven = None if self.at is None else torch.stack([torch.as_tensor(u) for u in inputs])
            along = torch.stack(states)
            after, matrices = self.every(along[:-1], driven)
        finite = along[1:].isfinite() & after.isfinite()  # one that diverges is refused by the run
        off = (after - along[1:]).abs()[finite]
        if off.numel() and float(off.max()) > SAME * max(1.0, float(along[1:][finite].abs().max())):
            raise SsmlensError("the map gives something else for many states at once: it must be a pure function")
        return states[-1], matrices.double().cpu().numpy()
