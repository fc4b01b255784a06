"""The recurrence walked token by token on a GPU, with the state in registers: outputs, states, norms.

The walk reads every input once, writes what was asked for and nothing else, and has no rounding but that of one
multiply-add a token: products of decays are never quotients or differences. It serves every kind of recurrence; for
one decay per head and p > 1 the matrix units (`ssd`) are faster unless every state is wanted. Layers with too few
channels to fill the chip are cut into segments of time: a first walk keeps each segment's end and decay, a second one
starts each segment from the state that enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import ScanInputs
from .walk_launch import launch, which_states
from .walk_plan import Plan, choose

__all__ = ["Plan", "Statistics", "Walked", "choose", "forward", "statistics"]


class Walked(NamedTuple):
    """What a walk hands out.

    Attributes:
        y: (b, t, h, p), or None where it was not wanted.
        final: (b, h, p, n) state after the last token.
        states: (b, k, h, p, n) states that were asked for, or None.
    """

    y: Tensor | None
    final: Tensor
    states: Tensor | None


class Statistics(NamedTuple):
    """Sizes of the states, in the units of the state.

    Attributes:
        norm: (b, t, h) Frobenius norm of the state after token t.
        kept: (b, t, h) norm of what was left of the state before token t was written: after its decay and its erase.
    """

    norm: Tensor
    kept: Tensor


def forward(
    x: ScanInputs,
    picks: Sequence[int] | str | None = None,
    *,
    every: int | None = None,
    want_output: bool = True,
    plan: Plan | None = None,
) -> Walked:
    """Walk a recurrence once.

    Args:
        x: any recurrence, on a GPU (or on the CPU under Triton's interpreter); any floating dtype but float64.
        picks: states to hand out: None, "all", or token positions 0 to t - 1 in any order, repeats allowed.
        every: instead of ``picks``: the states after tokens every - 1, 2 * every - 1, ... (k = t // every).
        want_output: compute y.
        plan: how to cut the walk up; by default `choose` decides.

    Returns:
        Everything in float32.

    Raises:
        ValueError: both ``picks`` and ``every``, or one of them out of range.
    """
    every, picks = which_states(x, picks, every)
    y = torch.empty(x.value.shape, device=x.value.device, dtype=torch.float32) if want_output else None
    return Walked(y, *launch(x, plan or choose(x), y=y, every=every, picks=picks))


def statistics(x: ScanInputs, *, plan: Plan | None = None) -> Statistics:
    """Norms of the state at every token, without writing a state.

    Args:
        x: as for `forward`.
        plan: as for `forward`.

    Returns:
        `Statistics`, float32. Squares are added up in float32: norms below 1e-19 come out as 0.
    """
    b, t, h, p = x.value.shape
    norm, kept = torch.empty(2, b, t, h, p, device=x.value.device, dtype=torch.float32)
    launch(x, plan or choose(x), norm=norm, kept=kept)
    if p == 1:
        return Statistics(norm[..., 0], kept[..., 0])
    return Statistics(norm.sum(-1).sqrt_(), kept.sum(-1).sqrt_())
