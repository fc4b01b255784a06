"""Figures of the capacity study: effective state sizes, rank floors, ranks, memory, processing, loads and collapse."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ssmlens.plotting import palette
from ssmlens.plotting.figures import _figure, _finish
from ssmlens.plotting.studies.capacity_memory import (
    BLUE,
    ORANGE,
    SMALL,
    copied_bits,
    finish_axes,
    finish_legend,
    hebbian_load,
    memory_capacity,
    processing,
    title_of,
)

__all__ = [
    "collapse",
    "copied_bits",
    "hankel",
    "hebbian_load",
    "memory_capacity",
    "processing",
    "rank_floor",
    "ranks",
    "state_size",
]

_PURPLE, _RED = "#8459c3", "#db5c6c"
_FEW = 4


def state_size(found: Any, row: int = 0) -> Figure:
    """Effective state size over cuts, median and 10 to 90 % of the heads of each layer, under the bound.

    Args:
        found: a result of `capacity.effective_state_size` on a trace or a recurrence.
        row: which text of a batch.
    """
    value, bound = _by_layer(found, found.value, row), _by_layer(found, found.control["rank_bound"], row)
    cuts, layers = np.asarray(found.coords["cut"]), found.coords.get("layer", [None])
    figure, axes = _figure(7.2, 4.4)
    single = len(cuts) == 1
    for k, (label, colour) in enumerate(zip(layers, palette.layer_colours(len(value)))):
        x = cuts + (k - (len(value) - 1) / 2) * 0.02 * cuts[-1] if single else cuts
        low, middle, high = np.nanquantile(value[k], [0.1, 0.5, 0.9], axis=0)
        name = None if label is None else f"layer {label}"
        if single:
            axes.errorbar(x, middle, [middle - low, high - middle], fmt="o", color=colour, markersize=5, label=name)
        else:
            axes.plot(x, middle, color=colour, linewidth=1.6, label=name)
            if len(value) <= _FEW:
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot(cuts, np.nanmax(bound, (0, 1)), color=palette.MUTED, linewidth=1.0, linestyle="--", label="bound")
    axes.set_yscale("log")
    finish_axes(axes, "cut: token where past and future part", f"effective state size ({found.settings['form']} form)")
    finish_legend(axes, beside=True)
    spread = ", 10 to 90 %" if single or len(value) <= _FEW else ""
    note = f"median over heads{spread}; bound: min(tokens before, tokens after, state size); gates frozen"
    return _finish(figure, axes, title_of("Effective state size", found), note)


def hankel(found: Any, row: int = 0) -> Figure:
    """Singular values from past to future over their largest, the median of the heads of each layer at the middle cut.

    Args:
        found: a result of `capacity.hankel` on a trace or a recurrence.
        row: which text of a batch.
    """
    middle = len(found.coords["cut"]) // 2
    value = _by_layer(found, found.value, row)[:, :, middle]
    layers = found.coords.get("layer", [None])
    figure, axes = _figure(6.4, 4.4)
    order = np.arange(1, value.shape[-1] + 1)
    for spectrum, label, colour in zip(value, layers, palette.layer_colours(len(value))):
        curve = np.nanmedian(spectrum / spectrum[:, :1], axis=0)
        shown = curve > 1e-17
        axes.plot(
            order[shown], curve[shown], color=colour, linewidth=1.6, label=None if label is None else f"layer {label}"
        )
    axes.set_yscale("log")
    finish_axes(axes, "order", "singular value over the largest")
    finish_legend(axes, beside=True)
    cut = found.coords["cut"][middle]
    return _finish(
        figure, axes, title_of("From past to future", found), f"cut at token {cut}; median over heads; gates frozen"
    )


def rank_floor(found: Any) -> Figure:
    """The metric against the rank of the truncated state, one panel for each layer (at most twelve).

    Args:
        found: a result of `capacity.rank_floor`.
    """
    layers = found.coords.get("layer", [None])[:12]
    readings = found.coords.get("reading", ["rerun"])
    shape = (len(found.coords.get("layer", [None])), len(readings), len(found.coords["rank"]))

    def full(x: Any) -> np.ndarray:
        return np.broadcast_to(x.numpy(), found.shape).reshape(shape)

    value, low, high = full(found.value), full(found.columns["low"]), full(found.columns["high"])
    floor, untouched = full(found.columns["floor"])[..., 0], float(found.control["untruncated"])
    ranks = np.asarray(found.coords["rank"])
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    figure, first = _figure(1.2 + 3.1 * columns, 1.1 + 2.6 * rows)
    figure.delaxes(first)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for k, (axes, layer) in enumerate(zip(panels, layers)):
        axes.axhline(untouched, color=palette.MUTED, linewidth=1.0, linestyle="--", label="whole state")
        for i, (reading, colour) in enumerate(zip(readings, (BLUE, ORANGE))):
            words = {"rerun": "all above recomputed", "frozen": "gates above frozen"}[reading]
            # The second is drawn thin over the first: for the last layer they are one.
            style, width = ("o-", 2.6) if i == 0 else ("o--", 1.2)
            axes.plot(ranks, value[k, i], style, color=colour, markersize=4.5 - 2 * i, linewidth=width, label=words)
            axes.fill_between(ranks, low[k, i], high[k, i], color=colour, alpha=0.15, linewidth=0)
            if np.isfinite(floor[k, i]):
                axes.axvline(floor[k, i], color=colour, linewidth=0.8, linestyle=":")
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks = [r for r in ranks if r == 0 or (r & (r - 1)) == 0]
        axes.set_xticks(ticks, [str(r) for r in ticks])
        axes.minorticks_off()
        if layer is not None:
            axes.set_title(f"layer {layer}", fontsize=SMALL + 1)
        finish_axes(
            axes, "rank of the state" if k >= len(layers) - columns else "", _metric(found) if k % columns == 0 else ""
        )
    for axes in panels[len(layers) :]:
        axes.axis("off")
    panels[0].legend(fontsize=SMALL - 1, frameon=False, loc="best")
    cut, prompts, within = (found.settings[k] for k in ("token_cut", "rows", "tolerance"))
    about = f"{prompts} prompts, 95 % bootstrap" if prompts > 1 else "one prompt, no interval"
    note = f"state truncated before token {cut}; {about}; dotted: floor within {within:g}"
    figure.suptitle(title_of("Rank floor", found), fontsize=11)
    figure.supxlabel(note, fontsize=SMALL - 1, color=palette.MUTED)
    figure.set_label(note)
    return figure


def ranks(found: Any, row: int = 0) -> Figure:
    """Participation ratio of each head's state over that of random writes, raw and less the mean state.

    Args:
        found: a result of `capacity.rank_statistics` on a trace or a recurrence.
        row: which text of a batch.
    """
    raw, centred = (_by_layer(found, x, row) for x in (found.value, found.columns["centred_participation"]))
    null = _by_layer(found, found.control["null"], row)
    layers = found.coords.get("layer", [0])
    figure, axes = _figure(7.2, 4.2)
    random = np.random.default_rng(0)
    for k in range(len(layers)):
        for values, shift, colour, name in (
            (raw, -0.22, BLUE, "state"),
            (centred, 0.0, ORANGE, "less its mean"),
            (null, 0.22, palette.MUTED, "random writes, same decay"),
        ):
            points = np.nanmean(values[k], axis=-1)
            points = points[np.isfinite(points)]
            where = k + shift + random.uniform(-0.05, 0.05, len(points))
            axes.plot(where, points, "o", color=colour, markersize=4, alpha=0.8, label=name if k == 0 else None)
    axes.set_xticks(range(len(layers)), [str(x) for x in layers])
    axes.set_yscale("log")
    finish_axes(axes, "layer", "participation ratio")
    finish_legend(axes, beside=True)
    return _finish(
        figure,
        axes,
        title_of("Rank of the state", found),
        "one point per head, mean over tokens; not a capacity: see the rank floor",
    )


def collapse(found: Any) -> Figure:
    """Loss by position with its control, and below it how far the states have left their range.

    Args:
        found: a result of `capacity.collapse` by bucket.
    """
    positions = np.asarray(found.coords["bucket"], dtype=float)
    train, width = found.settings["train_length"], int(found.settings["smooth"])
    figure, first = _figure(7.6, 5.4)
    figure.delaxes(first)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.plot(positions, found.value.numpy(), ".", color=BLUE, markersize=2.5, alpha=0.35)
    above.plot(
        positions, _running(found.value.numpy(), width), color=BLUE, linewidth=1.6, label="state carried all along"
    )
    if "restarted" in found.control:
        control = found.control["restarted"].numpy()
        above.plot(
            positions, _running(control, width), color=ORANGE, linewidth=1.4, label=f"state anew every {train} tokens"
        )
    below.plot(
        positions, found.columns["growth"].numpy(), color=_PURPLE, linewidth=1.4, label="variance of the widest head"
    )
    below.axhline(found.settings["growth"], color=palette.MUTED, linewidth=0.9, linestyle="--")
    below.set_yscale("log", base=2)
    below.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    below.yaxis.set_minor_formatter(NullFormatter())
    for axes in (above, below):
        axes.axvline(train, color=palette.NEVER, linewidth=0.9, linestyle=":")
        for name, colour in (("loss_onset", BLUE), ("state_onset", _PURPLE), ("onset", _RED)):
            at = float(found.columns[name].reshape(-1)[0])
            if np.isfinite(at):
                axes.axvline(at, color=colour, linewidth=1.0, linestyle="--")
    above.set_xscale("log", base=2)
    finish_axes(above, "", "loss, nats per token")
    finish_axes(below, "token", f"over that at token {train}")
    finish_legend(above)
    finish_legend(below)
    onsets = {k: float(found.columns[k].reshape(-1)[0]) for k in ("loss_onset", "state_onset", "onset")}
    words = [
        f"{k.replace('_', ' ')} {x:.0f}" if np.isfinite(x) else f"no {k.replace('_', ' ')}" for k, x in onsets.items()
    ]
    bucket = found.settings["bucket"]
    note = f"buckets of {bucket} tokens, running mean of {width}; dotted: training length {train}; {', '.join(words)}"
    above.set_title(title_of("Streamed with carried state", found), fontsize=11)
    figure.supxlabel(note, fontsize=SMALL - 1, color=palette.MUTED)
    figure.set_label(note)
    return figure


def _by_layer(found: Any, x: Any, row: int) -> np.ndarray:
    """(layer, head, ...) of one text, a single layer where the result has no such axis."""
    full = np.broadcast_to(x.numpy(), found.shape)
    if "layer" not in found.dims:
        full = full[None]
    return full[:, row]


def _running(x: np.ndarray, width: int) -> np.ndarray:
    return np.array([x[max(0, k + 1 - width) : k + 1].mean() for k in range(len(x))])


def _metric(found: Any) -> str:
    return {"loss": "loss, nats", "kl": "KL from the whole state, nats"}.get(found.name, found.name)
