"""The pieces of work that `bench` times, and how each is compared with the float64 loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention, naive, scan
from .inputs import ScanInputs

__all__ = ["OPS", "SMALL", "Op", "mamba"]

# Heads and tokens on which an op is compared with the loop: heads do not mix, and a prefix is a prefix.
_HEADS, _TOKENS = 4, 48


@dataclass(frozen=True)
class Op:
    """One timed piece of work on one recurrence.

    Attributes:
        what: for the table.
        sizes: (b, t, h, p, n) on a CPU and on a GPU.
        prepare: inputs to the call that is timed; the call returns the tensors it made.
        error: inputs and those tensors to their relative error against the float64 loop.
    """

    what: str
    sizes: dict[str, tuple[int, int, int, int, int]]
    prepare: Callable[[ScanInputs], Callable[[], Sequence[Tensor]]]
    error: Callable[[ScanInputs, Sequence[Tensor]], float]


def mamba(b: int, t: int, h: int, p: int, n: int, device: str, dtype: torch.dtype) -> ScanInputs:
    """Inputs like a released model's: p = 1 is Mamba-1 (decay per state), p > 1 Mamba-2 (decay per head)."""
    rng = torch.Generator().manual_seed(0)
    # softplus of a bias drawn as at initialisation: steps from 0.001 to 0.1.
    dt = torch.exp(torch.rand(b, t, h, generator=rng) * 4.6 - 6.9)
    A = -torch.arange(1.0, n + 1).expand(h, n) if p == 1 else -(1 + 15 * torch.rand(h, 1, generator=rng))
    pieces = {
        "value": torch.randn(b, t, h, p, generator=rng),
        "write": torch.randn(b, t, 1, n, generator=rng),
        "read": torch.randn(b, t, 1, n, generator=rng),
        "dt": dt,
        "A": A.contiguous(),
    }
    return ScanInputs(**{k: x.to(device, dtype) for k, x in pieces.items()})


def _forward(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    return lambda: scan.run(x)


def _backward(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    """Forward and backward; the gradients of value, dt and A, which heads do not share, come first."""
    pieces = {k: z.clone().requires_grad_() for k, z in x.tensors().items()}
    leaves = [pieces[k] for k in ("value", "dt", "A", "write", "read")]
    weight = torch.ones_like(scan.run(x.slice(0, 1))[0]).expand(x.value.shape)

    def call() -> Sequence[Tensor]:
        with torch.enable_grad():
            y, _ = scan.run(ScanInputs(**pieces))
            return torch.autograd.grad(y, leaves, weight)

    return call


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


def _some_heads(x: ScanInputs) -> ScanInputs:
    return x.select_heads(slice(0, min(_HEADS, x.n_heads))).cast(torch.float64)


def _forward_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    y, final = naive.run(some)
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
    y = naive.run(some)[0][:, -1]
    return _relative(torch.einsum("bhs,bshp->bhp", found[0][:, : some.n_heads].double(), some.value), y)


_MAMBA1 = {"cpu": (1, 1024, 1536, 1, 16), "cuda": (1, 2048, 5120, 1, 16)}
_MAMBA2 = {"cpu": (1, 1024, 24, 64, 128), "cuda": (1, 2048, 80, 64, 128)}
_SHORT = {"cpu": (1, 128, 1536, 1, 16), "cuda": (1, 1024, 1536, 1, 16)}
_LONG = {"cpu": (1, 1024, 1536, 1, 16), "cuda": (1, 4096, 1536, 1, 16)}

OPS = {
    "mamba1": Op("scan, y and final state", _MAMBA1, _forward, _forward_error),
    "mamba1-backward": Op("scan forward and backward", _MAMBA1, _backward, _backward_error),
    "mamba2": Op("scan, y and final state", _MAMBA2, _forward, _forward_error),
    "mamba2-backward": Op("scan forward and backward", _MAMBA2, _backward, _backward_error),
    "states": Op("every state", _LONG, lambda x: lambda: [scan.states(x)], _states_error),
    "dense": Op("attention, all heads", _SHORT, lambda x: lambda: [attention.dense(x)], _dense_error),
    "reduce": Op("attention, mean_abs", _LONG, lambda x: lambda: [attention.reduce(x, "mean_abs")], _reduce_error),
    "row": Op("last row of attention", _LONG, lambda x: lambda: [attention.row(x, x.length - 1)], _row_error),
}
"""What can be timed besides ``trace``."""

SMALL = {"p = 1": (1, 40, 24, 1, 4), "p > 1": (1, 40, 4, 8, 8)}
"""Sizes of ``--small``: a check that everything runs, not a measurement."""
