"""Multi-query associative recall: pairs of a key and a value, then keys whose value must be named.

A text is words separated by spaces: keys are the letters ``a`` to ``z``, values the numbers ``0`` to ``25``,
and ``.`` fills the rest: ``c 7 a 19 . . a`` asks for 19. The layout is that of Zoology (Arora et al. 2023):
the pairs stand at the start, each key is asked once, gaps follow a power law, and the target stands at the
position of the asked key; every other position is filler and carries no target.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "END", "FILLER", "KEYS", "N_KEYS", "TRAINING_LENGTH", "TRAINING_PAIRS", "VALUES", "RecallBatch", "accuracy",
    "batch", "tokenizer",
]  # fmt: skip

N_KEYS = 26
END = 0
FILLER = 1
KEYS = range(2, 2 + N_KEYS)
VALUES = range(2 + N_KEYS, 2 + 2 * N_KEYS)
IGNORE = -100

TRAINING_LENGTH = 64
TRAINING_PAIRS = (2, 4, 8, 16)
GAP_EXPONENT = 0.01


def tokenizer() -> Tokenizer:
    """The word tokenizer of the task, as text: ``a``..``z``, ``0``..``25``, ``.`` and the end of a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = ["<|endoftext|>", ".", *string.ascii_lowercase[:N_KEYS], *(str(i) for i in range(N_KEYS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|endoftext|>"])
    return made


@dataclass(frozen=True)
class RecallBatch:
    """A batch of the task.

    ids (b, t) tokens; targets (b, t) the value to name at an asked key, -100 elsewhere; asked (b, k) position
    at which key j of the pairs is asked; source (b, k) position of its value in the pairs (the key stands one
    before it). Pairs are numbered in the order in which they are told.
    """

    ids: Tensor
    targets: Tensor
    asked: Tensor
    source: Tensor


def batch(size: int, length: int, pairs: int, seed: int) -> RecallBatch:
    """Draw a batch; the same arguments give the same batch.

    Args:
        size: sequences.
        length: tokens a sequence, even.
        pairs: key-value pairs a sequence; at most ``length / 4`` and at most 26.
        seed: of the generator.

    Raises:
        ValueError: when the pairs and their questions do not fit.
    """
    if length % 2 or not 1 <= pairs <= min(length // 4, N_KEYS):
        raise ValueError(
            f"{pairs} pairs do not fit {length} tokens: the length is even, pairs are 1 to length / 4, at most {N_KEYS}"
        )
    random = torch.Generator().manual_seed(seed)
    keys = torch.rand(size, N_KEYS, generator=random).argsort(1)[:, :pairs] + KEYS.start
    values = torch.rand(size, N_KEYS, generator=random).argsort(1)[:, :pairs] + VALUES.start
    slots = (length - 2 * pairs) // 2  # a question may stand at every other position after the pairs
    weight = torch.arange(1, slots + 1, dtype=torch.float64).pow(GAP_EXPONENT - 1)
    gaps = torch.multinomial(weight.expand(size, slots), pairs, generator=random)
    asked = 2 * pairs + 2 * gaps
    ids = torch.full((size, length), FILLER)
    ids[:, 0 : 2 * pairs : 2] = keys
    ids[:, 1 : 2 * pairs : 2] = values
    ids.scatter_(1, asked, keys)
    targets = torch.full_like(ids, IGNORE).scatter_(1, asked, values)
    source = (2 * torch.arange(pairs) + 1).expand(size, pairs).clone()
    return RecallBatch(ids, targets, asked, source)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of asked keys whose value has the largest logit, in [0, 1].

    Args:
        logits: (b, t, v); the prediction for position t stands at position t.
        targets: (b, t) as in :class:`RecallBatch`.
    """
    asked = targets != IGNORE
    return float((logits.argmax(-1)[asked] == targets[asked]).double().mean())
