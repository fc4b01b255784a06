"""Sizes of the states at every token, without ever holding the states: time comes in blocks that carry the state on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked, naive
from .inputs import ScanInputs, expand_groups

__all__ = ["Statistics", "blocks"]

# Elements of the states, or of the fused kernel's sums of squares, of one block of time.
_CPU_BLOCK, _GPU_BLOCK = 2**21, 2**25


class Statistics(NamedTuple):
    """Norms of the states of some tokens, in the units of the state.

    Attributes:
        norm: (b, t, h) Frobenius norm of the state after token t, over p and n.
        kept: (b, t, h) the same of what the decay (and the erase of a delta rule) left of the state before token t,
            nothing written yet. ``kept[t] / norm[t - 1]`` is the share that token t let survive.
    """

    norm: Tensor
    kept: Tensor


@torch.no_grad()
def blocks(x: ScanInputs, impl: str) -> Iterator[tuple[slice, Statistics]]:
    """Stretches of time in order, with the statistics of their tokens.

    Args:
        x: the recurrence; its initial state is the one before the first token.
        impl: "naive", "chunked" or "triton".

    Yields:
        The stretch and its statistics in ``x.dtype``. Squares are summed in that dtype: in float32 norms below 1e-19
        come out as 0. Memory beyond the result: a block of states, or with Triton a block of (b, t, h, p).
    """
    if not x.value.numel() or not x.d_state:
        empty = torch.zeros(x.batch, x.length, x.n_heads, dtype=x.dtype, device=x.value.device)
        if x.length:
            yield slice(0, x.length), Statistics(empty, empty.clone())
        return
    block = _fused_block if impl == "triton" else _naive_block if impl == "naive" else _chunked_block
    size = x.batch * x.n_heads * x.head_dim * (1 if impl == "triton" else x.d_state)
    length = max(1, (_GPU_BLOCK if x.value.is_cuda else _CPU_BLOCK) // size)
    state = x.initial
    for start in range(0, x.length, length):
        stop = min(start + length, x.length)
        found, state = block(x.slice(start, stop).replace(initial=state))
        yield slice(start, stop), found


def _fused_block(x: ScanInputs) -> tuple[Statistics, Tensor]:
    from .fused.walk_launch import launch
    from .fused.walk_plan import choose

    b, t, h, p = x.value.shape
    norm, kept = (torch.empty(b, t, h, p, dtype=torch.float32, device=x.value.device) for _ in range(2))
    final, _ = launch(x, choose(x), norm=norm, kept=kept)
    if p == 1:
        return Statistics(norm[..., 0], kept[..., 0]), final
    return Statistics(norm.sum(-1).sqrt_(), kept.sum(-1).sqrt_()), final


def _chunked_block(x: ScanInputs) -> tuple[Statistics, Tensor]:
    return _of_states(x.cast(), chunked.states(x))


def _naive_block(x: ScanInputs) -> tuple[Statistics, Tensor]:
    return _of_states(x.cast(), naive.states(x))


def _of_states(x: ScanInputs, states: Tensor) -> tuple[Statistics, Tensor]:
    """From every state (b, t, h, p, n) of a block, and the last of them."""
    first = torch.zeros_like(states[:, 0]) if x.initial is None else x.initial
    decay = x.full_log_decay().exp()  # (b, t, h, 1 | n)
    if x.erase_read is not None and x.erase_write is not None:
        erase_read, erase_write = (expand_groups(z, x.n_heads)[..., None, :] for z in (x.erase_read, x.erase_write))
        before = torch.cat([first[:, None], states[:, :-1]], 1) * decay[..., None, :]
        before = before - (before * erase_read).sum(-1, keepdim=True) * erase_write
        kept = before.square().sum((-2, -1))
    else:
        before = torch.cat([first.square().sum(-2)[:, None], states[:, :-1].square().sum(-2)], 1)
        kept = (before * decay.square()).sum(-1)
    return Statistics(states.square().sum((-2, -1)).sqrt(), kept.sqrt()), states[:, -1]
