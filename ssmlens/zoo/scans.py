"""Puts trainable scans in place of those that transformers calls, for the length of a ``with`` block.

transformers' plain Mamba-1 scan loops over time in Python and its depthwise convolution is slow to
differentiate on a GPU; both are looked up by name in the modeling module at each call, so swapping the
names is enough and leaves the model classes untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.kernels import scan
from ssmlens.kernels.backend import resolve
from ssmlens.kernels.inputs import ScanInputs

__all__ = ["KINDS", "training_scans"]

KINDS = ("auto", "chunked", "triton")
"""Implementations that train, as `ssmlens.kernels.scan.run` takes them."""


def _convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """The causal depthwise convolution as shifted sums; (b, d, t) in and out, weight (d, taps)."""
    x = hidden_states.transpose(1, 2)
    taps, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    weight = weight.to(x.dtype)
    out = padded[:, :length] * weight[:, 0]
    for k in range(1, taps):
        out = out + padded[:, k : k + length] * weight[:, k]
    if bias is not None:
        out = out + bias.to(x.dtype)
    if activation is not None:
        if activation != "silu":
            raise ValueError(f"the zoo trains models with silu, got {activation!r}")
        out = F.silu(out)
    return out.transpose(1, 2)


def _selective(impl: str) -> Callable[..., Any]:
    """A function with the signature of transformers' ``mamba_selective_scan``."""

    def run(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        if return_last_state:
            raise ValueError("training scans keep no state: call the model with use_cache=False")
        with torch.autocast(hidden_states.device.type, enabled=False):
            x, step = hidden_states.transpose(1, 2).float(), dt.transpose(1, 2).float()
            if delta_bias is not None:
                step = step + delta_bias.float()
            if delta_softplus:
                step = F.softplus(step)
            write, read = (v.float().transpose(1, 2)[:, :, None] for v in (B, C))
            inputs = ScanInputs(value=x[..., None], write=write, read=read, dt=step, A=A.float())
            y = scan.run(inputs, impl=impl)[0][..., 0]
            if D is not None:
                y = y + x * D
            if z is not None:
                y = y.to(z.dtype) * F.silu(z.transpose(1, 2))
        return y.transpose(1, 2)

    return run


def _chunked(impl: str) -> Callable[..., Any]:
    """A function with the signature of transformers' ``mamba2_chunk_scan``."""

    def run(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        with torch.autocast(hidden_states.device.type, enabled=False):
            step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
            if dt_softplus:
                step = F.softplus(step)
            step = step.clamp(*dt_limit)
            x = hidden_states.float()
            inputs = ScanInputs(
                value=x, write=B.float(), read=C.float(), dt=step, A=A.float()[:, None], initial=initial_states
            )
            y, final = scan.run(inputs, impl=impl)
            if D is not None:
                y = y + x * D[:, None]
        return (y, final) if return_final_states else y

    return run


@contextmanager
def training_scans(device: torch.device, kind: str = "auto") -> Iterator[str]:
    """Swap the scans and the convolution of transformers' Mamba and Mamba-2 for trainable ones.

    Args:
        device: where the model trains.
        kind: one of `KINDS`.

    Yields:
        the implementation of the Mamba-1 scan in use, "triton" or "chunked".

    Raises:
        ValueError: for another kind, or for "triton" where it does not run.
    """
    if kind not in KINDS:
        raise ValueError(f"scan is one of {', '.join(KINDS)}, got {kind!r}")
    one = torch.ones(1, 1, 1, 1, device=device, requires_grad=True)
    used = resolve(kind, ScanInputs(value=one, write=one, read=one, log_decay=-one))
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    swaps: list[tuple[ModuleType, str, Callable[..., Any]]] = [
        (modeling_mamba, "mamba_selective_scan", _selective(used)),
        (modeling_mamba, "causal_conv1d_fn", _convolution),
        (modeling_mamba2, "mamba2_chunk_scan", _chunked(kind)),
        (modeling_mamba2, "causal_conv1d_fn", _convolution),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    try:
        for module, name, function in swaps:
            setattr(module, name, function)
        yield used
    finally:
        for module, name, function in before:
            setattr(module, name, function)
