"""What stands in for a token that is taken away."""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

from ssmlens.attribution._forward import Network
from ssmlens.errors import PromptError

__all__ = ["BASELINES", "Baseline", "baseline_embedding"]

BASELINES = ("zero", "mean")

Baseline = str | int


def baseline_embedding(network: Network, baseline: Baseline, others: tuple[str, ...] = ()) -> Tensor:
    """The embedding (d,) that replaces a token's.

    Args:
        network: whose embedding table counts.
        baseline: "zero", "mean" (of all rows of the table), or the id of a token.
        others: names that the caller handles itself, for the message.

    Raises:
        PromptError: when it is none of them.
    """
    table = network.embedding.detach()
    if baseline == "zero":
        return table.new_zeros(table.shape[1], dtype=network.dtype)
    if baseline == "mean":
        return table.to(network.dtype).mean(0)
    if isinstance(baseline, Integral) and not isinstance(baseline, bool) and 0 <= baseline < len(table):
        return table[int(baseline)].to(network.dtype)
    names = ", ".join((*BASELINES, *others))
    raise PromptError(f"unknown baseline {baseline!r}: choose one of {names}, or a token id from 0 to {len(table) - 1}")
