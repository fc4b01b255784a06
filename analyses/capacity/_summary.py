"""The capacity of each layer in one table."""

from __future__ import annotations

import torch

from ssmlens.analyses._layers import Source, collect
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._rank_statistics import NOT_CAPACITY, NULL, rank_statistics
from ssmlens.analyses.capacity._state_size import ENERGY, LINEAR, PER_CHANNEL, effective_state_size

__all__ = ["summary"]


def summary(source: Source, cut: int | None = None, *, tolerance: float = 1e-3) -> Result:
    """Effective state size of each layer beside its ranks and what random writes would give.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        cut: where past and future part; by default the middle of the shortest row.
        tolerance: as in `effective_state_size`.

    Returns:
        Result with axes (batch), ``layer`` in front for a trace. The value is the median over heads of the entropy
        form of the effective state size, with ``state_size_q90``, and ``tolerance_size``, the median of the tolerance
        form. Of the states in the second half of the text, as medians over heads and tokens: ``participation``,
        ``centred_participation`` and ``mean_energy``. Controls: ``rank_bound`` of the effective state size, and
        ``null``, the participation ratio of random writes at the same decay.

    Raises:
        ValueError: as `effective_state_size`.
    """
    layers = collect(source)
    middle = int(layers.lengths.min()) // 2 if cut is None else int(cut)
    parts = []
    for rec in layers:
        size = effective_state_size(rec, middle, tolerance=tolerance)
        ranks = rank_statistics(rec)
        flat = size.value[..., 0]

        def median(x: torch.Tensor) -> torch.Tensor:
            # torch's medians of expanded tensors are wrong.
            return x.flatten(1).contiguous().nanmedian(1).values

        parts.append(
            {
                "value": median(flat),
                "state_size_q90": flat.nanquantile(0.9, dim=1),
                "tolerance_size": median(size.columns["tolerance"]),
                "participation": median(ranks.value),
                "centred_participation": median(ranks.columns["centred_participation"]),
                "mean_energy": median(ranks.columns["mean_energy"]),
                "rank_bound": median(size.control["rank_bound"]),
                "null": median(ranks.control["null"]),
            }
        )
    return layers.result(
        parts,
        ("batch",),
        control=("rank_bound", "null"),
        settings={"cut": middle, "tolerance": tolerance},
        name="effective_state_size",
        units="dimensions",
        assumes=(LINEAR, PER_CHANNEL, ENERGY, NOT_CAPACITY, NULL),
        checked_by="those of effective_state_size and rank_statistics: checks.py of this study",
    )
