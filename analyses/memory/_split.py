"""Which tokens fit a probe and which judge it: nothing of a judging token's past is ever fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Split", "bootstrap_weights", "interval", "split"]

ROWS = 8
"""From so many sequences on, whole sequences are held out; with fewer, the last part of each."""

FOLDS = 5
BLOCKS = 40
"""Stretches that the held-out tokens are cut into, at most, for the bootstrap."""

SHORTEST_BLOCK = 16
FEWEST = 10
"""Tokens that a probe needs on either side."""


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens that take part.

    Args:
        fit, fit_fold: (m, 2) row and position of the tokens that the probe is fitted on, and their fold (m,).
        test, test_unit: the same of the tokens that judge it, and the unit (m',) that is drawn anew as a whole.
        units: number of units.
        unit: what a unit is, in words.
    """

    fit: Tensor
    fit_fold: Tensor
    test: Tensor
    test_unit: Tensor
    units: int
    unit: str

    def mask(self, shape: tuple[int, int]) -> Tensor:
        """(b, t) True at the tokens that are fitted on."""
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[self.fit[:, 0], self.fit[:, 1]] = True
        return mask


def split(lengths: Tensor, reach: int, share: float, seed: int) -> Split:
    """Fitting and judging tokens of sequences of the given lengths.

    From 8 sequences on, whole sequences are held out at random. With fewer, the last part of each sequence is,
    ``reach`` tokens after the part that is fitted on.

    Args:
        lengths: (b,) real tokens of each sequence.
        reach: the largest lag; the first ``reach`` tokens of a sequence have no source and take no part.
        share: share of the tokens that is held out.
        seed: of the choice of sequences and folds.

    Raises:
        ValueError: when too few tokens are left on either side, or the share is no share.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share lies between 0 and 1, got {share}")
    g = torch.Generator().manual_seed(seed)
    usable = [(row, reach, int(n)) for row, n in enumerate(lengths.tolist()) if n > reach]
    whole = len(usable) >= ROWS
    if whole:
        order = torch.randperm(len(usable), generator=g).tolist()
        held = max(2, round(share * len(usable)))
        test = [usable[i] for i in sorted(order[:held])]
        fit = [usable[i] for i in sorted(order[held:])]
    else:
        cuts = [(row, a, b, b - round(share * (b - a))) for row, a, b in usable]
        test = [(row, cut, b) for row, a, b, cut in cuts]
        fit = [(row, a, max(a, cut - reach)) for row, a, b, cut in cuts]
    fit_tokens, test_tokens = (_tokens(pieces) for pieces in (fit, test))
    for what, tokens in (("fitting", fit_tokens), ("judging", test_tokens)):
        if len(tokens) < FEWEST:
            raise ValueError(
                f"{len(tokens)} tokens are left for {what} the probe at a largest lag of {reach}, and it takes at "
                f"least {FEWEST}: give more or longer sequences, or smaller lags"
            )
    if whole:
        rows = {piece[0]: i % FOLDS for i, piece in enumerate(fit)}
        fold = torch.tensor([rows[row] for row in fit_tokens[:, 0].tolist()])
    else:
        # Folds are stretches in a row: neighbouring tokens share most of their past.
        fold = torch.arange(len(fit_tokens)) * FOLDS // len(fit_tokens)
    unit, words = _units(test_tokens, len(test) if whole else 0)
    return Split(fit_tokens, fold, test_tokens, unit, int(unit.max()) + 1, words)


def _tokens(pieces: list[tuple[int, int, int]]) -> Tensor:
    found = [torch.stack([torch.full((b - a,), row), torch.arange(a, b)], 1) for row, a, b in pieces if b > a]
    return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.long)


def _units(tokens: Tensor, sequences: int) -> tuple[Tensor, str]:
    """The unit of each held-out token: its sequence where there are enough of them, else a stretch of a sequence."""
    if sequences >= BLOCKS // 2:
        return torch.unique(tokens[:, 0], return_inverse=True)[1], "sequences"
    length = max(SHORTEST_BLOCK, -(-len(tokens) // BLOCKS))
    piece = tokens[:, 1] // length
    labels = torch.stack([tokens[:, 0], piece], 1)
    return torch.unique(labels, dim=0, return_inverse=True)[1], f"stretches of {length} tokens"


def bootstrap_weights(units: int, repeats: int, seed: int) -> Tensor:
    """How often each unit is drawn in each repeat, (repeats, units); as many draws as units, with replacement."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(units, (repeats, units), generator=g)
    weights = torch.zeros(repeats, units, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def interval(samples: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """The middle ``confidence`` of the repeats on the first axis: percentile bootstrap."""
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=samples.dtype)
    low, high = samples.nanquantile(ends, dim=0)
    return low, high
