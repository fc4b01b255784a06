"""The causal rank floor: how much of the state's rank the model needs, by taking the rest away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._metrics import METRICS, Score, make_score
from ssmlens.analyses.capacity._rank_statistics import PER
from ssmlens.analyses.capacity._truncation import Truncation, rank_grid, rerun, run_recurrence, token_of
from ssmlens.lens import Lens
from ssmlens.recurrence import Recurrence
from ssmlens.trace import Trace

__all__ = ["METRICS", "READINGS", "rank_floor"]

READINGS = ("rerun", "frozen")
"""What happens above the truncated layer: everything is computed anew, or dt, B and C of every layer stay those of the
untouched run, so that only what they act on changes. For the last recurrent layer both are the same."""

DRAWS = 999

CUT = "only the way through the chosen layers' states is cut; the convolution still sees the last tokens before the cut"
ENOUGH = "the floor is a sufficient rank for these prompts and this metric; other truncations might do with less"
ROWS = "the interval resamples prompts"
CHECKED = (
    "full rank gives the untouched logits, rank 0 a model whose state starts anew, and a state of k orthogonal pairs "
    "needs rank k: tests of this study"
)


def rank_floor(
    source: Lens | Recurrence,
    prompt: Any = None,
    layer: int | Sequence[int] | None = None,
    metric: str | Callable[[Tensor], Any] = "loss",
    r_grid: int | Sequence[int] | None = None,
    token_cut: int | None = None,
    *,
    targets: Tensor | None = None,
    together: bool = False,
    readings: Sequence[str] = READINGS,
    centred: bool = False,
    per: str = "auto",
    tolerance: float = 0.02,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Truncate the state at a token to its r largest singular directions, and measure what the model still does.

    Args:
        source: a model, or a recurrence, whose ``metric`` then is a function of its outputs y (b, t, h, p).
        prompt: whatever `Lens.trace` takes; rows are resampled for the intervals. None for a recurrence.
        layer: the layer, or several, each truncated on its own; all by default.
        metric: "loss", "accuracy", "kl", "agreement" (see below), or a function of the logits (b, t, v) that returns a
            number or one for each row.
        r_grid: ranks; 0 removes the state. By default 0, 1, 2, 3, 4, 6, 8... to the full rank.
        token_cut: the state before this token is truncated: tokens from it on read the earlier ones through r
            directions of each head. By default half of the shortest row.
        targets: (b, t) the token to name at each position, -100 where none; for "loss" and "accuracy". By default the
            next token.
        together: truncate the layers at once instead of one by one.
        readings: some of `READINGS`.
        centred: truncate what is left after the mean state over rows is taken off, and add it back.
        per: whose state makes a matrix, see `rank_statistics`.
        tolerance: distance from the untruncated metric within which it counts as kept.
        seed: of the bootstrap.
        progress: called with the runs done and the runs there are.

    Returns:
        Result with axes (layer, reading, rank): the metric over positions from the cut on. Columns: ``low`` and
        ``high``, a 95 % percentile bootstrap over rows; ``change`` from the untruncated metric, with ``change_low`` and
        ``change_high`` from the same draws, so that what the rows have in common drops out; ``floor``, the smallest
        rank of the grid from which on the change stays within ``tolerance``, with ``floor_low`` and ``floor_high``
        from the same draws (NaN: no rank of the grid does); ``kept_energy``, the share of the squared singular values
        in the first r; ``logit_difference``, the largest from the untouched logits. Controls: ``untruncated`` and
        ``full_rank``.

        "loss" is the mean negative log likelihood of the targets in nats, "accuracy" the share of targets with the
        largest logit, "kl" the mean divergence of the next-token law from the untouched one in nats, "agreement" the
        share of positions whose top token stays.

    Raises:
        ValueError: for unknown names, ranks below 0, or a cut outside the text.
        LayerError: when a layer does not exist or has no recurrence.
    """
    _check(per, readings, tolerance)
    if isinstance(source, Recurrence):
        return _of_recurrence(source, metric, r_grid, token_cut, centred, per, tolerance, seed)
    if not isinstance(source, Lens):
        raise ValueError(f"pass a Lens, as ssmlens.load(model) makes it, or a Recurrence, not {type(source).__name__}")
    if prompt is None:
        raise ValueError("give a prompt: the rank floor of a model is measured on texts")
    trace = source.trace(prompt).check()
    listed = [layer] if isinstance(layer, int) else sorted(trace.mixers) if layer is None else [int(k) for k in layer]
    for k in listed:
        trace[k]  # raises when there is none
    cut = token_of(token_cut, trace.lengths)
    score = make_score(metric, trace, cut, targets)
    groups = [listed] if together else [[k] for k in listed]
    cuts = {k: Truncation.of(trace[k].recurrence, cut, centred, per) for k in listed}
    ranks = rank_grid(r_grid, max(x.rank for x in cuts.values()))
    found, apart = _runs(source, trace, cut, groups, cuts, ranks, list(readings), score, progress)
    energies = torch.stack([torch.stack([cuts[k].energy(ranks) for k in group]).mean(0) for group in groups])
    return _result(
        found,
        score(trace.logits),
        ranks,
        tolerance,
        seed,
        name=score.name,
        units=score.units,
        dims=("layer", "reading", "rank"),
        coords={
            "layer": ["+".join(map(str, group)) for group in groups] if together else listed,
            "reading": list(readings),
        },
        columns={
            "kept_energy": energies[:, None],
            "logit_difference": apart,
        },
        full=torch.tensor([[[float(max(cuts[k].rank for k in group))]] for group in groups]),
        settings={
            **trace.settings,
            "reconstruction_error": trace.reconstruction_error,
            "token_cut": cut,
            "rows": len(trace.lengths),
            "tokens": int(trace.lengths.max()),
            "centred": centred,
            "per": per,
            "together": together,
        },
    )


