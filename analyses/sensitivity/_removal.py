"""What each part of a model is worth: the loss without it, alone and in a greedy order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.sensitivity._text import SPLITS, Text
from ssmlens.analyses.sensitivity._units import Model, Unit, units_of
from ssmlens.lens import Lens

__all__ = ["described", "fingerprint", "removal"]


def removal(
    lens: Lens, prompt: Any, kind: str = "block", *, layers: Iterable[int] | None = None, group: int | None = None,
    targets: Sequence[int] | None = None, control: bool = True, resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Change of the loss when one part at a time is taken out, split by position and by recall.

    Args:
        lens: a model whose layers all are mixers.
        prompt: whatever `Lens.trace` takes; several texts are rows of their own.
        kind: "block", "ssm" or "head", see `KINDS`.
        layers: where; everywhere by default.
        group: neighbouring heads that are taken out together, see `units_of`.
        targets: positions of the tokens whose loss counts, negative ones from a row's end; all by default. A model
            that was trained on some targets alone has no meaningful loss on the others.
        control: also replace each part by its mean over the text.
        resume: file that keeps each part that is done; a run with the same settings goes on there.
        progress: called with the parts done and the parts there are.

    Returns:
        Nats a token, (part, split), splits as in `SPLITS`. Columns: ``low`` and ``high``, 95 % of the block bootstrap
        over 20 stretches of the text, ``loss`` of the whole model, ``targets`` (how many tokens the mean is over),
        ``layer`` and ``head`` (the first of a group; -1 for other parts), and ``recall_excess`` with ``excess_low``
        and ``excess_high``: the change on recall targets less that on the others, in bits. Control: ``mean_change``,
        the change when the part gives its mean over the text's tokens instead of nothing: what is left of it without
        the constant that the layers above are used to.

    Raises:
        SsmlensError: for an unknown part or an empty text.
        LayerError: for a layer that does not exist.
        UnsupportedModelError: when a layer is no mixer.
    """
    units, text = units_of(lens, kind, layers, group), Text.of(lens, prompt, targets)
    model = Model(lens, text)
    about = {"part": kind, "group": group, "control": control, **fingerprint(text)}
    ledger = Ledger(resume, {**text.settings, **about})
    base = model.remember()
    changes, means = [], []
    for done, unit in enumerate(units):
        part = ledger.get(unit.label, partial(_one, model, unit, base, control))
        changes.append(torch.tensor(part["change"], dtype=torch.float64))
        means.append(torch.tensor(part["mean"], dtype=torch.float64))
        if progress is not None:
            progress(done + 1, len(units))
    value, low, high = (x.T for x in text.means(torch.stack(changes, dim=1)))
    controls = {"mean_change": text.means(torch.stack(means, dim=1))[0].T} if control else {}
    loss = text.means(base)[0]
    excess = [x[:, None] / math.log(2) for x in text.excess(torch.stack(changes, dim=1))]
    return Result(
        name="loss_change",
        value=value,
        dims=("part", "split"),
        units="nats per token",
        coords={"part": [unit.label for unit in units], "split": list(SPLITS)},
        columns={
            "low": low,
            "high": high,
            "loss": loss,
            "targets": text.masks.sum(1),
            **described(units),
            **dict(zip(("recall_excess", "excess_low", "excess_high"), excess)),
        },
        control=controls,
        settings={**text.settings, **about},
        assumes=(
            "A part's worth alone: two parts that stand in for each other both look worthless.",
            "The text is one sample: the interval is over stretches of it, not over texts.",
            "Zero is no value the layers above were trained on; mean_change tells how much of the change is that.",
        ),
        checked_by="a part with no weights changes nothing; tests/analyses/sensitivity/test_removal.py",
    )


def described(units: Iterable[Unit]) -> dict[str, Tensor]:
    """Columns (part, 1) that say which part each is."""
    listed = list(units)
    heads = [unit.heads[0] if unit.heads else -1 for unit in listed]
    numbers = {"layer": [unit.layer for unit in listed], "head": heads}
    return {k: torch.tensor(x, dtype=torch.float64)[:, None] for k, x in numbers.items()}


def fingerprint(text: Text) -> dict[str, Any]:
    """What tells one text from another."""
    digest = hashlib.sha256(text.ids.numpy().tobytes() + text.lengths.numpy().tobytes()).hexdigest()[:16]
    at = "all" if text.targets is None else list(text.targets)
    return {"tokens": digest, "targets": text.count, "target_positions": at, "rows": len(text.lengths)}


def _one(model: Model, unit: Unit, base: Tensor, control: bool) -> dict[str, Any]:
    change = model.losses([unit]) - base
    mean = model.losses([unit], "mean") - base if control else torch.full_like(base, torch.nan)
    return {"change": change.tolist(), "mean": mean.tolist()}
