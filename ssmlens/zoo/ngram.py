"""A 5-gram token model with interpolated modified Kneser-Ney smoothing: the baseline of the English models.

Chen & Goodman 1999, section 3: every order keeps three discounts estimated from its counts of counts; lower
orders count distinct predecessors instead of occurrences. N-grams are packed into one integer each and kept
sorted, so that training is a sort and a query a binary search.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus import WEIGHTS
from .data import Pack

__all__ = ["KneserNey", "baseline", "discounts"]

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]


def discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """The three discounts of modified Kneser-Ney for counts 1, 2 and 3 or more.

    Args:
        counts: one count for each distinct n-gram.

    Returns:
        D1, D2, D3 as Chen & Goodman's equation 17; 0.5, 1 and 1.5 where a count of counts is missing or an
        estimate falls outside of 0 to its count (tiny texts).
    """
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return 0.5, 1.0, 1.5
    y = n1 / (n1 + 2 * n2)
    raw = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return raw if all(0 < d < i for i, d in enumerate(raw, 1)) else (0.5, 1.0, 1.5)


def _pack(tokens: NDArray[np.integer], order: int, bits: int) -> Keys:
    """The n-gram ending at each position from ``order - 1`` on, first token in the highest bits."""
    count = len(tokens) - order + 1
    keys = np.zeros(max(count, 0), dtype=np.uint64)
    for i in range(order):
        keys = (keys << np.uint64(bits)) | tokens[i : i + max(count, 0)].astype(np.uint64)
    return keys


@dataclass(frozen=True)
class _Order:
    """One order: sorted n-grams with discounted counts, and sorted contexts with total and leftover mass."""

    ngrams: Keys
    discounted: NDArray[np.float32]
    contexts: Keys
    totals: NDArray[np.float32]
    leftover: NDArray[np.float32]


def _find(table: Keys, keys: Keys) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each key stands in a sorted table, and whether it does."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def _make_order(keys: Keys, counts: NDArray[np.int64], bits: int) -> _Order:
    d = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
    context = keys >> np.uint64(bits)
    start = np.flatnonzero(np.concatenate(([True], context[1:] != context[:-1])))
    return _Order(
        keys,
        (counts - d).astype(np.float32),
        context[start],
        np.add.reduceat(counts, start).astype(np.float32),
        np.add.reduceat(d, start).astype(np.float32),
    )


class KneserNey:
    """An interpolated modified Kneser-Ney model of a token sequence.

    Args:
        tokens: the training sequence, integers in [0, vocabulary).
        vocabulary: number of distinct tokens.
        order: longest n-gram; ``order`` times the bits of a token must fit 64.

    Raises:
        ValueError: when the sequence is shorter than the order or the n-gram does not fit 64 bits.
    """

    def __init__(self, tokens: NDArray[np.integer], vocabulary: int, order: int = 5) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.bits = max(1, (vocabulary - 1).bit_length())
        if self.bits * order > 64:
            raise ValueError(f"{order} tokens of {self.bits} bits do not fit 64 bits")
        if len(tokens) < order:
            raise ValueError(f"{len(tokens)} tokens are fewer than the order {order}")
        self.orders: list[_Order] = []
        packed = _pack(tokens, order, self.bits)
        packed.sort()
        start = np.flatnonzero(np.concatenate(([True], packed[1:] != packed[:-1])))
        counts = np.diff(np.append(start, len(packed)))
        keys = packed[start]
        del packed
        self.orders.append(_make_order(keys, counts, self.bits))
        for shorter in range(order - 1, 0, -1):
            # Distinct predecessors: drop the first token of the distinct longer n-grams, then count.
            keys = keys & np.uint64((1 << (self.bits * shorter)) - 1)
            keys, counts = np.unique(keys, return_counts=True)
            self.orders.insert(0, _make_order(keys, counts, self.bits))

    def probability(self, context: NDArray[np.integer], tokens: NDArray[np.integer]) -> Floats:
        """The probability of each token after its context.

        Args:
            context: (m, order - 1) preceding tokens, oldest first.
            tokens: (m,) next tokens.

        Returns:
            (m,) probabilities in (0, 1].
        """
        result = np.full(len(tokens), 1.0 / self.vocabulary)
        history = np.zeros(len(tokens), dtype=np.uint64)
        for i, table in enumerate(self.orders):
            if i:
                history |= context[:, -i].astype(np.uint64) << np.uint64(self.bits * (i - 1))
            at, known = _find(table.contexts, history)
            key = (history << np.uint64(self.bits)) | tokens.astype(np.uint64)
            where, seen = _find(table.ngrams, key)
            mass = np.where(seen, table.discounted[where].astype(np.float64), 0.0)
            mixed = (mass + table.leftover[at] * result) / table.totals[at]
            result = np.where(known, mixed, result)
        return result

    def bits_per_byte(self, documents: list[NDArray[np.integer]], n_bytes: int) -> float:
        """Bits per byte of documents, each of which starts with a token that is context only.

        Args:
            documents: token sequences; a context before the start repeats the first token.
            n_bytes: size of their text in bytes.
        """
        total = 0.0
        for ids in documents:
            padded = np.concatenate([np.full(max(self.order - 2, 0), ids[0]), ids])
            windows = np.lib.stride_tricks.sliding_window_view(padded, self.order)[1 - len(ids) :]
            total -= float(np.log2(self.probability(windows[:, :-1], windows[:, -1])).sum())
        return total / n_bytes


def baseline(pack: Pack, order: int = 5) -> dict[str, Any]:
    """Train on the training split of a pack and score its held-out documents.

    Args:
        pack: the packed text; its generated key-value texts are left out.
        order: longest n-gram.

    Returns:
        order, number of training tokens, and bits per byte by group of documents and for all of them.
    """
    tokens = np.concatenate([pack.parts[name] for name in WEIGHTS])
    model = KneserNey(tokens, pack.meta["vocabulary"], order)
    groups = dict.fromkeys(h.group for h in pack.held_out)
    chosen = {g: [h for h in pack.held_out if h.group == g] for g in groups} | {"all": pack.held_out}
    scores = {
        group: model.bits_per_byte([h.ids for h in held], sum(h.n_bytes for h in held))
        for group, held in chosen.items()
    }
    return {"order": order, "training_tokens": len(tokens), "bits_per_byte": scores}


def main(arguments: list[str] | None = None) -> int:
    """Measure the baseline of a pack and write it next to it as ``baseline.json``."""
    parser = argparse.ArgumentParser(prog="python -m ssmlens.zoo.ngram", description="5-gram baseline of a pack.")
    parser.add_argument("--pack", required=True, help="folder written by python -m ssmlens.zoo.data")
    options = parser.parse_args(arguments)
    try:
        result = baseline(Pack.load(options.pack))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    (Path(options.pack) / "baseline.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
