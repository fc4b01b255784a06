"""Triton's interpreter with every address of every load and store held against the tensors of the launch.

The interpreter reads and writes wherever a pointer leads, so a kernel that leaves its tensors passes every comparison
there and fails on a GPU. compute-sanitizer finds that on a device; this finds it without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

__all__ = ["checked"]


def _storages(x: Any, found: set[tuple[int, int]]) -> None:
    if isinstance(x, torch.Tensor):
        storage = x.untyped_storage()
        found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    elif isinstance(x, list | tuple):
        for each in x:
            _storages(each, found)
    elif isinstance(x, dict):
        _storages(list(x.values()), found)


@contextmanager
def checked() -> Iterator[list[str]]:
    """While it lasts, every launch is checked; the list holds what left its tensors, one line each."""
    complaints: list[str] = []
    live: set[tuple[int, int]] = set()
    name = [""]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    before = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def arguments(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = before[0](self, *args, **kwargs)
        live.clear()
        _storages(out, live)
        name[0] = getattr(self.fn, "__name__", str(self.fn))
        return out

    def look(pointers: Any, mask: Any, what: str) -> None:
        at = pointers.data.reshape(-1).astype(np.int64)
        if mask is not None:
            at = at[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(at.shape, dtype=bool)
        for low, high in live:
            inside |= (at >= low) & (at + size <= high)
        if not inside.all():
            complaints.append(f"{name[0]}: {int((~inside).sum())} of {at.size} addresses of a {what}")

    def load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        look(pointers, mask, "load")
        return before[1](self, pointers, mask, other, *args, **kwargs)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        look(pointers, mask, "store")
        return before[2](self, pointers, value, mask, *args, **kwargs)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = arguments, load, store
    try:
        yield complaints
    finally:
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = before
