"""Linear memory in closed form: constant diagonal states, and how precisely a noisy linear state tells the past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._linear_memory import CHECKED, LINEAR

__all__ = ["fisher_memory", "memory_capacity_exact"]


def memory_capacity_exact(
    decay: Sequence[float] | Tensor | np.ndarray,
    weight: Sequence[float] | Tensor | np.ndarray | None = None,
    lags: int = 1000,
    *,
    noise: float = 0.0,
) -> Result:
    """Memory capacity of constant diagonal states h[t] = a h[t-1] + v u[t] under white input, in closed form.

    R_ij = v_i v_j / (1 - a_i a_j) and p_k = v a^k.

    Args:
        decay: (n,) a, each in [0, 1).
        weight: (n,) v; ones by default. Without noise it does not matter.
        lags: largest lag, from 0.
        noise: as in `memory_capacity`.

    Returns:
        Result with axis (lag). Columns: ``total``, over these lags, and ``information``.

    Raises:
        ValueError: for decays outside [0, 1).
    """
    a = torch.as_tensor(decay, dtype=torch.float64)
    if a.ndim != 1 or not len(a) or not bool(((a >= 0) & (a < 1)).all()):
        raise ValueError("decays are (n,) numbers from 0 to below 1")
    v = torch.ones_like(a) if weight is None else torch.as_tensor(weight, dtype=torch.float64)
    gram = v[:, None] * v / (1 - a[:, None] * a)
    past = v * a ** torch.arange(lags + 1, dtype=torch.float64)[:, None]  # (k, n)
    powers, vectors = torch.linalg.eigh(gram + noise * gram.trace() / len(a) * torch.eye(len(a), dtype=a.dtype))
    # Real poles are nearly degenerate: below rounding an eigenvalue says nothing.
    known = powers > powers[-1] * len(a) * torch.finfo(torch.float64).eps
    value = ((past @ vectors[:, known]).square() / powers[known]).sum(1)
    return Result(
        name="memory_capacity",
        value=value,
        dims=("lag",),
        units="1",
        columns={"total": value.sum(), "information": -0.5 * torch.log1p(-value.clamp(max=1))},
        control={"rank": known.sum().double()},
        settings={"decay": a, "weight": v, "noise": noise},
        assumes=("constant gates, white scalar input", LINEAR),
        checked_by=CHECKED,
    )


def fisher_memory(
    transition: Tensor | np.ndarray, weight: Tensor | np.ndarray, lags: int = 1000, *, noise: float = 1.0
) -> Result:
    """Fisher memory curve of h[t] = W h[t-1] + v u[t] + noise: how precisely the state tells u[t-k].

    J(k) = (W^k v)' C^-1 (W^k v) with C the stationary covariance of the noise, C = W C W' + noise I. For a normal W
    and a unit v the sum over all lags is 1 / noise, however many states there are; it is at most n / noise
    (Ganguli, Huh and Sompolinsky 2008).

    Args:
        transition: (n, n) W, or (n,) for a diagonal one; all eigenvalues below 1 in absolute value.
        weight: (n,) v.
        lags: largest lag, from 0.
        noise: variance of the noise that each state gets at each step.

    Returns:
        Result with axis (lag). Column: ``total`` over these lags. Control: ``normal``, the sum for a normal W.

    Raises:
        ValueError: when shapes do not fit or W does not decay.
    """
    from scipy.linalg import solve_discrete_lyapunov

    W = torch.as_tensor(transition, dtype=torch.float64)
    W = torch.diag(W) if W.ndim == 1 else W
    v = torch.as_tensor(weight, dtype=torch.float64)
    if W.ndim != 2 or W.shape[0] != W.shape[1] or v.shape != W.shape[:1]:
        raise ValueError(f"transition is (n, n) and weight (n,), got {tuple(W.shape)} and {tuple(v.shape)}")
    if not noise > 0:
        raise ValueError(f"noise is above 0, got {noise}")
    if not float(torch.linalg.eigvals(W).abs().max()) < 1:
        raise ValueError("the transition does not decay: all its eigenvalues have to lie inside the unit circle")
    covariance = torch.from_numpy(solve_discrete_lyapunov(W.numpy(), noise * np.eye(len(v))))
    curve, x = [], v
    inverse = torch.linalg.inv(covariance)
    for _ in range(lags + 1):
        curve.append(x @ inverse @ x)
        x = W @ x
    value = torch.stack(curve)
    return Result(
        name="fisher_memory",
        value=value,
        dims=("lag",),
        units="1",
        columns={"total": value.sum()},
        control={"normal": v.square().sum() / noise},
        settings={"states": len(v), "noise": noise},
        assumes=("constant gates; independent noise of equal variance on every state",),
        checked_by="normal matrices, delay line, amplifying delay line: checks.py of this study",
    )
