"""Figures of lenses and of pairs: the numbers are those of the tables, in files and on pages."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from tiny import tiny_mamba2

import ssmlens
from ssmlens.analyses import memory
from ssmlens.attribution import pair_path
from ssmlens.interventions import logit_lens
from ssmlens.plotting import Caption, reading_pages, readings


@pytest.fixture(scope="module")
def trace() -> ssmlens.Trace:
    return ssmlens.load(tiny_mamba2()).trace([3, 1, 4, 1, 5, 9, 2, 6])


def test_lens_map_shows_every_layer_and_position(trace: ssmlens.Trace) -> None:
    table = logit_lens(trace).table()
    caption = Caption.of(trace)
    page = reading_pages.lens_map(table, caption, target=3)
    drawn = page.data[0].z
    assert drawn.shape == (4, 8)
    assert drawn[2][5] == table[(table["layer"] == 2) & (table["position"] == 5)]["probability"].item()
    figure = readings.lens_map(table, caption, colour="kl")
    assert np.allclose(figure.axes[0].images[0].get_array(), table["kl"].to_numpy().reshape(4, 8))
    assert len(figure.axes[0].texts) == 32
    with pytest.raises(ValueError, match="unknown colour 'red'"):
        readings.lens_map(table, colour="red")
    with pytest.raises(ValueError, match="no layer"):
        reading_pages.lens_map(table[:0])


def test_lens_path_has_one_line_per_token(trace: ssmlens.Trace) -> None:
    table = logit_lens(trace).follow(-1, most=3, decode=lambda ids: f"${ids[0]}")
    page = reading_pages.lens_path(table)
    figure = readings.lens_path(table)
    assert len(page.data) == len(figure.axes[0].lines) == 3
    assert list(page.data[0].y) == list(figure.axes[0].lines[0].get_ydata())
    figure.savefig(BytesIO(), format="svg")


def test_pair_has_one_dot_per_head_and_says_its_numbers(trace: ssmlens.Trace) -> None:
    path = pair_path(trace[1], 6, 2)
    caption = Caption.of(trace, 1)
    page = reading_pages.pair_path(path, caption)
    assert len(page.data[0].x) == 8
    figure = readings.pair_path(path, caption)
    assert len(figure.axes[0].collections[0].get_offsets()) == 8
    assert "From token 2 to token 6" in figure.axes[0].get_title()
    for words in (page.layout.meta["note"], figure.get_label()):
        assert f"contribution of length {path.norm:.3g}" in words
        assert "reconstruction error" in words


def test_state_course_draws_the_columns_of_its_table(trace: ssmlens.Trace) -> None:
    table = memory.state_norm(trace[1], reduce="pooled").table()
    tokens = [str(i) for i in range(8)]
    page = reading_pages.state_course(table, tokens, Caption.of(trace, 1), target=3)
    figure = readings.state_course(table, tokens, Caption.of(trace, 1))
    for k, column in enumerate(readings.COURSE):
        assert np.array_equal(page.data[k].y, table[column])
        assert np.array_equal(figure.axes[0].lines[k].get_ydata(), table[column])
    with pytest.raises(ValueError, match="3 tokens for 8"):
        readings.state_course(table, tokens[:3])


def test_errors_of_layers_are_drawn_or_counted(trace: ssmlens.Trace) -> None:
    errors = trace.reconstruction_error
    page, figure = (module.layer_errors(errors, Caption.of(trace)) for module in (reading_pages, readings))
    assert list(page.data[0].y) == list(figure.axes[0].lines[0].get_ydata()) == list(errors.values())
    assert [line.get_ydata()[0] for line in figure.axes[0].lines[1:]] == [trace.tolerance]
    assert page.layout.shapes[0].y0 == trace.tolerance
    assert 10 ** page.layout.annotations[0].y == pytest.approx(trace.tolerance)
    odd = {0: 1e-7, 1: 0.0, 5: float("nan"), 6: float("inf")}
    for module in (reading_pages, readings):
        drawn = module.layer_errors(odd)
        note = drawn.get_label() if module is readings else drawn.layout.meta["note"]
        assert note == "1 of 4 layers exact, not drawn; NOT FINITE in layers 5, 6"
        with pytest.raises(ValueError, match="no layer to draw"):
            module.layer_errors({})
    figure.savefig(BytesIO(), format="png")
