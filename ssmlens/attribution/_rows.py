"""Contributions to a few outputs of a long prompt, in stretches of time.

What `kernels.contributions` makes of all sources at once takes a tensor of the inner width for every tap. Here the
sources come a stretch at a time, and what stays is the rows of the recurrence's matrix and the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlens.attribution._front import Front, activate, derivative
from ssmlens.attribution._mixers import slope
from ssmlens.trace import MixerTrace

__all__ = ["rows_of"]

_LINES = 2**28
"""Bytes of the matrix's rows that are held at once, at least one row."""


@torch.no_grad()
def rows_of(mixer: MixerTrace, rule: str, rows: Sequence[int]) -> Tensor:
    """The contributions to some outputs, (b, len(rows), s, d).

    Args:
        mixer: one layer of a trace, with its weights.
        rule: one of `RULES`.
        rows: output positions, from 0.
    """
    front, rec = Front(mixer), mixer.recurrence
    weight = mixer.parameters["out_proj.weight"].detach().to(front.dtype)
    out = weight.new_zeros(rec.batch, len(rows), front.length, len(weight))
    held = max(1, _LINES // (rec.batch * front.inner * front.length * weight.element_size()))
    with torch.autocast(weight.device.type, enabled=False):
        for first in range(0, len(rows), held):
            lines = [front.line(row) for row in rows[first : first + held]]
            for start, stop in front.stretches(max(rows[first : first + held]) + 1):
                _fill(out[:, first:], lines, _given(front, rule, start, stop), weight, start, stop)
    return out


def _fill(
    out: Tensor, lines: Sequence[tuple[Tensor, Tensor]], given: list[Tensor], weight: Tensor, start: int, stop: int
) -> None:
    """Sources ``start`` to ``stop`` of these rows, into ``out`` (b, rows, s, d)."""
    for i, (line, gate) in enumerate(lines):
        near = line[..., start : stop + len(given) - 1]
        # Where all has decayed to nothing there is nothing to add up.
        if not bool(near.any()):
            continue
        operand = near[..., : stop - start].mT * given[0]
        for k, part in enumerate(given[1:], 1):
            later = near[..., k : k + stop - start].mT
            operand[:, : later.shape[1]] += later * part[:, : later.shape[1]]
        out[:, i, start:stop] = (operand * gate[:, None]) @ weight.mT


def _given(front: Front, rule: str, start: int, stop: int) -> list[Tensor]:
    """What tokens ``start`` to ``stop`` give to the scan's value k steps later, one (b, stop - start, e) per tap k."""
    if rule == "none":
        return [front.mixer.recurrence.value[:, start:stop].detach().to(front.dtype).flatten(2)]
    count = front.taps.shape[1]
    if rule == "silu":
        return [activate(front.x(start, stop) * front.taps[:, k], front.activation) for k in range(count)]
    end = min(stop + count - 1, front.length)
    x, c = front.conv(start, end)
    factor = slope(c, front.activation) if rule == "gate" else derivative(c, front.activation)
    given = []
    for k in range(count):
        later = factor[:, k : k + stop - start]
        part = x[:, : stop - start] * front.taps[:, k]
        # Behind the last token nothing is given.
        part[:, : later.shape[1]] *= later
        given.append(part)
    return given
