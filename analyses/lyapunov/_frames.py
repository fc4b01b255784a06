"""Orthonormal frames of tangents, and which of their directions a map has removed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmlens.errors import SsmlensError

__all__ = ["frame", "orthonormal_columns", "orthonormalise", "surviving"]

SMALL_QR = 2**15
"""Numbers up to which NumPy's QR is the quicker one."""

ROUNDING = 2000
"""Units in the last place that a tangent may lose on its way through a step and an orthogonalisation."""


def frame(k: int, state: Tensor, seed: int) -> Tensor:
    """k orthonormal tangents (k, *state), random."""
    if k > state.numel():
        raise SsmlensError(f"k is at most the {state.numel()} dimensions of the state, got {k}")
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(k, state.numel(), generator=generator, dtype=torch.float64).to(state.device)
    return orthonormalise(draw)[0].view(k, *state.shape).to(state.dtype)


def orthonormalise(tangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal tangents (k, n) in float64 of the same span, in order, the logs (k,) of R_ii, and what vanished.

    A direction that lies in the span of those before it up to rounding has vanished (k, bool): its R_ii is rounding,
    or exactly 0, and one orthogonal to all others takes its place.
    """
    z = tangents.reshape(len(tangents), -1).to(torch.float64)
    eps = torch.finfo(tangents.dtype).eps
    if z.numel() <= SMALL_QR and z.device.type == "cpu":
        q, logs, lost = orthonormal_columns(z.numpy().T, eps)
        return torch.from_numpy(np.ascontiguousarray(q.T)), torch.from_numpy(logs), torch.from_numpy(lost)
    q, r = torch.linalg.qr(z.T)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    logs, lost = _diagonal(r.cpu().numpy(), eps)
    return q.T.contiguous(), torch.from_numpy(logs), torch.from_numpy(lost)


def orthonormal_columns(z: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same in NumPy, on columns (n, k): without torch's cost of a call, for what is small."""
    q, r = np.linalg.qr(z)
    return q * np.where(r.diagonal() < 0, -1.0, 1.0), *_diagonal(r, eps)


def surviving(matrices: np.ndarray, eps: float) -> int:
    """Rank of the product of Jacobians (steps, n, n), the first one first, without ever forming it.

    After each step a basis of the image is cut to the singular values above rounding. A register of w inputs loses all
    of its directions in w steps; orthonormal frames alone hide that in long runs, since rounding makes of the w
    exponents -inf about log(eps) / w.
    """
    basis = np.eye(matrices.shape[1])
    for jacobian in matrices:
        u, sizes, _ = np.linalg.svd(jacobian @ basis, full_matrices=False)
        basis = u[:, sizes > eps * ROUNDING * sizes.max(initial=0.0)]
        if not basis.shape[1]:
            break
    return basis.shape[1]


def _diagonal(r: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Logs (k,) of |R_ii|, and where it is only rounding.

    With z_i = sum_j alpha_j z_j + R_ii q_i, rounding of all z leaves about eps (|z_i| + sum_j |alpha_j| |z_j|) in
    R_ii, and alpha_j = -S_ji R_ii for S the inverse of R: so R_ii is lost where sum_j |S_ji| |z_j| eps is near 1.
    """
    # Numbers of an orbit that diverges overflow here; the run refuses it.
    with np.errstate(all="ignore"):
        diagonal, size = np.abs(r.diagonal()), np.sqrt((r * r).sum(0))
        lost = diagonal <= eps * ROUNDING * size
        if not lost.all() and len(r) > 1:
            safe = r + np.diag(np.where(lost, np.where(size > 0, size, 1.0) * eps, 0.0))
            lost |= (np.abs(np.linalg.inv(safe)) * size[:, None]).sum(0) * eps * ROUNDING >= 1
        return np.log(diagonal), lost
