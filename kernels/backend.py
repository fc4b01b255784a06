"""Which implementation runs: the argument ``impl`` of the kernels, checked and resolved."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from .inputs import ScanInputs

__all__ = ["IMPLS", "resolve"]

IMPLS = ("auto", "naive", "chunked", "triton")


def resolve(impl: str, inputs: ScanInputs) -> str:
    """``impl`` itself, or what "auto" means here: "triton" for CUDA tensors in float32 or less, else "chunked".

    Raises:
        ValueError: unknown ``impl``, or "triton" where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        fits = inputs.value.is_cuda and inputs.value.dtype != torch.float64 and _has_triton()
        return "triton" if fits else "chunked"
    if impl == "triton":
        if not _has_triton():
            raise ValueError("impl='triton' needs the package triton, which is not installed: use impl='chunked'")
        from .fused import dispatch

        reason = dispatch.refusal(inputs)
        if reason is not None:
            raise ValueError(f"impl='triton' {reason}")
    return impl


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
