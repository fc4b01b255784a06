"""Level 0: the exponents of every state with its gates frozen, which are the means of its log decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._layers import Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._statistics import BLOCKS, block_means, bootstrap
from ssmlens.errors import SsmlensError
from ssmlens.recurrence import Recurrence

__all__ = ["latent"]

AXES = ("batch", "head", "state")


def latent(source: Source, window: int | None = None) -> Result:
    """Lyapunov exponents with frozen gates: the mean of log_decay over the text, exactly.

    With its gates given a state is multiplied by exp(log_decay[t]), so that its exponent is the mean of log_decay.
    It is at most 0 for every model with decays at most 1, whatever was learnt: a property of the family.

    Args:
        source: a `Trace` (layers stacked), a `MixerTrace` or a `Recurrence`.
        window: tokens of a stretch for the finite-time exponents; by default a twentieth of the text, at least 1.

    Returns:
        Value ([layer,] batch, head[, state]) in nats per token, -inf where a state is forgotten outright, with
        ``standard_error``, ``low`` and ``high`` (95 %, bootstrap of 20 blocks of the text), ``window_std``: spread
        of the exponents of whole windows, and ``multiplicity``: entries of the state that share the exponent.

    Raises:
        SsmlensError: for a delta rule, whose transition is no diagonal matrix: `spectrum` handles it as a map.
    """
    layers = collect(source)
    if layers.has_erase:
        raise SsmlensError("a delta rule's transition is not diagonal: give its map to lyapunov.spectrum instead")
    shortest = int(layers.lengths.min())
    width = max(1, shortest // BLOCKS) if window is None else window
    if not 1 <= width <= shortest:
        raise SsmlensError(f"window is between 1 and the {shortest} tokens of the shortest row, got {window}")
    return layers.result(
        [_exponents(rec, width) for rec in layers],
        AXES,
        settings={"study": "latent", "window": width, "interval": f"95 %, bootstrap of {BLOCKS} blocks of the text"},
        name="lyapunov_latent",
        units="nats/token",
        assumes=(
            "gates and inputs are what they were on this text, untouched by the perturbation",
            "this text's average stands for the average over all text",
        ),
        checked_by="mean of log_decay to 1e-14: tests/analyses/lyapunov/test_latent.py",
    )


def _exponents(rec: Recurrence, window: int) -> dict[str, Tensor]:
    """Exponents (b, h, n or 1) and their companions."""
    rows = [_row(rec, b, int(length), window) for b, length in enumerate(rec.real_lengths)]
    parts: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    shared = rec.d_state if parts["value"].shape[2] == 1 else 1
    parts["multiplicity"] = torch.full_like(parts["value"], shared * rec.head_dim)
    return parts


def _row(rec: Recurrence, b: int, length: int, window: int) -> dict[str, Tensor]:
    """The same (h, n or 1) of one text."""
    clock = _clock(rec, b, length)
    ones = torch.ones(length, dtype=torch.float64)
    error, low, high = bootstrap(_rates(rec, block_means(clock, ones)))
    windows = _rates(rec, clock[: length // window * window].unflatten(0, (-1, window)).mean(1))
    finite = windows.isfinite().all(0)
    spread = torch.where(finite, windows, 0.0).std(0, unbiased=False).where(finite, torch.nan)
    return {
        "value": _rates(rec, clock.mean(0)[None])[0],
        "standard_error": error,
        "low": low,
        "high": high,
        "window_std": spread,
    }


def _clock(rec: Recurrence, b: int, length: int) -> Tensor:
    """What the log decay is proportional to, (t, h, ...) in float64: dt where the decay is dt * A."""
    x = rec.inputs
    if x.dt is None or x.A is None or x.reset is not None:
        return rec[b : b + 1].log_decay[0, :length].cpu().double()
    return x.dt[b, :length].cpu().double()


def _rates(rec: Recurrence, clock: Tensor) -> Tensor:
    """Log decay (m, h, n or 1) of m means of the clock."""
    if clock.ndim == 3:
        return clock
    assert rec.inputs.A is not None
    return clock[..., None] * rec.inputs.A.cpu().double()
