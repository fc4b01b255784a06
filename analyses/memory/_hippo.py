"""HiPPO-LegS: the state that holds the whole past as a polynomial, and with it no timescale of its own.

The memory that state space models of this line were derived from (Gu et al. 2020), as a reference to check against.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["legs", "legs_reconstruct"]


def legs(signal: Tensor, n: int) -> Tensor:
    """Coefficients (n,) of the past on scaled Legendre polynomials after the whole signal (t,), in float64.

    c' = -(A / t) c + (B / t) f with A[i, j] = sqrt(2i+1) sqrt(2j+1) below the diagonal, i + 1 on it and 0 above, and
    B[i] = sqrt(2i+1); one bilinear step a sample.
    """
    x = torch.as_tensor(signal).double()
    root = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    A = (root[:, None] * root).tril(-1) + torch.diag(torch.arange(n, dtype=torch.float64) + 1)
    eye = torch.eye(n, dtype=torch.float64)
    c = torch.zeros(n, dtype=torch.float64)
    c[0] = x[0]
    # Each step is solved in the eigenbasis, where A / t is diagonal for all t: A has the eigenvalues 1 to n.
    values, vectors = torch.linalg.eig(A)
    values, vectors = values.real, vectors.real
    back = torch.linalg.solve(vectors, eye)
    state, drive = back @ c, back @ root
    for k in range(1, len(x)):
        # The step from time k to k + 1, in units of the sample, with the trapezoid of both ends.
        early, late = 1 / (2 * k), 1 / (2 * (k + 1))
        push = drive * (early * x[k - 1] + late * x[k])
        state = (state * (1 - early * values) + push) / (1 + late * values)
    return vectors @ state


def legs_reconstruct(c: Tensor, at: Tensor) -> Tensor:
    """The past at the places ``at`` in [0, 1], 0 its beginning and 1 its end, from the coefficients (n,)."""
    x = 2 * torch.as_tensor(at).double() - 1
    before, now = torch.zeros_like(x), torch.ones_like(x)
    total = torch.zeros_like(x)
    for k, coefficient in enumerate(torch.as_tensor(c).double()):
        total = total + coefficient * (2 * k + 1) ** 0.5 * now
        before, now = now, ((2 * k + 1) * x * now - k * before) / (k + 1)
    return total
