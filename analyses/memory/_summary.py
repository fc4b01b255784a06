"""The memory of each layer in one table."""

from __future__ import annotations

import torch

from ssmlens.analyses._layers import Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import (
    CONSTANT_DECAY,
    FROZEN,
    GEOMETRIC_KERNEL,
    KNOWN_SATURATION,
    READING,
    STATIONARY,
    assumes,
)
from ssmlens.analyses.memory._reach import mean_distance
from ssmlens.analyses.memory._saturation import saturation

__all__ = ["summary"]


def summary(source: Source, train_length: float | None = None, *, delta: float = 0.25) -> Result:
    """The memory of each layer in one table: half-lives, mean distance and saturation over its heads and states.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        train_length: tokens of one training sequence, for the saturation; by default the longest traced row, which
            asks how settled the states are at the end of this text.
        delta: as in `saturation`.

    Returns:
        Result with axes (batch). The value is the median "mean" half-life in tokens over heads and states, with
        ``half_life_q10``, ``half_life_q90`` and ``longer_than_text``, the share of heads and states whose half-life
        exceeds the tokens observed. Of the last token, as means over heads: ``mean_distance``, ``spread``,
        ``distance_q90`` and ``fraction_of_uniform``. Then ``saturation`` (median), ``unsaturated`` (share), and for a
        traced model its ``reconstruction_error``. The controls are the tokens observed and ``uniform_distance``.
    """
    layers = collect(source)
    length = float(layers.lengths.max()) if train_length is None else train_length
    errors = layers.settings.get("reconstruction_error", {})
    tokens = layers.lengths
    parts = []
    for layer, rec in layers.recurrences.items():
        lives = clock.half_life(rec).flatten(1).sort(1).values
        picks = [clock.order_index(q, lives.shape[1]) for q in (0.5, 0.1, 0.9)]
        part = dict(zip(("value", "half_life_q10", "half_life_q90"), lives[:, picks].unbind(1)))
        part["longer_than_text"] = (lives > tokens[:, None]).double().mean(1)
        far = mean_distance(rec, reduce="mean")
        part |= {"mean_distance": far.value, **far.columns}
        settled = saturation(rec, length, delta=delta)
        part["saturation"] = settled.value.flatten(1).nanmedian(1).values
        part["unsaturated"] = settled.columns["unsaturated"].flatten(1).nanmean(1)
        if layer in errors:
            part["reconstruction_error"] = torch.full_like(tokens, errors[layer])
        parts.append({**part, "observed_tokens": tokens, "uniform_distance": (tokens - 1) / 2})
    return layers.result(
        parts,
        ("batch",),
        name="half_life",
        units="tokens",
        control=("observed_tokens", "uniform_distance"),
        settings={"train_length": length, "delta": delta},
        assumes=(*assumes(layers, FROZEN, STATIONARY), *READING),
        checked_by="; ".join((CONSTANT_DECAY, GEOMETRIC_KERNEL, KNOWN_SATURATION)),
    )
