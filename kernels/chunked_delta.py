"""Scan with a rank-one erase before each write (delta rule), one token at a time.

The transition ``(I - erase_read erase_write^T) exp(log_decay)`` is not diagonal, so chunks do not factor
into the matrices of `chunked_matmul`; this walk keeps one state and reads out as it goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import ScanInputs, expand_groups

__all__ = ["scan"]


def scan(x: ScanInputs, picks: Sequence[int], want_output: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Outputs (b, t, h, p) or None, final state (b, h, p, n), states (b, len(picks), h, p, n).

    Args:
        x: inputs in the compute dtype with ``erase_read`` and ``erase_write``, t >= 1.
        picks: token positions whose states are wanted.
        want_output: False skips the read-out.
    """
    assert x.erase_read is not None
    assert x.erase_write is not None
    decay = x.full_log_decay().exp()[:, :, :, None, :]  # (b, t, h, 1, n | 1)
    write = x.full_write()
    read, look, rub = (expand_groups(z, x.n_heads) for z in (x.read, x.erase_read, x.erase_write))
    state = x.initial
    if state is None:
        state = x.value.new_zeros(x.batch, x.n_heads, x.head_dim, x.d_state)
    wanted = set(picks)
    kept: dict[int, Tensor] = {}
    outputs = []
    for t in range(x.length):
        state = decay[:, t] * state
        seen = (state @ look[:, t, :, :, None]).squeeze(-1)  # (b, h, p)
        state = state - seen[..., None] * rub[:, t, :, None, :]
        state = state + x.value[:, t, :, :, None] * write[:, t, :, None, :]
        if want_output:
            outputs.append((state @ read[:, t, :, :, None]).squeeze(-1))
        if t in wanted:
            kept[t] = state
    if picks:
        states = torch.stack([kept[i] for i in picks], 1)
    else:
        states = state.new_empty(x.batch, 0, *state.shape[1:])
    return (torch.stack(outputs, 1) if want_output else None), state, states
