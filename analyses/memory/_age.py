"""Recall against age: what the decays alone predict, beside what a probe reads and what the reads weigh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._layers import collect
from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import ENERGY_SHARE, FROZEN, LINEAR_PROBE
from ssmlens.analyses.memory._fidelity import fidelity
from ssmlens.recurrence import Recurrence
from ssmlens.trace import MixerTrace, Trace

__all__ = ["energy_shares", "recall_by_age"]

WHITE = "The prediction takes the writes as unrelated to each other, so that their energies add up."
READS = 48
"""Tokens whose shares are averaged, of one row; of many rows at least four each."""


def recall_by_age(
    source: Trace | MixerTrace | Recurrence,
    targets: Any = None,
    lags: Sequence[int] | None = None,
    *,
    rank: int = 256,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """How well a token is recalled k tokens later: measured with a probe, and predicted from the decays alone.

    Predicted is the share of a state's energy that the write of k tokens ago makes up, |rho W[t-k]|^2 over the sum of
    |rho W[t-j]|^2: for one leaky unit with white input that is exactly the R2 of the best readout, (1 - a^2) a^(2k).
    Read is the share of |M[t, t-k]| in its row: what the model itself weighs.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        targets, lags, rank, seed, resume, progress: as for `ssmlens.analyses.memory.fidelity`.

    Returns:
        Result with axes (layer, lag), as from `fidelity`: the value is the measured R2 between ``low`` and ``high``,
        with ``net``. ``predicted`` is the mean over heads, ``predicted_best`` that of the head which holds most of this
        age, and ``read`` the mean over heads. ``rank_correlation`` is Spearman's of predicted and measured over the
        lags, NaN for fewer than four. Controls as of `fidelity`: ``chance`` and ``current``.

    Raises:
        ValueError: as `fidelity`.
    """
    measured = fidelity(source, targets, lags, rank=rank, seed=seed, resume=resume, progress=progress)
    steps = [int(k) for k in measured.coords["lag"]]
    layers = collect(source)
    parts = [_predicted(rec, steps) for rec in layers]
    stacked = "layer" in measured.dims
    columns = {k: torch.stack([p[k] for p in parts]) if stacked else parts[0][k] for k in parts[0]}
    rows = zip(columns["predicted"].reshape(-1, len(steps)), measured.value.reshape(-1, len(steps)))
    correlation = torch.tensor([_spearman(a, b) for a, b in rows], dtype=torch.float64)
    columns["rank_correlation"] = correlation[:, None] if stacked else correlation
    return Result(
        name="recall_by_age",
        value=measured.value,
        dims=measured.dims,
        units="1",
        coords=measured.coords,
        columns={**{k: measured.columns[k] for k in ("low", "high", "net")}, **columns},
        control={k: measured.control[k] for k in ("chance", "current")},
        settings=measured.settings,
        assumes=(LINEAR_PROBE, FROZEN, WHITE),
        checked_by=ENERGY_SHARE,
    )


def _predicted(rec: Recurrence, lags: list[int]) -> dict[str, Tensor]:
    """(k,) predictions of one layer, over its rows."""
    held, read = [], []
    reads = max(4, READS // rec.batch)
    for b, n in enumerate(rec.real_lengths.tolist()):
        if n <= lags[-1]:
            continue
        at = torch.linspace(lags[-1], n - 1, reads, dtype=torch.float64).round().long()
        held.append(energy_shares(rec, b, at, lags))
        read.append(_read_shares(rec, b, at, lags))
    shares = torch.stack(held).mean(0)  # (h, k)
    return {
        "predicted": shares.nanmean(0),
        "predicted_best": shares.nan_to_num(0.0).amax(0),
        "read": torch.stack(read).nanmean(0),
    }


def energy_shares(rec: Recurrence, b: int, at: Tensor, lags: Sequence[int]) -> Tensor:
    """Share of each head's energy that the writes of ``lags`` tokens ago make up, (h, k), mean over the tokens ``at``.

    The energies of writes of one age decay at one rate for each state, so that one clock a head and state is enough.
    """
    ticks = clock.Clock.of(rec)
    inputs = rec.inputs
    value = inputs.value[b].double().square().sum(-1)  # (t, h)
    write = inputs.write[b].double()
    write = write.repeat_interleave(rec.n_heads // write.shape[1], 1)
    if inputs.dt is not None:
        write = write * inputs.dt[b].double()[..., None]
    energy = value[..., None] * write.square()  # (t, h, n)
    steps = torch.tensor(list(lags))
    total = torch.zeros(rec.n_heads, len(steps), dtype=torch.float64)
    for t in at.tolist():
        nats = (ticks.ticks[b, :, :, t, None] - ticks.ticks[b][:, :, : t + 1]) * ticks.rate[:, :, None]
        left = torch.exp(-2 * nats).permute(2, 0, 1) * energy[: t + 1]  # (t + 1, h, n)
        left = left.sum(-1)
        total += (left[t - steps] / left.sum(0)).mT.cpu()
    return total / len(at)


def _read_shares(rec: Recurrence, b: int, at: Tensor, lags: Sequence[int]) -> Tensor:
    """Share of the weight of a row of the implicit attention at each lag, (k,), mean over rows and heads."""
    steps, found = torch.tensor(list(lags)), []
    one = Recurrence(rec.inputs.replace(**{k: x[b : b + 1] for k, x in rec.inputs.tensors().items() if k != "A"}))
    for t in at.tolist():
        row = one.attention.row(t)[0, :, : t + 1].double().abs()
        found.append((row[:, t - steps] / row.sum(1, keepdim=True)).nanmean(0).cpu())
    return torch.stack(found).mean(0)


def _spearman(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    known = a.isfinite() & b.isfinite()
    if int(known.sum()) < 4 or len(a[known].unique()) < 2 or len(b[known].unique()) < 2:
        return float("nan")
    return float(spearmanr(a[known].numpy(), b[known].numpy()).statistic)
