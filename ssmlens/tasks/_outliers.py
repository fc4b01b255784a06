"""In-context classification with outliers among the examples."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._base import Batch, Draws, Task, need

__all__ = ["Outliers"]


@dataclass(frozen=True)
class Outliers(Task):
    """Examples of two classes, some of them with an outlier and a wrong label; the label of a last one is asked.

    The input of example i is a sum of unit vectors: +-mu_j (the pattern that decides, j < patterns), noise * nu_k (one
    that decides nothing) and, for an outlier, size * v (another one). Labels are the sign of mu_j times the sign s_j of
    the prompt, which is drawn anew for each prompt and pattern: the label can only be learned from the context. An
    outlier's label is the opposite. The last input is the question: the pattern of one of the examples, a sign of its
    own, no outlier, label slot 0.

    A setting after the theory of Mamba in context with outliers (Li et al. 2025): count, with a linear attention and
    with a gated one, how much weight falls on outliers.

    Args:
        examples: in the context.
        share: of outliers among the examples: exactly ``round(share * examples)`` of them.
        patterns: that decide.
        distractors: that decide nothing.
        noise: size of those.
        size: of the outlier vector.
    """

    name: ClassVar[str] = "outliers"
    examples: int = 16
    share: float = 0.25
    patterns: int = 1
    distractors: int = 8
    noise: float = 0.5
    size: float = 1.0

    def __post_init__(self) -> None:
        need(self.examples >= 1 and self.patterns >= 1 and self.distractors >= 1, "counts are at least 1")
        need(0 <= self.share <= 1, f"the share of outliers is from 0 to 1, got {self.share}")
        need(self.size > 0, f"the outlier vector has a size above 0, got {self.size}")

    @property
    def channels(self) -> int:
        """Of an input: patterns, distractors, the outlier, the label."""
        return self.patterns + self.distractors + 2

    @property
    def outliers(self) -> int:
        """Outliers in each prompt."""
        return round(self.share * self.examples)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: a coin; ``vote``: the majority of all examples with the asked pattern, outliers included.

        Of m examples with that pattern (one, and a binomial of the others), w are wrong (hypergeometric); a tie is a
        coin.
        """
        n, bad, vote, share = self.examples, self.outliers, 0.0, 1 / self.patterns
        for m in range(1, n + 1):
            p = comb(n - 1, m - 1) * share ** (m - 1) * (1 - share) ** (n - m)
            for w in range(max(0, m - (n - bad)), min(bad, m) + 1):
                q = comb(bad, w) * comb(n - bad, m - w) / comb(n, m)
                vote += p * q * (1.0 if 2 * w < m else 0.5 if 2 * w == m else 0.0)
        return {"uniform": 0.5, "vote": vote}

    @property
    def chance(self) -> float:
        """The best of the baselines."""
        return max(self.baselines.values())

    def batch(self, n: int, seed: int = 0) -> Batch:
        """``ids`` is (b, examples + 1, channels) float64, ``targets`` (b, examples + 1, 1) with the label, +-1, at the
        last place. Facts: ``outlier`` (b, examples) bool, ``pattern`` (b, examples + 1)."""
        draws, t = Draws(seed), self.examples + 1
        pattern = draws.integers(0, self.patterns, n, t)
        pattern[:, -1] = pattern[np.arange(n), draws.integers(0, self.examples, n)]
        sign = 2 * draws.integers(0, 2, n, t) - 1
        meaning = 2 * draws.integers(0, 2, n, self.patterns) - 1
        other = draws.integers(0, self.distractors, n, t)
        outlier = draws.order(n, self.examples) < self.outliers
        label = sign * np.take_along_axis(meaning, pattern, 1)
        inputs = np.zeros((n, t, self.channels))
        np.put_along_axis(inputs, pattern[..., None], sign[..., None].astype(np.float64), 2)
        np.put_along_axis(inputs, self.patterns + other[..., None], self.noise, 2)
        inputs[:, :-1, -2] = self.size * outlier
        inputs[:, :-1, -1] = np.where(outlier, -label[:, :-1], label[:, :-1])
        targets = np.zeros((n, t, 1))
        targets[:, -1, 0] = label[:, -1]
        mask = np.zeros((n, t), bool)
        mask[:, -1] = True
        facts = {"outlier": torch.from_numpy(outlier), "pattern": torch.from_numpy(pattern)}
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask), facts)

    def _votes(self, inputs: Tensor) -> Tensor:
        """(b, examples) what each example says of the question: its label, turned to the sign asked; 0 for others."""
        decides = inputs[..., : self.patterns]
        return (decides[:, :-1] * decides[:, -1:]).sum(-1) * inputs[:, :-1, -1]

    def oracle(self, batch: Batch) -> Tensor:
        """The vote of the examples, the labels of outliers turned."""
        votes = self._votes(batch.ids)
        sure = torch.where(batch.ids[:, :-1, -2] > 0, -votes, votes)
        return self._last(sure.sum(1).sign(), batch)

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        self._known(name)
        coin = torch.from_numpy(2.0 * Draws(seed).integers(0, 2, len(batch)) - 1)
        if name == "uniform":
            return self._last(coin, batch)
        vote = self._votes(batch.ids).sum(1).sign()
        return self._last(torch.where(vote == 0, coin, vote), batch)

    def score(self, predicted: Tensor, batch: Batch) -> float:
        """Share of rows whose last prediction has the right sign, in [0, 1]; predicted is (b, t, 1)."""
        return float((predicted[:, -1, 0].sign() == batch.targets[:, -1, 0]).double().mean())

    @staticmethod
    def _last(answer: Tensor, batch: Batch) -> Tensor:
        found = torch.zeros_like(batch.targets)
        found[:, -1, 0] = answer
        return found
