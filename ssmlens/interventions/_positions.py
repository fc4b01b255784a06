"""Token positions as callers write them, made masks over a padded batch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import LayerError, SsmlensError

__all__ = ["last_real", "mask_of", "one_head", "one_position", "whole"]


def mask_of(positions: Any, lengths: Tensor, name: str) -> Tensor:
    """True where a row's positions are named, (b, t) bool with t the longest row.

    Args:
        positions: one position, several, a range or slice, a bool mask (t,) or (b, t), or one list for each row;
            None means all. Negative ones count from each row's last real token.
        lengths: (b,) number of real tokens per row.
        name: how the argument is called, for messages.

    Raises:
        SsmlensError: when a position does not exist or the argument is of another form.
    """
    rows, longest = len(lengths), int(lengths.max())
    real = torch.arange(longest) < lengths.cpu()[:, None]
    if positions is None:
        return real
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape not in ((longest,), (rows, longest)):
            raise SsmlensError(f"a mask of {name} is ({longest},) or ({rows}, {longest}), got {tuple(positions.shape)}")
        mask = positions.cpu().expand(rows, longest)
        if bool((mask & ~real).any()):
            raise SsmlensError(f"the mask of {name} names padding, which is no token")
        return mask.clone()
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    for i, wanted in enumerate(_per_row(positions, rows, name)):
        length = int(lengths[i])
        for k in range(*wanted.indices(length)) if isinstance(wanted, slice) else wanted:
            mask[i, one_position(k, length, name)] = True
    return mask


def one_position(k: Any, length: int, name: str) -> int:
    """A position of a row as a number from 0.

    Raises:
        SsmlensError: when it is no integer or the row has no such token.
    """
    index = whole(k)
    if index is None and not isinstance(k, bool):
        raise SsmlensError(f"{name} holds token positions (integers), got {k!r}")
    if index is None or not -length <= index < length:
        raise SsmlensError(f"{name} holds position {k!r}, but the row has {length} tokens (0 to {length - 1})")
    return index % length


def one_head(head: Any, n_heads: int, layer: int) -> int:
    """A head of a layer as a number from 0.

    Raises:
        LayerError: when it is no integer or the layer has no such head.
    """
    index = whole(head)
    if index is None or not -n_heads <= index < n_heads:
        raise LayerError(f"head {head!r} does not exist in layer {layer}: choose from 0 to {n_heads - 1}")
    return index % n_heads


def whole(x: Any) -> int | None:
    """An integer of any library as Python's; None for what is none."""
    try:
        return None if isinstance(x, bool) else operator.index(x)
    except TypeError:
        return None


def last_real(position: int, lengths: Tensor) -> Tensor:
    """One position in every row as numbers from 0, (b,) long; -1 is each row's last real token."""
    return torch.tensor([one_position(position, int(n), "position") for n in lengths])


def _per_row(positions: Any, rows: int, name: str) -> Sequence[Any]:
    """One iterable or slice of positions for each row."""
    if isinstance(positions, Tensor):
        positions = positions.tolist()
    if isinstance(positions, slice):
        return [positions] * rows
    if not isinstance(positions, Iterable) or isinstance(positions, str):
        return [[positions]] * rows
    items = list(positions)
    if items and all(isinstance(x, Iterable) and not isinstance(x, str) for x in items):
        if len(items) != rows:
            raise SsmlensError(f"{name} has {len(items)} lists of positions for {rows} prompts: give one for each")
        return items
    return [items] * rows
