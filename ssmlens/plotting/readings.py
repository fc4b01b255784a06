"""Figures of lens readings and of single pairs of tokens, for files. `reading_pages` has them for pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from . import palette
from .caption import Caption
from .figures import _figure, _finish, _token_axis
from .labels import drawable, label, positions, thin, visible

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.attribution import PairPath

__all__ = [
    "COLOURS",
    "COURSE",
    "error_points",
    "layer_errors",
    "lens_map",
    "lens_matrix",
    "lens_path",
    "pair_note",
    "pair_path",
    "pair_title",
    "state_course",
]

COLOURS = {"probability": "probability of the top token", "kl": "KL to the final prediction (nats)"}
"""What `lens_map` can colour by, in words."""

COURSE = {
    "state_norm": "state after the token",
    "kept_norm": "kept of the state before",
    "write_norm": "written by the token",
}
"""What `state_course` draws, by the column of its table."""

_SMALL = 8.0
_FEW = 32


def lens_map(
    table: pd.DataFrame, caption: Caption | None = None, *, colour: str = "probability", name: str = "Logit lens"
) -> Figure:
    """What each layer would predict next at each position: layers upwards, positions to the right.

    Args:
        table: a `LensReading.table`, with layer, position, token, top, probability and kl.
        caption: model and error.
        colour: "probability" or "kl".
        name: what read the stream.

    Raises:
        ValueError: an unknown colour, or an empty table.
    """
    caption = caption or Caption()
    values, tops, tokens, layers = lens_matrix(table, colour)
    figure, axes = _figure(float(np.clip(2.5 + 0.28 * len(tokens), 5, 15)), 1.9 + 0.27 * len(layers))
    image = axes.imshow(
        values, cmap=ListedColormap(palette.positive_half(128)), vmin=0, aspect="auto", origin="lower",
        vmax=1.0 if colour == "probability" else None,
    )  # fmt: skip
    if len(tokens) <= _FEW:
        middle = np.nanmax(values) / 2
        for (k, t), value in np.ndenumerate(values):
            ink = "white" if value > middle else palette.INK
            text = drawable(label(str(tops[k][t]), 7))
            axes.text(t, k, text, ha="center", va="center", fontsize=6, color=ink, parse_math=False)
    axes.set_yticks(range(len(layers)), [str(k) for k in layers], fontsize=_SMALL)
    axes.set_ylabel("stream entering layer (top: after the last)", fontsize=_SMALL)
    _token_axis(axes, tokens, 1, "x", "token")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label(COLOURS[colour], fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    return _finish(figure, axes, caption.title(name), caption.note())


def lens_path(table: pd.DataFrame, caption: Caption | None = None, *, name: str = "Logit lens") -> Figure:
    """How likely some tokens are read off each layer's stream, at one position.

    Args:
        table: a `LensReading.follow`, with layer, token and probability.
        caption: model and error.
        name: what read the stream.
    """
    caption = caption or Caption()
    figure, axes = _figure(6.8, 3.6)
    followed = list(dict.fromkeys(table["token"]))
    for token, colour in zip(followed, palette.layer_colours(len(followed))):
        line = table[table["token"] == token]
        name_of = drawable(visible(str(token))).replace("$", r"\$")
        axes.plot(line["layer"], line["probability"], marker="o", markersize=3, color=colour, label=f"“{name_of}”")
    axes.set_xlabel("stream entering layer (last: after the last layer)", fontsize=_SMALL)
    axes.set_ylabel("probability", fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, caption.title(name), caption.note())


def pair_path(path: PairPath, caption: Caption | None = None) -> Figure:
    """Every head of one pair: what decay leaves of the source at the target, and M[t, s].

    Args:
        path: a `ssmlens.attribution.PairPath`.
        caption: model, layer and error.
    """
    caption = caption or Caption()
    figure, axes = _figure(6.4, 4.2)
    heads = path.table()
    axes.scatter(heads["decay"], heads["attention"], s=14, color=palette.diverging(11)[1], alpha=0.7, linewidths=0)
    axes.axhline(0, color=palette.MUTED, linewidth=0.7)
    axes.set_xlabel("left of the source's state at the target (decay of the head's slowest state)", fontsize=_SMALL)
    axes.set_ylabel("M[t, s]", fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    return _finish(figure, axes, pair_title(path, caption), pair_note(path, caption))


def pair_title(path: PairPath, caption: Caption) -> str:
    """What a figure of a pair is called."""
    return caption.title(f"From token {path.source} to token {path.target}")


def pair_note(path: PairPath, caption: Caption) -> str:
    """Length, shares and errors of a pair."""
    return caption.note(
        f"contribution of length {path.norm:.3g}, {100 * path.share:.3g} % of the output along the output",
        f"{100 * path.conv_share:.3g} % of it through later taps of the convolution",
        f"sum of all contributions misses the output by {path.error:.1e}",
    )


def state_course(table: pd.DataFrame, tokens: Sequence[str], caption: Caption | None = None) -> Figure:
    """Norms of one state over time: what each token left of it, what it wrote, and what came of both.

    Args:
        table: one line per token with state_norm, kept_norm and write_norm, see `ssmlens.analyses.memory.state_norm`.
        tokens: one text per line.
        caption: model, layer, head and error.

    Raises:
        ValueError: when the tokens do not fit the table.
    """
    caption = caption or Caption()
    names = positions(tokens, len(table))
    figure, axes = _figure(9.0, 3.8)
    for (column, words), colour in zip(COURSE.items(), palette.layer_colours(len(COURSE))):
        axes.plot(range(len(names)), table[column], color=colour, linewidth=1.4, label=words)
    _token_axis(axes, names, 1, "x", "token")
    axes.set_ylabel("Frobenius norm", fontsize=_SMALL)
    axes.tick_params(axis="y", labelsize=_SMALL)
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, caption.title("State, token by token"), caption.note())


def layer_errors(errors: Mapping[int, float], caption: Caption | None = None) -> Figure:
    """Reconstruction error of each layer on a logarithmic axis, with the tolerance as a line.

    Args:
        errors: layer -> relative error, as `Trace.reconstruction_error` has them. What has no place on the axis (0,
            infinite, NaN) is counted in the note.
        caption: model, error and the tolerance that is drawn.

    Raises:
        ValueError: when there is no layer.
    """
    caption = caption or Caption()
    points, beside = error_points(errors)
    figure, axes = _figure(6.4, 3.4)
    axes.plot(list(points), list(points.values()), "o", color=palette.diverging(11)[1], markersize=5)
    if caption.tolerance is not None:
        axes.axhline(caption.tolerance, color=palette.MUTED, linewidth=1.0, linestyle="--", label="tolerance")
        axes.legend(fontsize=_SMALL, frameon=False)
    axes.set_yscale("log")
    chosen = thin(len(errors), _FEW)
    axes.set_xticks([list(errors)[i] for i in chosen])
    axes.set_xlim(min(errors) - 0.5, max(errors) + 0.5)
    axes.set_xlabel("layer", fontsize=_SMALL)
    axes.set_ylabel("relative error of the rebuilt layer", fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    return _finish(figure, axes, caption.title("Reconstruction error by layer"), caption.note(beside))


def error_points(errors: Mapping[int, float]) -> tuple[dict[int, float], str]:
    """The errors that a logarithmic axis can show, and a note that counts the others.

    Raises:
        ValueError: when there is no layer.
    """
    if not errors:
        raise ValueError("no layer to draw: give at least one layer's error")
    points = {layer: x for layer, x in errors.items() if math.isfinite(x) and x > 0}
    exact = sum(x == 0 for x in errors.values())
    wrong = [str(layer) for layer, x in errors.items() if not math.isfinite(x)]
    notes = [f"{exact} of {len(errors)} layers exact, not drawn"] if exact else []
    notes += [f"NOT FINITE in layers {', '.join(wrong)}"] if wrong else []
    return points, "; ".join(notes)


def lens_matrix(table: pd.DataFrame, colour: str) -> tuple[Any, list[list[Any]], list[str], list[int]]:
    """The table of a lens as values (layer, t), top tokens, tokens and layers.

    Raises:
        ValueError: an unknown colour, or an empty table.
    """
    if colour not in COLOURS:
        raise ValueError(f"unknown colour {colour!r}: choose one of {', '.join(COLOURS)}")
    if not len(table):
        raise ValueError("no layer to draw: give at least one")
    values = table.pivot(index="layer", columns="position", values=colour)
    tops = table.pivot(index="layer", columns="position", values="top")
    tokens = table.drop_duplicates("position").sort_values("position")["token"]
    names = [[visible(str(x)) for x in line] for line in tops.to_numpy().tolist()]
    return values.to_numpy(dtype=float), names, [str(x) for x in tokens], [int(k) for k in values.index]
