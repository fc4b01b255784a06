"""States of a model that reads on and on: their sizes in every bucket of tokens, its loss, and when both give way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory._assumes import COLLAPSE_CONTESTED, KNOWN_COLLAPSE, TEACHER_FORCED
from ssmlens.analyses.memory._mitigate import rescaled
from ssmlens.analyses.memory._remembrance import prompt_ids
from ssmlens.lens import Lens
from ssmlens.recurrence import Recurrence
from ssmlens.stepping import Chunk, Stepper

__all__ = ["collapse_onset", "state_stream"]

SUGGESTED = "No paper defines the onset: half a nat and three times the trained variance are ours."


class _Mitigated(Stepper):
    """A stepper whose recurrences forget more, insert less, or are clipped."""

    def __init__(self, lens: Lens, forget: float, insert: float, clip: float | None) -> None:
        super().__init__(lens)
        self.change = (forget, insert)
        self.clip = clip

    def _through(self, state: Any, x: Tensor, recur: Any) -> Any:
        return super()._through(state, x, lambda inputs: self._recur(inputs, recur))

    def _recur(self, inputs: Any, recur: Any) -> tuple[Tensor, Tensor]:
        if self.change != (1.0, 1.0):
            inputs = rescaled(Recurrence(inputs), *self.change).inputs
        if self.clip is None:
            done: tuple[Tensor, Tensor] = recur(inputs)
            return done
        outputs, state = [], inputs.initial
        for t in range(inputs.length):
            one = inputs.slice(t, t + 1).replace(initial=state)
            _, state = recur(one)
            size = state.norm(dim=(-2, -1), keepdim=True)
            state = state * (self.clip / size).clamp(max=1.0)
            read = one.read[:, 0].to(state.dtype).repeat_interleave(state.shape[1] // one.read.shape[2], 1)
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, read))
        return torch.stack(outputs, 1), state


def state_stream(
    lens: Lens,
    prompt: Any,
    train_length: int,
    *,
    bucket: int = 128,
    forget: float = 1.0,
    insert: float = 1.0,
    clip: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Read a long text with carried state; sizes of the states at the end of every bucket, and the loss in it.

    The detector of Stuffed Mamba (Chen et al. 2024), with its proposed remedies. States and convolution windows are
    carried exactly over every boundary, and no target is dropped there.

    Args:
        lens: the model.
        prompt: a text, ids (t,) or (b, t), rows of one length; such as one newline over and over.
        train_length: tokens of one training sequence.
        bucket: tokens per bucket.
        forget, insert: every decay to this power, every write times this, as `rescaled` does.
        clip: largest norm of a head's state.
        progress: called with the tokens read and all tokens.

    Returns:
        Result with axes (layer, batch, bucket, head), labelled by the last token of each bucket. The value is the
        unbiased variance of the state's entries, with ``mean``, ``rms`` and ``median``; ``loss`` is the mean
        next-token loss of the bucket in nats; ``onset``, ``loss_onset`` and ``variance_onset`` are those of
        `collapse_onset`. The control, ``trained_variance``, is the variance at the end of the first ``train_length``
        tokens, or at the end of the text where that is shorter.

    Raises:
        ValueError: for a text of less than two tokens, or numbers out of range.
    """
    ids = prompt_ids(lens, prompt)
    if ids.shape[1] < 2 or bucket < 1 or train_length < 1 or (clip is not None and not clip > 0):
        raise ValueError("a stream takes two tokens at least, and bucket, train_length and clip above 0")
    plain = (forget, insert, clip) == (1.0, 1.0, None)
    net = Stepper(lens) if plain else _Mitigated(lens, forget, insert, clip)
    watch = _Watch(ids, progress)
    with torch.no_grad():
        net.run(net.initial(len(ids)), ids, chunk=bucket, logits="last", observe=watch)
    variance = torch.stack([x["value"] for x in watch.sizes], 1)  # layers padded to (layer, bucket, b, h)
    ends = torch.tensor(watch.ends)
    trained = int((ends >= min(train_length, int(ends[-1]) + 1) - 1).nonzero()[0])
    loss = torch.stack(watch.losses, 1)  # (b, bucket)
    rows = [collapse_onset(loss[b], variance[:, :, b], train_length, ends=ends + 1) for b in range(len(ids))]
    shape = (len(watch.sizes[0]["value"]), len(ids), len(ends), variance.shape[-1])
    columns = {k: torch.stack([x[k] for x in watch.sizes], 1).transpose(1, 2) for k in ("mean", "rms", "median")}
    columns["loss"] = loss[None, :, :, None]
    columns["onset"] = torch.stack([r.value for r in rows]).reshape(1, -1, 1, 1)
    for name in ("loss_onset", "variance_onset"):
        columns[name] = torch.stack([r.columns[name] for r in rows]).reshape(1, -1, 1, 1)
    value = variance.transpose(1, 2).reshape(shape)
    about = {"model": lens.name, "fingerprint": lens.fingerprint, "dtype": str(lens.dtype), "tokens": ids.shape[1]}
    about |= {"train_length": train_length, "bucket": bucket, "forget": forget, "insert": insert, "clip": clip}
    about["contested"] = COLLAPSE_CONTESTED
    return Result(
        name="state_variance",
        value=value,
        dims=("layer", "batch", "bucket", "head"),
        units="state^2",
        coords={"bucket": ends.tolist(), "layer": [x.index for x in lens.layers]},
        columns=columns,
        control={"trained_variance": value[:, :, trained : trained + 1].clone()},
        settings=about,
        assumes=(TEACHER_FORCED, SUGGESTED),
        checked_by=KNOWN_COLLAPSE,
    )


