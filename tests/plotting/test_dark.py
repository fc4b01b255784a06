"""Figures for dark pages: what was readable on white is readable on black."""

from __future__ import annotations

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from ssmlens.plotting import palette
from ssmlens.plotting.dark import GROUND, darken


def luminance(colour: object) -> float:
    """Relative luminance of WCAG 2."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))


def contrast(colour: object) -> float:
    one, two = sorted([luminance(colour), luminance(GROUND)])
    return (two + 0.05) / (one + 0.05)


@pytest.fixture
def figure() -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#1276ce", label="a line")
    axes.axhline(0.5, color=palette.MUTED)
    axes.plot([0.2], [0.2], "x", color=palette.MUTED)
    axes.fill_between([0, 1], [0, 0], [1, 1], color="#db8833", alpha=0.2, label="a band")
    axes.scatter([0, 1], [1, 0], color=palette.INK)
    axes.bar([0.5], [1], color="none", edgecolor="black")
    axes.set_title("title", color=palette.INK)
    axes.set_xlabel("tokens")
    axes.legend(frameon=True)
    return darken(figure)


def test_ink_is_light_and_paper_dark(figure: Figure) -> None:
    axes = figure.axes[0]
    assert to_hex(figure.get_facecolor()) == to_hex(axes.get_facecolor()) == GROUND
    words = [axes.title, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_legend().get_texts()]
    assert min(contrast(x.get_color()) for x in words) >= 7
    assert min(contrast(x.get_edgecolor()) for x in axes.spines.values()) >= 7
    assert min(contrast(x.get_color()) for x in axes.xaxis.get_ticklines()) >= 7
    assert contrast(axes.lines[1].get_color()) >= 4.5  # a line that was grey
    assert contrast(axes.lines[2].get_markeredgecolor()) >= 4.5
    assert contrast(axes.collections[1].get_facecolor()[0]) >= 7
    assert contrast(axes.patches[0].get_edgecolor()) >= 7
    assert axes.patches[0].get_facecolor()[3] == 0  # nothing stays nothing


def test_colours_stay(figure: Figure) -> None:
    axes = figure.axes[0]
    assert to_hex(axes.lines[0].get_color()) == "#1276ce"
    band = axes.collections[0].get_facecolor()[0]
    assert to_hex(band) == "#db8833"
    assert band[3] == pytest.approx(0.2)
    assert to_hex(axes.get_legend().get_lines()[0].get_color()) == "#1276ce"
