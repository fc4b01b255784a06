"""Orthogonal matrices that spread outliers: Hadamard, Karhunen-Loeve, random."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError

__all__ = ["hadamard", "karhunen_loeve", "random_rotation"]


def hadamard(d: int) -> Tensor:
    """A matrix (d, d) of +1 and -1 with H H^T = d I, in float64.

    Built by Sylvester's doubling from 1 or from a matrix of Paley's first kind, of order q + 1 for a prime
    q = 3 mod 4: 12, 20, 24, 28 has none, 32, 44, 48... so that 768 = 64 * 12 and 2560 = 128 * 20 have one.

    Args:
        d: the order.

    Raises:
        SsmlensError: when no such matrix exists, or these two ways do not lead to one.
    """
    if d < 1:
        raise SsmlensError(f"a Hadamard matrix has an order of at least 1, got {d}")
    core, doublings = d, 0
    while True:
        if core == 1 or (core % 4 == 0 and _is_prime(core - 1)):
            found = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core - 1)
            for _ in range(doublings):
                found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
            return found
        if core % 2:
            raise SsmlensError(f"no Hadamard matrix of order {d} is known here: choose another number of channels")
        core, doublings = core // 2, doublings + 1


def karhunen_loeve(x: Tensor) -> Tensor:
    """Eigenvectors (d, d) of the channels' covariance over samples x (m, d), as columns, largest variance first."""
    centred = x.double() - x.double().mean(0)
    return torch.linalg.eigh(centred.T @ centred / len(x)).eigenvectors.flip(1)


def random_rotation(d: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix (d, d) drawn evenly (Haar), in float64."""
    normal = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def _paley(q: int) -> Tensor:
    """Paley's first construction of order q + 1, for a prime q = 3 mod 4."""
    squares = {k * k % q for k in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if k in squares else -1.0 for k in range(1, q)], dtype=torch.float64)
    at = (torch.arange(q)[:, None] - torch.arange(q)[None]) % q
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, character[at]
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, int(q**0.5) + 1))
