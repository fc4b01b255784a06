"""Prompts of every kind, made one right-padded batch of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import PromptError

__all__ = ["Batch", "prepare"]


@dataclass(frozen=True)
class Batch:
    """Token ids (b, t) padded on the right, their lengths (b,) and the tokens' texts."""

    ids: Tensor
    lengths: Tensor
    tokens: list[list[str]]

    @property
    def padded(self) -> bool:
        return bool((self.lengths < self.ids.shape[1]).any())

    @property
    def mask(self) -> Tensor:
        """(b, t) long, 1 at real tokens."""
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()


def prepare(
    prompt: str | Sequence[str] | Sequence[int] | Tensor,
    tokenizer: Any,
    vocab_size: int,
    attention_mask: Tensor | None = None,
) -> Batch:
    """One batch from a text, texts, ids, or a LongTensor (t,) or (b, t) with an optional mask.

    Raises:
        PromptError: naming what is wrong and what a prompt may be.
    """
    rows = _rows(prompt, tokenizer, attention_mask)
    for i, row in enumerate(rows):
        if not row:
            which = f"prompt {i} of {len(rows)}" if len(rows) > 1 else "the prompt"
            raise PromptError(f"{which} is empty: give at least one token")
        low, high = min(row), max(row)
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise PromptError(f"token id {wrong} is outside the vocabulary: ids are 0 to {vocab_size - 1}")
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return Batch(ids, lengths, [_texts(row, tokenizer) for row in rows])


def _rows(prompt: Any, tokenizer: Any, mask: Tensor | None) -> list[list[int]]:
    if mask is not None and not (isinstance(prompt, Tensor) and prompt.shape == mask.shape and prompt.ndim == 2):
        raise PromptError("attention_mask goes with a (b, t) tensor of ids of the same shape")
    if isinstance(prompt, Tensor):
        integer = not (prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool)
        if not integer or prompt.ndim not in (1, 2):
            raise PromptError(
                f"a tensor prompt is integer ids (t,) or (b, t), got {prompt.dtype} {tuple(prompt.shape)}"
            )
        if prompt.numel() == 0:
            raise PromptError("the prompt is empty: give at least one token")
        table = prompt.long().cpu()[None] if prompt.ndim == 1 else prompt.long().cpu()
        return table.tolist() if mask is None else [_unpad(r, m, i) for i, (r, m) in enumerate(zip(table, mask.cpu()))]
    if isinstance(prompt, str):
        return [_encode(prompt, tokenizer)]
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        items = list(prompt)
        if not items:
            raise PromptError("the prompt is empty: give at least one token")
        if all(isinstance(x, str) for x in items):
            return [_encode(x, tokenizer) for x in items]
        if all(isinstance(x, Integral) and not isinstance(x, bool) for x in items):
            return [[int(x) for x in items]]
    raise PromptError("a prompt is a text, a list of texts, a list of token ids, or a LongTensor (t,) or (b, t)")


def _unpad(row: Tensor, mask: Tensor, index: int) -> list[int]:
    real = mask.nonzero()[:, 0]
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PromptError("attention_mask holds 0 and 1 only")
    if len(real) and int(real[-1] - real[0]) + 1 != len(real):
        raise PromptError(f"row {index} of attention_mask has a gap: the real tokens of a row must be contiguous")
    return [int(k) for k in row[real]]


def _encode(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise PromptError("this model has no tokenizer: give token ids, or load it with tokenizer=...")
    encoded = tokenizer.encode(text)
    return list(getattr(encoded, "ids", encoded))


def _texts(row: list[int], tokenizer: Any) -> list[str]:
    """The text of each token alone; ids where there is no tokenizer."""
    if tokenizer is None:
        return [str(k) for k in row]
    try:
        return [str(tokenizer.decode([k])) for k in row]
    except (OverflowError, IndexError, TypeError, ValueError):
        # Padding rows of the vocabulary have an embedding but no text.
        return [f"<{k}>" for k in row]