def _runs(
    lens: Lens,
    trace: Trace,
    cut: int,
    groups: list[list[int]],
    cuts: dict[int, Truncation],
    ranks: list[int],
    readings: list[str],
    score: Score,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Sums and counts (layer, reading, rank, 2, b), and the largest differences of logits (layer, reading, rank)."""
    rows: dict[tuple[int, str, int], tuple[Tensor, float]] = {}
    runs = [(i, x, r) for i in range(len(groups)) for x in readings for r in ranks]
    for done, (i, reading, r) in enumerate(runs, start=1):
        group = groups[i]
        twin = (i, readings[0], r)
        if min(group) == max(trace.mixers) and twin in rows:
            # Nothing with gates lies above, so that both readings are one.
            rows[i, reading, r] = rows[twin]
        else:
            logits = rerun(lens, trace, cut, {k: cuts[k].to(r) for k in group}, frozen=reading == "frozen")
            rows[i, reading, r] = score(logits), _apart(logits, trace.logits, cut, trace.lengths)
        if progress is not None:
            progress(done, len(runs))
    shape = (len(groups), len(readings), len(ranks))
    found = torch.stack([rows[x][0] for x in runs])
    apart = torch.tensor([rows[x][1] for x in runs], dtype=torch.float64)
    return found.reshape(*shape, *found.shape[1:]), apart.reshape(shape)


def _of_recurrence(
    rec: Recurrence,
    metric: str | Callable[[Tensor], Any],
    r_grid: int | Sequence[int] | None,
    token_cut: int | None,
    centred: bool,
    per: str,
    tolerance: float,
    seed: int,
) -> Result:
    if not callable(metric):
        raise ValueError("a recurrence has no logits: give a function of its outputs (b, t, h, p) as the metric")
    cut = token_of(token_cut, rec.real_lengths)
    truncation = Truncation.of(rec, cut, centred, per)
    ranks = rank_grid(r_grid, truncation.rank)
    score = Score.of(metric, rec.batch)
    found = torch.stack([score(run_recurrence(rec, cut, truncation.to(r))) for r in ranks])
    return _result(
        found,
        score(rec.run()),
        ranks,
        tolerance,
        seed,
        name=score.name,
        units=score.units,
        dims=("rank",),
        coords={},
        columns={"kept_energy": truncation.energy(ranks)},
        full=torch.tensor(float(truncation.rank)),
        settings={"token_cut": cut, "rows": rec.batch, "centred": centred, "per": per},
    )


def _result(
    found: Tensor,
    untouched: Tensor,
    ranks: list[int],
    tolerance: float,
    seed: int,
    *,
    full: Tensor,
    columns: dict[str, Tensor],
    coords: dict[str, Any],
    settings: dict[str, Any],
    **about: Any,
) -> Result:
    """From sums and counts of each row, found (..., ranks, 2, b) and untouched (2, b), to the result."""
    rows = found.shape[-1]
    picks = torch.randint(rows, (DRAWS, rows), generator=torch.Generator().manual_seed(seed))
    counts = torch.nn.functional.one_hot(picks, rows).sum(1).double()
    value, exact = _ratio(found.sum(-1)), _ratio(untouched.sum(-1))
    drawn = _ratio((found @ counts.mT).movedim(-1, 0))  # (draws, ..., ranks)
    drawn_exact = _ratio((untouched @ counts.mT).movedim(-1, 0))
    change = drawn - drawn_exact.reshape(-1, *[1] * (drawn.ndim - 1))
    floors = _floor(change, ranks, tolerance)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = drawn.nanquantile(ends, dim=0)
    change_low, change_high = change.nanquantile(ends, dim=0)
    # A draw without a floor lies above every rank.
    least, most = floors.nan_to_num(nan=torch.inf).quantile(ends, dim=0, interpolation="nearest")
    return Result(
        value=value,
        coords={**coords, "rank": ranks},
        columns={
            "low": low,
            "high": high,
            "change": value - exact,
            "change_low": change_low,
            "change_high": change_high,
            "floor": _floor(value - exact, ranks, tolerance)[..., None],
            "floor_low": least[..., None],
            "floor_high": most[..., None],
            **columns,
        },
        control={"untruncated": exact, "full_rank": full},
        settings={
            **settings,
            "tolerance": tolerance,
            "seed": seed,
            "interval": f"95 %, percentile bootstrap over {rows} rows, {DRAWS} draws",
        },
        assumes=(CUT, ENOUGH, ROWS),
        checked_by=CHECKED,
        **about,
    )


def _ratio(x: Tensor) -> Tensor:
    """Sum over count on the last axis but for what is behind it: x (..., 2)."""
    return x[..., 0] / x[..., 1]


def _floor(gap: Tensor, ranks: list[int], tolerance: float) -> Tensor:
    """The smallest rank from which on the gap (..., ranks) stays within the tolerance; NaN when none does."""
    bad = ~(gap.abs() <= tolerance)  # NaN is no answer
    after = bad.flip(-1).long().cumsum(-1).flip(-1) == 0  # nothing bad from here on
    first = after.long().argmax(-1)
    return torch.where(after.any(-1), torch.tensor(ranks, dtype=torch.float64)[first], torch.nan)


def _apart(logits: Tensor, untouched: Tensor, cut: int, lengths: Tensor) -> float:
    real = torch.arange(logits.shape[1], device=logits.device) < lengths.to(logits.device)[:, None]
    difference = (logits.double() - untouched.double()).abs().amax(-1)
    return float(difference[:, cut:].where(real[:, cut:], 0.0).max())


def _check(per: str, readings: Sequence[str], tolerance: float) -> None:
    if per not in PER:
        raise ValueError(f"unknown per {per!r}: choose one of {', '.join(PER)}")
    unknown = [x for x in readings if x not in READINGS]
    if unknown or isinstance(readings, str) or not len(readings):
        raise ValueError(f"readings are some of {', '.join(READINGS)}, got {readings!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is at least 0, got {tolerance}")
