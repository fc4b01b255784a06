"""Figures of the precision study: the stall law, heads against it, and KL over the text."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ssmlens.plotting import palette
from ssmlens.plotting.figures import _figure, _finish

__all__ = ["divergence", "horizon", "stall"]

_SMALL = 8.0
_BINS = 60
_VARIANT = {
    "all": ("every head", "#1b1b1b"),
    "slow": ("slow heads alone", "#db5c6c"),
    "random": ("as many others, at random", "#3263c3"),
    "rest": ("all but the slow", "#8459c3"),
    "stochastic": ("every head, rounded stochastically", "#de9212"),
}


def stall(found: Any) -> Figure:
    """Half-life against 1 - a: exact, rounded to nearest, and rounded stochastically.

    Args:
        found: a result of `precision.stall`.
    """
    frame = found.table().sort_values("decay")
    gone = 1 - frame["decay"].to_numpy()
    lives = frame["half_life"].to_numpy()
    figure, axes = _figure(6.4, 4.2)
    axes.plot(gone, frame["exact"], color=palette.MUTED, linewidth=1.2, label="exact: ln 2 / -ln a")
    finite = np.isfinite(lives)
    axes.plot(gone[finite], lives[finite], "o", color="#3263c3", markersize=5, label="rounded to nearest")
    axes.plot(gone, frame["stochastic"], "x", color="#de9212", markersize=6, label="rounded stochastically")
    top = 1.6 * float(frame["exact"].max())
    if not finite.all():
        axes.plot(
            gone[~finite], np.full((~finite).sum(), top), "^", color=palette.NEVER, label="stops before one half",
            clip_on=False,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    law = _digits(found.settings["dtype"])
    for power, words in ((law + 1, "stops at once"), (law, "stops soon")):
        if gone.min() / 2 < 2.0**-power < gone.max() * 2:
            axes.axvline(2.0**-power, color=palette.NEVER, linewidth=0.9, linestyle="--" if power > law else ":")
            axes.annotate(
                f"{words}: 2^-{power}", (2.0**-power, axes.get_ylim()[0]), xytext=(3, 4), textcoords="offset points",
                fontsize=_SMALL - 1, rotation=90, color=palette.NEVER, va="bottom",
            )  # fmt: skip
    _axes(axes, "1 - a", "half-life, tokens")
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, f"A decaying state in {found.settings['dtype']}", "nothing is written; start 1")


def horizon(found: Any) -> Figure:
    """Relative error of each head's state against its half-life, the noise law, and the heads that stall.

    Args:
        found: a result of `precision.horizon`, measured.
    """
    from ssmlens.analyses.precision import ROUNDING_NOISE

    frame = found.table()
    if "error" not in frame:
        raise ValueError("this result was not measured: call horizon with measure=True")
    frame = frame[np.isfinite(frame["half_life"]) & (frame["error"] > 0)]
    lives, errors = frame["half_life"].to_numpy(), frame["error"].to_numpy()
    figure, axes = _figure(6.8, 4.4)
    order = np.argsort(frame["stalled_share"].to_numpy(), kind="stable")
    shown = axes.scatter(
        lives[order], errors[order], c=frame["stalled_share"].to_numpy()[order], s=6 if len(frame) > 2000 else 14,
        cmap="cividis", vmin=0, vmax=1, linewidths=0, rasterized=len(frame) > 2000,
    )  # fmt: skip
    grid = np.geomspace(lives.min(), lives.max(), 200)
    decay = np.exp(-np.log(2) / grid)
    law = ROUNDING_NOISE * 2.0 ** -_digits(found.settings["dtype_of_state"]) / np.sqrt(1 - decay**2)
    axes.plot(grid, law, color=palette.INK, linewidth=1.2, label="noise of rounding, constant decay")
    longest = np.log(2) * found.settings["longest_time_constant"]
    if lives.min() < longest < lives.max():
        axes.axvline(longest, color=palette.NEVER, linewidth=0.9, linestyle="--", label="stall law")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _axes(axes, "half-life, tokens", "relative error of the state")
    axes.legend(fontsize=_SMALL, frameon=False, loc="upper left")
    bar = figure.colorbar(shown, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label("share of tokens whose decay is lost", fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)
    name = found.settings["dtype_of_state"]
    note = f"one point per head{' and state' if 'state' in found.dims else ''}; gates of the exact run"
    return _finish(figure, axes, _title(f"State kept in {name}", found), note)


def divergence(found: Any, row: int = 0) -> Figure:
    """KL over the text, by what is rounded; one panel for each format.

    Args:
        found: a result of `precision.divergence`.
        row: which text of a batch.
    """
    names, variants = found.coords["dtype"], found.coords["rounded"]
    length = int(np.isfinite(found.value[0, 0, row].numpy()).sum())
    figure, first = _figure(1.4 + 3.4 * len(names), 4.2)
    figure.delaxes(first)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    at, noise = _binned(found.control["own_forward"][0, 0, row, :length].numpy())
    for i, (axes, name) in enumerate(zip(panels, names)):
        for j, variant in enumerate(variants):
            label, colour = _VARIANT[variant]
            where, mean = _binned(found.value[i, j, row, :length].numpy())
            axes.plot(where, _positive(mean), color=colour, linewidth=1.2, label=label)
        weights = found.control["short_weights"][i, 0, row, :length].numpy()
        if np.isfinite(weights).all():
            where, mean = _binned(weights)
            axes.plot(where, _positive(mean), color="#2f8f5b", linewidth=1.2, linestyle="--",
                      label="control: weights in the format, state exact")  # fmt: skip
        axes.plot(
            at, _positive(noise), color=palette.MUTED, linewidth=1, linestyle=":", label="control: float32 itself"
        )
        axes.set_yscale("log")
        axes.set_title(name, fontsize=_SMALL + 1)
        _axes(axes, "token", "KL, nats" if i == 0 else "")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=_SMALL - 1, frameon=False)
    share = found.settings["share"]
    width = -(-length // len(at))
    binned = f"means of {width} tokens" if width > 1 else "each token"
    note = f"{binned}; slow: the {share:.0%} of heads with the longest half-lives"
    figure.suptitle(_title("Next-token law with the state rounded at each token", found), fontsize=11)
    figure.supxlabel(note, fontsize=_SMALL - 1, color=palette.MUTED)
    figure.set_label(note)
    return figure


def _axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=_SMALL)
    axes.set_ylabel(y, fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    axes.grid(color=palette.GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _binned(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middles and means of at most `_BINS` stretches of equal length."""
    width = -(-len(x) // _BINS)
    starts = range(0, len(x), width)
    return np.array([s + width / 2 for s in starts]), np.array([x[s : s + width].mean() for s in starts])


def _digits(name: str) -> int:
    from ssmlens.analyses.precision import format_of

    return format_of(name).digits


def _positive(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.nan)


def _title(what: str, found: Any) -> str:
    model = found.settings.get("model")
    return f"{what}: {model}" if model else what
