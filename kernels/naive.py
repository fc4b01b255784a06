"""The truth: the recurrence and its matrix as loops a reader can check by eye.

Slow, obvious and differentiable. Every other implementation is tested against this one in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import ScanInputs, expand_groups

__all__ = ["attention", "run", "states"]


def states(inputs: ScanInputs, at: Sequence[int] | None = None) -> Tensor:
    """The state after each step.

    Returns:
        (b, t, h, p, n), or (b, len(at), h, p, n); ``state[:, t]`` already contains token t.
    """
    x = inputs.cast()
    decay = x.full_log_decay().exp()  # (b, t, h, n | 1)
    write = x.full_write()  # (b, t, h, n)
    h = x.initial if x.initial is not None else x.value.new_zeros(x.batch, x.n_heads, x.head_dim, x.d_state)
    every = []
    for t in range(x.length):
        h = decay[:, t, :, None, :] * h
        if x.erase_read is not None and x.erase_write is not None:
            seen = torch.einsum("bhpn,bhn->bhp", h, expand_groups(x.erase_read, x.n_heads)[:, t])
            h = h - seen[..., None] * expand_groups(x.erase_write, x.n_heads)[:, t, :, None, :]
        h = h + x.value[:, t, :, :, None] * write[:, t, :, None, :]
        every.append(h)
    picked = every if at is None else [every[i] for i in at]
    return torch.stack(picked, dim=1) if picked else h.new_zeros(x.batch, 0, *h.shape[1:])


def run(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, t, h, p) and the final state (b, h, p, n)."""
    h = states(inputs)
    read = expand_groups(inputs.read.to(inputs.dtype), inputs.n_heads)
    final = h[:, -1] if inputs.length else inputs.cast().initial
    if final is None:
        final = h.new_zeros(inputs.batch, inputs.n_heads, inputs.head_dim, inputs.d_state)
    return torch.einsum("bthpn,bthn->bthp", h, read), final


def attention(inputs: ScanInputs) -> Tensor:
    """The matrix M (b, h, t, s) with ``y = M value`` for a zero initial state.

    Column s is the output when head channel 0 writes 1 at s and nothing elsewhere: transitions act on
    n only, so one matrix serves every channel p of a head.
    """
    b, length, h, _ = inputs.value.shape
    columns = []
    for s in range(length):
        impulse = inputs.value.new_zeros(b, length, h, 1)
        impulse[:, s] = 1
        columns.append(run(inputs.replace(value=impulse, initial=None))[0][..., 0].transpose(1, 2))
    if not columns:
        return inputs.value.new_zeros(b, h, 0, 0, dtype=inputs.dtype)
    return torch.stack(columns, dim=-1)
