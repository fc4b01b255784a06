"""Bits that a model copies, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ssmlens.analyses._ledger import Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._associative import effective_bits
from ssmlens.lens import Lens
from ssmlens.stepping import Stepper
from ssmlens.tasks import Copy

__all__ = ["copied_bits"]

TOLD = "the model reads its own right answers while it copies, as in training"


def copied_bits(
    lens: Lens,
    lengths: Sequence[int],
    symbols: int = 16,
    *,
    trials: int = 200,
    level: float = 0.9,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """How many bits a model copies, against those that its state has: `effective_bits` of a model and `tasks.Copy`.

    Args:
        lens: a model that copies: token 0 separates, 1 to ``symbols`` are symbols.
        lengths: symbols of a string, increasing.
        symbols: V.
        trials: random strings of each length.
        level: share of strings copied whole that counts as copied.
        seed: of the strings.
        progress: called with lengths done and lengths there are.

    Returns:
        As `effective_bits`: the share of whole strings copied right, axis (length), with ``each``, the share of
        symbols, beside it. The state counts with the window of the convolution.

    Raises:
        ValueError: when the model's vocabulary has no such symbols, or lengths do not increase.
    """
    if symbols + 1 > lens.vocab_size:
        raise ValueError(f"{symbols} symbols and a separator do not fit a vocabulary of {lens.vocab_size}")
    net = Stepper(lens)
    whole, each = [], []
    for done, n in enumerate(lengths, start=1):
        task = Copy(int(n), symbols)
        batch = task.batch(trials, seed)
        with torch.no_grad():
            logits = net.run(net.initial(trials), batch.ids.to(lens.device), chunk=4096)[1]
        assert logits is not None
        guessed = logits[..., 1 : symbols + 1].argmax(-1).cpu() + 1
        whole.append(task.whole(guessed, batch))
        each.append(task.score(guessed, batch))
        if progress is not None:
            progress(done, len(lengths))
    bits = torch.finfo(net.initial(1).layers[0].h.dtype).bits
    found = effective_bits(lengths, whole, symbols, trials=trials, level=level, elements=net.initial(1).size, bits=bits)
    about = {"model": lens.name, "fingerprint": lens.fingerprint, "seed": seed}
    columns = {**found.columns, "each": torch.tensor(each, dtype=torch.float64)}
    return replace(found, columns=columns, settings={**found.settings, **about}, assumes=(*found.assumes, TOLD))
