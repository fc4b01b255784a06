"""Colour limits and max-pooling: the only numerics that drawing does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTILE", "Limits", "Pooled", "as_array", "causal", "pool_max_abs", "symmetric_limits"]

QUANTILE = 0.995
"""Share of the drawn cells that the colours resolve; larger magnitudes share the end colour."""


def as_array(x: Any) -> NDArray[np.float64]:
    """Any tensor, array or nested list as float64 numpy; bfloat16 and gradients included."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


@dataclass(frozen=True)
class Limits:
    """Symmetric colour limits and the rule that gave them.

    Args:
        value: colours run from ``-value`` to ``value`` (from 0 when nothing is negative).
        quantile: the quantile of abs(x) that was asked for.
        clipped: fraction of the drawn cells whose magnitude is larger.
    """

    value: float
    quantile: float
    clipped: float

    @property
    def rule(self) -> str:
        """The rule in words, as figures print it."""
        if self.quantile >= 1:
            return "colours span the largest magnitude"
        beyond = f"{100 * self.clipped:.2g} % of cells exceed it" if self.clipped else "no cell exceeds it"
        return f"colours end at the {100 * self.quantile:g} % quantile of magnitude, {self.value:.3g}; {beyond}"


def symmetric_limits(x: Any, quantile: float = QUANTILE) -> Limits:
    """Limits around 0 from the finite entries of ``x``; 1 when all of them are 0.

    Raises:
        ValueError: when ``quantile`` is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is above 0 and at most 1, got {quantile}")
    values = as_array(x)
    magnitude = np.abs(values[np.isfinite(values)])
    if not magnitude.size or magnitude.max() == 0:
        return Limits(1.0, quantile, 0.0)
    # "higher" picks a value that occurs; an interpolated one could fall between 0 and a lone spike.
    value = float(np.quantile(magnitude, quantile, method="higher"))
    if value == 0:
        value = float(magnitude.max())
    return Limits(value, quantile, float((magnitude > value).mean()))


def causal(x: Any) -> NDArray[np.float64]:
    """A (t, s) map with NaN above the diagonal, where there is nothing to read.

    Raises:
        ValueError: when ``x`` is not a square matrix with at least one row.
    """
    values = as_array(x)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"a map is one matrix (t, s) with as many rows as columns, got {values.shape}")
    return np.where(np.tri(len(values), dtype=bool), values, np.nan)


@dataclass(frozen=True)
class Pooled:
    """A map drawn with one cell per ``factor`` x ``factor`` block.

    ``matrix`` holds, with its sign, the entry of largest magnitude of each block: a spike stays visible where
    a mean would wash it out. ``where`` tells which entry that is: its place in the block, ``factor`` times its row
    plus its column; None where nothing was pooled.
    """

    matrix: NDArray[np.float64]
    factor: int
    where: NDArray[np.int64] | None = None

    @property
    def rule(self) -> str:
        """The rule in words; empty when nothing was pooled."""
        if self.factor == 1:
            return ""
        return f"each cell is the largest magnitude of {self.factor} x {self.factor} entries, with its sign"


def pool_max_abs(x: Any, most: int) -> Pooled:
    """Shrink a (t, s) matrix to at most ``most`` rows and columns; NaN only where a whole block is NaN."""
    values = as_array(x)
    if most < 1:
        raise ValueError(f"a map keeps at least one cell, got most={most}")
    factor = -(-max(values.shape) // most)
    if factor == 1:
        return Pooled(values, 1)
    rows, columns = (-(-n // factor) for n in values.shape)
    padded = np.full((rows * factor, columns * factor), np.nan)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(rows, factor, columns, factor).swapaxes(1, 2).reshape(rows, columns, -1)
    # -1 marks the missing: below every magnitude, so argmax prefers any real entry.
    strongest = np.where(np.isnan(blocks), -1.0, np.abs(blocks)).argmax(axis=-1)
    return Pooled(np.take_along_axis(blocks, strongest[..., None], axis=-1)[..., 0], factor, strongest)
