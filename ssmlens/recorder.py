"""What a traced forward keeps of every scan, and how far it is from the model's own numbers.

Nothing is read back from the device before the forward is over, and all errors are read at once: every earlier look at
a number would make the host wait for all that is queued.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.exact import KeepFloat64
from ssmlens.kernels import scan
from ssmlens.models.family import Family, Lowered
from ssmlens.quiet import quiet_transformers
from ssmlens.tap import ScanCall, Tap
from ssmlens.trace import MixerTrace, gap, ratio

__all__ = ["CHECKED_PREFIX", "Recorder"]

CHECKED_PREFIX = 32
"""Tokens on which the fast scan is held against the model's own."""

TOGETHER = 2**25
"""Numbers, tokens x channels x states, of the layers whose first tokens the model's own scan runs through at once."""


@dataclass
class _Seen:
    """One scan.

    Args:
        family, lowered: of the call.
        y: (b, t, h, p) our scan's output with the skip, of the tokens that are compared.
        gap: of our output in place of the model's from the model's, see `ssmlens.trace.gap`; None where that has
            still to be computed.
        ours: that output of ours, for that.
        call: the model's scan of these tokens alone, for that.
    """

    family: Family
    lowered: Lowered
    y: Tensor
    gap: Tensor | None = None
    ours: Tensor | None = None
    call: _Call | None = None

    @property
    def real(self) -> Tensor | None:
        """(b, t) of the compared tokens, True where they are real; None when nothing is padded."""
        rec = self.lowered.recurrence
        return rec.real[:, : self.y.shape[1]] if rec.lengths is not None else None

    def compare(self, ours: Tensor, model: Any) -> None:
        self.gap = gap(ours, _time_first(self.family, model), self.real)


@dataclass(frozen=True)
class _Call:
    """A call of a model's scan function."""

    original: Any
    arguments: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {k: x for k, x in self.arguments.items() if isinstance(x, Tensor)}

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for calls that can be made at once."""
        shapes = tuple((k, x.shape, x.dtype, x.device) for k, x in self.tensors.items())
        return id(self.original), shapes, repr({k: x for k, x in self.arguments.items() if not isinstance(x, Tensor)})


class Recorder:
    """Lowers every scan call of one forward and compares it with the model's own numbers.

    Args:
        how: "model" or "fast", see `ssmlens.Lens.trace`.
        lengths: (b,) real tokens of each row, or None when nothing is padded.
    """

    def __init__(self, how: str, lengths: Tensor | None) -> None:
        self.how = how
        self.lengths = lengths
        self.seen: dict[int, _Seen] = {}

    def on_scan(self, call: ScanCall) -> Any:
        family = call.family
        lowered = family.lower(call.arguments, self.lengths)
        rec = lowered.recurrence
        y, final = scan.run(rec.inputs)
        y = rec.add_skip(y)
        ours = family.replace(call.arguments, lowered, y, final)
        if self.how == "model":
            result = call.run()
            self.seen[call.layer] = seen = _Seen(family, lowered, y)
            seen.compare(_time_first(family, ours), result)
            return result
        length = min(CHECKED_PREFIX, rec.length)
        # Copies, here and below: views would keep all that a long text went through.
        self.seen[call.layer] = seen = _Seen(family, lowered, y[:, :length].clone())
        whole, cut = call.arguments, family.prefix(call.arguments, length)
        if call.is_models_own:
            seen.ours = _time_first(family, ours)[:, :length].clone()
            seen.call = _Call(call.original, {k: x if x is whole[k] else _copy(x) for k, x in cut.items()})
        else:
            # Another tap changes the scan from outside, as long as the mixer runs.
            seen.compare(_time_first(family, ours)[:, :length], call.original(**cut))
        return ours

    @torch.no_grad()
    def finish(self, mixers: Mapping[int, nn.Module], tap: Tap) -> dict[int, MixerTrace]:
        """The traces of these mixers, their fronts, scans and tails compared with what the model computed."""
        self._run_models_scans([self.seen[k] for k in mixers])
        traces: dict[int, MixerTrace] = {}
        gaps: list[Tensor] = []
        for layer, mixer in mixers.items():
            seen = self.seen[layer]
            rec, length, real = seen.lowered.recurrence, seen.y.shape[1], seen.real
            parameters, config = seen.family.describe(mixer)
            parameters = {name: x.detach() for name, x in parameters.items()}
            hidden, output = tap.inputs[layer], tap.outputs[layer]
            value, gate = seen.family.front(hidden[:, :length], parameters, config)
            rebuilt = seen.family.rebuild(seen.y, gate, parameters, config)
            assert seen.gap is not None
            around = gap(value, rec.value[:, :length], real), gap(rebuilt, output[:, :length], real)
            gaps.append(torch.stack([seen.gap, *around]))
            traces[layer] = MixerTrace(
                layer=layer,
                family=seen.family.name,
                recurrence=rec,
                input=hidden,
                output=output,
                parameters=parameters,
                config=config,
                stored_gate=seen.lowered.gate,
            )
        errors = _read(gaps)
        return {k: replace(x, reconstruction_error=_worst(each)) for (k, x), each in zip(traces.items(), errors)}

    def _run_models_scans(self, seen: Sequence[_Seen]) -> None:
        """Let the model's own function compute what it has not yet, for layers of one form together."""
        groups: dict[Any, list[tuple[_Seen, _Call, Tensor]]] = {}
        for x in seen:
            if x.call is not None and x.ours is not None:
                groups.setdefault(x.call.kind, []).append((x, x.call, x.ours))
        for group in groups.values():
            first = group[0][0]
            width = max(1, TOGETHER // (first.y.numel() * first.lowered.recurrence.d_state))
            for start in range(0, len(group), width):
                some = group[start : start + width]
                for (x, _, ours), found in zip(some, _together([call for _, call, _ in some])):
                    x.compare(ours, found)


def _together(calls: Sequence[_Call]) -> list[Any]:
    """What a model's scan function returns for several calls of one form: through one evaluation where it allows that.

    A loop over tokens costs the same number of operations for one layer as for all of them.
    """
    first = calls[0]
    # Outside the forward of a float64 model its casts to float32 are still to be lifted.
    with quiet_transformers(), KeepFloat64():
        if len(calls) > 1:
            rest = {k: x for k, x in first.arguments.items() if not isinstance(x, Tensor)}
            stacked = {k: torch.stack([call.tensors[k] for call in calls]) for k in first.tensors}
            try:
                found = torch.func.vmap(lambda tensors: first.original(**tensors, **rest))(stacked)
            except (RuntimeError, NotImplementedError):  # a compiled scan need not allow for it
                pass
            else:
                parts = found[0] if isinstance(found, tuple) else found
                return list(parts.unbind())
        return [call.original(**call.arguments) for call in calls]


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _time_first(family: Family, output: Any) -> Tensor:
    """The output of a scan function with time on axis 1."""
    y: Tensor = output[0] if isinstance(output, tuple) else output
    return y.transpose(1, 2) if family.name == "mamba1" else y


def _read(gaps: Sequence[Tensor]) -> list[list[float]]:
    """Relative errors from the gaps (k, 2) of every layer, all read at once."""
    if not gaps:
        return []
    return [[ratio(*pair) for pair in pairs] for pairs in torch.stack([x.to(gaps[0].device) for x in gaps]).tolist()]


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN when any is."""
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)
