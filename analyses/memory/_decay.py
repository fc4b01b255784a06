"""Retention and half-life: how fast the state forgets, whatever is written and read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmlens.analyses._layers import Layers, Source, collect, positions, shares
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory import _crossing as crossing
from ssmlens.analyses.memory._assumes import CONSTANT_DECAY, FROZEN, POWER, TRUNCATED, assumes

__all__ = ["KINDS", "half_life", "retention"]

KINDS = ("mean", "arithmetic", "forward", "backward")
"""Half-lives that `half_life` takes."""


def retention(source: Source, s: int, t: int) -> Result:
    """Share of what was written at token ``s`` that is left in the state at token ``t``: exp of the summed log decay.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        s: token of the write; negative counts from the end of each batch row.
        t: token of the reading, not before ``s``.

    Returns:
        Result with axes (batch, head, state), between 0 and 1, exactly 1 for s = t; NaN in batch rows that are too
        short. ``log_retention`` is its natural log in nats, to which one step adds -1000 at most.
        The control is the retention under each row's mean decay.

    Raises:
        ValueError: when a token does not exist in any row, or ``t`` comes before ``s``.
    """
    layers = collect(source)
    start, stop = positions(layers, [s]), positions(layers, [t])
    if bool(((stop < start) & (stop >= 0) & (start >= 0)).any()):
        raise ValueError(f"token t={t} comes before s={s}: retention looks from s forward to t")
    known = ((start >= 0) & (stop >= 0))[:, :, None]
    parts = []
    for rec in layers:
        log = -clock.elapsed(rec, start.clamp(min=0)[:, 0], stop.clamp(min=0)[:, 0])
        steps = (stop - start).double()[:, :, None]
        steady = (steps * clock.mean_log_decay(rec)).nan_to_num(0.0).exp()
        part = {"value": log.exp(), "log_retention": log, "mean_decay_retention": steady}
        parts.append({name: x.where(known, torch.nan) for name, x in part.items()})
    return layers.result(
        parts,
        ("batch", "head", "state"),
        name="retention",
        units="1",
        settings={"s": s, "t": t},
        control=("mean_decay_retention",),
        assumes=assumes(layers, FROZEN),
        checked_by=POWER,
    )


def half_life(
    source: Source,
    kind: str = "mean",
    *,
    quantiles: Sequence[float] = (0.1, 0.5, 0.9),
    at: Sequence[int] | None = None,
    interpolate: bool = False,
) -> Result:
    """Tokens until half of a write is forgotten.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        kind: which half-life.
            "mean": ln 2 / mean(-log_decay), the half-life of the constant decay with the same geometric mean.
            "arithmetic": ln 2 / -ln(mean(exp(log_decay))), from the mean of the decays themselves; never shorter
            than "mean" (Jensen) and easily far longer. For comparison with published plots.
            "forward": for token s, the first t - s with at most half of its write left at t.
            "backward": at token t, the age t - s of the youngest write of which at most half is left.
        quantiles: for "forward" and "backward", quantiles over the tokens of each row: the smallest half-life that
            at least this share of the tokens does not exceed. ``reached`` says which share ended inside the text.
        at: for "forward" and "backward", the half-lives of these tokens instead; negative counts from the end of
            each row.
        interpolate: let the decay of a step act evenly over it, so that half-lives are fractions of a token; without
            it "forward" and "backward" are whole numbers.

    Returns:
        Result in tokens with axes (batch, head, state), then ``quantile``, or after ``batch`` ``token``; inf where
        nothing decays or the text ends first. The control of "mean" and "arithmetic" is the number of tokens
        observed: a longer half-life is an extrapolation. That of the others is the "mean" half-life.

    Raises:
        ValueError: for an unknown kind, a quantile outside 0 to 1, or a token that does not exist.
    """
    layers = collect(source)
    if kind not in KINDS:
        raise ValueError(f"unknown half-life {kind!r}: choose one of {', '.join(KINDS)}")
    if kind in ("mean", "arithmetic"):
        return _average_half_life(layers, kind)
    coords: dict[str, Sequence[float]] = {}
    parts = []
    if at is None:
        chosen = shares(quantiles)
        coords["quantile"] = chosen
        for rec in layers:
            value, reached = crossing.crossing_quantiles(rec, kind, chosen, interpolate)
            parts.append({"value": value, "reached": reached, "mean_half_life": clock.half_life(rec)[..., None]})
        axes: tuple[str, ...] = ("batch", "head", "state", "quantile")
    else:
        coords["token"] = list(at)
        tokens = positions(layers, at)
        for rec in layers:
            value = crossing.crossings(rec, kind, tokens, interpolate)
            parts.append({"value": value, "mean_half_life": clock.half_life(rec)[:, None]})
        axes = ("batch", "token", "head", "state")
    return layers.result(
        parts,
        axes,
        coords,
        name=f"{kind}_half_life",
        units="tokens",
        control=("mean_half_life",),
        settings={"kind": kind, "interpolate": interpolate},
        assumes=assumes(layers, FROZEN, TRUNCATED),
        checked_by=CONSTANT_DECAY,
    )


def _average_half_life(layers: Layers, kind: str) -> Result:
    parts = []
    for rec in layers:
        observed = rec.real_lengths.to("cpu", torch.float64)[:, None, None]
        value = clock.half_life(rec) if kind == "mean" else clock.to_half_life(clock.mean_retention(rec).log())
        parts.append({"value": value, "observed_tokens": observed.expand_as(value)})
    sense = "geometric" if kind == "mean" else "arithmetic"
    return layers.result(
        parts,
        ("batch", "head", "state"),
        name="half_life" if kind == "mean" else "arithmetic_half_life",
        units="tokens",
        control=("observed_tokens",),
        settings={"kind": kind},
        assumes=assumes(layers, FROZEN, f"One constant decay, the {sense} mean of all, stands for the whole text."),
        checked_by=CONSTANT_DECAY,
    )
