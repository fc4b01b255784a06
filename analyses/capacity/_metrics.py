"""What a model with a cut state is judged by: a sum and a count for every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.trace import Trace

__all__ = ["METRICS", "Score", "make_score"]

METRICS = ("loss", "accuracy", "kl", "agreement")
"""Names that `rank_floor` takes."""

IGNORE = -100
UNITS = {"loss": "nats", "kl": "nats"}


@dataclass(frozen=True)
class Score:
    """A metric.

    Args:
        name: for the result.
        units: of its value.
        function: from logits (b, t, v) to (2, b): sums and counts.
    """

    name: str
    units: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits)

    @classmethod
    def of(cls, metric: Callable[[Tensor], Any], rows: int) -> Score:
        """A caller's own function, which returns a number or one for each row."""

        def function(x: Tensor) -> Tensor:
            found = torch.as_tensor(metric(x)).detach().double().cpu()
            if found.shape not in ((), (rows,)):
                raise ValueError(
                    f"a metric returns one number, or one for each of {rows} rows, got shape {tuple(found.shape)}"
                )
            return torch.stack([found.expand(rows), torch.ones(rows, dtype=torch.float64)])

        name = getattr(metric, "__name__", "metric")
        return cls(name if name.isidentifier() else "metric", "1", function)


def make_score(metric: str | Callable[[Tensor], Any], trace: Trace, cut: int, targets: Tensor | None) -> Score:
    """The metric of a run, over real positions from ``cut`` on.

    Raises:
        ValueError: for an unknown name, targets that do not fit, or none behind the cut.
    """
    if callable(metric):
        if targets is not None:
            raise ValueError("a metric of your own gets the logits alone: leave targets out")
        return Score.of(metric, len(trace.lengths))
    if metric not in METRICS:
        raise ValueError(
            f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}, or give a function of the logits"
        )
    where = torch.arange(trace.ids.shape[1])
    counted = (where < trace.lengths.cpu()[:, None]) & (where >= cut)
    if metric in ("kl", "agreement"):
        if targets is not None:
            raise ValueError(f"the metric {metric} compares with the untouched run: leave targets out")
        untouched = trace.logits.cpu()

        def compare(logits: Tensor) -> Tensor:
            if metric == "agreement":
                each = (logits.cpu().argmax(-1) == untouched.argmax(-1)).double()
            else:
                law = untouched[:, cut:].double().log_softmax(-1)
                other = logits[:, cut:].cpu().double().log_softmax(-1)
                each = torch.cat([torch.zeros(len(law), cut), (law.exp() * (law - other)).sum(-1)], dim=1)
            return torch.stack([each.where(counted, 0.0).sum(1), counted.sum(1).double()])

        return Score(metric, UNITS.get(metric, "1"), compare)
    wanted = _targets(trace, targets)
    counted = counted & (wanted != IGNORE)
    if not bool(counted.any()):
        raise ValueError("no target stands at or after token_cut: choose an earlier cut or other targets")
    safe = wanted.where(counted, 0)

    def name(logits: Tensor) -> Tensor:
        if metric == "accuracy":
            each = (logits.cpu().argmax(-1) == safe).double()
        else:
            law = logits[:, cut:].cpu().double().log_softmax(-1)
            picked = law.gather(-1, safe[:, cut:, None])[..., 0]
            each = torch.cat([torch.zeros(len(law), cut, dtype=torch.float64), -picked], dim=1)
        return torch.stack([each.where(counted, 0.0).sum(1), counted.sum(1).double()])

    return Score(metric, UNITS.get(metric, "1"), name)


def _targets(trace: Trace, targets: Tensor | None) -> Tensor:
    """(b, t) the token to name at each position, by default the next one."""
    ids = trace.ids.cpu()
    if targets is not None:
        given = torch.as_tensor(targets).cpu().long()
        if given.shape != ids.shape:
            raise ValueError(f"targets are {tuple(ids.shape)} like the prompt, got {tuple(given.shape)}")
        vocabulary = trace.logits.shape[-1]
        if bool(((given != IGNORE) & ((given < 0) | (given >= vocabulary))).any()):
            raise ValueError(f"targets are token ids from 0 to {vocabulary - 1}, or {IGNORE} for none")
        return given
    following = torch.full_like(ids, IGNORE)
    following[:, :-1] = ids[:, 1:]
    last = trace.lengths.cpu()[:, None] - 1
    return following.masked_fill(torch.arange(ids.shape[1]) >= last, IGNORE)
