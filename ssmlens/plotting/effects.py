"""Figures of interventions, for files: two next-token distributions, two runs' numbers, and what each patched site
recovers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import ListedColormap

from . import palette
from .caption import Caption
from .figures import _figure, _finish, _token_axis
from .labels import drawable, label
from .scales import as_array, symmetric_limits

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["distributions", "patch_map", "two_runs"]

_SMALL = 8.0
_MARKER = "o"


def distributions(
    table: pd.DataFrame,
    caption: Caption | None = None,
    *,
    name: str = "Next token",
    runs: tuple[str, str] = ("before", "after"),
    note: str = "",
) -> Figure:
    """Probabilities of some next tokens in two runs, as pairs of bars.

    Args:
        table: with token, before and after, such as `ssmlens.interventions.Contrast.table` gives it.
        caption: model and error.
        name: what was done.
        runs: how the two runs are called.
        note: words for the line below.

    Raises:
        ValueError: an empty table.
    """
    caption = caption or Caption()
    if not len(table):
        raise ValueError("no token to draw: give at least one line")
    figure, axes = _figure(6.5, 1.6 + 0.34 * len(table))
    y = np.arange(len(table))
    for shift, column, words, colour in zip((-0.19, 0.19), ("before", "after"), runs, palette.layer_colours(2)):
        axes.barh(y + shift, table[column], 0.38, color=colour, label=words)
    axes.set_yticks(y, [drawable(label(str(token))) for token in table["token"]], fontsize=_SMALL, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("probability", fontsize=_SMALL)
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, caption.title(name), caption.note(*filter(None, [note])))


def patch_map(
    grid: Any,
    tokens: Sequence[str],
    caption: Caption | None = None,
    *,
    quantity: str = "recovered",
    name: str = "Patching",
    note: str = "",
) -> Figure:
    """One number for each layer and token, layers upwards; sites that were not patched stay grey.

    Args:
        grid: (layer, position) numbers, such as `ssmlens.interventions.Patching.grid` gives them; NaN where no site is.
        tokens: one text per position.
        caption: model and error.
        quantity: what a number is.
        name: what was patched.
        note: words for the line below.

    Raises:
        ValueError: when tokens and columns differ in number.
    """
    caption = caption or Caption()
    values = as_array(grid)
    if values.ndim != 2 or values.shape[1] != len(tokens):
        raise ValueError(f"the grid is {values.shape} for {len(tokens)} tokens: give one column per token")
    limit = symmetric_limits(values, 1.0).value
    figure, axes = _figure(float(np.clip(2.5 + 0.2 * len(tokens), 5, 15)), 1.9 + 0.27 * len(values))
    colours = ListedColormap(palette.diverging(255)).with_extremes(bad=palette.MISSING)
    image = axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    axes.set_yticks(range(len(values)), [str(k) for k in range(len(values))], fontsize=_SMALL)
    axes.set_ylabel("layer", fontsize=_SMALL)
    _token_axis(axes, tokens, 1, "x", "token")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label(quantity, fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    return _finish(figure, axes, caption.title(name), caption.note(*filter(None, [note])))


def two_runs(
    table: pd.DataFrame,
    caption: Caption | None = None,
    *,
    name: str,
    quantity: str,
    axis: str = "token",
    runs: tuple[str, str] = ("before", "after"),
    note: str = "",
) -> Figure:
    """One number for each token or layer in two runs as curves, and below them their difference.

    Args:
        table: with before, after and difference, and a column named as the axis: one line per token or layer.
        caption: model, layer and error.
        name: what is drawn.
        quantity: what a number is, with its unit.
        axis: "token", or "layer" for what is read from the stream entering each layer.
        runs: how the two runs are called.
        note: words for the line below.

    Raises:
        ValueError: an empty table.
    """
    caption = caption or Caption()
    if not len(table):
        raise ValueError("no number to draw: give at least one line")
    names, x = [str(each) for each in table[axis]], np.arange(len(table))
    figure, axes = _figure(float(np.clip(2.5 + 0.12 * len(table), 6, 15)), 4.6)
    rows = figure.add_gridspec(2, 1, height_ratios=(5, 3))
    axes.set_subplotspec(rows[0])
    below = figure.add_subplot(rows[1], sharex=axes)
    for column, words, colour in zip(("before", "after"), runs, palette.layer_colours(2)):
        axes.plot(x, table[column], marker=_MARKER, markersize=2.5, color=colour, linewidth=1.2, label=words)
    axes.legend(fontsize=_SMALL, frameon=False)
    axes.set_ylabel(quantity, fontsize=_SMALL)
    axes.tick_params(axis="x", labelbottom=False)
    below.bar(x, table["difference"], color=_signed(table["difference"]))
    below.axhline(0, color=palette.MUTED, linewidth=0.8)
    below.set_ylabel(f"{runs[1]} − {runs[0]}", fontsize=_SMALL)
    _token_axis(below, names, 1, "x", axis if axis == "token" else "stream entering layer")
    for each in (axes, below):
        each.tick_params(axis="y", labelsize=_SMALL)
    return _finish(figure, axes, caption.title(name), caption.note(*filter(None, [note])))


def _signed(values: Any) -> list[str]:
    """The colour of each difference by its sign."""
    return [palette.DIVERGING[-4] if value > 0 else palette.DIVERGING[3] for value in values]
