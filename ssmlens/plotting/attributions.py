"""Figures of attributions: the text coloured by scores, a waterfall to the logit, and methods side by side.

Drawn with matplotlib; `pages.attribution` is the interactive waterfall. Scores are signed and drawn as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from . import palette
from .caption import Caption
from .figures import _figure, _finish, _signed_map, _token_axis, token_row
from .labels import drawable, label, visible
from .scales import as_array

if TYPE_CHECKING:
    from ssmlens.attribution import Attribution

__all__ = ["attribution", "methods_side_by_side", "note_of", "scored_text", "steps_to_logit", "title_of"]

_SMALL = 8.0
_MOST = 14


def scored_text(found: Attribution, target: str = "", row: int = 0) -> Figure:
    """The prompt, each token coloured by its score; the frame marks where the logit is read.

    Args:
        found: an attribution.
        target: text of the explained token, for the title.
        row: which prompt of a batch.
    """
    tokens, position = found.tokens[row], int(found.position[row])
    caption = Caption(model=found.settings.get("model"), reduction="signed scores")
    return token_row(
        found.scores[row, : len(tokens)],
        tokens,
        caption,
        reader=position,
        title=title_of(found, target),
        note=note_of(found, row),
    )


def attribution(found: Attribution, target: str = "", row: int = 0, *, most: int = _MOST) -> Figure:
    """A waterfall from 0 to the logit: the tokens with the largest scores in the order of the text, all others in one
    step, the bias, and what is missing where the method promises no sum.

    Args:
        found: an attribution.
        target: text of the explained token, for the title.
        row: which prompt of a batch.
        most: tokens with a step of their own.
    """
    names, steps = steps_to_logit(found, row, most)
    figure, axes = _figure(8.4, 1.6 + 0.26 * len(names))
    ends = np.cumsum(steps)
    starts = np.concatenate([[0.0], ends[:-1]])
    ground = _signed_map(True)
    colours = [ground(0.9) if x >= 0 else ground(0.1) for x in steps]
    places = np.arange(len(names))
    axes.barh(places, steps, left=starts, color=colours, edgecolor=palette.INK, linewidth=0.4, height=0.72)
    for k in range(len(names) - 1):
        axes.plot([ends[k], ends[k]], [k, k + 1], color=palette.MUTED, linewidth=0.7)
    for k, x in enumerate(steps):
        axes.annotate(
            f"{x:+.3g}", (max(starts[k], ends[k]), k), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=_SMALL, color=palette.INK,
        )  # fmt: skip
    logit = float(found.logit[row])
    axes.axvline(logit, color=palette.INK, linewidth=0.9, linestyle="--")
    axes.axvline(0, color=palette.MUTED, linewidth=0.7)
    axes.set_yticks(places, [drawable(name) for name in names], fontsize=_SMALL, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(f"logit, from 0 to {logit:.4g} (dashed)", fontsize=_SMALL)
    axes.tick_params(axis="x", labelsize=_SMALL)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _finish(figure, axes, title_of(found, target), note_of(found, row))


def methods_side_by_side(
    found: Mapping[str, Attribution] | Sequence[Attribution], row: int = 0, source: Sequence[int] = ()
) -> Figure:
    """One line per method, one column per token, each line divided by its largest magnitude.

    Args:
        found: attributions of one prompt, by name or with their methods' names.
        row: which prompt of a batch.
        source: positions to mark, such as where the answer was told.

    Raises:
        ValueError: when there is none, or they are of different prompts.
    """
    named = dict(found) if isinstance(found, Mapping) else {each.method: each for each in found}
    if not named:
        raise ValueError("no attribution to draw: give at least one")
    first = next(iter(named.values()))
    tokens = first.tokens[row]
    if any(each.tokens[row] != tokens for each in named.values()):
        raise ValueError("attributions side by side are of one prompt")
    grid = np.stack([as_array(each.scores[row, : len(tokens)]) for each in named.values()])
    largest = np.abs(grid).max(1, keepdims=True)
    grid = grid / np.where(largest > 0, largest, 1.0)
    figure, axes = _figure(float(np.clip(2.4 + 0.17 * len(tokens), 5.0, 13.0)), 1.9 + 0.27 * len(named))
    image = axes.imshow(grid, cmap=_signed_map(True), vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(named)), list(named), fontsize=_SMALL)
    _token_axis(axes, tokens, 1, "x", "token")
    for k in source:
        axes.axvline(k, color=palette.INK, linewidth=0.8, linestyle=":")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("score / largest of its line", fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    model = first.settings.get("model")
    title = "Methods side by side" + (f": {model}" if model else "")
    return _finish(figure, axes, title, "dotted: where the answer was told" if len(source) else "")


def steps_to_logit(found: Attribution, row: int = 0, most: int = _MOST) -> tuple[list[str], list[float]]:
    """Names and sizes of the steps of a waterfall from 0 to the logit; they add up to it.

    Args:
        found, row, most: as for `attribution`.
    """
    tokens = found.tokens[row]
    scores = as_array(found.scores[row, : len(tokens)])
    largest = sorted(np.argsort(-np.abs(scores), kind="stable")[:most].tolist())
    names = [f"{k} {label(tokens[k])}" for k in largest]
    steps = [float(scores[k]) for k in largest]
    rest, bias = float(scores.sum() - sum(steps)), float(found.bias[row])
    if len(largest) < len(tokens):
        names, steps = [*names, f"{len(tokens) - len(largest)} other tokens"], [*steps, rest]
    if bias:
        names, steps = [*names, "bias"], [*steps, bias]
    missing = float(found.logit[row]) - sum(steps)
    if abs(missing) > 1e-3 * max(1e-30, abs(float(found.logit[row]))):
        names, steps = [*names, "not attributed"], [*steps, missing]
    return names, steps


def title_of(found: Attribution, target: str) -> str:
    """What a figure of an attribution is called."""
    of = f" of {visible(target)!r}" if target else ""
    model = found.settings.get("model")
    return f"{found.method}: the logit{of}" + (f", {model}" if model else "")


def note_of(found: Attribution, row: int) -> str:
    """Its completeness error, or that none is promised."""
    error = float(found.completeness_error[row])
    return "this method promises no sum" if error != error else f"completeness error {error:.1e}"
