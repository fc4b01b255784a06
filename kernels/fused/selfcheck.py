"""Do the kernels give the right numbers on this very device? Asked once per process before "auto" relies on them.

A compiler, a driver or a card that nobody has tried must not give wrong states in silence: three small recurrences, one
for each family of kernels, run forward and backward and are compared with PyTorch on the CPU. Kernels on matrix units
have been compiled wrong at some sizes and right at others (NOTES.md), so those are checked at each size anew.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import chunked
from ..inputs import ScanInputs
from . import dispatch, lines, tiles

__all__ = ["Sizes", "complaint", "complaint_at", "sizes"]

LIMIT = 1e-4
"""Largest relative difference: far above rounding, far below any mistake."""

TOKENS = 130
"""Of the recurrences that stand for a size: a little longer than a chunk."""

ROUGH = 3e-2
"""The same where operands or results are rounded to bfloat16."""


@cache
def complaint(device: torch.device) -> str | None:
    """What is wrong with the kernels on this device, as one clause; None when nothing is."""
    try:
        # Whatever mode the first caller is in: gradients are needed here, in full precision.
        with (
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            for x in _cases():
                worst = _difference(x, device)
                if not worst <= LIMIT:
                    return f"their results differ from PyTorch's by {worst:.1e}"
    except Exception as error:  # whatever a compiler or a driver throws
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


class Sizes(NamedTuple):
    """What kernels on matrix units are compiled for."""

    value: torch.dtype
    write: torch.dtype
    read: torch.dtype
    heads: int
    write_groups: int
    read_groups: int
    channels: int
    states: int
    factored: bool
    scaled: bool
    precision: str
    gradients: bool


def sizes(x: ScanInputs, precision: str) -> Sizes | None:
    """Those of a recurrence; None where other kernels run it."""
    if not dispatch.by_chunks(x):
        return None
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in x.tensors().values())
    return Sizes(
        x.value.dtype, x.write.dtype, x.read.dtype, x.n_heads, x.write.shape[2], x.read.shape[2], x.head_dim,
        x.d_state, x.A is not None, x.dt is not None, precision, recorded,
    )  # fmt: skip


@cache
def complaint_at(device: torch.device, of: Sizes) -> str | None:
    """What is wrong at these sizes on this device; None when nothing is."""
    try:
        with (
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            x = _case_of(of)
            there, true = x.map(lambda z: z.to(device)), x.cast(torch.float64)
            if of.gradients:
                pairs = zip(
                    _gradients(there, partial(dispatch.run, precision=of.precision)),
                    _gradients(true, chunked.run),
                    strict=True,
                )
            else:
                with torch.no_grad():
                    pairs = zip(dispatch.run(there, of.precision), chunked.run(true), strict=True)
            for found, exact in pairs:
                narrow = of.precision != "float32" or found.dtype != torch.float32
                limit = ROUGH if narrow else LIMIT
                worst = float((found.cpu().double() - exact).abs().max() / exact.abs().max())
                if not worst <= limit:
                    return f"their results differ from PyTorch's by {worst:.1e}"
    except Exception as error:  # whatever a compiler or a driver throws
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def _case_of(of: Sizes) -> ScanInputs:
    """A random recurrence of these sizes, a little longer than a chunk."""
    generator = torch.Generator("cpu").manual_seed(0)
    plain: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    t = TOKENS
    decay = -torch.rand(1, t, of.heads, 1, **plain)
    return ScanInputs(
        value=torch.randn(1, t, of.heads, of.channels, **plain).to(of.value),
        write=torch.randn(1, t, of.write_groups, of.states, **plain).to(of.write),
        read=torch.randn(1, t, of.read_groups, of.states, **plain).to(of.read),
        dt=torch.rand(1, t, of.heads, **plain) if of.factored or of.scaled else None,
        A=-torch.rand(of.heads, 1, **plain) if of.factored else None,
        log_decay=None if of.factored else decay,
    )


def _cases() -> list[ScanInputs]:
    # Explicit, because a program may have set other defaults.
    plain: dict[str, Any] = {
        "generator": torch.Generator("cpu").manual_seed(0),
        "dtype": torch.float32,
        "device": "cpu",
    }

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **plain)

    found = []
    for h, p, n, m in ((16, 1, 8, 8), (2, 32, 16, 1), (2, 8, 16, 16)):
        dt = torch.rand(1, 70, h, **plain)
        A = -torch.rand(h, m, **plain)
        found.append(ScanInputs(normal(1, 70, h, p), normal(1, 70, 1, n), normal(1, 70, 1, n), dt=dt, A=A))
    return found


def _difference(x: ScanInputs, device: torch.device) -> float:
    there, true = x.map(lambda z: z.to(device)), x.cast(torch.float64)
    pairs = list(zip(_gradients(there, dispatch.run), _gradients(true, chunked.run), strict=True))
    pairs.append((dispatch.states(there), chunked.states(true)))
    with torch.no_grad():
        # On the CPU and in float64: products on the device may be in tf32.
        matrix = tiles.dense(there).cpu().double()
        pairs.append((lines.row(there, x.length - 1), matrix[:, :, -1]))
        pairs.append((torch.einsum("bhts,bshp->bthp", matrix, true.value), chunked.run(true)[0]))
    # The largest NaN-proof: a comparison with NaN is false, so the caller's "<=" fails.
    return float(torch.stack([(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in pairs]).max())


def _gradients(x: ScanInputs, run) -> list[Tensor]:  # type: ignore[no-untyped-def]
    pieces = {k: z.detach().requires_grad_() for k, z in x.tensors().items()}
    with torch.enable_grad():
        y, final = run(ScanInputs(**pieces))
        slopes = torch.autograd.grad(y.sum() + final.sum(), list(pieces.values()))
    return [y.detach(), final.detach(), *slopes]
