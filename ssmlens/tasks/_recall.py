"""Multi-query associative recall, and recall of multi-token numbers from a phonebook of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._base import IGNORE, Batch, Draws, TokenTask, need, tokens

__all__ = ["MQAR", "PhonebookTokens"]


@dataclass(frozen=True)
class MQAR(TokenTask):
    """Multi-query associative recall: pairs of a key and a value are told, then keys whose value is asked.

    Token 0 is the filler, 1 ... V/2 - 1 are keys, V/2 ... V - 1 values; both are drawn without repeats. Pairs stand at
    the start, each key is asked once, at an even place after them; gaps follow the power law g^(alpha - 1). The target
    stands at the asked key. Source: Zoology (Arora et al. 2023, arXiv:2312.04927).

    Args:
        length: tokens a row, even.
        pairs: K, key-value pairs a row.
        vocabulary: V, even.
        passes: how often all pairs are told; 2 is the repeated context of "Just read twice" (arXiv:2407.05483).
        gap_exponent: alpha; small values ask soon after the pairs.
        fillers: "blank" (token 0) or "random" (any token but 0).
    """

    name: ClassVar[str] = "mqar"
    length: int = 64
    pairs: int = 8
    vocabulary: int = 64
    passes: int = 1
    gap_exponent: float = 0.01
    fillers: str = "blank"

    def __post_init__(self) -> None:
        need(self.vocabulary >= 4 and self.vocabulary % 2 == 0, f"the vocabulary is even, got {self.vocabulary}")
        need(self.passes >= 1, f"pairs are told at least once, got passes={self.passes}")
        most = min(self.vocabulary // 2 - 1, self.length // (2 * (self.passes + 1)))
        need(
            self.length % 2 == 0 and 1 <= self.pairs <= most,
            f"{self.pairs} pairs do not fit: the length is even ({self.length}), pairs are 1 to {most} here",
        )
        need(self.fillers in ("blank", "random"), f"fillers are blank or random, got {self.fillers!r}")

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def answers(self) -> range:
        return range(self.vocabulary // 2, self.vocabulary)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any value of the vocabulary; ``told``: any value of the row, 1 / K."""
        return {"uniform": 1 / len(self.answers), "told": 1 / self.pairs}

    @property
    def plateau(self) -> float:
        """ln K, nats: the loss of a model that knows which values were told but not with which key."""
        return math.log(self.pairs)

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``asked`` and ``source`` (b, K), places of asked key j and of its value in the last telling; pairs
        are numbered in the order they are told."""
        draws, k, half = Draws(seed), self.pairs, self.vocabulary // 2
        keys = draws.order(n, half - 1)[:, :k] + 1
        values = draws.order(n, half)[:, :k] + half
        told = 2 * k * self.passes
        slots = (self.length - told) // 2
        weight = np.arange(1, slots + 1, dtype=np.float64) ** (self.gap_exponent - 1)
        asked = told + 2 * draws.weighted(n, weight, k)
        ids = np.zeros((n, self.length), np.int64)
        if self.fillers == "random":
            ids[:] = draws.integers(1, self.vocabulary, n, self.length)
        for start in range(0, told, 2 * k):
            ids[:, start : start + 2 * k : 2] = keys
            ids[:, start + 1 : start + 2 * k : 2] = values
        np.put_along_axis(ids, asked, keys, 1)
        targets = np.full_like(ids, IGNORE)
        np.put_along_axis(targets, asked, values, 1)
        source = np.broadcast_to(told - 2 * k + 2 * np.arange(k) + 1, (n, k))
        return tokens(ids, targets, asked=asked, source=source)

    def oracle(self, batch: Batch) -> Tensor:
        """The value after the first telling of the key at each asked place."""
        k = self.pairs
        keys, values = batch.ids[:, 0 : 2 * k : 2], batch.ids[:, 1 : 2 * k : 2]
        same = batch.ids[:, :, None] == keys[:, None]
        found = torch.where(same.any(2), values.gather(1, same.long().argmax(2)), IGNORE)
        return self._masked(found, batch)

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        which = torch.from_numpy(Draws(seed).integers(0, self.pairs, *batch.targets.shape))
        return self._masked(batch.ids[:, 1 : 2 * self.pairs : 2].gather(1, which), batch)

    def words(self) -> list[str]:
        half = self.vocabulary // 2
        return [".", *(f"k{i}" for i in range(1, half)), *(f"v{i}" for i in range(half))]


@dataclass(frozen=True)
class PhonebookTokens(TokenTask):
    """A phonebook in tokens: each entry a name and the digits of its number, then one name whose number is asked.

    Token 0 pads, 1 asks, 2 ... 11 are the digits, names follow. A row is ``n`` entries, the asking token, a name, and
    the digits of its number but the last (told to the model as it goes, as in generation). With ``question_first``
    the asking token and the name also stand at the start.

    Source: the phonebook task of Jelassi et al. 2024 (arXiv:2402.01032) and Waleffe et al. 2024, in tokens.

    Args:
        entries: names with a number.
        digits: of a number, drawn independently.
        names: names there are.
        question_first: whether the name that will be asked is known before the list is read.
    """

    name: ClassVar[str] = "phonebook_tokens"
    entries: int = 8
    digits: int = 4
    names: int = 64
    question_first: bool = False

    def __post_init__(self) -> None:
        need(1 <= self.entries <= self.names, f"entries are 1 to {self.names}, got {self.entries}")
        need(self.digits >= 1, f"a number has digits, got {self.digits}")

    @property
    def n_tokens(self) -> int:
        return 12 + self.names

    @property
    def answers(self) -> range:
        return range(2, 12)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any digit; ``told``: the number of any entry, right with 1/n, else by chance."""
        return {"uniform": 0.1, "told": 1 / self.entries + (1 - 1 / self.entries) * 0.1}

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self._start + self.entries * (1 + self.digits) + 1 + self.digits

    @property
    def _start(self) -> int:
        return 2 if self.question_first else 0

    def _numbers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n) names and (b, n, digits) numbers of the list."""
        listed = ids[:, self._start : self._start + self.entries * (1 + self.digits)]
        listed = listed.reshape(len(ids), self.entries, 1 + self.digits)
        return listed[..., 0], listed[..., 1:]

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``entry`` (b,) the asked entry, ``source`` (b, digits) where its digits stand."""
        draws, size = Draws(seed), 1 + self.digits
        names = draws.order(n, self.names)[:, : self.entries] + 12
        numbers = draws.integers(2, 12, n, self.entries, self.digits)
        entry = draws.integers(0, self.entries, n)
        row = np.arange(n)
        listed = np.concatenate([names[..., None], numbers], 2).reshape(n, -1)
        question = np.stack([np.ones(n, np.int64), names[row, entry]], 1)
        answer = numbers[row, entry]
        front = [question] if self.question_first else []
        ids = np.concatenate([*front, listed, question, answer[:, :-1]], 1)
        targets = np.full_like(ids, IGNORE)
        targets[:, -self.digits :] = answer
        source = self._start + (entry * size)[:, None] + 1 + np.arange(self.digits)
        return tokens(ids, targets, entry=entry, source=source)

    def oracle(self, batch: Batch) -> Tensor:
        """The digits after the asked name in the list."""
        names, numbers = self._numbers(batch.ids)
        asked = batch.ids[:, -self.digits].unsqueeze(1)
        which = (names == asked).long().argmax(1)
        return self._placed(numbers[torch.arange(len(which)), which], batch)

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        _, numbers = self._numbers(batch.ids)
        which = torch.from_numpy(Draws(seed).integers(0, self.entries, len(batch)))
        return self._placed(numbers[torch.arange(len(which)), which], batch)

    def _placed(self, answer: Tensor, batch: Batch) -> Tensor:
        found = torch.full_like(batch.targets, IGNORE)
        found[:, -self.digits :] = answer
        return found

    def words(self) -> list[str]:
        return ["<pad>", "?", *"0123456789", *(f"name{i}" for i in range(self.names))]
