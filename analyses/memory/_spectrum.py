"""Time constants of all states, sorted, and which channels are local and which global."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlens.analyses._layers import Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import CONSTANT_DECAY, FROZEN, GEOMETRIC_KERNEL, READING, STATIONARY, assumes
from ssmlens.analyses.memory._reach import mean_distance
from ssmlens.recurrence import Recurrence

__all__ = ["CLASSES", "channel_class", "modes", "timescale_spectrum"]

CLASSES = ("decay", "distance")
"""What makes a channel global: its decay over a training sequence, or how far it reads."""


def timescale_spectrum(source: Source, windows: int = 8) -> Result:
    """The time constants of a layer's heads and states, from the slowest to the fastest.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        windows: equal stretches of the text whose own time constants give ``fastest`` and ``slowest``.

    Returns:
        Result in tokens with axes (batch, mode), mode 0 the slowest. The value is 1 / mean(-log_decay), the time to
        fall to 1/e; inf for a state that does not decay. ``head`` and ``state`` say which it is (state 0 where all
        states of a head share the decay), ``half_life`` is ln 2 times it, ``fastest`` and ``slowest`` are its extremes
        over the windows. With a the geometric mean of the decays, ``writes_held`` is 1 / (1 - a), the sum of their
        weights, and ``energy_held`` (1 + a^2) / (1 - a^2), the number of writes that share the state's energy. The
        control, ``observed_tokens``, is the horizon beyond which a time constant is extrapolated.

    Raises:
        ValueError: for fewer windows than one, or more than the shortest row has tokens.
    """
    layers = collect(source)
    shortest = int(layers.lengths.min())
    if not 1 <= windows <= shortest:
        raise ValueError(f"the text has 1 to {shortest} windows, got {windows}")
    parts = []
    for rec in layers:
        rate = -clock.mean_log_decay(rec)  # (b, h, n or 1)
        order = rate.flatten(1).argsort(dim=1, stable=True)
        states = rate.shape[2]
        rates = rate.flatten(1).gather(1, order)
        spread = torch.stack([1 / -clock.mean_log_decay(part).flatten(1) for part in _windows(rec, windows)])
        ends = [x.gather(1, order) for x in (spread.amin(0), spread.amax(0))]
        a = torch.exp(-rates)
        part = {"value": 1 / rates, "half_life": math.log(2) / rates, "fastest": ends[0], "slowest": ends[1]}
        part |= {"writes_held": 1 / -torch.expm1(-rates), "energy_held": (1 + a * a) / -torch.expm1(-2 * rates)}
        part |= {"head": order // states, "state": order % states}
        tokens = layers.lengths.to(rates)[:, None].expand_as(rates)
        parts.append({**{k: x.double() for k, x in part.items()}, "observed_tokens": tokens})
    return layers.result(
        parts,
        ("batch", "mode"),
        name="timescale",
        units="tokens",
        control=("observed_tokens",),
        settings={"windows": windows},
        assumes=assumes(layers, FROZEN, STATIONARY),
        checked_by=CONSTANT_DECAY,
    )


def _windows(rec: Recurrence, count: int) -> list[Recurrence]:
    """Equal stretches of each row, without the states that they begin in."""
    longest = int(rec.real_lengths.max())
    cuts = [round(i * longest / count) for i in range(count + 1)]
    found = []
    for a, b in itertools.pairwise(cuts):
        lengths = (rec.real_lengths - a).clamp(0, b - a)
        found.append(Recurrence(rec.inputs.slice(a, b).replace(initial=None), lengths=lengths))
    return [part for part in found if bool((part.real_lengths > 0).all())] or [rec]


def modes(A: Tensor, dt: Tensor | float = 1.0) -> Result:
    """Time constant, period and quality of the modes of a state matrix, real or complex (S4D, Mamba-3).

    Args:
        A: (..., n) eigenvalues with real part <= 0, such as -1/2 + i pi n of S4D-Lin.
        dt: step sizes that broadcast to A.

    Returns:
        Result in tokens with axes (channel, mode), leading axes of A joined. The value is 1 / (-Re A dt), with
        ``half_life``; ``period`` is 2 pi / (|Im A| dt), inf without rotation, and ``quality`` is |Im A| / (2 |Re A|).
        Rotation does not change a half-life. The control ``unit_step`` is the time constant at dt = 1.

    Raises:
        ValueError: for growing modes or steps that are not positive.
    """
    A = torch.as_tensor(A).to(torch.complex128)
    step = torch.as_tensor(dt, dtype=torch.float64)
    if bool((A.real > 0).any()) or not bool((step > 0).all()):
        raise ValueError("modes need real parts of A that are 0 or less and steps above 0")
    rate, turn = (-A.real * step).expand(torch.broadcast_shapes(A.shape, step.shape)), A.imag.abs() * step
    rate, turn, alone = (x.expand(rate.shape).reshape(-1, rate.shape[-1]) for x in (rate, turn, -A.real))
    return Result(
        name="timescale",
        value=1 / rate,
        dims=("channel", "mode"),
        units="tokens",
        columns={"half_life": math.log(2) / rate, "period": 2 * math.pi / turn, "quality": turn / (2 * rate)},
        control={"unit_step": 1 / alone},
        assumes=("The state matrix is constant in time.",),
        checked_by=CONSTANT_DECAY,
    )


def channel_class(
    source: Source,
    train_length: float | None = None,
    *,
    by: str = "decay",
    threshold: float = 1e-2,
    share: float = 0.2,
) -> Result:
    """Which channels are global, holding a training sequence to its end, and which are local.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        train_length: tokens of one training sequence; by default the longest row.
        by: "decay" (LongMamba, Ye et al. 2025): what is left at the end of a training sequence of a write at its
            start, exp(sum of dt A) in the slowest state, is above ``threshold``. "distance" (after UPI 2026): the head
            is among the ``share`` of its layer with the largest mean distance of the last row.
        threshold: share that must be left; this default is only a choice.
        share: of the heads that count as global by distance.

    Returns:
        Result with axes (batch, head): 1 for global, 0 for local. ``log_left`` is the log of what is left of a write
        over ``train_length`` tokens at this text's mean decay, in its slowest state; ``mean_distance`` in tokens is
        there by distance. ``dt_ratio`` is the sum of dt over the row (of nats, where there is no dt) over that of its
        first ``train_length`` tokens: how far beyond training the clock of the head has run, 1 where the row is not
        longer. The control, ``log_threshold`` or ``distance_threshold``, is what ``log_left`` or ``mean_distance``
        was compared with.

    Raises:
        ValueError: for an unknown criterion, or numbers outside their range.
    """
    layers = collect(source)
    if by not in CLASSES:
        raise ValueError(f"unknown criterion {by!r}: choose one of {', '.join(CLASSES)}")
    length = float(layers.lengths.max()) if train_length is None else float(train_length)
    if not (0 < threshold < 1 and 0 < share < 1 and length > 0):
        raise ValueError("threshold and share lie between 0 and 1, and train_length is above 0")
    parts = []
    for rec in layers:
        left = (clock.mean_log_decay(rec) * length).amax(2)
        part = {"log_left": left, "dt_ratio": _clock_ratio(rec, length)}
        if by == "decay":
            limit = torch.full_like(left, math.log(threshold))
            part |= {"value": (left > limit).double(), "log_threshold": limit}
        else:
            far = mean_distance(rec, quantile=None).value
            limit = far.nanquantile(1 - share, dim=1, keepdim=True).expand_as(far)
            part |= {"value": (far > limit).double(), "mean_distance": far, "distance_threshold": limit}
        parts.append({k: x.to("cpu", torch.float64) for k, x in part.items()})
    about: Sequence[str] = (FROZEN, STATIONARY) if by == "decay" else (FROZEN, *READING)
    return layers.result(
        parts,
        ("batch", "head"),
        name="global_channel",
        units="1",
        control=("log_threshold",) if by == "decay" else ("distance_threshold",),
        settings={"train_length": length, "by": by, "threshold": threshold, "share": share},
        assumes=assumes(layers, *about),
        checked_by=CONSTANT_DECAY if by == "decay" else GEOMETRIC_KERNEL,
    )


def _clock_ratio(rec: Recurrence, length: float) -> Tensor:
    """(b, h) clock run over the row, over that of its first ``length`` tokens."""
    ticks = clock.Clock.of(rec)
    spent = ticks.ticks[:, :, -1] if ticks.ticks.shape[2] > 1 else ticks.ticks[:, :, 0]  # (b, h, t)
    last = rec.real_lengths - 1
    first = last.clamp(max=max(0, int(length) - 1))
    whole, early = (spent.take_along_dim(i[:, None, None], 2)[..., 0] for i in (last, first))
    return torch.where(early > 0, whole / early, torch.where(whole > 0, torch.inf, 1.0))
