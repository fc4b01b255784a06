"""Figures of lens readings and of single pairs of tokens, for pages: the same names as in `readings`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from . import palette
from .caption import Caption
from .labels import label, positions, visible
from .pages import _blocks, _finish, _scale, _token_axis
from .readings import COLOURS, COURSE, error_points, lens_matrix, pair_note, pair_title

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.attribution import PairPath

__all__ = ["layer_errors", "lens_map", "lens_path", "pair_path", "state_course"]

_FEW = 40


def lens_map(
    table: pd.DataFrame,
    caption: Caption | None = None,
    *,
    colour: str = "probability",
    name: str = "Logit lens",
    target: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """What each layer would predict next at each position; hovering names tokens and probabilities.

    Arguments and errors as for `ssmlens.plotting.readings.lens_map`; ``target`` frames one position, ``dark`` takes the
    colours for a dark page.
    """
    caption = caption or Caption()
    values, tops, tokens, layers = lens_matrix(table, colour)
    names = np.broadcast_to(np.array(_blocks(tokens, 1), dtype=object)[None, :], values.shape)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            y=[str(k) for k in layers],
            zmin=0,
            zmax=1 if colour == "probability" else None,
            colorscale=_scale(palette.positive_half(dark=dark)),
            text=[[escape(top) for top in line] for line in tops],
            customdata=names,
            texttemplate="%{text}" if len(tokens) <= _FEW else None,
            textfont={"size": 9},
            hovertemplate=(
                f"stream %{{y}}, after %{{customdata}}<br>top: “%{{text}}”<br>{COLOURS[colour]} %{{z:.3g}}"
                "<extra></extra>"
            ),
            colorbar={"title": {"text": COLOURS[colour], "side": "right"}},
        )
    )
    if target is not None:
        figure.add_vrect(target - 0.5, target + 0.5, line={"width": 1.5, "color": palette.MUTED})
    figure.update_xaxes(**_token_axis(tokens, 1), title="token")
    figure.update_yaxes(title="stream entering layer", type="category")
    return _finish(figure, caption.title(name), caption.note(), 150 + 26 * len(layers))


def lens_path(table: pd.DataFrame, caption: Caption | None = None, *, name: str = "Logit lens") -> go.Figure:
    """How likely some tokens are read off each layer's stream, at one position.

    Args:
        table: a `LensReading.follow`, with layer, token and probability.
        caption: model and error.
        name: what read the stream.
    """
    caption = caption or Caption()
    figure = go.Figure()
    followed = list(dict.fromkeys(table["token"]))
    for token, colour in zip(followed, palette.layer_colours(len(followed))):
        line = table[table["token"] == token]
        figure.add_trace(
            go.Scatter(
                x=[str(k) for k in line["layer"]],
                y=line["probability"],
                name=f"“{escape(label(str(token)))}”",
                mode="lines+markers",
                line={"color": colour, "width": 2},
                hovertemplate=f"stream %{{x}}: “{escape(visible(str(token)))}” %{{y:.3g}}<extra></extra>",
            )
        )
    figure.update_xaxes(title="stream entering layer", type="category")
    figure.update_yaxes(title="probability", rangemode="tozero")
    return _finish(figure, caption.title(name), caption.note(), 340)


def pair_path(path: PairPath, caption: Caption | None = None) -> go.Figure:
    """Every head of one pair: what decay leaves of the source at the target, and M[t, s].

    Arguments as for `ssmlens.plotting.readings.pair_path`.
    """
    caption = caption or Caption()
    heads = path.table()
    figure = go.Figure(
        go.Scatter(
            x=heads["decay"],
            y=heads["attention"],
            customdata=heads["head"],
            mode="markers",
            marker={"size": 6, "color": palette.diverging(11)[2], "opacity": 0.75},
            hovertemplate="head %{customdata}<br>left %{x:.3g}<br>M[t, s] = %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="left of the source's state at the target (slowest state of the head)")
    figure.update_yaxes(title="M[t, s]", zeroline=True)
    return _finish(figure, pair_title(path, caption), pair_note(path, caption), 340)


def state_course(
    table: pd.DataFrame, tokens: Sequence[str], caption: Caption | None = None, *, target: int | None = None
) -> go.Figure:
    """Norms of one state over time: what each token left of it, what it wrote, and what came of both.

    Arguments and errors as for `ssmlens.plotting.readings.state_course`; ``target`` marks one token.
    """
    caption = caption or Caption()
    names = positions(tokens, len(table))
    figure = go.Figure()
    for (column, words), colour in zip(COURSE.items(), palette.layer_colours(len(COURSE))):
        figure.add_trace(
            go.Scatter(
                x=np.arange(len(names)),
                y=table[column],
                name=words,
                mode="lines" if len(names) > 1 else "markers",
                line={"color": colour, "width": 2},
                customdata=_blocks(names, 1),
                hovertemplate=f"%{{customdata}}<br>{words}: %{{y:.4g}}<extra></extra>",
            )
        )
    if target is not None:
        figure.add_vline(target, line={"width": 1, "color": palette.MUTED, "dash": "dot"})
    figure.update_xaxes(**_token_axis(names, 1), title="token")
    figure.update_yaxes(title="Frobenius norm", rangemode="tozero")
    return _finish(figure, caption.title("State, token by token"), caption.note(), 360)


def layer_errors(errors: Mapping[int, float], caption: Caption | None = None) -> go.Figure:
    """Reconstruction error of each layer on a logarithmic axis, with the tolerance as a line.

    Arguments and errors as for `ssmlens.plotting.readings.layer_errors`.
    """
    caption = caption or Caption()
    points, beside = error_points(errors)
    figure = go.Figure(
        go.Scatter(
            x=[str(layer) for layer in points],
            y=list(points.values()),
            mode="markers",
            marker={"size": 9, "color": palette.diverging(11)[2]},
            hovertemplate="layer %{x}: %{y:.1e}<extra></extra>",
            showlegend=False,
        )
    )
    if caption.tolerance is not None:
        figure.add_hline(caption.tolerance, line={"width": 1.5, "color": palette.MUTED, "dash": "dash"})
        # On a logarithmic axis a line stands at its value, and an annotation at the value's logarithm.
        figure.add_annotation(
            text=f"tolerance {caption.tolerance:.0e}",
            x=1,
            xref="paper",
            y=math.log10(caption.tolerance),
            yanchor="bottom",
            showarrow=False,
        )
    figure.update_xaxes(
        title="layer", type="category", categoryorder="array", categoryarray=[str(layer) for layer in errors]
    )
    figure.update_yaxes(title="relative error of the rebuilt layer", type="log", exponentformat="power")
    return _finish(figure, caption.title("Reconstruction error by layer"), caption.note(beside), 320)
