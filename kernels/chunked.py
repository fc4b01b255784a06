"""The fast PyTorch implementation: sends each recurrence to the algorithm that suits its shape.

=====================  ==========================  ================================
delta rule             `chunked_delta`             one token at a time
one channel per head   `chunked_diagonal`          Mamba-1, RG-LRU
anything else          `chunked_matmul`            Mamba-2, GLA, retention
=====================  ==========================  ================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import chunked_delta, chunked_diagonal, chunked_matmul
from .inputs import ScanInputs

__all__ = ["run", "states"]


def run(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, t, h, p) and final state (b, h, p, n), without holding all states."""
    y, final, _ = _scan(inputs, (), want_output=True)
    assert y is not None
    return y, final


def states(inputs: ScanInputs, at: Sequence[int] | None = None) -> Tensor:
    """States (b, len(at) or t, h, p, n); never more than those asked for."""
    return _scan(inputs, range(inputs.length) if at is None else at, want_output=False)[2]


def _scan(inputs: ScanInputs, picks: Sequence[int], want_output: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    # Autocast would turn the float32 products below into bfloat16 ones.
    with torch.autocast(inputs.value.device.type, enabled=False):
        x = inputs.cast().map(_untransposed)
        if x.length == 0 or x.value.numel() == 0 or x.d_state == 0:
            return _nothing(x, len(picks))
        if x.has_erase:
            return chunked_delta.scan(x, picks, want_output)
        if x.head_dim == 1:
            return chunked_diagonal.scan(x, picks, want_output)
        return chunked_matmul.scan(x, picks, want_output)


def _untransposed(z: Tensor) -> Tensor:
    """A copy with time before channels in memory, where a model hands out its convolution's (b, d, t).

    Every pass over such a view costs ten times that over a plain tensor, and so does ``contiguous()``; the
    two-dimensional transpose of one batch row is blocked for the cache.
    """
    if z.ndim != 4 or z.is_cuda or z.requires_grad or z.shape[1] < 2 or z.stride(1) != 1 or z.stride(3) == 1:
        return z
    out = torch.empty(z.shape, dtype=z.dtype)
    for row, source in zip(out, z, strict=True):
        row.flatten(1).copy_(source.reshape(z.shape[1], -1))
    return out


def _nothing(x: ScanInputs, n_picks: int) -> tuple[Tensor, Tensor, Tensor]:
    """No token, no head or no state: outputs are zero and the state stays."""
    final = x.initial
    if final is None:
        final = x.value.new_zeros(x.batch, x.n_heads, x.head_dim, x.d_state)
    return torch.zeros_like(x.value), final, final.new_zeros(x.batch, n_picks, *final.shape[1:])
