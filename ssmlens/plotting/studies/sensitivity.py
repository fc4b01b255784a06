"""Figures of the sensitivity study: parts, tokens and layers that a model can do without, outliers, curvature."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ssmlens.plotting import palette
from ssmlens.plotting.figures import _figure, _finish

__all__ = ["exits", "greedy", "hessian", "layers", "outliers", "removal", "tokens"]

_SMALL = 8.0
_BLUE, _ORANGE, _RED, _PURPLE, _GREEN = "#3263c3", "#de9212", "#db5c6c", "#8459c3", "#2f8f5b"
_MOST = 40


def removal(found: Any) -> Figure:
    """Change of the loss without each part, with its interval, and with the part's mean in its place.

    Args:
        found: a result of `sensitivity.removal`; at most 40 parts are drawn, those with the largest changes.
    """
    change, low, high = (
        found.value[:, 0].numpy(),
        found.columns["low"][:, 0].numpy(),
        found.columns["high"][:, 0].numpy(),
    )
    names = np.asarray(found.coords["part"])
    shown = np.sort(np.argsort(-np.abs(change), kind="stable")[:_MOST])
    figure, axes = _figure(8.6, 1.6 + 0.2 * len(shown))
    places = np.arange(len(shown))
    axes.hlines(places, low[shown], high[shown], color=_BLUE, linewidth=1.2)
    axes.plot(change[shown], places, "o", color=_BLUE, markersize=5, label="nothing in its place, 95 %")
    if "mean_change" in found.control:
        mean = found.control["mean_change"][:, 0].numpy()[shown]
        axes.plot(mean, places, "|", color=_ORANGE, markersize=9, markeredgewidth=2, label="control: its mean")
    axes.axvline(0, color=palette.MUTED, linewidth=0.8)
    if change[shown].max() > 20 * max(np.median(np.abs(change[shown])), 1e-12):
        axes.set_xscale("symlog", linthresh=max(float(np.median(np.abs(change[shown]))), 1e-6))
    axes.set_yticks(places, names[shown], fontsize=_SMALL - 1)
    axes.invert_yaxis()
    _axes(axes, "change of the loss, nats a token", "")
    figure.legend(fontsize=_SMALL, frameon=False, loc="outside right upper")
    note = f"loss of the whole model {float(found.columns['loss'][0]):.3g}"
    if len(shown) < len(names):
        note += f"; the {_MOST} largest of {len(names)} parts"
    return _finish(figure, axes, _title(f"Without each {found.settings['part']}", found), note)


def greedy(found: Any) -> Figure:
    """The loss as parts are taken out: greedily, in the order of single removals, and at random.

    Args:
        found: a result of `sensitivity.greedy`.
    """
    figure, axes = _figure(6.6, 4.2)
    steps = np.arange(len(found.value))
    axes.fill_between(steps, found.columns["low"].numpy(), found.columns["high"].numpy(), color=_BLUE, alpha=0.15,
                      linewidth=0)  # fmt: skip
    axes.plot(steps, found.value.numpy(), "o-", color=_BLUE, markersize=4, label="greedy, 95 % of its change")
    axes.plot(
        steps, found.control["single_order"].numpy(), "--", color=_PURPLE, label="in the order of single removals"
    )
    axes.plot(steps, found.control["random_order"].numpy(), ":", color=palette.MUTED, label="control: random orders")
    top = axes.get_ylim()[1]
    for step, name in enumerate(found.settings["order"], start=1):
        axes.annotate(name, (step, float(found.value[step])), xytext=(0, -12), textcoords="offset points",
                      fontsize=_SMALL - 2, ha="center", va="top", color=palette.MUTED)  # fmt: skip
    axes.set_ylim(top=top)
    axes.margins(y=0.15)
    axes.set_xticks(steps)
    _axes(axes, f"{found.settings['part']}s taken out", "loss, nats a token")
    axes.legend(fontsize=_SMALL, frameon=False, loc="upper left")
    rho, low, high = (float(found.columns[k][0]) for k in ("rank_correlation", "rank_low", "rank_high"))
    note = f"rank correlation of single changes with this order {rho:.2f} ({low:.2f} to {high:.2f})"
    return _finish(figure, axes, _title("Taken out one after another", found), note)


def tokens(found: Any) -> Figure:
    """Change of the loss when the context's lowest tokens are dropped, by score and share kept.

    Args:
        found: a result of `sensitivity.token_reduction`.
    """
    figure, axes = _figure(6.6, 4.2)
    keep = np.asarray(found.coords["keep"])
    colours = (_BLUE, _ORANGE, _RED, _PURPLE, _GREEN)
    names = found.coords["score"]
    for i, name in enumerate(names):
        known = name in ("recent", "random")
        style: dict[str, Any] = {"color": palette.MUTED, "linestyle": "--" if name == "recent" else ":"} if known else {
            "color": colours[i % len(colours)]}  # fmt: skip
        shift = (i - len(names) / 2) * 0.004
        change = found.value[i].numpy()
        bars = [change - found.columns["low"][i].numpy(), found.columns["high"][i].numpy() - change]
        label = f"control: {name}" if known else name
        axes.errorbar(keep + shift, change, yerr=np.abs(bars), marker="o", markersize=3.5, linewidth=1.2,
                      elinewidth=0.7, label=label, **style)  # fmt: skip
    nothing = float(found.control["no_context"])
    axes.axhline(nothing, color=palette.INK, linewidth=0.8, linestyle="-.", label="no context above the layer")
    axes.axhline(0, color=palette.GRID, linewidth=0.8)
    axes.invert_xaxis()
    _axes(axes, "share of the context's tokens kept", "change of the loss, nats a token")
    axes.legend(fontsize=_SMALL - 1, frameon=False, ncols=2)
    where = f"dropped above layer {found.settings['layer']}"
    note = f"{where}; 95 % intervals; mean over {found.settings['measured_tokens']} targets"
    return _finish(figure, axes, _title("Without the lowest tokens", found), note)


def layers(found: Any) -> Figure:
    """Agreement with the model, confidence and repetition of the token by layer.

    Args:
        found: a result of `sensitivity.layer_confidence`.
    """
    frame = found.table().groupby("layer").mean()
    at = frame.index.to_numpy()
    figure, axes = _figure(6.4, 4.0)
    axes.fill_between(at, frame["low"], frame["high"], color=_BLUE, alpha=0.15, linewidth=0)
    axes.plot(at, frame["agreement"], "o-", color=_BLUE, markersize=4, label="same first choice as the model")
    axes.plot(
        at, frame["confidence"], "s-", color=_ORANGE, markersize=3.5, label="its own probability of its first choice"
    )
    axes.plot(at, frame["repeats"], "--", color=_RED, label="its first choice is the token itself")
    axes.axhline(float(found.control["unigram_agreement"]), color=palette.MUTED, linewidth=0.9, linestyle=":",
                 label="control: always the model's commonest choice")  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    _axes(axes, "residual stream entering layer (the last: after all)", "share, or probability")
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, _title("Read off early by the model's own head", found), "means over tokens")


def exits(found: Any) -> Figure:
    """Change of the loss against the share of layers that ran, by what becomes of the states above.

    Args:
        found: a result of `sensitivity.early_exit`.
    """
    figure, axes = _figure(6.4, 4.0)
    for i, (name, colour) in enumerate(zip(found.coords["states"], (_BLUE, _GREEN, _RED))):
        depth, change = found.columns["depth"][i].numpy(), found.value[i].numpy()
        bars = [change - found.columns["low"][i].numpy(), found.columns["high"][i].numpy() - change]
        axes.errorbar(depth, change, yerr=np.abs(bars), marker="o", markersize=4, linewidth=1.2, elinewidth=0.7,
                      color=colour, label=f"states above: {name}")  # fmt: skip
    axes.plot(found.columns["depth"][0], found.control["random_change"][0], "x--", color=palette.MUTED,
              label="control: the same depths at random")  # fmt: skip
    _axes(axes, "share of the layers that ran", "change of the loss, nats a token")
    axes.legend(fontsize=_SMALL, frameon=False)
    words = ", ".join(f"{x:g}" for x in found.coords["threshold"])
    return _finish(figure, axes, _title("Leaving early", found), f"thresholds {words}; 95 % intervals")


def outliers(found: Any) -> Figure:
    """Error of 8-bit rounding of each tensor before and after rotations, layers as points.

    Args:
        found: a result of `sensitivity.outliers`.
    """
    names, rotations = found.coords["tensor"], found.coords["rotation"]
    colours = (palette.INK, _ORANGE, _BLUE, _GREEN, palette.MUTED)
    figure, axes = _figure(1.6 + 1.0 * len(names), 4.4)
    for k, rotation in enumerate(rotations):
        for i in range(len(names)):
            points = found.columns["int8_error"][i, :, k].numpy()
            x = i + (k - (len(rotations) - 1) / 2) * 0.15
            axes.plot(np.full(len(points), x), points, ".", color=colours[k % len(colours)], alpha=0.35, markersize=4)
            axes.plot([x], [np.median(points)], "_", color=colours[k % len(colours)], markersize=9, markeredgewidth=2.2,
                      label=rotation.replace("_", " ") if i == 0 else None)  # fmt: skip
    axes.axhline(float(found.control["normal_int8_error"].median()), color=_RED, linewidth=0.9, linestyle=":",
                 label="control: normal numbers")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, fontsize=_SMALL)
    _axes(axes, "", "relative error of 8-bit rounding")
    axes.legend(fontsize=_SMALL - 1, frameon=False, ncols=3, loc="upper left")
    axes.margins(y=0.2)
    return _finish(figure, axes, _title("Outliers before and after rotations", found), "points: layers; bars: medians")


def hessian(found: Any) -> Figure:
    """The largest eigenvalues, the smallest, and the largest with shuffled targets.

    Args:
        found: a result of `sensitivity.hessian`.
    """
    figure, axes = _figure(6.0, 3.8)
    at = np.arange(1, len(found.value) + 1)
    axes.bar(at, found.value.numpy(), color=_BLUE, width=0.6, label="largest")
    axes.bar([len(at) + 1.2], [float(found.columns["smallest"][0])], color=_RED, width=0.6, label="smallest")
    axes.axhline(float(found.control["shuffled_targets"][0]), color=palette.MUTED, linewidth=0.9, linestyle=":",
                 label="control: largest with shuffled targets")  # fmt: skip
    axes.axhline(0, color=palette.INK, linewidth=0.8)
    axes.set_xticks([*at, len(at) + 1.2], [*map(str, at), "smallest"], fontsize=_SMALL)
    _axes(axes, "eigenvalue", "nats a token per squared unit of the weights")
    axes.legend(fontsize=_SMALL, frameon=False)
    negative = float(found.columns["negative_share"][0])
    note = f"loss {found.settings['loss']:.3g} on {found.settings['targets']} targets"
    note += f"; {negative:.0%} of the absolute spectrum is negative" if negative == negative else ""
    return _finish(figure, axes, _title("Curvature of the loss", found), note)


def _axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=_SMALL)
    axes.set_ylabel(y, fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    axes.grid(color=palette.GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _title(what: str, found: Any) -> str:
    model = found.settings.get("model")
    return f"{what}: {model}" if model else what
