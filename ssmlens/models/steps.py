"""Steps of a mixer on plain tensors, differentiable and in pieces of time, for what computes one from its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssmlens.kernels.inputs import compute_dtype
from ssmlens.models.family import finite_rate

__all__ = ["causal", "rate", "split"]


def rate(weights: Mapping[str, Tensor]) -> Tensor:
    """Decay rates A, (h, n) or (h, 1), in the compute dtype, from ``A_log``."""
    A_log = weights["A_log"]
    found = finite_rate(-torch.exp(A_log.to(compute_dtype(A_log.dtype))))
    return found if found.ndim == 2 else found[:, None]


def split(family: str, projected: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What in_proj gives: gate z (b, t, e), what enters the convolution (b, t, c), and Mamba-2's raw dt (b, t, h)."""
    if family == "mamba1":
        before, z = projected.chunk(2, dim=-1)
        return z, before, None
    sizes = [weights["out_proj.weight"].shape[1], weights["conv1d.weight"].shape[0], len(weights["A_log"])]
    z, before, low = projected.split(sizes, dim=-1)
    return z, before, low


def causal(before: Tensor, tail: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of (b, t, c) after the tail (b, k - 1, c); kernel (c, k), its last tap is now.

    Returns:
        The result without bias, and a view of the tail for the tokens that follow.
    """
    padded, length = torch.cat([tail, before], 1), before.shape[1]
    out = padded[:, :length] * kernel[:, 0]
    for k in range(1, kernel.shape[1]):
        out = out + padded[:, k : k + length] * kernel[:, k]
    return out, padded[:, length:]
