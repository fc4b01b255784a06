"""Copying a string, copying what stands among blanks, and completing a repeated pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._base import IGNORE, Batch, Draws, TokenTask, need, tokens

__all__ = ["Copy", "Induction", "SelectiveCopy", "copy_bound"]


def copy_bound(state_bits: float, length: int, symbols: int) -> float:
    """Largest share of uniformly random strings that any state of so many bits lets come back whole, in [0, 1].

    A state of b bits takes 2^b values, each of which stands for one string at best: 2^b / V^n.

    Args:
        state_bits: b.
        length: n, symbols of a string.
        symbols: V.

    Source: Jelassi et al. 2024, arXiv:2402.01032.
    """
    return min(1.0, 2.0 ** min(0.0, state_bits - length * math.log2(symbols)))


@dataclass(frozen=True)
class Copy(TokenTask):
    """A string of random symbols, a separator, and the string again.

    Token 0 separates, 1 ... V are symbols, drawn independently. The row is x1 ... xn, 0, x1 ... x(n-1); the targets
    from the separator on are x1 ... xn, the model reading its own right answers.

    Args:
        count: n, symbols of the string.
        symbols: V.
    """

    name: ClassVar[str] = "copy"
    count: int = 16
    symbols: int = 16

    def __post_init__(self) -> None:
        need(self.count >= 1 and self.symbols >= 2, "a string has at least 1 symbol, of at least 2 kinds")

    @property
    def n_tokens(self) -> int:
        return self.symbols + 1

    @property
    def answers(self) -> range:
        return range(1, self.symbols + 1)

    @property
    def length(self) -> int:
        """Tokens a row, 2 n."""
        return 2 * self.count

    @property
    def bits(self) -> float:
        """n log2 V: what has to be held to copy every string."""
        return self.count * math.log2(self.symbols)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any symbol; ``told``: any symbol of the string, which is the right one with 1/n."""
        return {"uniform": 1 / self.symbols, "told": 1 / self.count + (1 - 1 / self.count) / self.symbols}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``source`` (b, n), where the symbol of each answer stands."""
        string = Draws(seed).integers(1, self.symbols + 1, n, self.count)
        ids = np.concatenate([string, np.zeros((n, 1), np.int64), string[:, :-1]], 1)
        targets = np.full_like(ids, IGNORE)
        targets[:, self.count :] = string
        return tokens(ids, targets, source=np.broadcast_to(np.arange(self.count), string.shape))

    def oracle(self, batch: Batch) -> Tensor:
        found = torch.full_like(batch.ids, IGNORE)
        found[:, self.count :] = batch.ids[:, : self.count]
        return found

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        which = torch.from_numpy(Draws(seed).integers(0, self.count, *batch.ids.shape))
        return self._masked(batch.ids.gather(1, which), batch)

    def words(self) -> list[str]:
        return ["|", *(f"s{i}" for i in range(self.symbols))]


@dataclass(frozen=True)
class SelectiveCopy(TokenTask):
    """Symbols at random places among blanks, then as many asking tokens; they come back in order, without the blanks.

    Token 0 is blank, 1 asks, 2 ... V + 1 are symbols. Source: Gu and Dao 2023 (arXiv:2312.00752), section 4.1.

    Args:
        stretch: tokens of the first part.
        count: symbols in it.
        symbols: V.
    """

    name: ClassVar[str] = "selective_copy"
    stretch: int = 64
    count: int = 8
    symbols: int = 16

    def __post_init__(self) -> None:
        need(1 <= self.count <= self.stretch, f"symbols are 1 to {self.stretch}, got {self.count}")
        need(self.symbols >= 2, f"there are at least 2 symbols, got {self.symbols}")

    @property
    def n_tokens(self) -> int:
        return self.symbols + 2

    @property
    def answers(self) -> range:
        return range(2, self.symbols + 2)

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.stretch + self.count

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any symbol; ``told``: any symbol of the row."""
        return {"uniform": 1 / self.symbols, "told": 1 / self.count + (1 - 1 / self.count) / self.symbols}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``source`` (b, count), where each symbol stands."""
        draws = Draws(seed)
        string = draws.integers(2, self.symbols + 2, n, self.count)
        places = draws.choose(n, self.stretch, self.count)
        ids = np.zeros((n, self.length), np.int64)
        np.put_along_axis(ids, places, string, 1)
        ids[:, self.stretch :] = 1
        targets = np.full_like(ids, IGNORE)
        targets[:, self.stretch :] = string
        return tokens(ids, targets, source=places)

    def _told(self, ids: Tensor) -> Tensor:
        return ids[ids >= 2].reshape(len(ids), self.count)

    def oracle(self, batch: Batch) -> Tensor:
        found = torch.full_like(batch.ids, IGNORE)
        found[:, self.stretch :] = self._told(batch.ids)
        return found

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        which = torch.from_numpy(Draws(seed).integers(0, self.count, *batch.ids.shape))
        return self._masked(self._told(batch.ids).gather(1, which), batch)

    def words(self) -> list[str]:
        return [".", "?", *(f"s{i}" for i in range(self.symbols))]


@dataclass(frozen=True)
class Induction(TokenTask):
    """Random symbols with one mark among them; the mark comes again at the end, and what followed it is asked.

    Token 0 is the mark, 1 ... V are symbols. Source: the induction heads task of Gu and Dao 2023, section 4.1.

    Args:
        length: tokens a row, with the mark at the end.
        symbols: V.
    """

    name: ClassVar[str] = "induction"
    length: int = 64
    symbols: int = 15

    def __post_init__(self) -> None:
        need(self.length >= 4 and self.symbols >= 2, "a row has at least 4 tokens, of at least 2 symbols")

    @property
    def n_tokens(self) -> int:
        return self.symbols + 1

    @property
    def answers(self) -> range:
        return range(1, self.symbols + 1)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any symbol; ``told``: any of the length - 2 symbols of the row."""
        told = self.length - 2
        return {"uniform": 1 / self.symbols, "told": 1 / told + (1 - 1 / told) / self.symbols}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``source`` (b, 1), where the answer stands."""
        draws = Draws(seed)
        ids = draws.integers(1, self.symbols + 1, n, self.length)
        place = draws.integers(0, self.length - 2, n)[:, None]
        np.put_along_axis(ids, place, 0, 1)
        ids[:, -1] = 0
        targets = np.full_like(ids, IGNORE)
        targets[:, -1:] = np.take_along_axis(ids, place + 1, 1)
        return tokens(ids, targets, source=place + 1)

    def oracle(self, batch: Batch) -> Tensor:
        found = torch.full_like(batch.ids, IGNORE)
        place = (batch.ids == 0).long().argmax(1, keepdim=True)
        found[:, -1:] = batch.ids.gather(1, place + 1)
        return found

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        told = batch.ids[batch.ids != 0].reshape(len(batch), -1)
        which = torch.from_numpy(Draws(seed).integers(0, told.shape[1], *batch.ids.shape))
        return self._masked(told.gather(1, which), batch)

    def words(self) -> list[str]:
        return ["!", *(f"s{i}" for i in range(self.symbols))]
