"""What a patched run is judged by: a number for each row of the batch, from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._positions import last_real

__all__ = ["METRICS", "Metric", "make_metric"]

METRICS = ("logit", "logit_difference", "probability", "kl")
"""Names that `patch` takes: the target's logit; its logit less that of the other token; its probability; and the
Kullback-Leibler divergence from the clean run's next-token distribution to the patched one's, in nats."""


@dataclass(frozen=True)
class Metric:
    """A function of logits and what it looks at.

    Args:
        name: one of `METRICS`, or how the callable calls itself.
        function: (b, t, v) to (b,) float64.
        target: (b,) token ids, and for "logit_difference" (b, 2); None when the metric needs none.
        position: (b,) the position it reads; None for a callable.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    target: Tensor | None
    position: Tensor | None


def make_metric(
    metric: str | Callable[[Tensor], Any],
    clean: Tensor,
    corrupt: Tensor,
    lengths: Tensor,
    target: Any,
    position: int,
    tokenizer: Any,
) -> Metric:
    """The metric of these two runs.

    Args:
        metric: one of `METRICS`, or a callable on logits (b, t, v) that returns a number or (b,).
        clean, corrupt: (b, t, v) logits of both runs.
        lengths: (b,) real tokens per row.
        target: token id or text, a list with one for each row, or None for the clean run's top token; for
            "logit_difference" a pair of those, None for the two runs' top tokens.
        position: which position's logits count; -1 is each row's last real token.
        tokenizer: reads a target given as text.

    Raises:
        SsmlensError: for an unknown name, a target that is no single token, or two equal targets.
    """
    rows = len(lengths)
    if callable(metric):
        if target is not None:
            raise SsmlensError("a metric of your own gets the logits alone: leave target out")
        return Metric(getattr(metric, "__name__", "metric"), lambda x: _per_row(metric(x), rows), None, None)
    if metric not in METRICS:
        raise SsmlensError(
            f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}, or give a function of logits"
        )
    where = last_real(position, lengths)
    index = torch.arange(rows)

    def at(logits: Tensor) -> Tensor:
        return logits[index, where].double()

    if metric == "kl":
        if target is not None:
            raise SsmlensError("the metric kl compares whole distributions: leave target out")
        reference = at(clean).log_softmax(-1)

        def divergence(logits: Tensor) -> Tensor:
            return (reference.exp() * (reference - at(logits).log_softmax(-1))).sum(-1)

        return Metric(metric, divergence, None, where)
    vocabulary = clean.shape[-1]
    if metric == "logit_difference":
        if target is None:
            pair = [at(clean).argmax(-1), at(corrupt).argmax(-1)]
        elif isinstance(target, Sequence) and not isinstance(target, str) and len(target) == 2:
            pair = [token_ids(x, rows, tokenizer, vocabulary) for x in target]
        else:
            raise SsmlensError("the target of logit_difference is a pair: the right token and the other one")
        ids = torch.stack([x.cpu() for x in pair], dim=1)
        if bool((ids[:, 0] == ids[:, 1]).any()):
            raise SsmlensError("both tokens of logit_difference are the same, so it would be 0 everywhere: give target")
        return Metric(metric, lambda x: at(x)[index, ids[:, 0]] - at(x)[index, ids[:, 1]], ids, where)
    chosen = at(clean).argmax(-1).cpu() if target is None else token_ids(target, rows, tokenizer, vocabulary)
    if metric == "logit":
        return Metric(metric, lambda x: at(x)[index, chosen], chosen, where)
    return Metric(metric, lambda x: at(x).softmax(-1)[index, chosen], chosen, where)


def token_ids(target: Any, rows: int, tokenizer: Any, vocabulary: int) -> Tensor:
    """One token id for each row, (b,) long, from an id, a text of one token, or a list of them."""
    many = target.tolist() if isinstance(target, Tensor) else target
    items = list(many) if isinstance(many, Sequence) and not isinstance(many, str) else [many] * rows
    if len(items) != rows:
        raise SsmlensError(f"target has {len(items)} entries for {rows} prompts: give one, or one for each")
    return torch.tensor([_token_id(x, tokenizer, vocabulary) for x in items])


def _token_id(x: Any, tokenizer: Any, vocabulary: int) -> int:
    if isinstance(x, str):
        if tokenizer is None:
            raise SsmlensError("this model has no tokenizer: give the target as a token id")
        found = tokenizer.encode(x)
        ids = list(getattr(found, "ids", found))
        if len(ids) != 1:
            raise SsmlensError(f"the target {x!r} is {len(ids)} tokens, not one: give a token id, or one token's text")
        return int(ids[0])
    if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < vocabulary:
        raise SsmlensError(f"a target is a token id from 0 to {vocabulary - 1} or one token's text, got {x!r}")
    return x


def _per_row(value: Any, rows: int) -> Tensor:
    found = torch.as_tensor(value).detach().double().cpu()
    if found.ndim == 0:
        found = found.expand(rows)
    if found.shape != (rows,):
        raise SsmlensError(
            f"a metric returns one number, or one for each of {rows} rows, got shape {tuple(found.shape)}"
        )
    return found
