"""Needles in a stretch of filler, in tokens: a passkey, and keys with values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._base import IGNORE, Batch, Draws, TokenTask, need, tokens

__all__ = ["Needles", "Passkey", "filler_chain"]


def filler_chain(draws: Draws, n: int, length: int, low: int, high: int, branches: int = 4) -> np.ndarray:
    """(n, length) filler tokens low ... high - 1 of a fixed Markov chain: each goes on to one of a few, equally likely.

    The successors of token i are (3 i + 7 j + 1) mod size for j < branches: text-like in that the next token is
    neither certain nor uniform. Its entropy rate is ln(branches) nats where these differ.
    """
    size = high - low
    chain = np.empty((n, length), np.int64)
    now = draws.integers(0, size, n)
    step = draws.integers(0, branches, n, max(length, 1))
    for t in range(length):
        chain[:, t] = now
        now = (3 * now + 7 * step[:, t] + 1) % size
    return chain + low


@dataclass(frozen=True)
class Passkey(TokenTask):
    """A passkey of digits, told once somewhere in filler and asked at the end; in tokens, so that it trains in minutes.

    Token 0 pads, 1 tells, 2 asks, 3 ... 12 are digits, the rest is filler of a Markov chain (:func:`filler_chain`).
    The row ends with the asking token and the digits but the last, the model reading its own right answers.

    Args:
        length: tokens a row, all of it.
        digits: of the passkey.
        fillers: filler tokens there are.
        depth: where it is told: share of the filler that stands before it, in [0, 1]; drawn for each row when None.
    """

    name: ClassVar[str] = "passkey"
    length: int = 128
    digits: int = 5
    fillers: int = 51
    depth: float | None = None

    def __post_init__(self) -> None:
        need(self.digits >= 1, f"a passkey has digits, got {self.digits}")
        need(self.fillers >= 2, f"there are at least 2 fillers, got {self.fillers}")
        need(self._room >= 0, f"{self.digits} digits take {2 * self.digits + 1} tokens, the row has {self.length}")
        need(self.depth is None or 0 <= self.depth <= 1, f"depth is a share from 0 to 1, got {self.depth}")

    @property
    def _room(self) -> int:
        return self.length - 2 * self.digits - 1

    @property
    def n_tokens(self) -> int:
        return 13 + self.fillers

    @property
    def answers(self) -> range:
        return range(3, 13)

    @property
    def chance_whole(self) -> float:
        """Chance of naming every digit by luck."""
        return 0.1**self.digits

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``source`` (b, digits) where the digits are told, ``depth`` (b,) share of the filler before them."""
        draws, room, d = Draws(seed), self._room, self.digits
        key = draws.integers(3, 13, n, d)
        filler = filler_chain(draws, n, room, 13, self.n_tokens)
        if self.depth is None:
            before = draws.integers(0, room + 1, n)
        else:
            before = np.full(n, round(self.depth * room))
        ids = np.empty((n, self.length), np.int64)
        for row in range(n):
            parts = [filler[row, : before[row]], [1], key[row], filler[row, before[row] :]]
            ids[row, : room + d + 1] = np.concatenate(parts)
        ids[:, room + d + 1 :] = np.concatenate([np.full((n, 1), 2), key[:, :-1]], 1)
        targets = np.full_like(ids, IGNORE)
        targets[:, -d:] = key
        depth = before / max(room, 1)
        return tokens(ids, targets, source=before[:, None] + 1 + np.arange(d), depth=depth)

    def oracle(self, batch: Batch) -> Tensor:
        """The digits after the telling token."""
        place = (batch.ids == 1).long().argmax(1, keepdim=True) + 1 + torch.arange(self.digits)
        found = torch.full_like(batch.ids, IGNORE)
        found[:, -self.digits :] = batch.ids.gather(1, place)
        return found

    def words(self) -> list[str]:
        return ["<pad>", "<tell>", "<ask>", *"0123456789", *(f"f{i}" for i in range(self.fillers))]


