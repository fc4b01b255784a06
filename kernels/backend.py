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


def resolve(impl: str, inputs: ScanInputs, precision: str = "float32", work: str = "scan") -> str:
    """``impl`` itself, or what "auto" means here: "triton" for CUDA tensors in float32 or less, else "chunked".

    Before the kernels do a kind of work for the first time on a device, and those on matrix units before their first
    use at these sizes, they are checked there (`fused.selfcheck`); where they fail, "auto" warns and means "chunked".

    Args:
        impl: one of `IMPLS`.
        inputs: the recurrence.
        precision: of matrix products.
        work: one of `fused.selfcheck.WORK`, what is about to be done.

    Raises:
        ValueError: unknown ``impl``, or "triton" where it cannot run or failed that check.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        fits = inputs.value.is_cuda and _has_triton() and _refusal(inputs) is None
        return "triton" if fits and _trusted(inputs, precision, work) else "chunked"
    if impl == "triton":
        if not _has_triton():
            raise ValueError("impl='triton' needs the package triton, which is not installed: use impl='chunked'")
        reason = _refusal(inputs)
        if reason is not None:
            raise ValueError(f"impl='triton' {reason}")
        if inputs.value.is_cuda and not _trusted(inputs, precision, work):
            raise ValueError("impl='triton' failed the check of its kernels on this device: use impl='chunked'")
    return impl


def _refusal(inputs: ScanInputs) -> str | None:
    from .fused import dispatch

    return dispatch.refusal(inputs)


def _trusted(inputs: ScanInputs, precision: str, work: str) -> bool:
    """Whether the kernels passed their checks on this device; says so once when they did not."""
    from .fused import selfcheck

    return all(_passed(inputs.value.device, check) for check in selfcheck.needed(inputs, work, precision))


@cache
def _passed(device: torch.device, check: Any) -> bool:
    from .fused import selfcheck

    ask = selfcheck.complaint_at if isinstance(check, selfcheck.Sizes) else selfcheck.complaint_about
    complaint = ask(device, check)
    if complaint is not None:
        text = f"Triton's kernels are not used on {device} for {check}: {complaint}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)
    return complaint is None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
