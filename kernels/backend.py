"""Which implementation runs: the argument ``impl`` of the kernels, checked and resolved."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch

from .inputs import ScanInputs

__all__ = ["IMPLS", "resolve"]

IMPLS = ("auto", "naive", "chunked", "triton")


def resolve(impl: str, inputs: ScanInputs) -> str:
    """``impl`` itself, or what "auto" means here: "triton" for CUDA tensors in float32 or less, else "chunked".

    Before its first use on a device the kernels are checked there once (`fused.selfcheck`); where they fail, "auto"
    warns and means "chunked".

    Raises:
        ValueError: unknown ``impl``, or "triton" where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        fits = inputs.value.is_cuda and _has_triton() and _refusal(inputs) is None
        return "triton" if fits and _trusted(inputs.value.device) else "chunked"
    if impl == "triton":
        if not _has_triton():
            raise ValueError("impl='triton' needs the package triton, which is not installed: use impl='chunked'")
        reason = _refusal(inputs)
        if reason is not None:
            raise ValueError(f"impl='triton' {reason}")
    return impl


def _refusal(inputs: ScanInputs) -> str | None:
    from .fused import dispatch

    return dispatch.refusal(inputs)


@cache
def _trusted(device: torch.device) -> bool:
    """Whether the kernels passed their check on this device; says so once when they did not."""
    from .fused import selfcheck

    complaint = selfcheck.complaint(device)
    if complaint is not None:
        warnings.warn(f"Triton's kernels are not used on {device}: {complaint}", RuntimeWarning, stacklevel=4)
    return complaint is None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
