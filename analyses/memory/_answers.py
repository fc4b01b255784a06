"""Answers against age: how often a model still names what it was told so many tokens ago."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory._assumes import CONSTANT_DECAY, FROZEN, STATIONARY
from ssmlens.analyses.memory._split import bootstrap_weights, interval
from ssmlens.lens import Lens

__all__ = ["answers_by_age"]

TOLD = "An answer's age counts from where its token last stood in the text."
BATCH = 32


def answers_by_age(
    lens: Lens,
    ids: Any,
    targets: Any,
    edges: Sequence[int] | None = None,
    *,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Result:
    """Share of right answers by the age of what is asked for, beside what the decays let survive so long.

    Args:
        lens: a model; its answer is the most likely token.
        ids: (b, t) token ids, such as those of a batch of `ssmlens.tasks`.
        targets: (b, t) the token that the output at a position has to name, negative where nothing is asked. Its age
            is how many tokens ago it last stood in the text; one that never did has none and is left out.
        edges: ages at which a bin begins, from small to large; by default 1, 2, 4, ...
        repeats, confidence, seed: of the bootstrap over sequences.

    Returns:
        Result with the axis (age), labelled by the beginnings of the bins. The value is the share of right answers
        between ``low`` and ``high``, NaN without any, with their ``count`` and ``mean_age``. ``retained_slowest`` and
        ``retained_median`` are what is left of a write of the bin's mean age in the slowest head and state of the model
        and in the median one, at the mean decay over these texts. The control, ``guess``, is the share of right
        answers when each question gets the answer to another one.

    Raises:
        ValueError: when shapes differ, nothing is asked, or no answer was told before.
    """
    ids, targets = torch.as_tensor(ids), torch.as_tensor(targets)
    if ids.ndim != 2 or ids.shape != targets.shape:
        raise ValueError(f"ids and targets are (b, t) both, got {tuple(ids.shape)} and {tuple(targets.shape)}")
    ages = _ages(ids, targets)
    asked = ages > 0
    if not bool(asked.any()):
        raise ValueError("no target stands earlier in its own text: there is nothing to recall")
    answers, rates = _read(lens, ids)
    starts = _edges(edges, int(ages.max()))
    right = (answers == targets) & asked
    mixed = _mixed(answers, targets, asked, seed)
    which = torch.bucketize(ages, torch.tensor(starts), right=True) - 1
    sums = {
        name: torch.stack([((which == i) & asked & x).sum(1) for i in range(len(starts))], 1).double()
        for name, x in (("right", right), ("count", asked), ("guess", mixed))
    }
    count = sums["count"].sum(0)
    weights = bootstrap_weights(len(ids), repeats, seed)
    low, high = interval((weights @ sums["right"]) / (weights @ sums["count"]), confidence)
    mean_age = torch.stack([ages[(which == i) & asked].double().mean() for i in range(len(starts))])
    columns = {"low": low, "high": high, "count": count, "mean_age": mean_age}
    columns["retained_slowest"] = torch.exp(rates.max() * mean_age)
    columns["retained_median"] = torch.exp(rates.median() * mean_age)
    return Result(
        name="accuracy",
        value=sums["right"].sum(0) / count,
        dims=("age",),
        units="1",
        coords={"age": starts},
        columns=columns,
        control={"guess": sums["guess"].sum(0) / count},
        settings={
            "model": lens.name,
            "fingerprint": lens.fingerprint,
            "dtype": str(lens.dtype),
            "sequences": len(ids),
            "tokens": ids.shape[1],
            "interval": f"{confidence:.0%} percentile bootstrap over {len(ids)} sequences, {repeats} repeats",
        },
        assumes=(TOLD, FROZEN, STATIONARY),
        checked_by=CONSTANT_DECAY,
    )


def _ages(ids: Tensor, targets: Tensor) -> Tensor:
    """(b, t) tokens since the target last stood in the text; 0 where nothing is asked or it never did."""
    ages = torch.zeros_like(targets)
    for b, t in (targets >= 0).nonzero().tolist():
        told = (ids[b, :t] == targets[b, t]).nonzero()
        if len(told):
            ages[b, t] = t - int(told[-1])
    return ages


def _read(lens: Lens, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token at each position, (b, t), and the mean log decay of every head and state, (k,)."""
    answers, rates = [], []
    for part in ids.split(BATCH):
        found = lens.trace(part).check()
        answers.append(found.logits.argmax(-1).cpu())
        rates.append(torch.cat([clock.mean_log_decay(m.recurrence).mean(0).flatten().cpu() for m in found]))
    return torch.cat(answers), torch.stack(rates).mean(0)


def _edges(edges: Sequence[int] | None, oldest: int) -> list[int]:
    if edges is None:
        return [2**i for i in range(oldest.bit_length())]
    found = sorted({int(k) for k in edges})
    if not found or found[0] < 1:
        raise ValueError("the bins of ages begin at 1 or later")
    return found


def _mixed(answers: Tensor, targets: Tensor, asked: Tensor, seed: int) -> Tensor:
    """Where the answer to another of the questions would have been right."""
    g = torch.Generator().manual_seed(seed)
    given = answers[asked]
    out = torch.zeros_like(asked)
    out[asked] = given[torch.randperm(len(given), generator=g)] == targets[asked]
    return out