@dataclass(frozen=True)
class Needles(TokenTask):
    """Keys with values told in filler, some of which are asked: the needles of RULER (Hsieh et al. 2024) in tokens.

    Token 0 pads, 1 tells, 2 asks, then keys, then values, then filler. A needle is 1, key, value; a key with several
    values is told once for each. At the end each asked key stands as 2, key, its values but the last; its values are
    asked in the order told. Keys and values of a row are all different.

    Args:
        length: tokens a row.
        keys: keys told ("multi-key" when above 1).
        per_key: values of each ("multi-value" when above 1).
        asked: keys asked ("multi-query" when above 1).
        alphabet: keys there are; as many values.
        fillers: filler tokens there are.
    """

    name: ClassVar[str] = "needles"
    length: int = 128
    keys: int = 4
    per_key: int = 1
    asked: int = 1
    alphabet: int = 32
    fillers: int = 51

    def __post_init__(self) -> None:
        need(min(self.keys, self.per_key, self.asked) >= 1, "keys, values of each and asked keys are at least 1")
        need(self.asked <= self.keys, f"{self.asked} keys are asked but {self.keys} told")
        need(self.keys * self.per_key <= self.alphabet, f"keys times values are at most {self.alphabet}")
        need(self._room >= 0, f"needles and questions take {self.length - self._room} tokens, not {self.length}")

    @property
    def _needles(self) -> int:
        return self.keys * self.per_key

    @property
    def _question(self) -> int:
        return self.asked * (1 + self.per_key)

    @property
    def _room(self) -> int:
        return self.length - 3 * self._needles - self._question

    @property
    def n_tokens(self) -> int:
        return 3 + 2 * self.alphabet + self.fillers

    @property
    def answers(self) -> range:
        return range(3 + self.alphabet, 3 + 2 * self.alphabet)

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any value there is; ``told``: any value of the row."""
        return {"uniform": 1 / self.alphabet, "told": 1 / self._needles}

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Facts: ``source`` (b, asked * per_key) where each answer is told, ``key`` (b, asked) asked keys."""
        draws, m, v = Draws(seed), self._needles, self.per_key
        keys = draws.order(n, self.alphabet)[:, : self.keys] + 3
        values = draws.order(n, self.alphabet)[:, :m] + 3 + self.alphabet
        order = draws.order(n, m)  # needle i of the text tells value order[i], of key order[i] // v
        filler = filler_chain(draws, n, self._room, 3 + 2 * self.alphabet, self.n_tokens)
        gaps = draws.choose(n, self._room + m, m) - np.arange(m)  # filler tokens before each needle
        asked = draws.order(n, self.keys)[:, : self.asked]
        ids = np.zeros((n, self.length), np.int64)
        targets = np.full_like(ids, IGNORE)
        source = np.empty((n, self.asked * v), np.int64)
        for row in range(n):
            text: list[int] = []
            places: dict[int, list[int]] = {}
            for i, j in enumerate(order[row]):
                start = 0 if i == 0 else gaps[row, i - 1]
                text += [*filler[row, start : gaps[row, i]], 1, keys[row, j // v], values[row, j]]
                places.setdefault(j // v, []).append(len(text) - 1)
            text += [*filler[row, gaps[row, -1] :]]
            found = [p for key in asked[row] for p in places[key]]
            for q, key in enumerate(asked[row]):
                told = [text[p] for p in places[key]]
                at = len(text) + 1
                text += [2, keys[row, key], *told[:-1]]
                targets[row, at : at + v] = told
                source[row, q * v : (q + 1) * v] = found[q * v : (q + 1) * v]
            ids[row] = text
        return tokens(ids, targets, source=source, key=np.take_along_axis(keys, asked, 1))

    def oracle(self, batch: Batch) -> Tensor:
        """Read every needle, then look each asked key up."""
        found = torch.full_like(batch.ids, IGNORE)
        for row, ids in enumerate(batch.ids.tolist()):
            told: dict[int, list[int]] = {}
            for i, token in enumerate(ids):
                if token == 1:
                    told.setdefault(ids[i + 1], []).append(ids[i + 2])
                elif token == 2:
                    found[row, i + 1 : i + 1 + self.per_key] = torch.tensor(told[ids[i + 1]])
        return found

    def guess(self, batch: Batch, name: str, seed: int = 0) -> Tensor:
        if name != "told":
            return super().guess(batch, name, seed)
        ids = batch.ids
        marks = torch.nn.functional.pad(ids == 1, (2, 0))[:, : ids.shape[1]]
        told = ids[marks].reshape(len(ids), self._needles)
        which = torch.from_numpy(Draws(seed).integers(0, self._needles, *ids.shape))
        return self._masked(told.gather(1, which), batch)

    def words(self) -> list[str]:
        kinds = (("k", self.alphabet), ("v", self.alphabet), ("f", self.fillers))
        return ["<pad>", "<tell>", "<ask>", *(f"{kind}{i}" for kind, count in kinds for i in range(count))]
