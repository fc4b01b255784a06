"""Mamba-1's selective scan with everything around it in the same kernel: bias, softplus, skip and gate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import ScanInputs
from .walk_launch import Extras, launch, which_states
from .walk_plan import Plan, choose

__all__ = ["Selected", "selective_scan"]


class Selected(NamedTuple):
    """What a selective scan hands out, in float32.

    Attributes:
        y: (b, t, h).
        final: (b, h, n) state after the last token.
        states: (b, k, h, n) states that were asked for, or None.
    """

    y: Tensor
    final: Tensor
    states: Tensor | None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    at: Iterable[int] | Tensor | str | None = None,
    plan: Plan | None = None,
) -> Selected:
    """The scan of a Mamba-1 mixer (Gu and Dao 2023, algorithm 2), forward only::

        step[t] = softplus(delta[t] + delta_bias)
        h[t] = exp(step[t] * A) * h[t-1] + step[t] * u[t] * B[t]
        y[t] = (sum over n of h[t] * C[t] + D * u[t]) * z[t] * sigmoid(z[t])

    Tensors may have any strides and any floating dtype but float64; memory with channels next to each other is fastest.

    Args:
        u: (b, t, h) what is written.
        delta: (b, t, h) step size, before its bias and softplus.
        A: (h, n) decay rate, <= 0.
        B: (b, t, n) or (b, t, g, n) write direction.
        C: (b, t, n) or (b, t, g, n) read direction.
        D: (h,) skip; none when None.
        z: (b, t, h) gate before its SiLU; none when None.
        delta_bias: (h,) added to delta.
        delta_softplus: whether the step is the softplus of delta (above 20: delta itself).
        initial: (b, h, n) state before the first token.
        reset: (b, t) bool, True forgets the state before this token is written.
        at: states to hand out: None, "all" or token positions, negative ones counted from the end.
        plan: how to cut the walk up; by default `walk_plan.choose` decides.

    Raises:
        ValueError: shapes that do not fit together, or a position outside the sequence.
    """
    for name, tensor, axes in (("u", u, "b, t, h"), ("A", A, "h, n")):
        if tensor.ndim != axes.count(",") + 1:
            raise ValueError(f"{name} is ({axes}), got {tuple(tensor.shape)}")
    b, t, h = u.shape
    given = (
        ("delta", delta, (b, t, h)),
        ("D", D, (h,)),
        ("z", z, (b, t, h)),
        ("delta_bias", delta_bias, (h,)),
        ("initial", initial, (b, h, A.shape[1])),
    )
    for name, piece, shape in given:
        if piece is not None and piece.shape != shape:
            raise ValueError(f"{name} has shape {shape}, got {tuple(piece.shape)}")
    x = ScanInputs(
        value=u[..., None],
        write=B[:, :, None] if B.ndim == 3 else B,
        read=C[:, :, None] if C.ndim == 3 else C,
        dt=delta,
        A=A,
        initial=None if initial is None else initial[:, :, None],
        reset=reset,
    )
    if isinstance(at, Tensor):
        at = at.tolist()
    if at is not None and not isinstance(at, str):
        at = [i + t if i < 0 else i for i in at]
    every, picks = which_states(x, at)
    y = torch.empty(b, t, h, device=u.device, dtype=torch.float32)
    extras = Extras(bias=delta_bias, softplus=delta_softplus, skip=D, gate=z)
    final, states = launch(x, plan or choose(x, gate=z is not None), y=y, every=every, picks=picks, extras=extras)
    return Selected(y, final[:, :, 0], None if states is None else states[:, :, :, 0])
