"""Figures for pages: the same values, limits and names, and pages that load nothing."""

import re

import numpy as np
import pytest

from ssmlens import plotting
from ssmlens.plotting import Caption, pages, palette

NASTY = ["", "\n", "<script>alert(1)</script>", "😀", "<a href='http://x'>"]
CAPTION = Caption("some-model", 2, "mean", 3.1e-7, 1e-5)


@pytest.fixture
def matrix():
    return np.random.default_rng(2).normal(size=(len(NASTY), len(NASTY)))


def test_both_worlds_draw_the_same_numbers(matrix):
    page = pages.attention_map(matrix, NASTY, CAPTION)
    image = plotting.attention_map(matrix, NASTY, CAPTION).axes[0].images[0]
    assert np.array_equal(page.data[0].z, np.ma.filled(image.get_array(), np.nan), equal_nan=True)
    assert (page.data[0].zmin, page.data[0].zmax) == image.get_clim()
    assert page.data[0].colorscale[0][1] == palette.diverging()[0]
    assert page.data[0].colorscale[-1][1] == palette.diverging()[-1]


def test_the_note_and_title_travel_with_the_page(matrix):
    figure = pages.attention_map(matrix, NASTY, CAPTION)
    assert figure.layout.meta["title"] == "Implicit attention: some-model, layer 2"
    assert "reconstruction error 3.1e-07" in figure.layout.meta["note"]
    assert "3.1e-07" in figure.layout.title.text


def test_token_text_is_escaped(matrix):
    figure = pages.attention_map(matrix, NASTY, CAPTION)
    texts = [*figure.layout.xaxis.ticktext, *figure.data[0].text.ravel(), *figure.data[0].customdata.ravel()]
    row = pages.token_row(matrix[0], NASTY, CAPTION)
    texts += [*row.layout.xaxis.ticktext, *row.data[0].customdata]
    assert not any("<" in text for text in texts)
    assert any("&lt;script" in text for text in texts)


def test_pooled_cells_name_their_range():
    figure = pages.attention_map(np.eye(10), list("abcdefghij"), most=5)
    assert figure.data[0].z.shape == (5, 5)
    assert figure.data[0].customdata[0, 1].startswith("2 to 3")
    assert list(figure.layout.xaxis.tickvals) == [i / 2 for i in range(10)]


def test_the_row_is_a_bar_per_token():
    figure = pages.token_row([1.0, -2.0], ["a", "b"], CAPTION)
    assert figure.data[0].y.tolist() == [1.0, -2.0]
    assert figure.data[0].marker.cmin == -figure.data[0].marker.cmax


def test_half_lives_name_their_heads_and_count_the_endless():
    figure = pages.half_life_map({3: [2.0, np.inf, 8.0]}, CAPTION)
    assert figure.data[0].y.tolist() == [2.0, 8.0]
    assert figure.data[0].customdata.tolist() == [0, 2]
    assert figure.layout.yaxis.type == "log"
    assert "1 without decay" in figure.layout.meta["note"]
    with pytest.raises(ValueError, match="no layer"):
        pages.half_life_map({})


def test_state_norms_are_curves():
    figure = pages.state_norms({0: [1.0, 2.0], 5: [3.0, 4.0]}, ["a", "b"], CAPTION)
    assert [trace.name for trace in figure.data] == ["layer 0", "layer 5"]
    assert figure.data[1].y.tolist() == [3.0, 4.0]


def test_saved_pages_load_nothing(matrix, tmp_path):
    path = pages.save(pages.attention_map(matrix, NASTY, CAPTION), tmp_path / "map.html")
    html = path.read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", html)
    assert "<script>alert" not in html
    assert [p.name for p in tmp_path.iterdir()] == ["map.html"]
    with pytest.raises(ValueError, match=r"\.html"):
        pages.save(pages.attention_map(matrix), tmp_path / "map.png")
