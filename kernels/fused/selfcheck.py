"""Do the kernels give the right numbers on this very device? Asked before "auto" relies on them.

A compiler, a driver or a card that nobody has tried must not give wrong states in silence: before a kind of work is
done for the first time, a small recurrence of that family is computed on the device and compared with PyTorch on the
CPU. Only what is about to run is checked, because most of a check is compilation (Triton keeps what it compiled on
disk, so that the next process is fast). Kernels on matrix units have been compiled wrong at some sizes and right at
others (NOTES.md), so those are checked at each size anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import chunked, contributions
from ..inputs import ScanInputs
from . import contributions as contribution_kernels
from . import dispatch, lines, tiles, walk

__all__ = ["FAMILIES", "WORK", "Check", "Sizes", "complaint", "complaint_about", "complaint_at", "needed"]

LIMIT = 1e-4
"""Largest relative difference: far above rounding, far below any mistake."""

TOKENS = 130
"""Of the recurrences that stand for a size: a little longer than a chunk."""

ROUGH = 3e-2
"""The same where operands or results are rounded to bfloat16."""

FAMILIES = ("one channel per head", "one decay per head", "one decay per state", "a delta rule")
WORK = {
    "scan": "outputs",
    "states": "states",
    "gradients": "gradients",
    "tiles": "attention",
    "reduce": "attention over heads",
    "lines": "rows of attention",
    "contributions": "contributions",
    "norms": "norms of states",
}
"""What is asked of a recurrence, and its name in a warning."""


class Check(NamedTuple):
    """One kind of work on one family of recurrences."""

    family: str
    work: str

    def __str__(self) -> str:
        return f"the {WORK[self.work]} of recurrences with {self.family}"


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

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.channels} channels, {self.states} states"


def needed(x: ScanInputs, work: str = "scan", precision: str = "float32") -> list[Check | Sizes]:
    """What has to be checked before this work on this recurrence.

    Args:
        x: the recurrence; where it asks for gradients, those are checked too.
        work: one of `WORK`.
        precision: of matrix products.
    """
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in x.tensors().values())
    family = _family(x)
    if work not in ("scan", "states"):
        return [Check(family, work)]
    found: list[Check | Sizes] = []
    if work == "states" or not dispatch.by_chunks(x):
        found.append(Check(family, work))
    if dispatch.by_chunks(x):
        sizes = Sizes(
            x.value.dtype, x.write.dtype, x.read.dtype, x.n_heads, x.write.shape[2], x.read.shape[2], x.head_dim,
            x.d_state, x.A is not None, x.dt is not None, precision, recorded,
        )  # fmt: skip
        found.append(sizes)
    elif recorded and family == FAMILIES[0]:  # the others' gradients are PyTorch's
        found.append(Check(family, "gradients"))
    return found


def complaint(device: torch.device) -> str | None:
    """What is wrong with the kernels on this device, all families and all work, as one clause; None when nothing is.

    Takes a minute where nothing is compiled yet.
    """
    for family, x in _cases().items():
        for work in WORK:
            if x.has_erase and work in ("tiles", "reduce", "lines"):  # PyTorch's work
                continue
            check = Check(family, work)
            found = complaint_about(device, check)
            if found is not None:
                return f"for {check} {found}"
    return None


@cache
def complaint_about(device: torch.device, check: Check) -> str | None:
    """What is wrong with one kind of work on this device; None when nothing is."""
    return _clause(device, lambda: _worst(_pairs(_cases()[check.family], device, check.work)), LIMIT)


@cache
def complaint_at(device: torch.device, of: Sizes) -> str | None:
    """What is wrong at these sizes on this device; None when nothing is."""

    def worst() -> float:
        x = _case_of(of)
        there, true = x.map(lambda z: z.to(device)), x.cast(torch.float64)
        run = partial(dispatch.run, precision=of.precision)
        if of.gradients:
            pairs = list(zip(_gradients(there, run), _gradients(true, chunked.run), strict=True))
        else:
            with torch.no_grad():
                pairs = list(zip(run(there), chunked.run(true), strict=True))
        # What is rounded to bfloat16 has a limit of its own.
        narrow = [of.precision != "float32" or found.dtype != torch.float32 for found, _ in pairs]
        return _worst(pairs, [LIMIT / ROUGH if rough else 1.0 for rough in narrow])

    return _clause(device, worst, LIMIT)


def _clause(device: torch.device, worst: Callable[[], float], limit: float) -> str | None:
    try:
        # Whatever mode the first caller is in: gradients may be needed here, in full precision.
        with (
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            found = worst()
    except Exception as error:  # whatever a compiler or a driver throws
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if found <= limit else f"their results differ from PyTorch's by {found:.1e}"


def _family(x: ScanInputs) -> str:
    if x.has_erase:
        return FAMILIES[3]
    if x.head_dim == 1:
        return FAMILIES[0]
    decay = x.log_decay if x.A is None else x.A
    assert decay is not None
    return FAMILIES[1] if decay.shape[-1] == 1 or x.d_state == 1 else FAMILIES[2]


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


def _cases() -> dict[str, ScanInputs]:
    # Explicit, because a program may have set other defaults.
    plain: dict[str, Any] = {
        "generator": torch.Generator("cpu").manual_seed(0),
        "dtype": torch.float32,
        "device": "cpu",
    }

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **plain)

    found = {}
    for family, (h, p, n, m) in zip(FAMILIES, ((16, 1, 8, 8), (2, 32, 16, 1), (2, 8, 16, 16), (2, 8, 16, 1))):
        dt = torch.rand(1, 70, h, **plain)
        A = -torch.rand(h, m, **plain)
        x = ScanInputs(normal(1, 70, h, p), normal(1, 70, 1, n), normal(1, 70, 1, n), dt=dt, A=A)
        if family == FAMILIES[3]:
            along = torch.nn.functional.normalize(normal(1, 70, 1, n), dim=-1)
            x = x.replace(erase_read=along, erase_write=along * torch.rand(1, 70, 1, 1, **plain))
        found[family] = x
    return found


def _pairs(x: ScanInputs, device: torch.device, work: str) -> list[tuple[Tensor, Tensor]]:
    """What the device finds, and what is true."""
    there, true = x.map(lambda z: z.to(device)), x.cast(torch.float64)
    if work == "gradients":
        return list(zip(_gradients(there, dispatch.run), _gradients(true, chunked.run), strict=True))
    with torch.no_grad():
        if work == "scan":
            return list(zip(dispatch.run(there), chunked.run(true), strict=True))
        if work == "states":
            some = [3, x.length - 1]
            return [
                (dispatch.states(there), chunked.states(true)),
                (dispatch.states(there, some), chunked.states(true, some)),
            ]
        if work == "norms":
            return [(walk.statistics(there).norm, chunked.states(true).flatten(3).norm(dim=-1))]
        if work == "contributions":
            found = contributions.norms_by(contribution_kernels, _terms(there))
            return [(found, contributions.norms_by(None, _terms(true)))]
        matrix = _attention(true)
        if work == "lines":
            return [(lines.row(there, x.length - 1), matrix[:, :, -1]), (lines.column(there, 0), matrix[..., 0])]
        if work == "reduce":
            return [(tiles.reduce(there, "mean_abs"), matrix.abs().mean(1))]
        return [(tiles.dense(there), matrix)]


def _terms(x: ScanInputs) -> contributions.Terms:
    """A mixer of two taps around a recurrence."""
    inner = x.n_heads * x.head_dim
    rng = torch.Generator("cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float32, device="cpu").to(x.value)

    sources, gate = normal(1, 2, x.length, inner), normal(1, x.length, inner)
    return contributions.Terms(x, sources, gate, normal(24, inner), normal(x.n_heads))


def _attention(x: ScanInputs) -> Tensor:
    """(b, h, t, s) as the responses to unit values."""
    unit = torch.eye(x.length, dtype=x.dtype)
    units = unit[None, :, None].expand(x.batch, x.length, x.n_heads, x.length)
    y, _ = chunked.run(x.replace(value=units, initial=None))
    return y.transpose(1, 2)


def _worst(pairs: list[tuple[Tensor, Tensor]], weights: list[float] | None = None) -> float:
    """The largest difference relative to the truth; NaN when one is NaN, which no limit allows."""
    found = [(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in pairs]
    return float((torch.stack(found) * torch.tensor(weights or 1.0)).max())


def _gradients(x: ScanInputs, run) -> list[Tensor]:  # type: ignore[no-untyped-def]
    pieces = {k: z.detach().requires_grad_() for k, z in x.tensors().items()}
    with torch.enable_grad():
        y, final = run(ScanInputs(**pieces))
        slopes = torch.autograd.grad(y.sum() + final.sum(), list(pieces.values()))
    return [y.detach(), final.detach(), *slopes]
