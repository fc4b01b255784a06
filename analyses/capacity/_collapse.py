"""Where a model that is streamed over a long text falls apart: loss by position, and states that leave their range."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._stream import Stream, stream
from ssmlens.lens import Lens
from ssmlens.prompt import prepare

__all__ = ["BY", "collapse", "collapse_onset"]

BY = ("bucket", "head")
"""What `collapse` returns: the loss of each bucket of tokens, or the state of each head there."""

DRAWS = 999

ONSET = (
    "onset: first bucket whose loss exceeds the least so far by the rise while the variance of a head exceeds that at "
    "the training length by the growth; a convention, since the papers define none"
)
CAUSE = (
    "states that grow together with the loss are no proof of a cause: too large a state, states never visited in "
    "training and the spectrum of A are all claimed"
)
TEXT = "loss moves with the text: the restarted control has read the same tokens with a state never older than training"
CHECKED = "a stream in chunks equals one pass, also across the convolution's window: tests of this study"


def collapse(
    lens: Lens,
    prompt: Any,
    train_length: int,
    length: int | None = None,
    *,
    by: str = "bucket",
    bucket: int = 128,
    smooth: int = 8,
    rise: float = 0.5,
    growth: float = 3.0,
    control: bool = True,
    chunk: int = 1024,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Stream a text through the model with carried states, and watch loss and states leave what training showed.

    Args:
        lens: a model of Mamba layers.
        prompt: whatever `Lens.trace` takes; rows of one length. Short ones are repeated to ``length``: one token such
            as a newline makes the stress test of Stuffed Mamba.
        train_length: tokens of one training sequence; no checkpoint states it.
        length: tokens to stream; those of the prompt by default.
        by: one of `BY`.
        bucket: tokens over which the loss is averaged, and after which the states are looked at.
        smooth: buckets of the running mean that the onset is read from.
        rise: nats of loss above the least so far.
        growth: factor of a head's variance over that at the training length.
        control: also stream with a state that starts anew every ``train_length`` tokens: twice the time.
        chunk: tokens that go through the model at once, rounded to whole buckets; the numbers do not depend on it.
        seed: of the bootstrap.
        resume: file that keeps finished chunks; a killed run goes on there, with the state beside it.
        progress: called with tokens done and tokens there are.

    Returns:
        By bucket: the mean loss in nats per token, axis (bucket), labelled by the position after its last token.
        Columns: ``low`` and ``high``, a 95 % bootstrap over blocks of an eighth of a bucket and rows; ``growth``, the
        largest factor of a head's variance over that at the training length; ``growing``, the share of heads above
        ``growth``; ``loss_onset``, ``state_onset`` and ``onset``, tokens, inf for never. Control: ``restarted``.

        By head: the variance of the state, axes (layer, head, bucket), with ``mean``, ``rms``, ``median``, ``decay``
        (geometric mean over the bucket), ``factor`` and ``state_onset`` of each head. Mamba-1 has one entry a layer.

    Raises:
        ValueError: when the text is no longer than a bucket, or names and sizes are out of range.
        UnsupportedModelError: when a layer carries another kind of memory.
    """
    if by not in BY:
        raise ValueError(f"unknown by {by!r}: choose one of {', '.join(BY)}")
    if not 1 <= bucket <= train_length or smooth < 1 or chunk < 1 or rise <= 0 or growth <= 1:
        raise ValueError("bucket is 1 to train_length, smooth and chunk at least 1, rise above 0 and growth above 1")
    ids = _ids(lens, prompt, length)
    if ids.shape[1] < 2 * bucket:
        raise ValueError(f"{ids.shape[1]} tokens are fewer than two buckets of {bucket}: give a longer text or length")
    chunk = max(1, chunk // bucket) * bucket
    with torch.no_grad():
        seen = stream(lens, ids, bucket, chunk, train_length if control else None, resume, progress)
    ends = [min((k + 1) * bucket, ids.shape[1]) for k in range(seen.loss.shape[1])]
    reference = max(0, min(train_length // bucket, len(ends)) - 1)
    settings = {
        "model": lens.name,
        "fingerprint": lens.fingerprint,
        "dtype": str(lens.dtype).removeprefix("torch."),
        "rows": len(ids),
        "tokens": ids.shape[1],
        "train_length": train_length,
        "bucket": bucket,
        "smooth": smooth,
        "rise": rise,
        "growth": growth,
        "seed": seed,
        "interval": f"95 %, bootstrap over blocks of {bucket // 8 or 1} tokens, {DRAWS} draws",
    }
    variance = _heads(seen.states["variance"])
    factor = _running(variance, smooth) / _running(variance, smooth)[..., reference, None]
    if by == "head":
        return _by_head(lens, seen, ends, reference, factor, growth, settings)
    loss = _mean(seen.loss.sum(0), seen.count * len(ids))
    low, high = _interval(seen.loss, seen.count, seed)
    onsets = collapse_onset(_running(loss, smooth), factor.flatten(0, 1), reference, ends, rise=rise, growth=growth)
    flat = factor.flatten(0, 1)
    known = flat[~flat[:, 0].isnan()]
    return Result(
        name="loss",
        value=loss,
        dims=("bucket",),
        units="nats per token",
        coords={"bucket": ends},
        columns={
            "low": low,
            "high": high,
            "growth": known.max(0).values,
            "growing": (known > growth).double().mean(0),
            **{k: torch.tensor(x, dtype=torch.float64) for k, x in onsets.items()},
        },
        control={} if seen.restarted is None else {"restarted": _mean(seen.restarted.sum(0), seen.count * len(ids))},
        settings=settings,
        assumes=(ONSET, CAUSE, TEXT),
        checked_by=CHECKED,
    )


def collapse_onset(
    loss: Tensor,
    factor: Tensor,
    reference: int,
    ends: Sequence[int] | None = None,
    *,
    rise: float = 0.5,
    growth: float = 3.0,
) -> dict[str, float]:
    """When loss and states leave their range, and when both have.

    Args:
        loss: (buckets,) nats.
        factor: (heads, buckets) variance of each head's state over that at the bucket ``reference``.
        reference: the last bucket of the training length; states count from the next one on.
        ends: position after each bucket; its number by default.
        rise: nats above the least loss so far.
        growth: factor of the variance.

    Returns:
        ``loss_onset``, ``state_onset`` and ``onset`` (both at once), positions; inf for never.
    """
    where = list(range(len(loss))) if ends is None else list(ends)
    high = loss > loss.cummin(0).values + rise
    wide = (factor > growth).any(0)
    wide[: reference + 1] = False

    def first(x: Tensor) -> float:
        found = x.nonzero()
        return float(where[int(found[0])]) if len(found) else float("inf")

    return {"loss_onset": first(high), "state_onset": first(wide), "onset": first(high & wide)}


def _by_head(
    lens: Lens,
    seen: Stream,
    ends: list[int],
    reference: int,
    factor: Tensor,
    growth: float,
    settings: dict[str, Any],
) -> Result:
    wide = factor > growth
    wide[..., : reference + 1] = False
    positions = torch.tensor(ends, dtype=torch.float64)
    onset = torch.where(wide, positions, torch.inf).amin(-1, keepdim=True)
    found = {name: _heads(x) for name, x in seen.states.items()}
    return Result(
        name="variance",
        value=found.pop("variance"),
        dims=("layer", "head", "bucket"),
        units="1",
        coords={"layer": [x.index for x in lens.layers], "bucket": ends},
        columns={**found, "factor": factor, "state_onset": onset.where(~factor[..., :1].isnan(), torch.nan)},
        settings=settings,
        assumes=(ONSET, CAUSE),
        checked_by=CHECKED,
    )


def _ids(lens: Lens, prompt: Any, length: int | None) -> Tensor:
    """(b, t), the prompt repeated to the length."""
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    if batch.padded:
        raise ValueError("the rows of a stream are of one length: cut them to the shortest, or stream them one by one")
    if length is None:
        return batch.ids
    if length < 1:
        raise ValueError(f"length is at least 1, got {length}")
    times = -(-length // batch.ids.shape[1])
    return batch.ids.repeat(1, times)[:, :length]


def _heads(layers: list[Tensor]) -> Tensor:
    """(layer, head, bucket) from one (head, bucket) for each layer; NaN where a layer has fewer heads."""
    full = torch.full((len(layers), max(len(x) for x in layers), layers[0].shape[1]), torch.nan, dtype=torch.float64)
    for k, x in enumerate(layers):
        full[k, : len(x)] = x
    return full


def _running(x: Tensor, width: int) -> Tensor:
    """Mean of the last ``width`` entries of the last axis, of fewer at its start."""
    total = torch.nn.functional.pad(x.cumsum(-1), (1, 0))
    stop = torch.arange(1, x.shape[-1] + 1)
    start = (stop - width).clamp(min=0)
    return (total[..., stop] - total[..., start]) / (stop - start)


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """(buckets,) from sums and counts (buckets, SUB)."""
    return total.sum(-1) / count.sum(-1)


def _interval(loss: Tensor, count: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """95 % limits (buckets,) of the mean loss, blocks (b, buckets, SUB) drawn again."""
    blocks = loss.transpose(0, 1).flatten(1)
    sizes = count[:, None].expand(-1, len(loss), -1).flatten(1)
    picks = torch.randint(blocks.shape[1], (DRAWS, blocks.shape[1]), generator=torch.Generator().manual_seed(seed))
    counts = torch.nn.functional.one_hot(picks, blocks.shape[1]).sum(1).double()
    drawn = (counts @ blocks.mT) / (counts @ sizes.mT)
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return low, high
