"""Where a recall model's implicit attention points when a key is asked: at the pair that was told, or elsewhere.

The right answer is known here, and so is the place it was told. A row of M points at the source with the largest
signed weight. It points at the right pair when that source is the told value or the token after it: the short
convolution lets the token after a value see both key and value, so the pair may be written there. These windows of
two tokens belong to one pair each. Every token from the second up to the asking one may be a source; the first
is left out, since no value has been told by then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import recall_task
from .recall_task import RecallBatch

if TYPE_CHECKING:
    from ssmlens.lens import Lens

__all__ = ["AFTER", "CHOICE_SEED", "CHOSEN_FROM", "asked_rows", "choose_heads", "measure", "pointed", "share"]

AFTER = 1  # tokens after the value that still count as its pair
CHOSEN_FROM = 0.95
CHOICE_SEED = 20_000
CHOICE_PAIRS = 8


def asked_rows(attention: Tensor, made: RecallBatch) -> Tensor:
    """The rows of asked keys, with every token that cannot be their source at minus infinity.

    Args:
        attention: (b, h, t, s) implicit attention of a layer on ``made.ids``.
        made: a batch of the task.

    Returns:
        (b, h, k, s) for the k asked keys of each sequence.
    """
    b, h, _, s = attention.shape
    rows = attention.gather(2, made.asked[:, None, :, None].expand(b, h, -1, s))
    place = torch.arange(s)
    possible = (place >= 1) & (place <= made.asked[..., None])
    return rows.masked_fill(~possible[:, None], -torch.inf)


def pointed(rows: Tensor, source: Tensor) -> Tensor:
    """Whether the largest weight of a row lies on a pair.

    Args:
        rows: (..., k, s) as :func:`asked_rows` gives them.
        source: (..., k) position of the value of a pair, which may be the right one or a control.

    Returns:
        bool (..., k).
    """
    after = rows.argmax(-1) - source
    return (after >= 0) & (after <= AFTER)


def share(rows: Tensor, made: RecallBatch) -> Tensor:
    """The share of asked keys at which a head points at the right pair, (h,) in [0, 1]."""
    return pointed(rows, made.source[:, None]).double().mean((0, 2))


@torch.no_grad()
def choose_heads(lens: Lens, sequences: int = 24) -> tuple[int, list[int]]:
    """The layer whose best head points best, and its heads that point at 95 % of the asked keys or more.

    Args:
        lens: a recall model.
        sequences: how many to choose on, drawn apart from those that are measured.

    Returns:
        layer and heads; the best head alone where none reaches 95 %.
    """
    made = recall_task.batch(sequences, recall_task.TRAINING_LENGTH, CHOICE_PAIRS, CHOICE_SEED)
    trace = lens.trace(made.ids)
    shares = {m.layer: share(asked_rows(m.recurrence.attention.dense(), made), made) for m in trace}
    layer = max(shares, key=lambda k: float(shares[k].max()))
    good = (shares[layer] >= CHOSEN_FROM).nonzero()[:, 0].tolist()
    return layer, good or [int(shares[layer].argmax())]


@torch.no_grad()
def measure(folder: str | Path, sequences: int = 100) -> dict[str, Any]:
    """How often a recall model points at the right pair, for its card.

    Args:
        folder: of the model.
        sequences: for each load.

    Returns:
        layer; heads chosen by :func:`choose_heads` and how many there are; by load the share of asked keys at which
        the signed mean over the chosen heads, the worst of them, and the mean of the sizes over all heads point at
        the right pair.
    """
    from ssmlens.loading import load

    lens = load(folder)
    layer, heads = choose_heads(lens)
    rows = []
    for i, pairs in enumerate(recall_task.TRAINING_PAIRS):
        made = recall_task.batch(sequences, recall_task.TRAINING_LENGTH, pairs, CHOICE_SEED + 1 + i)
        attention = lens.trace(made.ids, layers=[layer])[layer].recurrence.attention
        chosen = asked_rows(attention.dense(heads), made)
        every = asked_rows(attention.reduce("mean_abs")[:, None], made)
        rows.append(
            {
                "pairs": pairs,
                "mean": float(share(chosen.mean(1, keepdim=True), made)),
                "worst": float(share(chosen, made).min()),
                "all_heads_abs": float(share(every, made)),
            }
        )
    return {"layer": layer, "heads": heads, "of": attention.shape[1], "sequences": sequences, "by_pairs": rows}
