"""Benettin's algorithm: tangents carried along an orbit and re-orthonormalised, in parts that can be taken up again.

After each interval of steps the tangents are the columns of Z = Q R with R's diagonal positive; the exponents are the
means of log R_ii per step (Benettin et al. 1980; Eckmann and Ruelle 1985). Two frames run along the same orbit: the
second starts elsewhere and is re-orthonormalised half as often, and nothing but convergence makes the two agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ssmlens.analyses.lyapunov._checkpoint import Checkpoint
from ssmlens.analyses.lyapunov._frames import frame, orthonormalise
from ssmlens.errors import SsmlensError

__all__ = ["Advance", "Growth", "Interval", "Plan", "Progress", "Pushed", "Stride", "run"]

VANISHES = 0.1
"""Share of the intervals from which on a direction that shrinks below rounding has the exponent -inf: a window of w
inputs loses each of its directions at least every w + 1 steps. Where it is rarer, the rounding that was left bounds
that interval's growth from above."""

Advance = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(state, tangents (m, *state), first step, number of steps) to the state and tangents after them."""


class Stride(Protocol):
    """Carries a run on by some intervals."""

    @property
    def most(self) -> int:
        """Intervals that it takes at once."""
        ...

    def __call__(self, now: Progress, intervals: Sequence[Interval]) -> None:
        """Move state and frames to the end of these intervals and record how the frames grew."""
        ...


SAVE_SECONDS = 10.0
"""Seconds of work between two checkpoints of a run that can be resumed."""


@dataclass(frozen=True)
class Plan:
    """How long an orbit is followed.

    Args:
        k: tangents.
        discard: steps before the measurement, in which the orbit and the tangents settle.
        steps: steps measured.
        every: steps between two re-orthonormalisations.
        seed: of the first tangents.
        control: whether the second frame runs along.
    """

    k: int
    discard: int
    steps: int
    every: int
    seed: int
    control: bool

    def __post_init__(self) -> None:
        for name, low in (("k", 1), ("discard", 0), ("steps", 1), ("every", 1)):
            if getattr(self, name) < low:
                raise SsmlensError(f"{name} is at least {low}, got {getattr(self, name)}")

    def intervals(self) -> Iterator[Interval]:
        """All intervals; one ends where the measurement begins, and there the second frame is due as well."""
        for measured, start, stop in ((False, 0, self.discard), (True, self.discard, self.discard + self.steps)):
            for number, first in enumerate(range(start, stop, self.every)):
                count = min(self.every, stop - first)
                yield Interval(first, count, measured, number % 2 == 1 or first + count == stop)


@dataclass(frozen=True)
class Interval:
    """Steps between two re-orthonormalisations.

    Args:
        first: its first step.
        count: of steps.
        measured: whether it counts.
        both: whether the second frame is re-orthonormalised at its end too.
    """

    first: int
    count: int
    measured: bool
    both: bool


@dataclass(frozen=True, eq=False)
class Growth:
    """What the tangents did.

    Args:
        logs: (intervals, k) natural logs of R_ii of the measured intervals; -inf for directions that vanish.
        lengths: (intervals,) steps of each.
        other: (k,) mean log growth per step of the second frame, or None.
        vanished: (k,) share of the intervals in which a direction shrank below rounding.
        state: where the orbit ended.
    """

    logs: Tensor
    lengths: Tensor
    other: Tensor | None
    vanished: Tensor
    state: Tensor


@dataclass
class Progress:
    """Everything that changes while a run goes on.

    Args:
        state: of the orbit.
        frames: tangents (k, *state) of the first frame and, with a control, of the second.
        done: intervals behind.
        logs: log growth (k,) of the first frame in each measured interval.
        other: (k,) summed log growth of the second frame.
        lost: (2, k) measured re-orthonormalisations of each frame at which a direction had vanished.
    """

    state: Tensor
    frames: list[Tensor]
    done: int = 0
    logs: list[Tensor] = field(default_factory=list)
    other: Tensor | None = None
    lost: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        self.lost = torch.zeros(2, len(self.frames[0]), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        kept = {"state": self.state, "done": torch.tensor(self.done), "lost": self.lost}
        kept |= {f"frame{i}": x for i, x in enumerate(self.frames)}
        if self.logs:
            kept["logs"] = torch.stack(self.logs)
        return kept | ({} if self.other is None else {"other": self.other})

    def record(self, number: int, logs: Tensor, lost: Tensor) -> None:
        """Log growth (k,) of one frame at the end of a measured interval, and what vanished in it."""
        self.lost[number] += lost.cpu()
        if number == 0:
            self.logs.append(logs.cpu())
        elif self.other is not None:
            self.other = self.other + logs.cpu()

    def restore(self, kept: dict[str, Tensor]) -> None:
        device = self.state.device
        self.state, self.done = kept["state"].to(device), int(kept["done"])
        self.frames = [kept[f"frame{i}"].to(device) for i in range(len(self.frames))]
        self.logs = list(kept["logs"]) if "logs" in kept else []
        self.other, self.lost = kept.get("other"), kept["lost"]


def run(
    stride: Stride,
    state: Tensor,
    plan: Plan,
    settings: dict[str, Any],
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Growth:
    """Follow the orbit and measure how its tangents grow.

    Args:
        stride: the map and its derivative.
        state: where the orbit starts.
        plan: for how long.
        settings: what a checkpoint depends on besides.
        resume: file that holds the run so far; it goes on from there, and from nowhere else.
        progress: called with the steps done and the steps there are.

    Raises:
        SsmlensError: when the orbit leaves the finite numbers.
    """
    intervals = list(plan.intervals())
    now = Progress(state, [frame(plan.k, state, plan.seed + i) for i in range(2 if plan.control else 1)])
    now.other = torch.zeros(plan.k, dtype=torch.float64) if plan.control else None
    file = Checkpoint(resume, {**settings, **vars(plan)}, state)
    file.restore(now.restore)
    saved = time.monotonic()
    while now.done < len(intervals):
        first = intervals[now.done].first
        part = intervals[now.done : now.done + stride.most]
        stride(now, part)
        now.done += len(part)
        stop = part[-1].first + part[-1].count
        if not all(bool(x.isfinite().all()) for x in (now.state, *now.frames)):
            raise SsmlensError(f"the orbit leaves the finite numbers between steps {first} and {stop}")
        if file and (time.monotonic() - saved > SAVE_SECONDS or now.done == len(intervals)):
            file.save(now.tensors())
            saved = time.monotonic()
        if progress is not None:
            progress(stop, plan.discard + plan.steps)
    return _growth(now, [i for i in intervals if i.measured])


def _growth(now: Progress, intervals: Sequence[Interval]) -> Growth:
    """What was recorded; a direction that vanished again and again has the exponent -inf."""
    lengths = torch.tensor([i.count for i in intervals], dtype=torch.float64)
    logs = torch.stack(now.logs)
    share = now.lost[0] / len(intervals)
    logs[:, share >= VANISHES] = -torch.inf
    other = None if now.other is None else now.other / lengths.sum()
    if other is not None:
        other[now.lost[1] / sum(i.both for i in intervals) >= VANISHES] = -torch.inf
    return Growth(logs, lengths, other, share, now.state)


class Pushed:
    """A stride of one interval: all tangents of all frames through the map together.

    Args:
        advance: the map and its derivative over some steps.
    """

    most = 1

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def __call__(self, now: Progress, intervals: Sequence[Interval]) -> None:
        for i in intervals:
            now.state, moved = self.advance(now.state, torch.cat(now.frames), i.first, i.count)
            parts = moved.split(len(now.frames[0]))
            for number, part in enumerate(parts):
                if number and not i.both:
                    now.frames[number] = part
                    continue
                if not bool(part.isfinite().all()):
                    now.frames[number] = part
                    return
                q, logs, lost = orthonormalise(part)
                now.frames[number] = q.view_as(part).to(part.dtype)
                if i.measured:
                    now.record(number, logs, lost)
