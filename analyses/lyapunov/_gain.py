"""Transient gain: how much a perturbation can grow before it dies, although every exponent is negative.

G(tau) is the largest singular value of the derivative of tau steps. It is found by power iteration on that derivative
and its transpose, forwards and backwards through the steps in pieces, so that neither the matrix nor a long tape is
ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ssmlens.analyses.lyapunov._tangent import slope

__all__ = ["PIECE", "Advance", "Section", "largest_gain", "squared_size"]

PIECE = 16
"""Steps that one backward pass goes through."""

TOLERANCE = 1e-4
"""Relative change of the gain at which the iteration stops."""


class Advance(Protocol):
    def __call__(self, x: Tensor, /, first: int, count: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Section:
    """A stretch of orbits side by side.

    Args:
        advance: (states (r, n), first step, number of steps) to the states after them; each row on its own.
        start: (r, n) states at step 0.
    """

    advance: Advance
    start: Tensor

    def pieces(self, steps: int) -> list[tuple[Tensor, int, int]]:
        """(states, first step, number of steps) of stretches short enough to differentiate backwards."""
        found, state = [], self.start
        for first in range(0, steps, PIECE):
            count = min(PIECE, steps - first)
            found.append((state, first, count))
            if first + count < steps:
                state = self.advance(state, first, count)
        return found


def largest_gain(section: Section, steps: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of the derivative of each row's steps.

    Returns:
        Gains (r,), a lower bound that power iteration raises to the value; the relative change (r,) in its last
        round; and the perturbations (r, n) of length one that grow so.
    """
    with torch.no_grad():
        pieces = section.pieces(steps)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(section.start.shape, generator=generator, dtype=torch.float64).to(section.start)
    v = v / v.norm(dim=1, keepdim=True)
    best, gain = v, v.new_zeros(len(v))
    change = torch.full_like(gain, torch.inf)
    for _ in range(iterations):
        u = _forwards(section, pieces, v)
        size = u.norm(dim=1)
        change = ((size - gain).abs() / size.clamp(min=1e-300)).where(size > 0, 0.0)
        best = torch.where((size > gain)[:, None], v, best)
        gain = torch.maximum(gain, size)
        if float(change.max()) <= TOLERANCE:
            break
        back = _backwards(section, pieces, u)
        length = back.norm(dim=1, keepdim=True)
        v = torch.where(length > 0, back / length.clamp(min=1e-300), v)
    return gain.double().cpu(), change.double().cpu(), best


def _forwards(section: Section, pieces: Sequence[tuple[Tensor, int, int]], v: Tensor) -> Tensor:
    with torch.no_grad():
        for state, first, count in pieces:
            _, v = slope(partial(section.advance, first=first, count=count), state, v)
    return v


def _backwards(section: Section, pieces: Sequence[tuple[Tensor, int, int]], u: Tensor) -> Tensor:
    for state, first, count in reversed(pieces):
        with torch.enable_grad():
            x = state.detach().requires_grad_()
            y = section.advance(x, first, count)
            (u,) = torch.autograd.grad(y, x, u, allow_unused=True, materialize_grads=True)
    return u


def squared_size(section: Section, probes: int, seed: int) -> Tensor:
    """Mean of |J v|^2 over random signs v, (r,): the squared Frobenius norm of one step's derivative."""
    generator = torch.Generator().manual_seed(seed)
    total = section.start.new_zeros(len(section.start))
    with torch.no_grad():
        for _ in range(probes):
            v = torch.randint(2, section.start.shape, generator=generator).to(section.start) * 2 - 1
            _, moved = slope(partial(section.advance, first=0, count=1), section.start, v)
            total = total + moved.square().sum(1)
    return (total / probes).double().cpu()
