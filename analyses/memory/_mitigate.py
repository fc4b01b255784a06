"""What was proposed against states that collapse, without training: forget more, insert less, clip, or slide.

After Stuffed Mamba (Chen et al. 2024, first version), whose code for these was not released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmlens.analyses._layers import Layers, collect, positions
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import OBSERVED, WINDOW
from ssmlens.recurrence import Recurrence
from ssmlens.trace import MixerTrace

__all__ = ["norm_clip", "rescaled", "window_by_difference"]


def rescaled(rec: Recurrence, forget: float = 1.0, insert: float = 1.0) -> Recurrence:
    """The recurrence with every decay a replaced by a ** forget, and every write multiplied by ``insert``.

    Args:
        rec: the recurrence; its initial state stays.
        forget: above 1 forgets more; 0 forgets nothing.
        insert: below 1 remembers less of each token.

    Returns:
        The changed recurrence, which every other function takes.

    Raises:
        ValueError: for a negative or infinite factor.
    """
    for name, x in (("forget", forget), ("insert", insert)):
        if not (x >= 0 and math.isfinite(x)):
            raise ValueError(f"{name} is a number of 0 or more, got {x}")
    inputs = rec.inputs
    decay = {"A": inputs.A * forget} if inputs.A is not None else {"log_decay": inputs.full_log_decay() * forget}
    # The write, not the value: the skip reads the value as well.
    return replace(rec, inputs=inputs.replace(write=inputs.write * insert, **decay))


def window_by_difference(source: MixerTrace | Recurrence, width: int, at: Sequence[int] | None = None) -> Result:
    """States that hold the last ``width`` tokens alone, as the difference h[t] - rho(t, t - width) h[t - width].

    For a linear recurrence this is the state of a run that begins at t - width + 1 with nothing. In float64 the two
    agree to rounding; where hardly anything decays, the difference of two large states loses digits.

    Args:
        source: one mixer's trace, or a recurrence; without a delta rule, whose erasures rho does not describe.
        width: tokens in the window.
        at: tokens whose window states are wanted, negative ones from the end of each row; all by default.

    Returns:
        Result in the units of the state with axes (batch, token, head, channel, state), the last left out where there
        is one; NaN where a row is too short.
        ``lost_digits`` is log10 |h[t]| / |difference|, per head: decimal digits that cancel. The control,
        ``whole_norm``, is the norm of the state without a window.

    Raises:
        ValueError: for a delta rule, a width below 1, or a token that does not exist.
    """
    layers, rec = _single(source)
    if rec.inputs.has_erase:
        raise ValueError("the states of a delta rule are no sum of decayed writes: there is no window by difference")
    if int(width) != width or width < 1:
        raise ValueError(f"the width is a whole number above 0, got {width}")
    labels = list(range(rec.length)) if at is None else [int(t) for t in at]
    where = positions(layers, labels)
    states = _States(rec, {int(t) for t in where.flatten()} | {int(t) - width for t in where.flatten()})
    ticks = clock.Clock.of(rec)
    out = torch.full((*where.shape, rec.n_heads, rec.head_dim, rec.d_state), torch.nan, dtype=torch.float64)
    whole = torch.full((*where.shape, rec.n_heads, 1, 1), torch.nan, dtype=torch.float64)
    for b, i in (where >= 0).nonzero().tolist():
        t = int(where[b, i])
        here, before = states.at(b, t), states.at(b, t - width)
        # The initial state is older than the clock's first tick.
        start = ticks.ticks[b, :, :, t - width] if t >= width else 0.0
        left = torch.exp(-(ticks.ticks[b, :, :, t] - start) * ticks.rate)[:, None]
        out[b, i] = (here - left * before).cpu()
        whole[b, i] = here.norm(dim=(-2, -1), keepdim=True).cpu()
    lost = torch.log10(whole / out.norm(dim=(-2, -1), keepdim=True)).clamp(min=0)
    return layers.result(
        [{"value": out, "lost_digits": lost, "whole_norm": whole}],
        ("batch", "token", "head", "channel", "state"),
        {"token": labels},
        name="window_state",
        units="state",
        control=("whole_norm",),
        settings={"width": width},
        assumes=(OBSERVED,),
        checked_by=WINDOW,
    )


class _States:
    """States of some tokens in float64; the one before the first token is the initial one."""

    def __init__(self, rec: Recurrence, wanted: set[int]) -> None:
        self.rec = rec
        self.order = {t: i for i, t in enumerate(sorted(t for t in wanted if t >= 0))}
        self.found = rec.states(list(self.order)).double()

    def at(self, b: int, t: int) -> Tensor:
        if t >= 0:
            return self.found[b, self.order[t]]
        if self.rec.initial is None:
            return torch.zeros_like(self.found[b, 0])
        return self.rec.initial[b].double()


def _single(source: MixerTrace | Recurrence) -> tuple[Layers, Recurrence]:
    layers = collect(source)
    if len(layers.recurrences) > 1:
        raise ValueError("this looks at one layer: pass trace[k], or a recurrence")
    return layers, next(iter(layers))


def norm_clip(source: MixerTrace | Recurrence, limit: float) -> Result:
    """Run with every head's state scaled back to the norm ``limit`` whenever it grows beyond, token by token.

    Clipping is not linear: the whole past shrinks, what mattered and what did not.

    Args:
        source: one mixer's trace, or a recurrence, without a delta rule.
        limit: largest Frobenius norm of a head's state, in the units of the state.

    Returns:
        Result with axes (batch, token, head): the norm after each token. ``clipped`` is 1 where it was cut, ``kept``
        the product of all cuts so far, the share of the first token's write that clipping left. The control,
        ``whole_norm``, is the norm of the run without clipping.

    Raises:
        ValueError: for a delta rule, or a limit that is not positive.
    """
    layers, rec = _single(source)
    if rec.inputs.has_erase:
        raise ValueError("norm clipping is written for recurrences without a delta rule")
    if not limit > 0:
        raise ValueError(f"the limit is a norm above 0, got {limit}")
    state = rec.initial
    shape = (rec.batch, rec.length, rec.n_heads)
    norm, clipped, kept = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    left = torch.ones(rec.batch, rec.n_heads, dtype=torch.float64)
    for t in range(rec.length):
        state = Recurrence(rec.inputs.slice(t, t + 1).replace(initial=state)).final_state()
        size = state.double().norm(dim=(-2, -1))
        cut = (limit / size).clamp(max=1.0)
        state = state * cut.to(state.dtype)[..., None, None]
        left = left * cut.cpu()
        norm[:, t], clipped[:, t], kept[:, t] = (size * cut).cpu(), (cut < 1).double().cpu(), left
    real = rec.real.cpu()[..., None]
    whole = rec.statistics().norm.to("cpu", torch.float64)
    part = {"value": norm, "clipped": clipped, "kept": kept, "whole_norm": whole}
    return layers.result(
        [{k: x.where(real, torch.nan) for k, x in part.items()}],
        ("batch", "token", "head"),
        name="state_norm",
        units="state",
        control=("whole_norm",),
        settings={"limit": limit},
        assumes=(OBSERVED,),
        checked_by=WINDOW,
    )
