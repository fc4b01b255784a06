"""Which implementation runs: the argument ``impl`` of the kernels, checked and resolved."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch

from .inputs import ScanInputs

__all__ = ["IMPLS", "resolve"]

IMPLS = ("auto", "naive", "chunked", "triton")


def resolve(impl: str, inputs: ScanInputs, precision: str = "float32") -> str:
    """``impl`` itself, or what "auto" means here: "triton" for CUDA tensors in float32 or less, else "chunked".

    Before their first use on a device, and those on matrix units before their first use at these sizes, the kernels
    are checked there (`fused.selfcheck`); where they fail, "auto" warns and means "chunked".

    Raises:
        ValueError: unknown ``impl``, or "triton" where it cannot run or failed that check.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        fits = inputs.value.is_cuda and _has_triton() and _refusal(inputs) is None
        return "triton" if fits and _trusted(inputs, precision) else "chunked"
    if impl == "triton":
        if not _has_triton():
            raise ValueError("impl='triton' needs the package triton, which is not installed: use impl='chunked'")
        reason = _refusal(inputs)
        if reason is not None:
            raise ValueError(f"impl='triton' {reason}")
        if inputs.value.is_cuda and not _trusted(inputs, precision):
            raise ValueError("impl='triton' failed the check of its kernels on this device: use impl='chunked'")
    return impl


def _refusal(inputs: ScanInputs) -> str | None:
    from .fused import dispatch

    return dispatch.refusal(inputs)


def _trusted(inputs: ScanInputs, precision: str = "float32") -> bool:
    """Whether the kernels passed their check on this device and at these sizes; says so once when they did not."""
    from .fused import selfcheck

    device = inputs.value.device
    if not _passed(device, None):
        return False
    sizes = selfcheck.sizes(inputs, precision)
    return sizes is None or _passed(device, sizes)


@cache
def _passed(device: torch.device, sizes: Any) -> bool:
    from .fused import selfcheck

    complaint = selfcheck.complaint(device) if sizes is None else selfcheck.complaint_at(device, sizes)
    if complaint is not None:
        where = "" if sizes is None else f" for {sizes.heads} heads of {sizes.channels} channels, {sizes.states} states"
        warnings.warn(f"Triton's kernels are not used on {device}{where}: {complaint}", RuntimeWarning, stacklevel=5)
    return complaint is None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
