"""The pieces of work that `bench` times, and how each is compared with the float64 loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention, naive, scan
from .inputs import ScanInputs

__all__ = ["OPS", "SMALL", "Op", "mamba"]

# Heads and tokens on which an op is compared with the loop: heads do not mix, and a prefix is a prefix.
_HEADS, _TOKENS = 4, 48
# Beyond this many tokens the loop takes too long, and its float64 reference is the chunked scan, tested against it.
_LOOP_TOKENS = 2048

Size = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Op:
    """One timed piece of work on one recurrence.

    Attributes:
        what: for the table.
        sizes: (b, t, h, p, n) of each row on a CPU and on a GPU.
        prepare: inputs to the call that is timed; the call returns the tensors it made.
        error: inputs and those tensors to their relative error against the float64 loop.
        dtype: of the inputs, where it is not the one asked for.
        precision: of the matrix products; the gate is that of its dtype.
    """

    what: str
    sizes: dict[str, tuple[Size, ...]]
    prepare: Callable[[ScanInputs], Callable[[], Sequence[Tensor]]]
    error: Callable[[ScanInputs, Sequence[Tensor]], float]
    dtype: torch.dtype | None = None
    precision: torch.dtype = torch.float32


def mamba(b: int, t: int, h: int, p: int, n: int, device: str, dtype: torch.dtype) -> ScanInputs:
    """Inputs like a released model's: p = 1 is Mamba-1 (decay per state), p > 1 Mamba-2 (decay per head)."""
    rng = torch.Generator(device).manual_seed(0)
    placed: dict[str, Any] = {"generator": rng, "device": device}
    # softplus of a bias drawn as at initialisation: steps from 0.001 to 0.1.
    dt = torch.rand(b, t, h, **placed).mul_(4.6).sub_(6.9).exp_()
    A = -torch.arange(1.0, n + 1, device=device).expand(h, n) if p == 1 else -(1 + 15 * torch.rand(h, 1, **placed))
    pieces = {
        "value": torch.randn(b, t, h, p, **placed),
        "write": torch.randn(b, t, 1, n, **placed),
        "read": torch.randn(b, t, 1, n, **placed),
        "dt": dt,
        "A": A.contiguous(),
    }
    return ScanInputs(**{k: x.to(dtype) for k, x in pieces.items()})


def _forward(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    return lambda: scan.run(x)


def _forward_bfloat16(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    return lambda: scan.run(x, precision="bfloat16")


def _backward(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    """Backward alone; the gradients of value, dt and A, which heads do not share, come first."""
    pieces = {k: z.clone().requires_grad_() for k, z in x.tensors().items()}
    leaves = [pieces[k] for k in ("value", "dt", "A", "write", "read")]
    with torch.enable_grad():
        y, _ = scan.run(ScanInputs(**pieces))
    weight = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, leaves, weight, retain_graph=True)


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


def _some_heads(x: ScanInputs) -> ScanInputs:
    return x.select_heads(slice(0, min(_HEADS, x.n_heads))).cast(torch.float64)


def _truth(some: ScanInputs) -> tuple[Tensor, Tensor]:
    return naive.run(some) if some.length <= _LOOP_TOKENS else scan.run(some, impl="chunked")


def _forward_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    y, final = _truth(some)
    h = some.n_heads
    return max(_relative(found[0][:, :, :h], y), _relative(found[1][:, :h], final))


def _states_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    return _relative(found[0][:, :, : some.n_heads], naive.states(some))


def _backward_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    h = some.n_heads
    pieces = {k: z.clone().requires_grad_() for k, z in some.tensors().items()}
    with torch.enable_grad():
        y, _ = naive.run(ScanInputs(**pieces))
        value, dt, A = torch.autograd.grad(y.sum(), [pieces[k] for k in ("value", "dt", "A")])
    errors = (found[0][:, :, :h], value), (found[1][:, :, :h], dt), (found[2][:h], A)
    return max(_relative(a, b) for a, b in errors)


def _prefix(x: ScanInputs) -> ScanInputs:
    return x.slice(0, min(_TOKENS, x.length)).cast(torch.float64)


def _dense_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _prefix(x)
    return _relative(found[0][:, :, : some.length, : some.length], naive.attention(some))


def _reduce_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _prefix(x)
    return _relative(found[0][:, : some.length, : some.length], naive.attention(some).abs().mean(1))


def _row_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    """A row times the values is the output there."""
    some = _some_heads(x)
    y = _truth(some)[0][:, -1]
    return _relative(torch.einsum("bhs,bshp->bhp", found[0][:, : some.n_heads].double(), some.value), y)


_MAMBA1: dict[str, tuple[Size, ...]] = {
    "cpu": ((1, 1024, 1536, 1, 16),),
    "cuda": ((1, 2048, 5120, 1, 16), (1, 16384, 5120, 1, 16), (1, 65536, 5120, 1, 16), (8, 2048, 1536, 1, 16)),
}
_MAMBA2: dict[str, tuple[Size, ...]] = {
    "cpu": ((1, 1024, 24, 64, 128),),
    "cuda": ((1, 2048, 80, 64, 128), (1, 16384, 80, 64, 128), (1, 131072, 80, 64, 128)),
}


def _one(cpu: Size, cuda: Size) -> dict[str, tuple[Size, ...]]:
    return {"cpu": (cpu,), "cuda": (cuda,)}


_M1, _M2 = (1, 1024, 1536, 1, 16), (1, 1024, 24, 64, 128)
_STATES1, _STATES2 = _one(_M1, (1, 2048, 5120, 1, 16)), _one((1, 256, 24, 64, 128), (1, 2048, 80, 64, 128))
_SHORT = _one((1, 128, 1536, 1, 16), (1, 1024, 1536, 1, 16))
_LONG = _one(_M1, (1, 4096, 1536, 1, 16))
_ROW = _one(_M1, (1, 1048576, 1536, 1, 16))

OPS = {
    "mamba1": Op("scan, y and final state", _MAMBA1, _forward, _forward_error),
    "mamba1-backward": Op("backward of the scan", _one(_M1, (1, 2048, 5120, 1, 16)), _backward, _backward_error),
    "mamba1-states": Op("every state", _STATES1, lambda x: lambda: [scan.states(x)], _states_error),
    "mamba2": Op("scan, y and final state", _MAMBA2, _forward, _forward_error),
    "mamba2-bfloat16": Op(
        "bfloat16 inputs and products",
        _MAMBA2,
        _forward_bfloat16,
        _forward_error,
        torch.bfloat16,
        torch.bfloat16,
    ),
    "mamba2-backward": Op("backward of the scan", _one(_M2, (1, 2048, 80, 64, 128)), _backward, _backward_error),
    "mamba2-states": Op("every state", _STATES2, lambda x: lambda: [scan.states(x)], _states_error),
    "dense": Op("attention, all heads", _SHORT, lambda x: lambda: [attention.dense(x)], _dense_error),
    "reduce": Op("attention, mean_abs", _LONG, lambda x: lambda: [attention.reduce(x, "mean_abs")], _reduce_error),
    "row": Op("last row of attention", _ROW, lambda x: lambda: [attention.row(x, x.length - 1)], _row_error),
}
"""What can be timed besides ``trace``."""

SMALL = {"p = 1": (1, 40, 24, 1, 4), "p > 1": (1, 40, 4, 8, 8)}
"""Sizes of ``--small``: a check that everything runs, not a measurement."""
