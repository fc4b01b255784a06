"""Figures of the Lyapunov study: exponents of every level with their intervals and controls."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssmlens.plotting import palette
from ssmlens.plotting.figures import _figure, _finish

__all__ = ["closed", "divergence", "gain", "latent", "stack", "summary"]

_SMALL = 8.0
_BLUE, _ORANGE, _RED = "#3263c3", "#de9212", "#db5c6c"
_TINY = 1e-20
"""KL below which nothing is drawn: it is rounding."""

_LEVELS = {
    "latent": "latent: gates frozen",
    "stack": "stack: text given",
    "gain": "gain: log of the largest",
    "closed": "closed: fed with its expectation",
    "divergence": "divergence: slope of log KL",
}


def summary(found: Any) -> Figure:
    """The leading number of each level with its interval and its control.

    Args:
        found: a result of `lyapunov.summary`.
    """
    frame = found.table()
    figure, panels = _figure(7.6, 3.6)
    figure.delaxes(panels)
    left, right = figure.subplots(1, 2, width_ratios=(4, 1.3))
    rates = frame[frame["level"] != "gain"].reset_index(drop=True)
    at = np.arange(len(rates))[::-1]
    low, high = (rates["lyapunov"] - rates["low"]).clip(lower=0), (rates["high"] - rates["lyapunov"]).clip(lower=0)
    left.axvline(0, color=palette.MUTED, linewidth=0.8)
    left.errorbar(
        rates["lyapunov"], at, xerr=np.nan_to_num([low, high]), fmt="o", color=_BLUE, label="with 95 % interval"
    )
    left.plot(rates["control"], at, "|", color=_ORANGE, markersize=14, markeredgewidth=2, label="gates frozen")
    left.set_yticks(at, [_LEVELS[name] for name in rates["level"]])
    left.set_ylim(-0.6, len(rates) - 0.4)
    _axes(left, "nats per token", "")
    left.legend(fontsize=_SMALL, frameon=False, loc="lower right")
    right.bar([0], [found.settings["largest_gain"]], color=_RED, width=0.5)
    right.axhline(1, color=palette.MUTED, linewidth=0.8)
    right.set_yscale("log")
    right.set_xticks([0], [f"within {found.settings['largest_gain_horizon']} tokens"])
    right.set_xlim(-0.7, 0.7)
    _axes(right, "", "largest gain")
    parted = f"{found.settings['parted']:.0%} of {found.settings['pairs']} pairs parted"
    note = f"{parted} after a disturbance of {found.settings['disturbance']:g}; {_tokens(found)}"
    return _finish(figure, left, _title("Perturbations on every level", found), note)


def latent(found: Any, row: int = 0) -> Figure:
    """Exponents of each layer's states with frozen gates, largest first.

    Args:
        found: a result of `lyapunov.latent`.
        row: which text of a batch.
    """
    frame = found.table()
    frame = frame[frame["batch"] == row]
    layers = found.coords.get("layer", [None])
    figure, axes = _figure(6.8, 4.2)
    for layer, colour in zip(layers, palette.layer_colours(len(layers))):
        part = frame if layer is None or "layer" not in frame else frame[frame["layer"] == layer]
        rates = np.sort(-part[found.name].dropna().to_numpy())
        share = (np.arange(len(rates)) + 0.5) / len(rates)
        axes.plot(share, np.where(rates > 0, rates, np.nan), color=colour, linewidth=1.5, label=f"layer {layer}")
    axes.set_yscale("log")
    axes.invert_yaxis()
    _axes(axes, "share of heads and states, slowest first", "minus the exponent, nats per token")
    if layers[0] is not None:
        axes.legend(fontsize=_SMALL - 1, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _finish(figure, axes, _title("Exponents with frozen gates", found), "mean of the log decay; top: slowest")


def stack(found: Any) -> Figure:
    """The spectrum of the whole model beside that of its frozen gates, or of any map.

    Args:
        found: a result of `lyapunov.stack` or `lyapunov.spectrum`; windows are drawn as a band of their own.
    """
    figure, axes = _figure(6.4, 4.2)
    order = np.asarray(found.coords["exponent"])
    if "window" in found.dims:
        value = found.columns["mean"].numpy()
        low, high = np.quantile(found.value.numpy(), [0.1, 0.9], axis=0)
        axes.fill_between(order, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="10 to 90 % of the windows")
    else:
        value = found.value.numpy()
    ends = [found.columns[name].expand(len(order)).numpy() for name in ("low", "high")]
    finite = np.isfinite(value)
    axes.axhline(0, color=palette.MUTED, linewidth=0.8)
    errors = np.nan_to_num([value - ends[0], ends[1] - value], nan=0.0, posinf=0.0).clip(min=0)[:, finite]
    axes.errorbar(order[finite], value[finite], yerr=errors, fmt="o", color=_BLUE, markersize=4.5, label="measured")
    for name, words, mark, colour in (
        ("frozen_gates", "gates frozen", "_", _ORANGE),
        ("other_start", "other start", "x", palette.MUTED),
    ):
        if name in found.control:
            axes.plot(
                order, found.control[name].expand(len(order)).numpy(), mark, color=colour, markersize=8, label=words
            )
    _axes(axes, "exponent", found.units.replace("/", " per "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=_SMALL, frameon=False)
    s = found.settings
    gone = int((~finite).sum())
    note = f"{s['steps']} steps after {s['discard']}; 95 % intervals" + (f"; {gone} more are -inf" if gone else "")
    return _finish(figure, axes, _title("Lyapunov spectrum", found), note)


def gain(found: Any) -> Figure:
    """Transient gain over the horizon: largest, median and smallest over the starts.

    Args:
        found: a result of `lyapunov.transient_gain`.
    """
    horizons = np.asarray(found.coords["horizon"])
    figure, axes = _figure(6.4, 4.2)
    axes.axhline(1, color=palette.MUTED, linewidth=0.8)
    axes.plot(horizons, found.value, "o-", color=_RED, linewidth=1.6, markersize=4, label="largest over the starts")
    if len(found.settings["starts"]) > 1:
        axes.plot(horizons, found.columns["median"], color=_BLUE, linewidth=1.4, label="median")
        axes.fill_between(
            horizons,
            found.columns["smallest"],
            found.value,
            color=_BLUE,
            alpha=0.12,
            linewidth=0,
            label="smallest to largest",
        )
    if "spectral" in found.control:
        axes.plot(
            horizons, found.control["spectral"], "--", color=palette.MUTED, label="a normal map, same eigenvalues"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(horizons, [str(h) for h in horizons])
    axes.minorticks_off()
    axes.set_yscale("log")
    _axes(axes, "steps later", "gain of the most sensitive perturbation")
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, _title("Transient gain", found), "norm of the raw state; inputs given")


def closed(found: Any) -> Figure:
    """The leading exponents of the closed loop against the temperature.

    Args:
        found: a result of `lyapunov.closed_loop` of a lens.
    """
    warm = np.asarray(found.coords["temperature"])
    figure, axes = _figure(6.4, 4.2)
    axes.axhline(0, color=palette.MUTED, linewidth=0.8)
    count = found.shape[1]
    for i, colour in zip(range(count), palette.layer_colours(count)):
        axes.plot(warm, found.value[:, i], "o-", color=colour, linewidth=1.5, markersize=4, label=f"exponent {i + 1}")
    axes.fill_between(
        warm,
        found.columns["low"][:, 0],
        found.columns["high"][:, 0],
        color=palette.layer_colours(count)[0],
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(warm, found.control["frozen_gates"][:, 0], "--", color=palette.MUTED, label="largest with gates frozen")
    if len(warm) > 1:
        axes.set_xscale("log")
    axes.set_xticks(warm, [f"{x:g}" for x in warm])
    axes.minorticks_off()
    _axes(axes, "temperature of the feedback", "nats per token")
    axes.legend(fontsize=_SMALL, frameon=False)
    s = found.settings
    note = f"{s['steps']} steps after {s['discard']}; 95 % interval of the first; above 0 nearby runs part"
    return _finish(figure, axes, _title("Fed with its own expectation", found), note)


def divergence(found: Any) -> Figure:
    """Pairs of generations with shared chance: how many have parted, and KL before.

    Args:
        found: a result of `lyapunov.divergence`.
    """
    steps = np.asarray(found.coords["step"])
    figure, axes = _figure(6.8, 5.0)
    figure.delaxes(axes)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(steps, found.columns["parted"], color=_RED, linewidth=1.6, label="parted so far")
    top.plot(steps, found.value, color=_BLUE, linewidth=1.0, label="differ at this token")
    top.fill_between(steps, found.columns["low"], found.columns["high"], color=_BLUE, alpha=0.15, linewidth=0)
    top.plot(steps, found.control["rounding_parted"], "--", color=palette.MUTED, label="by rounding alone")
    top.set_ylim(-0.03, 1.03)
    _axes(top, "", "share of pairs")
    top.legend(fontsize=_SMALL, frameon=False)
    for name, of, colour in (
        ("disturbed", found.columns["kl"], _BLUE),
        ("rounding alone", found.control["rounding_kl"], palette.MUTED),
    ):
        kl = of.numpy()
        bottom.plot(steps, np.where(kl > _TINY, kl, np.nan), color=colour, linewidth=1.1, label=name)
    bottom.set_yscale("log")
    _axes(bottom, "token", "KL of the next token, nats")
    bottom.legend(fontsize=_SMALL, frameon=False)
    s = found.settings
    note = f"{s['pairs']} pairs; state disturbed by {s['size']:g}; temperature {s['temperature']:g}; median KL"
    return _finish(figure, top, _title("Generations with shared chance", found), note)


def _title(what: str, found: Any) -> str:
    model = found.settings.get("model")
    return what if model is None else f"{what}: {model}"


def _tokens(found: Any) -> str:
    return f"{found.settings['tokens']} tokens of text"


def _axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=_SMALL + 1)
    axes.set_ylabel(y, fontsize=_SMALL + 1)
    axes.tick_params(labelsize=_SMALL)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
