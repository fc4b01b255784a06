"""What is left of a memory when its state is kept in a short number format.

`stall` is the law of one number, `horizon` applies it to every head of a trace, `divergence` measures what a rounded
state does to the model's predictions.
"""

from __future__ import annotations

from ssmlens.analyses.precision._divergence import VARIANTS, divergence, slowest
from ssmlens.analyses.precision._formats import FORMATS, ROUNDINGS, Format, format_of, rounded
from ssmlens.analyses.precision._horizon import ROUNDING_NOISE, horizon
from ssmlens.analyses.precision._stall import stall, stalled_share

__all__ = [
    "FORMATS", "ROUNDINGS", "ROUNDING_NOISE", "VARIANTS", "Format", "divergence", "format_of", "horizon", "rounded",
    "slowest", "stall", "stalled_share",
]  # fmt: skip
