"""The text that a sensitivity is measured on: its rows, its targets, and how its tokens are split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ssmlens.bootstrap import block_sums, ratio_interval
from ssmlens.errors import PromptError
from ssmlens.lens import Lens

__all__ = ["SPLITS", "Text"]

SPLITS = ("all", "first third", "middle third", "last third", "recall", "other")
"""Which targets a mean is over.

recall  the token ends a pair (the token before it, itself) that stood in the same row before, so that it could be
        looked up in the context (the "associative recall hits" of Arora et al. 2023, Zoology)
other   all that is no recall
"""


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of tokens and what is known about each target.

    Args:
        ids: (b, t) padded on the right.
        lengths: (b,) real tokens.
        settings: where it was traced.
        targets: positions of the tokens whose loss counts, negative ones from a row's end; None for all.
    """

    ids: Tensor
    lengths: Tensor
    settings: dict[str, Any]
    targets: tuple[int, ...] | None = None

    @classmethod
    def of(cls, lens: Lens, prompt: Any, targets: Sequence[int] | None = None) -> Text:
        """The prompt's tokens.

        Raises:
            PromptError: when the prompt cannot be used, no row has a next token to predict, or none is left.
        """
        trace = lens.trace(prompt)
        trace.check()
        if int(trace.lengths.max()) < 2:
            raise PromptError("a loss needs a next token: give a text of at least two")
        settings = {**trace.settings, "reconstruction_error": dict(trace.reconstruction_error)}
        text = cls(trace.ids, trace.lengths, settings, None if targets is None else tuple(int(t) for t in targets))
        if targets is not None and not text.count:
            raise PromptError(
                f"no row has a token to predict at {list(targets)}: give positions from 1 on, or negative"
            )
        return text

    @cached_property
    def real(self) -> Tensor:
        """(b, t - 1) True where both the token and the next one are real, and the next one's loss counts."""
        at = torch.arange(1, self.ids.shape[1])
        real = at < self.lengths[:, None]
        if self.targets is None:
            return real
        chosen = torch.zeros_like(real)
        for t in self.targets:
            chosen |= at == (t if t >= 0 else self.lengths[:, None] + t)
        return real & chosen

    @cached_property
    def count(self) -> int:
        """Targets of all rows."""
        return int(self.real.sum())

    def losses(self, logits: Tensor) -> Tensor:
        """Nats on each target, row after row (count,), float64, from logits (b, t, v)."""
        laws = logits[:, :-1].log_softmax(-1).cpu()
        return -laws.gather(-1, self.ids[:, 1:, None])[..., 0][self.real].double()

    @cached_property
    def recall(self) -> Tensor:
        """(count,) True where the pair of a target and the token before it stood in its row before."""
        found = torch.zeros(self.real.shape, dtype=torch.bool)
        for row, length in enumerate(self.lengths.tolist()):
            seen: set[tuple[int, int]] = set()
            tokens = self.ids[row, :length].tolist()
            for t, pair in enumerate(itertools.pairwise(tokens)):
                found[row, t] = pair in seen
                seen.add(pair)
        return found[self.real]

    @cached_property
    def masks(self) -> Tensor:
        """(splits, count) of 0 and 1, in the order of `SPLITS`."""
        share = (torch.arange(self.ids.shape[1] - 1) / (self.lengths[:, None] - 1).clamp(min=1))[self.real]
        third = (share * 3).long().clamp(max=2)
        masks = [torch.ones_like(self.recall), *(third == i for i in range(3)), self.recall, ~self.recall]
        return torch.stack(masks).double()

    def means(self, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over each split of numbers (count, ...), and the ends of its interval, (splits, ...) each.

        A split without a target is NaN.
        """
        masks = self.masks.reshape(*self.masks.shape, *[1] * (change.ndim - 1))
        tops = torch.stack([block_sums(change * mask) for mask in masks], dim=1)  # (blocks, splits, ...)
        bottoms = torch.stack([block_sums(mask) for mask in masks], dim=1)
        low, high = ratio_interval(tops, bottoms)
        return tops.sum(0) / bottoms.sum(0), low, high

    def excess(self, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over recall targets less that over all others, of numbers (count, parts), and its interval, (parts,).

        NaN without a target of either kind.
        """
        sides = []
        for name in ("recall", "other"):
            mask = self.masks[SPLITS.index(name)][:, None]
            sides.append((block_sums(change * mask), block_sums(mask)))
        blocks = len(sides[0][0])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(blocks, (1000, blocks), generator=generator)
        means = [top.sum(0) / bottom.sum(0) for top, bottom in sides]
        again = [top[drawn].sum(1) / bottom[drawn].sum(1) for top, bottom in sides]
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.nanquantile(again[0] - again[1], ends, dim=0)
        return means[0] - means[1], low, high
