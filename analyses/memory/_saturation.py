"""Saturation: whether training was long enough for a state to settle, and when it leaves what it has seen."""

from __future__ import annotations

import math

import torch

from ssmlens.analyses._layers import Layers, Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import FROZEN, KNOWN_ONSET, KNOWN_SATURATION, STATIONARY, assumes

__all__ = ["onset_time", "saturation"]

ZERO_START = "The state was zero at the start of every training sequence."
SAME_DRIVE = "The input drives the state as strongly as in training."


def saturation(source: Source, train_length: float | None = None, *, delta: float = 0.25) -> Result:
    """How close a state that starts at zero comes to its stationary level within the training length.

    For a head whose mean log decay is l: 1 - exp(T l) of the stationary mean (the value), and 1 - exp(2 T l) of the
    stationary variance (``variance_saturation``), after T = ``train_length`` tokens.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        train_length: tokens of one training sequence, which no checkpoint states; by default the longest row of the
            source, and ``assumes`` says so.
        delta: a head is ``unsaturated`` (1, else 0) when its mean could still grow by more than this factor minus
            one, which is when the value is below 1 / (1 + delta), the control.

    Returns:
        Result with axes (batch, head, state), between 0 (nothing decays) and 1, with ``half_life`` in tokens.

    Raises:
        ValueError: when ``train_length`` or ``delta`` is not a positive number.
    """
    layers = collect(source)
    train_length, stand_in = _train_length(layers, train_length)
    _check_positive(train_length=train_length, delta=delta)
    parts = []
    for rec in layers:
        rate = clock.mean_log_decay(rec)
        mean = -torch.expm1(train_length * rate)
        threshold = torch.full_like(mean, 1 / (1 + delta))
        unsaturated = (mean < threshold).double().where(~mean.isnan(), torch.nan)
        part = {"value": mean, "variance_saturation": -torch.expm1(2 * train_length * rate)}
        parts.append({**part, "half_life": clock.half_life(rec), "unsaturated": unsaturated, "threshold": threshold})
    return layers.result(
        parts,
        ("batch", "head", "state"),
        name="saturation",
        units="1",
        control=("threshold",),
        settings={"train_length": train_length, "delta": delta},
        assumes=assumes(layers, FROZEN, STATIONARY, ZERO_START, *stand_in),
        checked_by=KNOWN_SATURATION,
    )


def onset_time(
    source: Source, train_length: float | None = None, *, delta: float = 0.25, moment: str = "mean"
) -> Result:
    """Tokens after which a state exceeds everything it reached in training by the factor 1 + delta.

    t* = ln(1 - (1 + delta) m) / l with the mean log decay l and m = 1 - exp(T l), the part of its stationary level
    that the head reached in training; for the variance both use 2 l. A head with (1 + delta) m >= 1 never does: inf.
    It says which heads leave their trained range; when they do depends on ``delta``, and a model may go on working
    after they have.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        train_length: T, tokens of one training sequence; by default the longest row of the source.
        delta: relative growth that counts.
        moment: "mean", for states driven in one direction, or "variance", for states driven by zero-mean tokens.

    Returns:
        Result in tokens with axes (batch, head, state), and the ``saturation`` m. The control, (1 + delta) T, is the
        onset of a head that does not decay: no head is earlier.

    Raises:
        ValueError: when ``train_length`` or ``delta`` is not a positive number, or for an unknown moment.
    """
    layers = collect(source)
    train_length, stand_in = _train_length(layers, train_length)
    _check_positive(train_length=train_length, delta=delta)
    if moment not in ("mean", "variance"):
        raise ValueError(f"unknown moment {moment!r}: choose one of mean, variance")
    limit = (1 + delta) * train_length
    parts = []
    for rec in layers:
        rate = clock.mean_log_decay(rec) * (1 if moment == "mean" else 2)
        reached = -torch.expm1(train_length * rate)
        level = (1 + delta) * reached
        onset = (torch.log1p(-level) / rate).masked_fill(level >= 1, torch.inf).masked_fill(rate == 0, limit)
        parts.append({"value": onset, "saturation": reached, "no_decay_onset": torch.full_like(onset, limit)})
    return layers.result(
        parts,
        ("batch", "head", "state"),
        name="onset_time",
        units="tokens",
        control=("no_decay_onset",),
        settings={"train_length": train_length, "delta": delta, "moment": moment},
        assumes=assumes(layers, FROZEN, STATIONARY, SAME_DRIVE, *stand_in),
        checked_by=KNOWN_ONSET,
    )


def _train_length(layers: Layers, given: float | None) -> tuple[float, tuple[str, ...]]:
    """The training length, and what has to be assumed when none was given."""
    if given is not None:
        return given, ()
    length = float(layers.lengths.max())
    return length, (f"No training length was given: the {length:.0f} tokens of this text stand in for it.",)


def _check_positive(**numbers: float) -> None:
    for name, x in numbers.items():
        if not (x > 0 and math.isfinite(x)):
            raise ValueError(f"{name} is a positive number, got {x}")
