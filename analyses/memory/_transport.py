"""Memory fidelity without a probe: how much of a write is still there, and how it stands out from the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlens.analyses._layers import Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import FROZEN, ONE_WRITE, assumes
from ssmlens.analyses.memory._features import state_blocks
from ssmlens.analyses.memory._material import checked_lags
from ssmlens.analyses.memory._split import bootstrap_weights, interval
from ssmlens.recurrence import Recurrence

__all__ = ["transport"]

SIGNED = "Addressability is the cosine of one write with the whole state: writes that point the same way raise it."
NAMES = ("survival", "addressability", "absent")


def transport(
    source: Source,
    lags: Sequence[int] | None = None,
    *,
    reads: int = 64,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Result:
    """What is left of the write of k tokens ago, and how far it stands out in the state: exact, nothing is trained.

    With W[s] the write of token s and rho(t, s) the decay since, both per state: survival is |rho W| / |W|, and
    addressability the cosine of rho W with the state at t, signal against everything else that the state holds.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        lags: steps back; by default log-spaced up to an eighth of the longest row, 256 at most.
        reads: tokens t, evenly spaced, that each row is read at.
        repeats, confidence, seed: of the bootstrap over the tokens read, for the intervals of both.

    Returns:
        Result with axes (batch, head, lag), means over the tokens read. The value is the survival, between ``low`` and
        ``high``, and ``addressability`` has ``addressability_low`` and ``addressability_high``. The control,
        ``absent``, is the cosine that the write of token t + k would have, which the state cannot hold: writes
        of trained models share a common direction, and what lies above the control is memory.

    Raises:
        ValueError: when lags do not exist, or leave no token that has both a token k before and k after it.
    """
    layers = collect(source)
    steps = checked_lags(lags, layers.lengths)
    parts = [_layer(rec, steps, reads, (repeats, confidence, seed)) for rec in layers]
    return layers.result(
        parts,
        ("batch", "head", "lag"),
        {"lag": steps},
        name="transport",
        units="1",
        control=("absent",),
        settings={
            "lags": steps,
            "reads": reads,
            "seed": seed,
            "interval": f"{confidence:.0%} percentile bootstrap over the tokens read, {repeats} repeats",
        },
        assumes=assumes(layers, FROZEN, SIGNED),
        checked_by=ONE_WRITE,
    )


def _layer(rec: Recurrence, lags: list[int], reads: int, bootstrap: tuple[int, float, int]) -> dict[str, Tensor]:
    where = _read_at(rec, lags[-1], reads)  # (b, reads)
    ticks = clock.Clock.of(rec)
    out = {name: torch.full((*where.shape, rec.n_heads, len(lags)), torch.nan, dtype=torch.float64) for name in NAMES}
    for stretch, states in state_blocks(rec):
        for b, i in ((where >= stretch.start) & (where < stretch.stop)).nonzero().tolist():
            t = int(where[b, i])
            found = _at(rec, ticks, b, t, states[b, t - stretch.start].double(), torch.tensor(lags))
            for name, x in zip(NAMES, found):
                out[name][b, i] = x.cpu()
    repeats, confidence, seed = bootstrap
    weights = bootstrap_weights(where.shape[1], repeats, seed)
    part = {}
    for name, low, high in (
        ("survival", "low", "high"),
        ("addressability", "addressability_low", "addressability_high"),
    ):
        ends = [interval(_means(x, weights), confidence) for x in out[name]]
        part[low], part[high] = (torch.stack([end[k] for end in ends]) for k in (0, 1))
    means = {name: x.nanmean(1) for name, x in out.items()}
    return {"value": means.pop("survival"), **means, **part}


def _read_at(rec: Recurrence, reach: int, reads: int) -> Tensor:
    """(b, reads) tokens of each row that have ``reach`` tokens before and after them."""
    rows = []
    for n in rec.real_lengths.tolist():
        first, last = reach, n - 1 - reach
        if last < first:
            raise ValueError(
                f"no token of a row of {n} has {reach} tokens before and after it: give smaller lags or a longer text"
            )
        rows.append(torch.linspace(first, last, reads, dtype=torch.float64).round().long())
    return torch.stack(rows)


def _at(rec: Recurrence, ticks: clock.Clock, b: int, t: int, state: Tensor, lags: Tensor) -> tuple[Tensor, ...]:
    """Survival, addressability and the cosine of an absent write, (h, k), for the state (h, p, n) at one token."""
    nats = (ticks.ticks[b, :, :, t, None] - ticks.ticks[b][:, :, t - lags]) * ticks.rate[:, :, None]
    decay = torch.exp(-nats).permute(2, 0, 1)  # (k, h, n or 1)
    value, write = _write(rec, b, t - lags)
    kept = decay * write
    size = value.norm(dim=-1) * write.norm(dim=-1)
    survival = torch.where(size > 0, value.norm(dim=-1) * kept.norm(dim=-1) / size, torch.nan)
    other_value, other_write = _write(rec, b, t + lags)
    # The current write is in the state: a token in the future has none, whatever the lag.
    there = _cosine(value, kept, state)
    absent = _cosine(other_value, decay * other_write, state).where((lags > 0).to(state.device)[:, None], torch.nan)
    return survival.mT, there.mT, absent.mT


def _write(rec: Recurrence, b: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """Value (k, h, p) and write (k, h, n) of some tokens of one row, in float64."""
    inputs = rec.inputs
    value, write = inputs.value[b, at].double(), inputs.write[b, at].double()
    write = write.repeat_interleave(rec.n_heads // write.shape[1], 1)
    return value, write if inputs.dt is None else write * inputs.dt[b, at].double()[..., None]


def _cosine(value: Tensor, write: Tensor, state: Tensor) -> Tensor:
    """Cosine of outer(value, write), (k, h), with the state (h, p, n)."""
    size = value.norm(dim=-1) * write.norm(dim=-1) * state.norm(dim=(-2, -1))
    dot = torch.einsum("khp,hpn,khn->kh", value, state, write)
    return torch.where(size > 0, dot / size, torch.nan)


def _means(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted means over the first axis (reads, ...), NaN left out, for each row of weights: (repeats, ...)."""
    known = ~x.isnan()
    total = torch.tensordot(weights, x.nan_to_num(0.0), 1)
    return total / torch.tensordot(weights, known.double(), 1)
