"""Ranks of the state matrix, raw and centred, beside what random writes would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._layers import Source, collect, listed, positions
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._state_size import entropy_rank
from ssmlens.recurrence import Recurrence

__all__ = ["PER", "matrix_ranks", "rank_null", "rank_statistics"]

PER = ("auto", "head", "layer")
"""Whose state makes one matrix: a head's (p x n), or a layer's with all channels stacked (h p x n). "auto" takes the
head's, and the layer's where a head has one channel (Mamba-1)."""

DEFAULT_TOKENS = 16

NOT_CAPACITY = (
    "no rank of the state is its capacity: a mean of one sign that all writes share is a large component of rank one "
    "and hides what is stored; rank_floor measures what the model needs"
)
NULL = "the null model is a state filled for long with independent isotropic keys and values at the mean decay"
CHECKED = (
    "flat spectrum r, geometric spectra, diag(2, 1, 1); the null model against simulation: checks.py of this study"
)


def rank_statistics(
    source: Source | Tensor | np.ndarray | list[Any],
    at: int | Sequence[int] | None = None,
    *,
    per: str = "auto",
    threshold: float = 1e-4,
) -> Result:
    """How many directions carry the energy of the state matrix, per head and token, raw and centred.

    Args:
        source: a trace, a mixer's trace, a recurrence, or states (..., p, n) themselves.
        at: tokens after which the state is looked at; by default 16 evenly spaced ones in the second half of the text.
        per: one of `PER`.
        threshold: singular values above this share of the largest count in ``threshold_rank``.

    Returns:
        Result with axes (batch, head, token), with ``layer`` in front for a trace; for states the axes in front of
        (p, n). The value is the participation ratio (sum s^2)^2 / sum s^4. Columns: ``entropy_rank``, exp(entropy of
        s / sum s); ``stable_rank``, sum s^2 / max s^2; ``threshold_rank``; the same four of the state less its mean
        over tokens and batch rows, with ``centred_`` in front (NaN for a single state); ``mean_energy``, the share
        of the energy in that mean. The control ``null`` is `rank_null` at the head's mean decay; NaN where the states
        of a head, or the heads of a layer taken as one, decay apart, since the formula is for one decay.

    Raises:
        ValueError: for an unknown ``per``, a token outside the text, or states that are no matrices.
    """
    if per not in PER:
        raise ValueError(f"unknown per {per!r}: choose one of {', '.join(PER)}")
    settings = {"per": per, "threshold": threshold}
    if isinstance(source, Tensor | np.ndarray | list):
        states = torch.as_tensor(source).detach().double().cpu()
        if states.ndim < 2 or not states.numel():
            raise ValueError(f"states are (..., p, n), got {tuple(states.shape)}")
        part = _columns(states, threshold, tuple(range(states.ndim - 2)))
        return Result(
            name="participation_ratio",
            value=part.pop("value"),
            dims=tuple(f"axis{i}" for i in range(states.ndim - 2)),
            units="directions",
            columns=part,
            settings={**settings, "source": f"states {tuple(states.shape)}"},
            assumes=(NOT_CAPACITY,),
            checked_by=CHECKED,
        )
    layers = collect(source)
    longest = int(layers.lengths.max())
    if at is None:
        steps = torch.linspace(longest // 2, longest - 1, min(DEFAULT_TOKENS, longest - longest // 2))
        at = sorted({int(x) for x in steps})
    at = listed(at)
    where = positions(layers, at)
    parts = []
    for rec in layers:
        states, decay = _states(rec, where, per)
        part = _columns(states, threshold, (0, 2))
        null = rank_null(decay, states.shape[-1], states.shape[-2]).value
        parts.append({**part, "null": null[..., None].expand_as(part["value"]).clone()})
    return layers.result(
        parts,
        ("batch", "head", "token"),
        coords={"token": [int(t) for t in at]},
        control=("null",),
        settings=settings,
        name="participation_ratio",
        units="directions",
        assumes=(NOT_CAPACITY, NULL),
        checked_by=CHECKED,
    )


def matrix_ranks(states: Tensor, threshold: float = 1e-4) -> dict[str, Tensor]:
    """The four ranks of states (..., p, n) by their singular values, NaN where a state holds NaN, 0 where it is 0."""
    known = torch.isfinite(states).all(-1).all(-1)
    values = torch.linalg.svdvals(states.where(known[..., None, None], 0.0))
    energy, top = values.square(), values[..., :1]
    total = energy.sum(-1)

    def over(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b, 0.0)

    # By the largest first, so that squares of squares of small states do not vanish.
    scaled = over(values, top)
    found = {
        "value": over(scaled.square().sum(-1).square(), scaled.pow(4).sum(-1)),
        "entropy_rank": entropy_rank(values),
        "stable_rank": over(total, energy[..., 0]),
        "threshold_rank": (values > threshold * top).sum(-1).double(),
    }
    return {k: x.where(known, torch.nan) for k, x in found.items()}


def rank_null(
    decay: float | Sequence[float] | Tensor | np.ndarray, d_state: int, channels: int, *, name: str = "rank_null"
) -> Result:
    """Participation ratio of a state that independent random writes fill at a constant decay.

    ``N P / ((N + P + 1) + r ((N + 2)(P + 2) - (N + P + 1)))`` with ``r = (1 - a^2) / (1 + a^2)``, for state size N, P
    channels and decay a: the ratio of expectations (E sum s^2)^2 / E sum s^4 under isotropic Gaussian keys and values.

    Args:
        decay: a in [0, 1], a number or an array of any shape.
        d_state: N.
        channels: P.
        name: of the result.

    Returns:
        Result with the axes of ``decay`` (none for a number): the expected participation ratio. Column: ``held``,
        (1 + a^2) / (1 - a^2), the number of writes that it holds by energy.

    Raises:
        ValueError: for a decay outside [0, 1] or sizes below 1.
    """
    a = torch.as_tensor(decay, dtype=torch.float64)
    if bool(((a < 0) | (a > 1)).any()):
        raise ValueError("a decay lies between 0 and 1")
    if d_state < 1 or channels < 1:
        raise ValueError(f"d_state and channels are at least 1, got {d_state} and {channels}")
    n, p = d_state, channels
    r = (1 - a.square()) / (1 + a.square())
    few = n + p + 1
    return Result(
        name=name,
        value=n * p / (few + r * ((n + 2) * (p + 2) - few)),
        dims=tuple(f"axis{i}" for i in range(a.ndim)),
        units="directions",
        columns={"held": 1 / r},
        settings={"d_state": n, "channels": p},
        assumes=(NULL,),
        checked_by=CHECKED,
    )


def _states(rec: Recurrence, where: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """States (b, head, token, p, n), NaN where a row has no such token, and mean decay (b, head), in float64."""
    steps = sorted({int(t) for t in where.flatten().tolist() if t >= 0})
    states = rec.states(steps).double().cpu()
    index = torch.tensor([[steps.index(t) if t >= 0 else 0 for t in row] for row in where.tolist()])
    picked = torch.stack([x[i] for x, i in zip(states, index)])
    picked = picked.where((where >= 0)[:, :, None, None, None], torch.nan).transpose(1, 2)
    # Averages of decays belong in log space.
    real = rec.real[:, :, None, None]
    logs = rec.log_decay.double().where(real, 0.0)
    logs = logs.where(logs.isfinite(), 0.0).sum(1) / rec.real_lengths.double()[:, None, None]
    decay = logs[..., 0].exp().cpu() if logs.shape[-1] == 1 else torch.full(logs.shape[:2], torch.nan)
    if per == "layer" or (per == "auto" and rec.head_dim == 1):
        picked = picked.transpose(1, 2).flatten(2, 3)[:, None]
        decay = decay if rec.n_heads == 1 else torch.full((rec.batch, 1), torch.nan)
    return picked, decay.double()


def _columns(states: Tensor, threshold: float, over: tuple[int, ...]) -> dict[str, Tensor]:
    """Raw and centred ranks of states (..., p, n); the mean is taken over the axes ``over``."""
    found = matrix_ranks(states, threshold)
    mean = states.nanmean(over, keepdim=True) if over else states
    centred = matrix_ranks(states - mean, threshold)
    alone = states[..., 0, 0].isfinite().sum(over, keepdim=True) < 2 if over else torch.tensor(True)
    for key, x in centred.items():
        found["centred_participation" if key == "value" else f"centred_{key}"] = x.masked_fill(alone, torch.nan)
    energy = states.square().sum((-2, -1))
    average = energy.nanmean(over, keepdim=True) if over else energy
    share = mean.square().sum((-2, -1)) / average
    found["mean_energy"] = share.expand_as(energy).clone().masked_fill(alone, torch.nan)
    return found
