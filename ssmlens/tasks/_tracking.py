"""State tracking: parity and the word problem of finite groups; and the one-token stress of a state."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._base import IGNORE, Batch, Draws, TokenTask, need, tokens

__all__ = ["GroupWord", "Newlines", "Parity", "group_table"]


def _even(order: tuple[int, ...]) -> bool:
    inversions = sum(order[i] > order[j] for i in range(len(order)) for j in range(i + 1, len(order)))
    return inversions % 2 == 0


@cache
def group_table(group: str) -> np.ndarray:
    """(g, g) product table of a finite group: element i after element j; element 0 is the identity.

    Args:
        group: "Z2", "Z3", ... cyclic; "S3" ... "S5" all permutations, "A3" ... "A5" the even ones.

    Raises:
        SsmlensError: for another name.
    """
    kind, size = group[:1], int(group[1:]) if group[1:].isdigit() else 0
    need(
        (kind == "Z" and 2 <= size <= 120) or (kind in "SA" and 3 <= size <= 5),
        f"groups are Z2 to Z120, S3 to S5 and A3 to A5, got {group!r}",
    )
    if kind == "Z":
        table = np.add.outer(np.arange(size), np.arange(size)) % size
    else:
        elements = [p for p in itertools.permutations(range(size)) if kind == "S" or _even(p)]
        index = {p: i for i, p in enumerate(elements)}
        table = np.array([[index[tuple(p[k] for k in q)] for q in elements] for p in elements])
    table.setflags(write=False)
    return table


@dataclass(frozen=True)
class GroupWord(TokenTask):
    """The word problem of a group: at each place, the product of all elements so far.

    Tokens are the elements, drawn independently and uniformly, so every product is uniform too. The target at t is
    x(t) ... x(2) x(1), the latest element on the left. S3 is solvable but not commutative; A5 is the smallest group
    that is not solvable, for which no fixed depth of diagonal recurrences is known to suffice (Merrill et al. 2024,
    arXiv:2404.08819).

    Args:
        group: see :func:`group_table`.
        length: tokens a row.
    """

    name: ClassVar[str] = "group_word"
    group: str = "S3"
    length: int = 40

    def __post_init__(self) -> None:
        need(self.length >= 1, f"a row has tokens, got length {self.length}")
        group_table(self.group)

    @property
    def n_tokens(self) -> int:
        return len(group_table(self.group))

    @property
    def answers(self) -> range:
        return range(self.n_tokens)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any element, 1/g; ``last``: the latest element, right at the first place and with 1/g after."""
        g = self.n_tokens
        return {"uniform": 1 / g, "last": (1 + (self.length - 1) / g) / self.length}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """No facts: every place is asked."""
        ids = Draws(seed).integers(0, self.n_tokens, n, self.length)
        return tokens(ids, self._products(ids))

    def _products(self, ids: np.ndarray) -> np.ndarray:
        table, out = group_table(self.group), np.empty_like(ids)
        product = np.zeros(len(ids), np.int64)
        for t in range(ids.shape[1]):
            product = table[ids[:, t], product]
            out[:, t] = product
        return out

    def oracle(self, batch: Batch) -> Tensor:
        """By halves instead of one by one: the product is associative."""
        table = torch.from_numpy(group_table(self.group).copy())
        out, step = batch.ids.clone(), 1
        while step < out.shape[1]:
            out = torch.cat([out[:, :step], table[out[:, step:], out[:, :-step]]], 1)
            step *= 2
        return out

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        return batch.ids.clone() if name == "last" else super().guess(batch, name, seed)


@dataclass(frozen=True)
class Parity(GroupWord):
    """Whether the number of ones so far is odd: the group Z2 on bits."""

    name: ClassVar[str] = "parity"
    group: str = "Z2"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.group == "Z2", f"parity is the group Z2, got {self.group!r}")

    def oracle(self, batch: Batch) -> Tensor:
        """The running sum, modulo 2."""
        return batch.ids.cumsum(1) % 2


@dataclass(frozen=True)
class Newlines(TokenTask):
    """One token over and over: a stress of the state, which is to forget what it is told again and again.

    The target is the same token, so a language model should grow ever surer; loss and state norms against position
    show whether the state settles. Source: Stuffed Mamba (Chen et al. 2024, arXiv:2410.07145), 300,000 newlines.

    Args:
        length: tokens a row.
        token: which one; the newline of the model's own tokenizer.
        vocabulary: tokens there are.
    """

    name: ClassVar[str] = "newlines"
    length: int = 1024
    token: int = 0
    vocabulary: int = 256

    def __post_init__(self) -> None:
        need(self.length >= 2, f"a row has at least 2 tokens, got {self.length}")
        need(0 <= self.token < self.vocabulary, f"tokens are 0 to {self.vocabulary - 1}, got {self.token}")

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def answers(self) -> range:
        return range(self.vocabulary)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any token; ``last``: the token that stands there, always right."""
        return {"uniform": 1 / self.vocabulary, "last": 1.0}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """n equal rows; the seed changes nothing. The last place has no target."""
        Draws(seed)
        ids = np.full((n, self.length), self.token, np.int64)
        targets = ids.copy()
        targets[:, -1] = IGNORE
        return tokens(ids, targets)

    def oracle(self, batch: Batch) -> Tensor:
        return self._masked(batch.ids, batch)

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        return self.oracle(batch) if name == "last" else super().guess(batch, name, seed)

    def text(self) -> str:
        """The same stress as text: ``length`` newlines."""
        return "\n" * self.length
