"""Chains of variables to be followed, and words to be counted, after RULER, in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._base import IGNORE, Batch, Draws, TokenTask, need, tokens
from ._needles import filler_chain

__all__ = ["FrequentWord", "Variables"]


@dataclass(frozen=True)
class Variables(TokenTask):
    """Chains of variables: x gets a value, y gets x, z gets y; the value of the last one is asked.

    Token 0 pads, 1 sets, 2 asks, then variables, then values, then filler. A statement is 1, variable, value or
    earlier variable; chains are shuffled into each other, statements of one stay in order. The variable tracking of
    RULER (Hsieh et al. 2024, arXiv:2404.06654), asked for the value of a variable instead of for all of them.

    Args:
        length: tokens a row.
        chains: chains.
        hops: copies after the first statement of a chain.
        variables: variables there are; as many values.
        fillers: filler tokens there are.
    """

    name: ClassVar[str] = "variables"
    length: int = 128
    chains: int = 2
    hops: int = 2
    variables: int = 32
    fillers: int = 51

    def __post_init__(self) -> None:
        need(self.chains >= 1 and self.hops >= 0, "there is at least 1 chain, and hops are 0 or more")
        need(self._statements <= self.variables, f"chains times (hops + 1) are at most {self.variables}")
        need(self._room >= 0, f"statements and question take {self.length - self._room} tokens, not {self.length}")

    @property
    def _statements(self) -> int:
        return self.chains * (self.hops + 1)

    @property
    def _room(self) -> int:
        return self.length - 3 * self._statements - 2

    @property
    def n_tokens(self) -> int:
        return 3 + 2 * self.variables + self.fillers

    @property
    def answers(self) -> range:
        return range(3 + self.variables, 3 + 2 * self.variables)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any value there is; ``told``: the value of any chain."""
        return {"uniform": 1 / self.variables, "told": 1 / self.chains}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``chain`` (b,) the asked one, ``source`` (b, 1) where its value stands."""
        draws, m, size = Draws(seed), self._statements, self.hops + 1
        names = (draws.order(n, self.variables)[:, :m] + 3).reshape(n, self.chains, size)
        values = draws.order(n, self.variables)[:, : self.chains] + 3 + self.variables
        chain_of = draws.order(n, m) % self.chains  # each chain turns up size times
        filler = filler_chain(draws, n, self._room, 3 + 2 * self.variables, self.n_tokens)
        gaps = draws.choose(n, self._room + m, m) - np.arange(m)
        asked = draws.integers(0, self.chains, n)
        ids = np.zeros((n, self.length), np.int64)
        source = np.zeros((n, 1), np.int64)
        for row in range(n):
            text: list[int] = []
            told = [0] * self.chains
            for i, chain in enumerate(chain_of[row]):
                start, done = 0 if i == 0 else gaps[row, i - 1], told[chain]
                right = names[row, chain, done - 1] if done else values[row, chain]
                text += [*filler[row, start : gaps[row, i]], 1, names[row, chain, done], right]
                if chain == asked[row] and not done:
                    source[row] = len(text) - 1
                told[chain] += 1
            ids[row] = [*text, *filler[row, gaps[row, -1] :], 2, names[row, asked[row], -1]]
        targets = np.full_like(ids, IGNORE)
        targets[:, -1] = values[np.arange(n), asked]
        return tokens(ids, targets, chain=asked, source=source)

    def oracle(self, batch: Batch) -> Tensor:
        """Follow the statements, then name the value of the asked variable."""
        found = torch.full_like(batch.ids, IGNORE)
        for row, ids in enumerate(batch.ids.tolist()):
            known: dict[int, int] = {}
            for i in (i for i, token in enumerate(ids) if token == 1):
                known[ids[i + 1]] = known.get(ids[i + 2], ids[i + 2])
            found[row, -1] = known[ids[-1]]
        return found

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        value = (batch.ids >= self.answers.start) & (batch.ids < self.answers.stop)
        told = batch.ids[value].reshape(len(batch), self.chains)
        which = torch.from_numpy(Draws(seed).integers(0, self.chains, *batch.ids.shape))
        return self._masked(told.gather(1, which), batch)

    def words(self) -> list[str]:
        kinds = (("x", self.variables), ("v", self.variables), ("f", self.fillers))
        return ["<pad>", "<set>", "<ask>", *(f"{kind}{i}" for kind, count in kinds for i in range(count))]


@dataclass(frozen=True)
class FrequentWord(TokenTask):
    """Words in random order, one of them more often than the others; which one is asked at the end.

    Token 0 asks, 1 ... V are words. The frequent-word extraction of RULER with one answer.

    Args:
        kinds: different words of a row.
        often: how often the frequent one stands there.
        rarely: how often each other one does, less than ``often``.
        symbols: V, words there are.
    """

    name: ClassVar[str] = "frequent_word"
    kinds: int = 8
    often: int = 8
    rarely: int = 4
    symbols: int = 32

    def __post_init__(self) -> None:
        need(2 <= self.kinds <= self.symbols, f"words of a row are 2 to {self.symbols} kinds, got {self.kinds}")
        need(1 <= self.rarely < self.often, f"rarely ({self.rarely}) is 1 or more and less than often ({self.often})")

    @property
    def _words(self) -> int:
        return self.often + (self.kinds - 1) * self.rarely

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self._words + 1

    @property
    def n_tokens(self) -> int:
        return self.symbols + 1

    @property
    def answers(self) -> range:
        return range(1, self.symbols + 1)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any word there is; ``told``: the word at any place of the row."""
        return {"uniform": 1 / self.symbols, "told": self.often / self._words}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``counts`` (b, V + 1), how often each token stands before the question."""
        draws = Draws(seed)
        kinds = draws.order(n, self.symbols)[:, : self.kinds] + 1
        row = np.repeat(np.arange(self.kinds), [self.often, *[self.rarely] * (self.kinds - 1)])
        listed = np.take_along_axis(kinds[:, row], draws.order(n, self._words), 1)
        ids = np.concatenate([listed, np.zeros((n, 1), np.int64)], 1)
        targets = np.full_like(ids, IGNORE)
        targets[:, -1] = kinds[:, 0]
        counts = (listed[:, :, None] == np.arange(self.n_tokens)).sum(1)
        return tokens(ids, targets, counts=counts)

    def oracle(self, batch: Batch) -> Tensor:
        found = torch.full_like(batch.ids, IGNORE)
        found[:, -1] = batch.ids[:, :-1].mode(1).values
        return found

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        which = torch.from_numpy(Draws(seed).integers(0, self._words, *batch.ids.shape))
        return self._masked(batch.ids.gather(1, which), batch)
