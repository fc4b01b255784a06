"""Which logit is attributed: the position in each row, and the target token there."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import PromptError

__all__ = ["Position", "Target", "positions", "target_ids"]

Position = int | Sequence[int] | Tensor
Target = int | str | Sequence[int | str] | Tensor | None


def positions(position: Position, lengths: Tensor) -> Tensor:
    """One position per row, (b,), counted from 0.

    Args:
        position: an index, or one per row; negative ones count back from each row's last real token.
        lengths: (b,) number of real tokens.

    Raises:
        PromptError: when a row has no such token.
    """
    asked = _per_row(position, len(lengths), "position")
    found = []
    for i, (k, n) in enumerate(zip(asked, lengths.tolist())):
        if not _whole(k):
            raise PromptError(f"position is an index, or one per prompt, got {position!r}")
        if not -n <= int(k) < n:
            raise PromptError(f"position {int(k)} does not exist: prompt {i} has {n} tokens, 0 to {n - 1}")
        found.append(int(k) % n)
    return torch.tensor(found, dtype=torch.long)


def target_ids(target: Target, rows: int, vocab_size: int, tokenizer: Any) -> Tensor | None:
    """One token id per row, (b,); None where the model's own top token is meant.

    Args:
        target: None, a token id, a text that is one token, or a list or tensor with one of them per row.
        rows: number of prompts.
        vocab_size: rows of the embedding.
        tokenizer: turns text into ids; may be None.

    Raises:
        PromptError: when a target is no token.
    """
    if target is None:
        return None
    return torch.tensor([_token(x, vocab_size, tokenizer) for x in _per_row(target, rows, "target")], dtype=torch.long)


def _per_row(value: Any, rows: int, name: str) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * rows
    if len(value) != rows:
        raise PromptError(f"{name} has {len(value)} entries for {rows} prompts: give one, or one per prompt")
    return list(value)


def _token(target: Any, vocab_size: int, tokenizer: Any) -> int:
    if isinstance(target, str):
        if tokenizer is None:
            raise PromptError("this model has no tokenizer: give the target as a token id")
        encoded = tokenizer.encode(target)
        ids = list(getattr(encoded, "ids", encoded))
        if len(ids) != 1:
            raise PromptError(f"the target {target!r} is {len(ids)} tokens: give one token, as text or as an id")
        return int(ids[0])
    if not _whole(target):
        raise PromptError(f"a target is a token id, a text that is one token, or None, got {target!r}")
    if not 0 <= int(target) < vocab_size:
        raise PromptError(f"target {int(target)} is outside the vocabulary: ids are 0 to {vocab_size - 1}")
    return int(target)


def _whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)
