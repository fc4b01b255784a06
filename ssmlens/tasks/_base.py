"""What every task is: a frozen description that draws batches, knows its answers and the score of those who do not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ssmlens.errors import SsmlensError

__all__ = ["IGNORE", "Batch", "Draws", "Task", "TokenTask", "need"]

IGNORE = -100
"""Target of a position at which nothing is asked; what torch's cross-entropy leaves out."""


def need(holds: bool, sentence: str) -> None:
    """Raise SsmlensError with one sentence when a setting does not hold."""
    if not holds:
        raise SsmlensError(sentence)


class Draws:
    """Random draws that are the same on every machine and with every version of numpy.

    Only the uniform doubles of PCG64 are taken from numpy, whose higher functions may change between versions;
    everything else is made of them here.

    Args:
        seed: a non-negative integer.
    """

    def __init__(self, seed: int) -> None:
        need(seed >= 0, f"a seed is 0 or larger, got {seed}")
        self._bits = np.random.Generator(np.random.PCG64(seed))

    def uniform(self, *shape: int) -> np.ndarray:
        """Doubles in [0, 1)."""
        return self._bits.random(shape)

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers low, ..., high - 1, all equally likely."""
        return low + np.floor(self.uniform(*shape) * (high - low)).astype(np.int64)

    def order(self, rows: int, count: int) -> np.ndarray:
        """(rows, count): a random order of 0 ... count - 1 in each row."""
        return self.uniform(rows, count).argsort(1, kind="stable")

    def choose(self, rows: int, count: int, chosen: int) -> np.ndarray:
        """(rows, chosen): different numbers of 0 ... count - 1, in ascending order."""
        return np.sort(self.order(rows, count)[:, :chosen], 1)

    def weighted(self, rows: int, weight: np.ndarray, chosen: int) -> np.ndarray:
        """(rows, chosen): different indices, drawn one after the other in proportion to weight (count,)."""
        # The smallest of exponential clocks with rates w is index i with probability w_i / sum(w), and so on.
        clocks = -np.log1p(-self.uniform(rows, len(weight))) / weight
        return clocks.argsort(1, kind="stable")[:, :chosen]


@dataclass(frozen=True)
class Batch:
    """One batch; unpacks as ``ids, targets, mask``.

    Args:
        ids: (b, t) int64 tokens, or (b, t, c) float64 inputs of a task on numbers.
        targets: (b, t) int64, what the output *at* that position has to name, -100 where nothing is asked; or
            (b, t, c) float64.
        mask: (b, t) bool, where something is asked.
        facts: more about each row, by name: where things were told, how long ago, how many.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor
    facts: Mapping[str, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.ids, self.targets, self.mask))

    def __len__(self) -> int:
        return len(self.ids)


class Task(ABC):
    """A task: a frozen dataclass of its settings.

    ``batch(n, seed)`` draws n rows. ``oracle(batch)`` finds the answers from the inputs alone, so every question can
    be answered. ``baselines`` has, for each predictor that lacks the memory which is asked for, its expected score in
    closed form, and ``guess(batch, name, seed)`` is that predictor.
    """

    name: ClassVar[str]

    @abstractmethod
    def batch(self, n: int, seed: int = 0) -> Batch:
        """Draw n rows; the same arguments give the same batch on any machine."""

    @abstractmethod
    def oracle(self, batch: Batch) -> Tensor:
        """The answers, found from ``batch.ids`` alone; like ``batch.targets`` where something is asked."""

    @property
    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Expected score of each simple predictor, in closed form."""

    @abstractmethod
    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        """What the simple predictor ``name`` says, shaped like ``batch.targets``."""

    @abstractmethod
    def score(self, predicted: Tensor, batch: Batch) -> float:
        """Score of predictions shaped like ``batch.targets``; only asked positions count."""

    @property
    def settings(self) -> dict[str, Any]:
        """The task's name and every setting, as plain numbers and words."""
        return {"task": self.name, **asdict(self)}  # type: ignore[call-overload]

    def _known(self, name: str) -> None:
        need(name in self.baselines, f"{self.name} has no baseline {name!r}: they are {', '.join(self.baselines)}")


class TokenTask(Task):
    """A task on tokens 0 ... n_tokens - 1 whose score is the share of right answers."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Size of the vocabulary."""

    @property
    @abstractmethod
    def answers(self) -> range:
        """The tokens among which every answer is."""

    @property
    def chance(self) -> float:
        """The best of the baselines: what an accuracy has to beat to show any of the memory that is asked for."""
        return max(self.baselines.values())

    @property
    def baselines(self) -> dict[str, float]:
        return {"uniform": 1 / len(self.answers)}

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        self._known(name)
        drawn = Draws(seed).integers(self.answers.start, self.answers.stop, *batch.targets.shape)
        return self._masked(torch.from_numpy(drawn), batch)

    def score(self, predicted: Tensor, batch: Batch) -> float:
        """Share of asked positions at which the right token is named, in [0, 1].

        Args:
            predicted: (b, t) tokens, or (b, t, v) logits, of which the largest counts.
            batch: what was asked.
        """
        if predicted.ndim == 3:
            predicted = predicted.argmax(-1)
        return float((predicted == batch.targets)[batch.mask].double().mean())

    def whole(self, predicted: Tensor, batch: Batch) -> float:
        """Share of rows in which every asked position is right, in [0, 1]; arguments as for ``score``."""
        if predicted.ndim == 3:
            predicted = predicted.argmax(-1)
        return float(((predicted == batch.targets) | ~batch.mask).all(1).double().mean())

    def words(self) -> list[str]:
        """One word for each token, for a word tokenizer and for reading."""
        return [str(i) for i in range(self.n_tokens)]

    @staticmethod
    def _masked(predicted: Tensor, batch: Batch) -> Tensor:
        return predicted.masked_fill(~batch.mask, IGNORE)


def tokens(ids: np.ndarray, targets: np.ndarray, **facts: np.ndarray) -> Batch:
    """A batch of tokens from arrays; the mask is where the target is a token."""
    answer = torch.from_numpy(targets)
    return Batch(
        torch.from_numpy(ids), answer, answer != IGNORE, {k: torch.from_numpy(v.copy()) for k, v in facts.items()}
    )


def pick(rows: np.ndarray, index: np.ndarray) -> Tensor:
    """rows[i, index[i]] as a tensor: (b, count), (b, k) -> (b, k)."""
    return torch.from_numpy(np.take_along_axis(rows, index, 1))
