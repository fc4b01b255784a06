"""Triton launches on the current device; tensors may live on another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ..inputs import ScanInputs

__all__ = ["on_its_device"]

F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(function: F) -> F:
    """Make the device of the first argument's tensors the current one while ``function`` runs.

    Args:
        function: takes a recurrence, or `contributions.Parts`, first.
    """

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = first.value if isinstance(first, ScanInputs) else first.gate
        with torch.cuda.device_of(tensor):
            return function(first, *args, **kwargs)

    return cast("F", run)
