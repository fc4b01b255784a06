"""Do the kernels give the right numbers on this very device? Asked before "auto" relies on them.

A compiler, a driver or a card that nobody has tried must not give wrong states in silence: before a kind of work is
done for the first time, a small recurrence of that family is computed on the device and compared with PyTorch on the
CPU. Only what is about to run is checked, because most of a check is compilation (Triton keeps what it compiled on
disk, so that the next process is fast). Kernels on matrix units have been compiled wrong at some sizes and right at
others (NOTES.md), so those are checked at each size anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import chunked, contributions, statistics
from ..attention import REDUCTIONS
from ..inputs import ScanInputs
from . import contributions as contribution_kernels
from . import dispatch, lines, tiles, walk
from .rounding import next_power_of_2
from .walk_plan import SHORTEST

__all__ = ["FAMILIES", "WORK", "Check", "Sizes", "complaint", "complaint_about", "complaint_at", "needed"]

LIMIT = 1e-4
"""Largest relative difference: far above rounding, far below any mistake."""

TOKENS = 130
"""Of the recurrences that are checked: a little longer than a chunk, and than two blocks of attention."""

ROUGH = 3e-2
"""The same where operands or results are rounded to bfloat16."""

ONE, UNITS, FEW, STATES, DELTA = (
    "one channel per head", "one decay per head", "one decay per head of few channels", "one decay per state",
    "a delta rule",
)  # fmt: skip
FAMILIES = {ONE: (16, 1, 8, 8), UNITS: (2, 32, 16, 1), FEW: (2, 4, 8, 1), STATES: (2, 8, 16, 16), DELTA: (2, 8, 16, 1)}
"""Kinds of recurrence that run different kernels, and sizes of a small one: heads, channels, states, decays a head."""

WORK = {
    "scan": "outputs",
    "segments": "outputs of long sequences",
    "states": "states",
    "gradients": "gradients",
    "norms": "norms of states",
    "tiles": "attention",
    "distance": "mean distances",
    **{f"reduce {how}": f"attention over heads ({how})" for how in REDUCTIONS},
    "lines": "rows of attention",
    "distance of few": "mean distances of few rows",
    "contributions": "contributions",
}
"""What is asked of a recurrence, and its name in a warning."""

_SCANS = ("scan", "segments", "states", "gradients", "norms")
_ON_MATRIX_UNITS = ("tiles", "distance", *(f"reduce {how}" for how in REDUCTIONS), "contributions")
_PLAIN = ("A", "dt", "read", "value", "write")


class Check(NamedTuple):
    """One kind of work on one family of recurrences.

    Attributes:
        family: one of `FAMILIES`.
        work: one of `WORK`.
        pieces: names of the tensors that the recurrence has, sorted: kernels are compiled for them.
        states: of a head; 0 for those of `FAMILIES`, which stand for all where no matrix units are at work.
        shared: whether all heads share one direction to read and one to write.
    """

    family: str
    work: str
    pieces: tuple[str, ...] = _PLAIN
    states: int = 0
    shared: bool = True

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
    pieces: tuple[str, ...]
    precision: str
    gradients: bool
    picks: bool

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.channels} channels, {self.states} states"


def needed(x: ScanInputs, work: str = "scan", precision: str = "float32") -> list[Check | Sizes]:
    """What has to be checked before this work on this recurrence.

    Args:
        x: the recurrence; where it asks for gradients, those are checked too.
        work: one of `WORK`.
        precision: of matrix products.
    """
    if not x.value.numel() or not x.d_state:  # no kernel is launched
        return []
    named = x.tensors()
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in named.values())
    pieces = tuple(sorted(named if work in _SCANS else named.keys() - {"initial"}))
    units = dispatch.by_chunks(x)
    states = next_power_of_2(x.d_state) if work in _ON_MATRIX_UNITS else 0
    about = Check(_family(x), work, pieces, states, x.write.shape[2] == x.read.shape[2] == 1)
    found: list[Check | Sizes] = []
    if work != "scan" or not units:
        found.append(about)
    if work in ("scan", "states"):
        if units:
            found.append(_sizes(x, pieces, precision, recorded, work == "states"))
        elif recorded and x.head_dim == 1 and not x.has_erase:  # the others' gradients are PyTorch's
            found.append(about._replace(work="gradients"))
    walks = work in ("states", "norms") or (work == "scan" and not units)
    if walks and x.length >= 2 * SHORTEST and walk.choose(x).segments > 1:
        found.append(about._replace(work="segments"))
    return found


def _sizes(x: ScanInputs, pieces: tuple[str, ...], precision: str, recorded: bool, picks: bool) -> Sizes:
    return Sizes(
        x.value.dtype, x.write.dtype, x.read.dtype, x.n_heads, x.write.shape[2], x.read.shape[2], x.head_dim,
        x.d_state, pieces, precision, recorded, picks,
    )  # fmt: skip


def complaint(device: torch.device) -> str | None:
    """What is wrong with the kernels on this device, all families and all work, as one clause; None when nothing is.

    Takes a minute where nothing is compiled yet.
    """
    for family in FAMILIES:
        for work in WORK:
            if family == DELTA and work not in (*_SCANS, "contributions"):  # PyTorch's work
                continue
            check = Check(family, work, (*_PLAIN, "erase_read", "erase_write") if family == DELTA else _PLAIN)
            found = complaint_about(device, check)
            if found is not None:
                return f"for {check} {found}"
    return None


@cache
def complaint_about(device: torch.device, check: Check) -> str | None:
    """What is wrong with one kind of work on this device; None when nothing is."""
    return _clause(device, lambda: _worst(_pairs(_case_for(check), device, check.work)), LIMIT)


@cache
def complaint_at(device: torch.device, of: Sizes) -> str | None:
    """What is wrong at these sizes on this device; None when nothing is."""

    def worst() -> float:
        x = _case_of(of)
        there, true = x.map(lambda z: z.to(device)), x.cast(torch.float64)
        some = [3, x.length - 1]

        def ours(z: ScanInputs) -> tuple[Tensor, ...]:
            outputs = dispatch.run(z, of.precision)
            return (*outputs, dispatch.states(z, some)) if of.picks else outputs

        def truth(z: ScanInputs) -> tuple[Tensor, ...]:
            outputs = chunked.run(z)
            return (*outputs, chunked.states(z, some)) if of.picks else outputs

        if of.gradients:
            pairs = list(zip(_gradients(there, ours), _gradients(true, truth), strict=True))
        else:
            with torch.no_grad():
                pairs = list(zip(ours(there), truth(true), strict=True))
        # What is rounded to bfloat16 has a limit of its own.
        narrow = [of.precision != "float32" or found.dtype != torch.float32 for found, _ in pairs]
        return _worst(pairs, [LIMIT / ROUGH if rough else 1.0 for rough in narrow])

    return _clause(device, worst, LIMIT)


def _clause(device: torch.device, worst: Callable[[], float], limit: float) -> str | None:
    try:
        # Whatever mode the first caller is in: gradients may be needed here, in full precision, on either device.
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            found = worst()
    except torch.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:  # whatever a compiler or a driver throws
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if found <= limit else f"their results differ from PyTorch's by {found:.1e}"


def _family(x: ScanInputs) -> str:
    if x.has_erase:
        return DELTA
    if x.head_dim == 1:
        return ONE
    decay = x.log_decay if x.A is None else x.A
    assert decay is not None
    if decay.shape[-1] > 1 and x.d_state > 1:
        return STATES
    return UNITS if dispatch.by_chunks(x) else FEW


def _case_of(of: Sizes) -> ScanInputs:
    """A random recurrence of these sizes, a little longer than a chunk."""
    x = _case(of.pieces, of.heads, of.channels, of.states, 1, of.write_groups, of.read_groups)
    return x.replace(value=x.value.to(of.value), write=x.write.to(of.write), read=x.read.to(of.read))


def _case_for(check: Check) -> ScanInputs:
    h, p, n, decays = FAMILIES[check.family]
    states = check.states or n
    groups = 1 if check.shared else 2
    return _case(check.pieces, h, p, states, decays if decays == 1 else states, groups, groups)


def _case(
    pieces: tuple[str, ...], h: int, p: int, n: int, decays: int, write_groups: int, read_groups: int
) -> ScanInputs:
    """A random recurrence of one row with these pieces."""
    # Explicit, because a program may have set other defaults.
    plain: dict[str, Any] = {
        "generator": torch.Generator("cpu").manual_seed(0),
        "dtype": torch.float32,
        "device": "cpu",
    }
    t = TOKENS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **plain)

    along = torch.nn.functional.normalize(normal(1, t, write_groups, n), dim=-1)
    every = {
        "value": normal(1, t, h, p),
        "write": normal(1, t, write_groups, n),
        "read": normal(1, t, read_groups, n),
        "dt": torch.rand(1, t, h, **plain),
        "A": -torch.rand(h, decays, **plain),
        "log_decay": -torch.rand(1, t, h, decays, **plain),
        "initial": normal(1, h, p, n),
        "reset": (torch.arange(t, device="cpu") % 50 == 49)[None],
        "erase_read": along,
        "erase_write": along * torch.rand(1, t, 1, 1, **plain),
    }
    return ScanInputs(**{name: every[name] for name in pieces})


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
        if work == "segments":
            y, final = chunked.run(true)
            walked = walk.forward(there, "all", plan=walk.choose(there)._replace(segments=2))
            assert walked.y is not None
            assert walked.states is not None
            return [(walked.y, y), (walked.final, final), (walked.states, chunked.states(true))]
        if work == "norms":
            whole = torch.cat([torch.stack(part) for _, part in statistics.blocks(true, "chunked")], 2)
            return list(zip(walk.statistics(there), whole, strict=True))
        if work == "contributions":
            # As many rows as a tile has, far enough from the first token for sources on both sides of the boundary.
            rows = range(max(0, x.length - contribution_kernels.BLOCK), x.length)
            found = contributions.norms_by(contribution_kernels, _terms(there), rows=rows)
            return [(found, contributions.norms_by(None, _terms(true), rows=rows))]
        return _attention_pairs(there, _attention(true), work)


def _attention_pairs(x: ScanInputs, matrix: Tensor, work: str) -> list[tuple[Tensor, Tensor]]:
    last = x.length - 1
    away = torch.arange(x.length, dtype=matrix.dtype)
    mass = matrix.abs()
    far = (mass * (away[:, None] - away)).sum(-1) / mass.sum(-1)
    if work == "lines":
        return [(lines.row(x, last), matrix[:, :, -1]), (lines.column(x, 0), matrix[..., 0])]
    if work == "distance of few":
        return [(lines.distance(x, [last]), far[..., -1:])]
    if work == "distance":
        return [(tiles.distance(x), far)]
    if work == "tiles":
        return [(tiles.dense(x), matrix)]
    how = work.removeprefix("reduce ")
    maps = {"mean": matrix.mean(1), "mean_abs": mass.mean(1), "max_abs": mass.amax(1), "norm": matrix.norm(dim=1)}
    return [(tiles.reduce(x, how), maps[how])]


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
    return float((torch.stack(found) * torch.tensor(weights or [1.0])).max())


def _gradients(x: ScanInputs, run: Callable[[ScanInputs], tuple[Tensor, ...]]) -> list[Tensor]:
    """What ``run`` returns, and the gradient of its sum in every piece."""
    pieces = {k: z.detach().requires_grad_(z.is_floating_point()) for k, z in x.tensors().items()}
    with torch.enable_grad():
        outputs = run(ScanInputs(**pieces))
        total = torch.stack([z.sum() for z in outputs]).sum()
        slopes = torch.autograd.grad(total, [z for z in pieces.values() if z.requires_grad])
    return [*(z.detach() for z in outputs), *slopes]
