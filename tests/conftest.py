"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

# Without a CUDA device the Triton kernels run in Triton's interpreter, asked for before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The shapes that the annotations of the public classes promise are checked on every call, in the tests only.
install_import_hook(["ssmlens.attention", "ssmlens.recurrence"], "beartype.beartype")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating memory holds NaN, so that code which reads what it never wrote shows it."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
