"""Figures of the memory study: fidelity by age and across layers, time constants, remembrance, influence, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssmlens.plotting import palette
from ssmlens.plotting.figures import _figure, _finish

__all__ = [
    "answers_by_age",
    "cross_layer_fidelity",
    "fidelity",
    "influence",
    "recall_by_age",
    "remembrance",
    "stream",
    "timescale_spectrum",
    "transport",
]

_SMALL = 8.0
_CONTROL: dict[str, Any] = {"color": palette.MUTED, "linewidth": 1.1}


def fidelity(found: Any) -> Figure:
    """Net fidelity against the steps back, one line for each layer with its interval; and R2 with its controls.

    Args:
        found: a result of `memory.fidelity`.
    """
    figure, (first, second) = _panels(2, 9.6, 4.2)
    lags = np.asarray(found.coords["lag"], dtype=float)
    for (words, colour), i in _layers(found):
        net, low, high = (found.columns[k][i].numpy() for k in ("net_r2", "net_r2_low", "net_r2_high"))
        first.plot(lags, net, color=colour, linewidth=1.5, marker="o", markersize=2.5, label=words)
        first.fill_between(lags, low, high, color=colour, alpha=0.15, linewidth=0)
        second.plot(lags, found.value[i].numpy(), color=colour, linewidth=1.5, marker="o", markersize=2.5)
    _, i = next(_layers(found))
    for name, style, words in (
        ("current", "--", "told by the reading token alone"),
        ("chance", ":", "shuffled targets"),
    ):
        second.plot(lags, found.control[name][i].numpy(), linestyle=style, label=words, **_CONTROL)
    for axes, words in ((first, "net R²: beyond both controls"), (second, "R² on held-out tokens")):
        _steps_back(axes, words, lags)
    top = max(0.1, 1.05 * float(found.value.max()))
    net = found.columns["net_r2"].nan_to_num(0.0)
    first.set_ylim(min(-0.05 * top, 1.1 * float(net.min())), max(0.02, 1.08 * float(net.max())))
    second.set_ylim(-0.05 * top, top)
    first.legend(fontsize=_SMALL - 1, frameon=False, ncols=2)
    second.legend(fontsize=_SMALL - 1, frameon=False)
    return _finish(figure, first, _title(found, "Memory fidelity"), _note(found))


def cross_layer_fidelity(found: Any) -> Figure:
    """Two maps, layer by reader: the R2 of a layer's state told by the reader's, and by the residual stream there.

    Args:
        found: a result of `memory.cross_layer_fidelity` on a trace.
    """
    figure, (first, second) = _panels(2, 9.2, 4.2)
    names = found.coords["layer"]
    for axes, values in ((first, found.value), (second, found.control["residual"])):
        shown = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        axes.set_xticks(range(len(names)), names, fontsize=_SMALL)
        axes.set_yticks(range(len(names)), names, fontsize=_SMALL)
        axes.set_xlabel("reader: the later layer", fontsize=_SMALL)
        axes.set_ylabel("layer whose state is told", fontsize=_SMALL)
        if len(names) <= 12:
            for (i, j), x in np.ndenumerate(values.numpy()):
                if np.isfinite(x):
                    ink = "white" if x < 0.6 else palette.INK
                    axes.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=_SMALL - 2, color=ink)
    second.set_title("told by the residual stream that enters the reader", fontsize=_SMALL + 1)
    figure.colorbar(shown, ax=[first, second], fraction=0.03, pad=0.02).set_label("R²", fontsize=_SMALL)
    return _finish(figure, first, _title(found, "Fidelity across layers"), _note(found))


def recall_by_age(found: Any) -> Figure:
    """What the probe measured against what the decays predict, one panel for each of at most four layers.

    Args:
        found: a result of `memory.recall_by_age`.
    """
    shown = list(_layers(found))
    if len(shown) > 4:
        shown = [shown[round(i * (len(shown) - 1) / 3)] for i in range(4)]
    figure, panels = _panels(len(shown), max(5.0, 3.1 * len(shown) + 0.6), 3.9)
    lags = np.asarray(found.coords["lag"], dtype=float)
    for axes, ((words, colour), i) in zip(panels, shown):
        low, high = (found.columns[k][i].numpy() for k in ("low", "high"))
        axes.plot(lags, found.value[i].numpy(), color=colour, linewidth=1.7, marker="o", markersize=3, label="measured")
        axes.fill_between(lags, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(lags, found.columns["predicted"][i].numpy(), linestyle="--", label="predicted, mean head", **_CONTROL)
        axes.plot(
            lags, found.columns["predicted_best"][i].numpy(), linestyle="-.", label="predicted, best head", **_CONTROL
        )
        axes.plot(lags, found.columns["read"][i].numpy(), linestyle=":", label="share of reading", **_CONTROL)
        axes.annotate(words, (0.97, 0.95), xycoords="axes fraction", ha="right", va="top", fontsize=_SMALL)
        _steps_back(axes, "share; R²" if axes is panels[0] else "", lags, "tokens later")
    panels[0].legend(fontsize=_SMALL - 2, frameon=False, loc="best")
    return _finish(figure, panels[0], _title(found, "Recall by age"), _note(found))


def answers_by_age(found: Any) -> Figure:
    """Share of right answers by the age of what is asked for, beside what the decays let survive.

    Args:
        found: a result of `memory.answers_by_age`.
    """
    figure, axes = _figure(6.4, 4.2)
    age = found.columns["mean_age"].numpy()
    good = np.isfinite(age)
    low, high = (found.columns[k].numpy() for k in ("low", "high"))
    value = found.value.numpy()
    axes.plot(age[good], value[good], color="#3263c3", marker="o", markersize=4, linewidth=1.6, label="right answers")
    axes.fill_between(age[good], low[good], high[good], color="#3263c3", alpha=0.18, linewidth=0)
    for name, style, words in (
        ("slowest", "--", "the slowest state keeps"),
        ("median", "-.", "the median state keeps"),
    ):
        axes.plot(age[good], found.columns[f"retained_{name}"].numpy()[good], linestyle=style, label=words, **_CONTROL)
    guess = found.control["guess"].numpy()
    axes.plot(age[good], guess[good], linestyle=":", label="answers to other questions", **_CONTROL)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.04)
    _axes(axes, "tokens since it was told", "share")
    axes.legend(fontsize=_SMALL - 1, frameon=False)
    return _finish(figure, axes, _title(found, "Answers by age"), _note(found))


def transport(found: Any) -> Figure:
    """Survival of a write by layer, and how it stands out beside a write that is not there; means over heads.

    Args:
        found: a result of `memory.transport`.
    """
    figure, (first, second) = _panels(2, 9.6, 4.2)
    lags = np.asarray(found.coords["lag"], dtype=float)

    def mean(x: Any, i: Any) -> Any:
        return x[i].nanmean(dim=(0, 1)).numpy()

    for (words, colour), i in _layers(found):
        first.plot(lags, mean(found.value, i), color=colour, linewidth=1.5, marker="o", markersize=2.5, label=words)
        second.plot(lags, mean(found.columns["addressability"], i), color=colour, linewidth=1.5)
        second.plot(lags, mean(found.control["absent"], i), color=colour, linewidth=1.0, linestyle=":")
    for axes, words in ((first, "survival"), (second, "cosine with the state")):
        _steps_back(axes, words, lags)
    second.annotate(
        "dotted: writes still to come", (0.97, 0.95), xycoords="axes fraction", ha="right", va="top", fontsize=_SMALL
    )
    first.legend(fontsize=_SMALL - 1, frameon=False, ncols=2)
    return _finish(figure, first, _title(found, "Transport of single writes"), "means over heads")


def timescale_spectrum(found: Any) -> Figure:
    """Time constants from the slowest to the fastest, one line for each layer.

    Args:
        found: a result of `memory.timescale_spectrum`.
    """
    figure, axes = _figure(6.8, 4.4)
    for (words, colour), i in _layers(found):
        value = found.value[i][0].numpy()
        value = value[np.isfinite(value)]
        axes.plot(np.linspace(0, 1, len(value)), value, color=colour, linewidth=1.5, label=words)
    horizon = float(found.control["observed_tokens"].max())
    axes.axhline(horizon, linestyle="--", label=f"the text: {horizon:.0f} tokens", **_CONTROL)
    axes.set_yscale("log")
    _axes(axes, "share of heads and states, slow to fast", "time constant, tokens")
    axes.legend(fontsize=_SMALL - 1, frameon=False, ncols=2)
    return _finish(figure, axes, _title(found, "Time constants"), "1 / mean(-log decay); above the line: extrapolated")


def remembrance(found: Any) -> Figure:
    """How far a prediction moves when only the last k tokens are read.

    Args:
        found: a result of `memory.effective_remembrance`.
    """
    figure, axes = _figure(6.4, 4.2)
    kept = np.asarray(found.coords["kept"], dtype=float)
    for row in found.value.numpy()[:24]:
        axes.plot(kept, row, color=palette.GRID, linewidth=0.8)
    axes.plot(kept, found.columns["mean"][0].numpy(), color="#3263c3", linewidth=1.8, label="mean over sequences")
    if "low" in found.columns:
        low, high = (found.columns[k][0].numpy() for k in ("low", "high"))
        axes.fill_between(kept, low, high, color="#3263c3", alpha=0.18, linewidth=0)
    control = float(found.control["last_token"].mean())
    axes.axhline(control, linestyle="--", label="only the last token read", **_CONTROL)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    _axes(axes, "tokens kept", "total variation from the whole text's prediction")
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, _title(found, "Effective remembrance"), _note(found))


def influence(found: Any) -> Figure:
    """Influence of the token k steps back on a prediction, beside the decay of the slowest head.

    Args:
        found: a result of `memory.influence`; its first position is drawn.
    """
    figure, axes = _figure(6.6, 4.2)
    value = found.value[0].numpy()
    back = np.arange(len(value))
    good = value > 0
    axes.plot(back[good] + 1, value[good], color="#3263c3", linewidth=1.3, label="measured")
    low, high = (found.columns[k][0].numpy() for k in ("low", "high"))
    axes.fill_between(back[good] + 1, low[good], high[good], color="#3263c3", alpha=0.2, linewidth=0)
    if "slowest_head" in found.control:
        start = value[good][min(8, good.sum() - 1)]
        slope = float(found.control["slowest_head"].reshape(-1)[0])
        axes.plot(
            back + 1, start * np.exp(slope * (back - 8)), linestyle="--", label="decay of the slowest state", **_CONTROL
        )
        axes.set_ylim(bottom=value[good].min() / 2, top=value[good].max() * 2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _axes(axes, "tokens back, and one", "|d logits / d embedding| |embedding|")
    axes.legend(fontsize=_SMALL, frameon=False)
    return _finish(figure, axes, _title(found, "Influence"), _note(found))


def stream(found: Any) -> Figure:
    """States and loss over a long text: rms of the median and the fastest growing head of each layer, and the loss.

    Args:
        found: a result of `memory.state_stream`; its first row is drawn.
    """
    figure, (first, second) = _panels(2, 9.6, 4.2)
    tokens = np.asarray(found.coords["bucket"]) + 1
    growth = (found.value / found.control["trained_variance"])[:, 0].numpy()
    for (words, colour), i in _layers(found):
        first.plot(tokens, np.nanmax(growth[i], axis=1), color=colour, linewidth=1.4, label=words)
        first.plot(tokens, np.nanmedian(growth[i], axis=1), color=colour, linewidth=0.8, linestyle=":")
    second.plot(tokens, found.columns["loss"][0, 0, :, 0].numpy(), color=palette.INK, linewidth=1.4)
    trained = found.settings["train_length"]
    for axes, words in ((first, "variance of the state over that at the training length"), (second, "loss, nats")):
        axes.axvline(trained, linestyle="--", label=f"training length: {trained}", **_CONTROL)
        axes.set_xscale("log", base=2)
        _axes(axes, "tokens read", words)
    first.set_yscale("log")
    first.axhline(3.0, color=palette.NEVER, linewidth=0.9)
    # The layers' names stand beside the single line of the loss, where there is room.
    second.legend(*first.get_legend_handles_labels(), fontsize=_SMALL - 1, frameon=False, ncols=2, loc="best")
    onset = float(found.columns["onset"].reshape(-1)[0])
    words = f"onset at {onset:.0f} tokens" if np.isfinite(onset) else "no onset"
    note = f"full: head that grew most; dotted: median head; {words}"
    return _finish(figure, first, _title(found, "States over a long text"), note)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with several panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _layers(found: Any) -> Iterator[tuple[tuple[str, str], Any]]:
    """Words and colour of each layer, and its index; one entry where there is no axis of layers."""
    if "layer" not in found.dims:
        yield (str(found.settings.get("reads", "states")), "#3263c3"), ...
        return
    names = found.coords["layer"]
    for i, (name, colour) in enumerate(zip(names, palette.layer_colours(len(names)))):
        yield (f"layer {name}", colour), i


def _steps_back(axes: Axes, words: str, lags: np.ndarray, below: str = "steps back") -> None:
    axes.set_xscale("symlog", linthresh=1, base=2)
    axes.set_xlim(-0.1, lags[-1] * 1.15)
    ticks = [k for k in lags if k == 0 or np.log2(max(k, 1)) % 1 == 0]
    axes.set_xticks(ticks, [f"{k:.0f}" for k in ticks])
    axes.axhline(0.0, color=palette.GRID, linewidth=0.8)
    _axes(axes, below, words)


def _axes(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below, fontsize=_SMALL)
    axes.set_ylabel(beside, fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _title(found: Any, what: str) -> str:
    model = found.settings.get("model")
    return f"{what}: {model}" if model else what


def _note(found: Any) -> str:
    settings = found.settings
    parts = [f"features: {settings['features']}"] if "features" in settings else []
    parts += [f"{settings['fitted_tokens']} tokens fitted"] if "fitted_tokens" in settings else []
    parts += [f"{settings['held_out_tokens']} held out"] if "held_out_tokens" in settings else []
    parts += [settings["interval"]] if "interval" in settings else []
    return "; ".join(parts)