class _Watch:
    """Gathers the sizes of the states and the losses, chunk by chunk."""

    def __init__(self, ids: Tensor, progress: Callable[[int, int], None] | None) -> None:
        self.ids, self.progress = ids, progress
        self.last: Tensor | None = None
        self.ends: list[int] = []
        self.sizes: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def __call__(self, chunk: Chunk) -> None:
        assert chunk.logits is not None
        logits = chunk.logits if self.last is None else torch.cat([self.last, chunk.logits], 1)
        first = chunk.start + (1 if self.last is None else 0)
        targets = self.ids[:, first : chunk.stop].to(logits.device)
        losses = F.cross_entropy(logits[:, :-1].mT.double(), targets, reduction="none")
        self.losses.append(losses.mean(1).cpu() if losses.shape[1] else torch.full((len(losses),), math.nan).double())
        self.last = chunk.logits[:, -1:]
        self.ends.append(chunk.stop - 1)
        self.sizes.append(_sizes([layer.h for layer in chunk.after.layers]))
        if self.progress is not None:
            self.progress(chunk.stop, self.ids.shape[1])


def _sizes(states: list[Tensor]) -> dict[str, Tensor]:
    """Statistics of each layer's states (b, h, p, n) over p and n: (layer, b, h) each, NaN beyond a layer's heads."""
    widest = max(h.shape[1] for h in states)
    names = ("value", "mean", "rms", "median")
    out = {k: torch.full((len(states), len(states[0]), widest), torch.nan, dtype=torch.float64) for k in names}
    for k, h in enumerate(states):
        flat = h.flatten(2).double()
        found = (flat.var(-1), flat.mean(-1), flat.square().mean(-1).sqrt(), flat.median(-1).values)
        for name, x in zip(names, found):
            out[name][k, :, : h.shape[1]] = x.cpu()
    return out


def collapse_onset(
    loss: Tensor,
    variance: Tensor,
    train_length: int,
    *,
    ends: Tensor,
    rise: float = 0.5,
    growth: float = 3.0,
) -> Result:
    """When a model's loss and states have left what training showed them.

    Args:
        loss: (k,) mean loss of each bucket, in nats.
        variance: (..., k, h) variance of each head's state at the end of each bucket.
        train_length: tokens of one training sequence.
        ends: (k,) tokens read at the end of each bucket.
        rise: nats above the lowest bucket so far.
        growth: times the variance at the end of the first ``train_length`` tokens.

    Returns:
        Result, one number of tokens: the end of the first bucket with both the rise of the loss and one head at least
        whose variance has grown so far; inf where there is none. ``loss_onset`` and ``variance_onset`` are the first
        buckets of each alone. The control is ``train_length``.

    Raises:
        ValueError: when the buckets do not fit together.
    """
    loss, ends = torch.as_tensor(loss).double(), torch.as_tensor(ends)
    variance = torch.as_tensor(variance).double()
    if loss.ndim != 1 or loss.shape != ends.shape or variance.ndim < 2 or variance.shape[-2] != len(loss):
        raise ValueError("loss and ends are (k,), and variance is (..., k, h) for the same k buckets")
    # The lowest bucket may be NaN, where a bucket holds no target.
    best = loss.nan_to_num(torch.inf).cummin(0).values
    risen = loss > best + rise
    trained = int((ends >= min(train_length, int(ends[-1]))).nonzero()[0])
    start = variance.narrow(-2, trained, 1)
    grown = ((variance > growth * start) & (torch.arange(len(loss)) > trained)[:, None]).transpose(-2, -1)
    grown = grown.reshape(-1, len(loss)).any(0)

    def first(where: Tensor) -> Tensor:
        return ends[where][0].double() if bool(where.any()) else torch.tensor(torch.inf, dtype=torch.float64)

    return Result(
        name="collapse_onset",
        value=first(risen & grown),
        dims=(),
        units="tokens",
        columns={"loss_onset": first(risen), "variance_onset": first(grown)},
        control={"train_length": torch.tensor(float(train_length))},
        settings={"rise": rise, "growth": growth, "train_length": train_length},
        assumes=(SUGGESTED,),
        checked_by=KNOWN_COLLAPSE,
    )
