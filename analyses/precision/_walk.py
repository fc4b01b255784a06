"""A recurrence walked token by token, its state rounded at every step, beside the same walk without rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.analyses._layers import time_blocks
from ssmlens.analyses.precision._formats import Format, rounded
from ssmlens.recurrence import Recurrence

__all__ = ["Step", "walk"]


@dataclass(frozen=True)
class Step:
    """One token.

    Args:
        t: its position.
        log_decay: (b, h, m), with m = n or 1.
        exact: (b, h, p, n) the state after it.
        states: the same with rounding, one for each way.
    """

    t: int
    log_decay: Tensor
    exact: Tensor
    states: tuple[Tensor, ...]


def walk(rec: Recurrence, to: Format, roundings: tuple[str, ...], scaled: bool, seed: int) -> Iterator[Step]:
    """The recurrence with its state kept in a format: what a step reads is rounded, what it computes with is not.

    Args:
        rec: the recurrence.
        to: the format.
        roundings: ways of rounding; one state each.
        scaled, seed: as in `rounded`.
    """
    dtype = torch.float64 if to.digits > 11 else rec.dtype
    b, h, p, n = rec.batch, rec.n_heads, rec.head_dim, rec.d_state
    start = torch.zeros(b, h, p, n, dtype=dtype, device=rec.device) if rec.initial is None else rec.initial.to(dtype)
    generator = torch.Generator(rec.device).manual_seed(seed)
    exact, states = start, [rounded(start, to, how, generator, scaled) for how in roundings]
    for block in time_blocks(rec, b * h * (n + p)):
        part = rec.inputs.slice(block.start, min(block.stop, rec.length))
        cut = Recurrence(part)
        log_decay, write, value = cut.log_decay.to(dtype), cut.write.to(dtype), cut.value.to(dtype)
        erase = None
        if cut.erase_read is not None and cut.erase_write is not None:
            erase = cut.erase_read.to(dtype), cut.erase_write.to(dtype)
        decay = log_decay.exp()
        for i in range(cut.length):
            added = value[:, i, :, :, None] * write[:, i, :, None, :]
            one = None if erase is None else (erase[0][:, i], erase[1][:, i])
            exact = _step(exact, decay[:, i], added, one)
            states = [
                rounded(_step(x, decay[:, i], added, one), to, how, generator, scaled)
                for x, how in zip(states, roundings)
            ]
            yield Step(block.start + i, log_decay[:, i], exact, tuple(states))


def _step(state: Tensor, decay: Tensor, added: Tensor, erase: tuple[Tensor, Tensor] | None) -> Tensor:
    state = state * decay[:, :, None]
    if erase is not None:
        state = state - torch.einsum("bhpn,bhn,bhm->bhpm", state, *erase)
    return state + added
