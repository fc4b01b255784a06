"""A prompt's answer as a function of which of its tokens are there, and curves over growing sets of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.attribution._baselines import Baseline, baseline_embedding
from ssmlens.attribution._forward import Network
from ssmlens.errors import SsmlensError

__all__ = ["OUTPUTS", "Masked", "order_of", "sizes_of", "subsets"]

OUTPUTS = ("probability", "logit")
"""What a metric reads of the target token."""

TOKENS_AT_ONCE = 16384
"""Rows times length of one batch."""

# Masks of about the same size that run together.
_TOGETHER = 64


@dataclass(frozen=True, eq=False)
class Masked:
    """One prompt up to the explained position; its target's logit or probability for any set of kept tokens.

    Args:
        network: the model.
        x: (t, d) embeddings of the prompt, the explained position last.
        target: id of the explained token.
        start: (d,) what takes a missing token's place; None to close the gap. With every token dropped the model
            answers to one zero embedding, which writes nothing into its states.
        output: one of `OUTPUTS`.
    """

    network: Network
    x: Tensor
    target: int
    start: Tensor | None
    output: str

    @classmethod
    def of(cls, network: Network, x: Tensor, target: int, baseline: Baseline, output: str) -> Masked:
        """Raises PromptError for an unknown baseline and SsmlensError for an unknown output."""
        if output not in OUTPUTS:
            raise SsmlensError(f"unknown output {output!r}: choose one of {', '.join(OUTPUTS)}")
        start = None if baseline == "drop" else baseline_embedding(network, baseline, ("drop",))
        return cls(network, x, target, start, output)

    def __call__(self, keep: Tensor) -> Tensor:
        """(k,) answers for masks (k, t) of bool."""
        if self.start is not None:
            return torch.cat([self._some(part) for part in keep.split(self._at_once(len(self.x)))])
        # Masks of about the same size run together, and no longer than their longest.
        sizes, order = keep.sum(1).sort()
        out, first = [], 0
        while first < len(order):
            last = min(len(order), first + _TOGETHER, first + self._at_once(int(sizes[-1])))
            out.append(self._some(keep[order[first:last]]))
            first = last
        return torch.cat(out)[order.argsort()]

    def _at_once(self, length: int) -> int:
        return max(1, TOKENS_AT_ONCE // max(1, length))

    def _some(self, keep: Tensor) -> Tensor:
        if self.start is not None:
            x = torch.where(keep[..., None], self.x, self.start)
            last = torch.full((len(keep),), keep.shape[1] - 1)
        else:
            # Kept tokens move to the front in order; what stands behind them is never read.
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
            last = (keep.sum(1) - 1).clamp(min=0).cpu()
            order = order[:, : int(last.max()) + 1]
            x = self.x[order] * keep.gather(1, order)[..., None]
        logits = self.network.last_logits(x, last)
        return (logits if self.output == "logit" else logits.softmax(-1))[:, self.target]


def order_of(scores: Tensor) -> Tensor:
    """Positions (t,) from the largest score to the smallest; of equal ones the earlier first."""
    return scores.argsort(descending=True, stable=True)


def sizes_of(length: int, points: int | None) -> list[int]:
    """How many tokens each point of a curve takes away: 0 to ``length``, every one or ``points`` + 1 evenly spread."""
    if points is None or points >= length:
        return list(range(length + 1))
    return [round(i * length / points) for i in range(points + 1)]


def subsets(order: Tensor, sizes: Sequence[int]) -> Tensor:
    """Masks (len(sizes), t): True for the first ``size`` positions of an order."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank < torch.tensor(list(sizes), device=order.device)[:, None]
