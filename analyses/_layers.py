"""From what a caller hands to a study to its recurrences, and from per-layer numbers to one result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.errors import ReconstructionError
from ssmlens.recurrence import Recurrence
from ssmlens.trace import TOLERANCE, MixerTrace, Trace

__all__ = [
    "Layers",
    "Source",
    "block_entries",
    "collect",
    "head_blocks",
    "listed",
    "positions",
    "shares",
    "time_blocks",
]

Source = Trace | MixerTrace | Recurrence
"""What every study takes: all traced layers, one layer, or one recurrence without a model."""

BLOCK_ENTRIES = 2**22
"""Entries of the largest temporary tensor of a study: 32 MiB in float64. One number a token is not cut further."""

GPU_BLOCK_ENTRIES = 2**24
"""The same on a GPU."""


@dataclass(frozen=True, eq=False)
class Layers:
    """The recurrences of a source, and what a result says about where they come from.

    Args:
        recurrences: layer index to recurrence; the index is None for a bare recurrence.
        stacked: True when results get a ``layer`` axis, as for a trace.
        settings: provenance of the source.
    """

    recurrences: Mapping[int | None, Recurrence]
    stacked: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Recurrence]:
        return iter(self.recurrences.values())

    @property
    def lengths(self) -> Tensor:
        """(b,) number of real tokens of each batch row, in float64; the same for every layer."""
        return next(iter(self)).real_lengths.to("cpu", torch.float64)

    @property
    def has_erase(self) -> bool:
        return any(rec.inputs.has_erase for rec in self)

    def result(
        self,
        parts: Sequence[Mapping[str, Tensor]],
        axes: Sequence[str],
        coords: Mapping[str, Sequence[Any]] | None = None,
        control: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> Result:
        """One result from the numbers of each layer.

        Args:
            parts: for each layer "value" and companions, all with the axes ``axes``; a state axis of size 1 is
                shared by all states and is left out when every layer shares it.
            axes: names of the axes, starting with "batch".
            coords: labels of axes that are not simply counted.
            control: names of the companions to compare with.
            settings: how it was computed, added to where the source comes from.
            about: the result's name, units, assumes and checked_by.
        """
        axes = list(axes)
        if "state" in axes and all(part["value"].shape[axes.index("state")] == 1 for part in parts):
            parts = [{k: x.squeeze(axes.index("state")) for k, x in part.items()} for part in parts]
            axes.remove("state")
        labels: dict[str, Sequence[Any]] = dict(coords or {})
        indices = [k for k in self.recurrences if k is not None]
        if self.stacked:
            axes = ["layer", *axes]
            numbers = {name: _stack([part[name] for part in parts], axes) for name in parts[0]}
        else:
            numbers = dict(parts[0])
        if indices:
            labels["layer"] = indices
        return Result(
            value=numbers.pop("value"),
            dims=tuple(axes),
            coords=labels,
            control={k: x for k, x in numbers.items() if k in control},
            columns={k: x for k, x in numbers.items() if k not in control},
            settings={**self.settings, **(settings or {})},
            **about,
        )


def collect(source: Source) -> Layers:
    """The recurrences of a source, refused when they do not describe the model.

    Raises:
        ValueError: for any other source, an empty one, or a decay that is NaN, infinite or growing.
        ReconstructionError: when a rebuilt layer differs from the model by more than the trace's tolerance.
    """
    if isinstance(source, Trace):
        source.check()
        recurrences: dict[int | None, Recurrence] = {m.layer: m.recurrence for m in source}
        settings = {**source.settings, "reconstruction_error": dict(source.reconstruction_error)}
        layers = Layers(recurrences, stacked=True, settings=settings)
    elif isinstance(source, MixerTrace):
        limit = TOLERANCE.get(source.output.dtype, TOLERANCE[torch.float32])
        if not source.reconstruction_error <= limit:
            raise ReconstructionError(
                f"layer {source.layer} was rebuilt with relative error {source.reconstruction_error:.1e}, above the "
                f"tolerance {limit:.0e}: nothing computed from it would describe the model"
            )
        about = {"family": source.family, "reconstruction_error": {source.layer: source.reconstruction_error}}
        layers = Layers({source.layer: source.recurrence}, stacked=False, settings=about)
    elif isinstance(source, Recurrence):
        layers = Layers({None: source}, stacked=False)
    else:
        raise ValueError(f"pass a Trace, a MixerTrace or a Recurrence, not {type(source).__name__}")
    if not layers.recurrences:
        raise ValueError("this trace holds no recurrence: trace at least one layer that has one")
    for layer, rec in layers.recurrences.items():
        _check(rec, "this recurrence" if layer is None else f"layer {layer}")
    return replace(layers, recurrences={k: _detached(rec) for k, rec in layers.recurrences.items()})


def head_blocks(rec: Recurrence, per_head: int) -> Iterator[slice]:
    """Ranges of heads whose temporary tensors, of ``per_head`` entries each, stay within the block limit."""
    width = max(1, block_entries(rec) // max(per_head, 1))
    for start in range(0, rec.n_heads, width):
        yield slice(start, min(start + width, rec.n_heads))


def time_blocks(rec: Recurrence, per_token: int) -> Iterator[slice]:
    """The same for stretches of time, of ``per_token`` entries a token."""
    width = max(1, block_entries(rec) // max(per_token, 1))
    for start in range(0, rec.length, width):
        yield slice(start, min(start + width, rec.length))


def block_entries(rec: Recurrence) -> int:
    """Entries of the largest temporary tensor where this recurrence lives."""
    return GPU_BLOCK_ENTRIES if rec.device.type == "cuda" else BLOCK_ENTRIES


def listed(numbers: Any) -> list[int]:
    """Whole numbers, of one as of several: a list, a range, an array, a tensor."""
    try:
        return [int(k) for k in numbers]
    except TypeError:
        return [int(numbers)]


def positions(layers: Layers, at: Sequence[int]) -> Tensor:
    """Tokens counted in each row, (b, k) on the CPU; -1 in rows that are too short.

    Raises:
        ValueError: when no row has such a token.
    """
    lengths = layers.lengths.long()[:, None]
    longest = int(lengths.max())
    wrong = [t for t in at if not -longest <= t < longest]
    if wrong or not len(at):
        what = f"token {wrong[0]} does not exist" if wrong else "no token was chosen"
        raise ValueError(f"{what}: the longest row has tokens 0 to {longest - 1}")
    wanted = torch.tensor([int(t) for t in at])
    wanted = torch.where(wanted < 0, wanted + lengths, wanted.expand(len(lengths), -1))
    return wanted.where((wanted >= 0) & (wanted < lengths), -1)


def shares(quantiles: Sequence[float]) -> tuple[float, ...]:
    wrong = [q for q in quantiles if not 0 < q <= 1]
    if wrong or not len(quantiles):
        raise ValueError(f"a quantile lies above 0 and is at most 1, got {wrong[0] if wrong else 'none'}")
    return tuple(float(q) for q in quantiles)


def _detached(rec: Recurrence) -> Recurrence:
    """The recurrence without its autograd graph, which would keep every temporary tensor of a study."""
    if not any(x.requires_grad for x in rec.inputs.tensors().values()):
        return rec
    return replace(rec, inputs=rec.inputs.replace(**{k: x.detach() for k, x in rec.inputs.tensors().items()}))


def _check(rec: Recurrence, where: str) -> None:
    inputs = rec.inputs
    if rec.length == 0:
        raise ValueError(f"{where} holds no tokens: memory needs at least one")
    if inputs.dt is not None:
        low, high = _range(rec, inputs.dt)
        _require(math.isfinite(low) and math.isfinite(high), f"dt of {where} holds NaN or infinite numbers")
        _require(low >= 0, f"dt of {where} is negative somewhere, so the state would grow")
    if inputs.A is not None:
        _require(bool(inputs.A.isfinite().all()), f"A of {where} holds NaN or infinite numbers")
        _require(bool((inputs.A <= 0).all()), f"A of {where} is positive somewhere, so the state would grow")
    if inputs.log_decay is not None:
        _, high = _range(rec, inputs.log_decay)
        _require(not math.isnan(high), f"log_decay of {where} holds NaN")
        _require(high <= 0, f"log_decay of {where} is positive somewhere, so the state would grow")


def _range(rec: Recurrence, x: Tensor) -> tuple[float, float]:
    """Smallest and largest entry of x (b, t, ...) at real tokens, padding counted as 0; both NaN when any is."""
    ends = []
    for block in time_blocks(rec, x[:, :1].numel()):
        real = rec.real[:, block].view(rec.batch, -1, *[1] * (x.ndim - 2))
        ends.append(torch.stack(x[:, block].where(real, 0.0).aminmax()))
    low, high = torch.stack(ends).unbind(1)
    return low.min().item(), high.max().item()


def _require(good: bool, sentence: str) -> None:
    if not good:
        raise ValueError(f"{sentence}: memory is only defined for decays between 0 and 1")


def _stack(parts: Sequence[Tensor], axes: Sequence[str]) -> Tensor:
    """Layers on a new first axis. Fewer heads than another layer leave NaN; a shared state stands for all."""
    sizes = [max(sizes) for sizes in zip(*(x.shape for x in parts))]
    full = torch.full((len(parts), *sizes), torch.nan, dtype=torch.float64)
    for layer, x in enumerate(parts):
        where = tuple(slice(None) if axis == "state" and n == 1 else slice(n) for axis, n in zip(axes[1:], x.shape))
        full[(layer, *where)] = x.to(full)
    return full
