"""Figures of interventions, for pages: the same names as in `effects`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import palette
from .caption import Caption
from .labels import label
from .pages import _blocks, _finish, _scale, _token_axis
from .scales import as_array, symmetric_limits

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["distributions", "patch_map", "two_runs"]


def distributions(
    table: pd.DataFrame,
    caption: Caption | None = None,
    *,
    name: str = "Next token",
    runs: tuple[str, str] = ("before", "after"),
    note: str = "",
) -> go.Figure:
    """Probabilities of some next tokens in two runs, as pairs of bars.

    Arguments and errors as for `ssmlens.plotting.effects.distributions`.
    """
    caption = caption or Caption()
    if not len(table):
        raise ValueError("no token to draw: give at least one line")
    figure = go.Figure()
    names = [f"“{escape(label(str(token)))}”" for token in table["token"]]
    for column, words, colour in zip(("before", "after"), runs, palette.layer_colours(2)):
        figure.add_trace(
            go.Bar(
                x=table[column],
                y=list(range(len(table))),
                name=escape(words),
                orientation="h",
                marker={"color": colour},
                customdata=names,
                hovertemplate=f"%{{customdata}} {escape(words)}: %{{x:.4g}}<extra></extra>",
            )
        )
    figure.update_layout(barmode="group")
    figure.update_xaxes(title="probability", rangemode="tozero")
    figure.update_yaxes(tickvals=list(range(len(table))), ticktext=names, autorange="reversed")
    return _finish(figure, caption.title(name), caption.note(*filter(None, [note])), 150 + 30 * len(table))


def patch_map(
    grid: Any,
    tokens: Sequence[str],
    caption: Caption | None = None,
    *,
    quantity: str = "recovered",
    name: str = "Patching",
    note: str = "",
    pinned: tuple[int, int] | None = None,
    dark: bool = False,
) -> go.Figure:
    """One number for each layer and token; hovering names both.

    Arguments and errors as for `ssmlens.plotting.effects.patch_map`; ``pinned`` frames one (layer, position), ``dark``
    takes the colours for a dark page.
    """
    caption = caption or Caption()
    values = as_array(grid)
    if values.ndim != 2 or values.shape[1] != len(tokens):
        raise ValueError(f"the grid is {values.shape} for {len(tokens)} tokens: give one column per token")
    limit = symmetric_limits(values, 1.0).value
    figure = go.Figure(
        go.Heatmap(
            z=values,
            y=[str(k) for k in range(len(values))],
            zmin=-limit,
            zmax=limit,
            colorscale=_scale(palette.diverging(dark=dark)),
            customdata=np.broadcast_to(np.array(_blocks(tokens, 1), dtype=object)[None, :], values.shape),
            hovertemplate=f"layer %{{y}}, %{{customdata}}<br>{escape(quantity)} %{{z:.4g}}<extra></extra>",
            colorbar={"title": {"text": escape(quantity), "side": "right"}},
        )
    )
    if pinned is not None:
        k, t = pinned
        line = {"width": 2, "color": palette.MUTED}
        figure.add_shape(type="rect", x0=t - 0.5, x1=t + 0.5, y0=k - 0.5, y1=k + 0.5, line=line)
    figure.update_xaxes(**_token_axis(tokens, 1), title="token", tickangle=-90)
    figure.update_yaxes(title="layer", type="category")
    return _finish(figure, caption.title(name), caption.note(*filter(None, [note])), 150 + 26 * len(values))


def two_runs(
    table: pd.DataFrame,
    caption: Caption | None = None,
    *,
    name: str,
    quantity: str,
    axis: str = "token",
    runs: tuple[str, str] = ("before", "after"),
    note: str = "",
) -> go.Figure:
    """One number for each token or layer in two runs as curves, and below them their difference.

    Arguments and errors as for `ssmlens.plotting.effects.two_runs`.
    """
    caption = caption or Caption()
    if not len(table):
        raise ValueError("no number to draw: give at least one line")
    words, x = [str(each) for each in table[axis]], list(range(len(table)))
    names = _blocks(words, 1) if axis == "token" else [f"{axis} {each}" for each in words]
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.62, 0.38], vertical_spacing=0.08)
    for column, run, colour in zip(("before", "after"), runs, palette.layer_colours(2)):
        curve = go.Scatter(
            x=x,
            y=table[column],
            name=escape(run),
            mode="lines+markers",
            marker={"size": 4},
            line={"color": colour, "width": 2},
            customdata=names,
            hovertemplate=f"%{{customdata}}, {escape(run)}: %{{y:.4g}}<extra></extra>",
        )
        figure.add_trace(curve, row=1, col=1)
    difference = f"{escape(runs[1])} − {escape(runs[0])}"
    bars = go.Bar(
        x=x,
        y=table["difference"],
        name=difference,
        marker={"color": [palette.DIVERGING[-4 if value > 0 else 3] for value in table["difference"]]},
        customdata=names,
        hovertemplate=f"%{{customdata}}, {difference}: %{{y:.4g}}<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(bars, row=2, col=1)
    figure.update_yaxes(title=escape(quantity), row=1, col=1)
    figure.update_yaxes(title=difference, zeroline=True, row=2, col=1)
    ticks = _token_axis(words, 1) if axis == "token" else {"tickvals": x, "ticktext": words}
    title = axis if axis == "token" else "stream entering layer"
    figure.update_xaxes(**ticks, title=title, tickangle=-90 if axis == "token" else 0, row=2, col=1)
    return _finish(figure, caption.title(name), caption.note(*filter(None, [note])), 460)
