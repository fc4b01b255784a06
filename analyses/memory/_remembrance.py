"""What the model's own prediction owes to the distant past: the same prediction with the past cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._layers import listed
from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory._assumes import NO_FORGETTING, TEACHER_FORCED
from ssmlens.analyses.memory._split import bootstrap_weights, interval
from ssmlens.lens import Lens
from ssmlens.prompt import prepare
from ssmlens.stepping import Stepper

__all__ = ["effective_remembrance", "prompt_ids"]

UNUSUAL = "A text that begins in the middle is itself unusual input: part of the distance may be the missing start."


def effective_remembrance(
    source: Lens | Callable[[Tensor], Tensor],
    prompt: Any,
    kept: int | Sequence[int] | None = None,
    *,
    repeats: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """How far the next-token prediction moves when all but the last k tokens are never read (Buitrago and Gu 2025).

    Total variation between q(. | x[0:T]) and q(. | x[T-k:T]), half the sum of the absolute differences. For a state
    space model reading the suffix alone is the same as zeroing states and convolution windows at T - k.

    Args:
        source: a lens; or a function from ids (b, t) to the logits (b, v) after the last token.
        prompt: for a lens a text, texts of equal length or ids; else ids (t,) or (b, t).
        kept: numbers k of tokens kept; by default powers of two below T, and T itself.
        repeats, confidence, seed: of the bootstrap over rows, where there are several.
        progress: called with the runs done and all runs.

    Returns:
        Result with axes (batch, kept), between 0 (the past makes no difference) and 1. ``mean`` is over rows, with
        ``low`` and ``high`` where there are several. The control, ``last_token``, is the distance with one token kept:
        what there is to remember at all.

    Raises:
        ValueError: for numbers of tokens that the prompt does not have, or rows of different length.
    """
    if isinstance(source, Lens):
        ids, last = prompt_ids(source, prompt), _last_logits(source)
    else:
        ids, last = torch.as_tensor(prompt), source
        ids = ids[None] if ids.ndim == 1 else ids
    total = ids.shape[1]
    steps = _kept(kept, total)
    laws = {}
    wanted = sorted({1, total, *steps})
    for done, k in enumerate(wanted):
        with torch.no_grad():
            laws[k] = torch.log_softmax(last(ids[:, total - k :]).double(), -1).exp().cpu()
        if progress is not None:
            progress(done + 1, len(wanted))
    value = torch.stack([_variation(laws[total], laws[k]) for k in steps], 1)
    one = _variation(laws[total], laws[1])[:, None]
    columns = {"mean": value.mean(0, keepdim=True)}
    if len(value) > 1:
        samples = bootstrap_weights(len(value), repeats, seed) @ value / len(value)
        columns["low"], columns["high"] = (x[None] for x in interval(samples, confidence))
    settings = {"tokens": total, "kept": steps, "seed": seed}
    if isinstance(source, Lens):
        settings |= {"model": source.name, "fingerprint": source.fingerprint, "dtype": str(source.dtype)}
    if len(value) > 1:
        settings["interval"] = f"{confidence:.0%} percentile bootstrap over {len(value)} rows, {repeats} repeats"
    return Result(
        name="effective_remembrance",
        value=value,
        dims=("batch", "kept"),
        units="1",
        coords={"kept": steps},
        columns=columns,
        control={"last_token": one},
        settings=settings,
        assumes=(TEACHER_FORCED, UNUSUAL),
        checked_by=NO_FORGETTING,
    )


def prompt_ids(lens: Lens, prompt: Any) -> Tensor:
    """Ids (b, t) of a prompt whose rows are of one length."""
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    if int(batch.lengths.min()) != batch.ids.shape[1]:
        raise ValueError("the prompts are of different lengths: cut them to one number of tokens")
    ids: Tensor = batch.ids
    return ids


def _last_logits(lens: Lens) -> Callable[[Tensor], Tensor]:
    net = Stepper(lens)

    def last(ids: Tensor) -> Tensor:
        _, logits = net.run(net.initial(len(ids)), ids, logits="last")
        assert logits is not None
        return logits

    return last


def _kept(kept: int | Sequence[int] | None, total: int) -> list[int]:
    if kept is None:
        return [*(2**i for i in range(total.bit_length()) if 2**i < total), total]
    found = sorted(set(listed(kept)))
    if not found or not 1 <= found[0] <= found[-1] <= total:
        raise ValueError(f"numbers of tokens kept lie between 1 and {total}")
    return found


def _variation(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2
