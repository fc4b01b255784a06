"""Figures of the capacity study for memory of random inputs and for associative storage."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmlens.plotting import palette
from ssmlens.plotting.figures import _figure, _finish

__all__ = [
    "BLUE",
    "ORANGE",
    "SMALL",
    "copied_bits",
    "finish_axes",
    "finish_legend",
    "hebbian_load",
    "memory_capacity",
    "processing",
    "title_of",
]

SMALL = 8.0
BLUE, ORANGE = "#3263c3", "#de9212"


def memory_capacity(found: Any) -> Figure:
    """Capacity by lag: corrected, held out with its interval, and the shuffled control.

    Args:
        found: a result of `capacity.memory_capacity`, or of its closed form.
    """
    lags = np.asarray(found.coords["lag"])
    figure, axes = _figure(6.8, 4.2)
    axes.plot(lags, found.value.numpy(), color=BLUE, linewidth=1.6, label=f"MC, total {float(found.value.sum()):.2f}")
    if "held_out" in found.columns:
        total = float(found.columns["total_held_out"].reshape(-1)[0])
        axes.plot(
            lags, found.columns["held_out"].numpy(), color=ORANGE, linewidth=1.2, label=f"held out, total {total:.2f}"
        )
        axes.fill_between(
            lags, found.columns["low"].numpy(), found.columns["high"].numpy(), color=ORANGE, alpha=0.2, linewidth=0
        )
        axes.plot(lags, found.control["shuffled"].numpy(), color=palette.MUTED, linewidth=0.9, label="shuffled")
    floor = -0.08 if "held_out" in found.columns else 0
    axes.set_ylim(floor, max(0.05, 1.08 * float(found.value.max())))
    finish_axes(axes, "lag, steps", "share of the input's variance read back")
    finish_legend(axes)
    noise = found.settings["noise"]
    note = (
        f"noise {noise:g} of the features' variance; at most {float(found.control['rank'].reshape(-1)[0]):.0f} in all"
    )
    return _finish(figure, axes, title_of("Linear memory capacity", found), note)


def processing(found: Any) -> Figure:
    """Capacity by degree; for the selectivity tax with gates and without.

    Args:
        found: a result of `capacity.information_processing_capacity` or `capacity.selectivity_tax`.
    """
    degrees = np.asarray(found.coords["degree"])
    figure, axes = _figure(5.6, 4.0)
    what = "Selectivity tax" if "selective" in found.columns else "Information processing capacity"
    if "selective" in found.columns:
        bars = ((found.columns["frozen"], "gates frozen", ORANGE), (found.columns["selective"], "selective", BLUE))
    else:
        bars = ((found.value, "capacity", BLUE), (found.control["shuffled"], "shuffled", palette.MUTED))
    for i, (heights, name, colour) in enumerate(bars):
        where = degrees + (i - 0.5) * 0.36
        axes.bar(where, heights.numpy(), width=0.34, color=colour, label=f"{name}, total {float(heights.sum()):.2f}")
        for x, height in zip(where, heights.tolist()):
            axes.annotate(f"{height:.2f}", (x, max(height, 0)), ha="center", va="bottom", fontsize=SMALL - 1)
    axes.set_xticks(degrees)
    finish_axes(axes, "degree of the function of past inputs", "capacity")
    finish_legend(axes)
    rank = float(found.control["rank"].reshape(-1)[0])
    lags = ", ".join(map(str, found.settings["lags"]))
    of = found.settings
    note = f"{of['features']} features, at most {rank:.0f} in all; lags to {lags}; {of['samples']} samples"
    return _finish(figure, axes, title_of(what, found), note)


def hebbian_load(found: Any) -> Figure:
    """Predicted and simulated accuracy against the load.

    Args:
        found: a result of `capacity.hebbian_load`.
    """
    load = found.columns["load"].numpy()
    figure, axes = _figure(6.0, 4.0)
    axes.plot(load, found.value.numpy(), "-", color=BLUE, linewidth=1.6, label="predicted")
    if "simulated" in found.columns:
        middle, low, high = (found.columns[k].numpy() for k in ("simulated", "low", "high"))
        axes.errorbar(
            load, middle, [middle - low, high - middle], fmt="o", color=ORANGE, markersize=4, label="simulated"
        )
    axes.axhline(float(found.control["chance"]), color=palette.MUTED, linewidth=0.9, linestyle="--", label="chance")
    axes.axvline(1, color=palette.MUTED, linewidth=0.9, linestyle=":")
    axes.set_xscale("log", base=2)
    finish_axes(axes, "pairs over K* = n p / (2 ln V)", "share of pairs recalled")
    finish_legend(axes)
    s = found.settings
    half = float(found.columns["half_load"])
    note = f"n = {s['d_state']}, p = {s['channels']}, V = {s['vocabulary']}: K* = {half:.0f}; decay {s['decay']:g}"
    return _finish(figure, axes, "A head as a sum of outer products", note)


def copied_bits(found: Any) -> Figure:
    """Share of strings copied whole against their bits, with the bound of the state.

    Args:
        found: a result of `capacity.copied_bits` or `capacity.effective_bits`.
    """
    bits = np.asarray(found.coords["length"]) * np.log2(found.settings["vocabulary"])
    figure, axes = _figure(6.4, 4.0)
    axes.plot(bits, found.value.numpy(), "o-", color=BLUE, markersize=4, linewidth=1.6, label="strings copied whole")
    if "low" in found.columns:
        axes.fill_between(
            bits, found.columns["low"].numpy(), found.columns["high"].numpy(), color=BLUE, alpha=0.15, linewidth=0
        )
    if "each" in found.columns:
        axes.plot(bits, found.columns["each"].numpy(), color=ORANGE, linewidth=1.2, label="symbols copied")
    axes.axhline(found.settings["level"], color=palette.MUTED, linewidth=0.9, linestyle="--")
    axes.axvline(float(found.columns["effective_bits"].reshape(-1)[0]), color=BLUE, linewidth=0.9, linestyle=":")
    elements = found.settings["elements"]
    held = None if elements is None else elements * found.settings["bits"]
    if held is not None and held < 2 * bits.max():
        axes.axvline(held, color=palette.NEVER, linewidth=1.0, label="bits of the state")
    finish_axes(axes, "bits of a random string", "share")
    finish_legend(axes)
    note = f"dotted: {found.settings['level']:.0%} of the strings" + (
        "" if held is None else f"; the state has {held} bits"
    )
    return _finish(figure, axes, title_of("Copied bits", found), note)


def title_of(what: str, found: Any) -> str:
    """``what`` with the model that it is about."""
    model = found.settings.get("model")
    return f"{what}: {model}" if model else what


def finish_legend(axes: Axes, beside: bool = False) -> None:
    """A legend where there is something to tell, inside or to the right of the axes."""
    if axes.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if beside else {}
        axes.legend(fontsize=SMALL - 1, frameon=False, **place)


def finish_axes(axes: Axes, x: str, y: str) -> None:
    """Labels, a light grid, and no frame above and to the right."""
    axes.set_xlabel(x, fontsize=SMALL)
    axes.set_ylabel(y, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color=palette.GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
