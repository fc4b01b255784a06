"""Figures for files: values, limits, labels, notes and metadata; and that no token text can break one."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ssmlens import plotting
from ssmlens.plotting import Caption, palette

NASTY = ["", " ", "\n", "$x^2$ $", "<b>&", "😀", "\x00", "\\frac{", "%s{}", "中文", "a" * 300]
CAPTION = Caption("some-model", 2, "mean", 3.1e-7, 1e-5)


@pytest.fixture
def matrix():
    return np.random.default_rng(1).normal(size=(len(NASTY), len(NASTY)))


def test_the_map_shows_the_lower_triangle_as_it_is(matrix):
    figure = plotting.attention_map(matrix, NASTY, CAPTION)
    image = figure.axes[0].images[0]
    drawn = np.ma.filled(image.get_array(), np.nan)
    lower = np.tri(len(NASTY), dtype=bool)
    assert np.array_equal(drawn[lower], matrix[lower])
    assert np.isnan(drawn[~lower]).all()


def test_signed_limits_are_symmetric_and_unsigned_ones_start_at_zero(matrix):
    low, high = plotting.attention_map(matrix, caption=CAPTION, quantile=1).axes[0].images[0].get_clim()
    assert -low == high == np.abs(np.tril(matrix)).max()
    low, high = plotting.attention_map(np.abs(matrix), caption=Caption(reduction="norm")).axes[0].images[0].get_clim()
    assert low == 0.0 < high


def test_zero_is_drawn_in_the_neutral_colour():
    signed = plotting.attention_map(np.eye(3), caption=Caption(reduction="mean")).axes[0].images[0]
    unsigned = plotting.attention_map(np.eye(3), caption=Caption(reduction="norm")).axes[0].images[0]
    for image in (signed, unsigned):
        assert to_hex(image.cmap(image.norm(0.0))) == palette.diverging(255)[127]


def test_the_map_says_what_it_shows(matrix):
    figure = plotting.attention_map(matrix, NASTY, CAPTION)
    axes = figure.axes[0]
    assert axes.get_title() == "Implicit attention: some-model, layer 2"
    for part in ("mean over heads (signed)", "reconstruction error 3.1e-07", "within tolerance 1e-05", "99.5 %"):
        assert part in figure.get_label()
        assert part in figure.get_supxlabel().replace("\n", " ")
    assert "token" in axes.get_xlabel()
    assert "token" in axes.get_ylabel()
    assert [t.get_text() for t in axes.get_xticklabels()][:4] == ["∅", "·", "↵", "$x^2$·$"]
    assert [t.get_text() for t in axes.get_yticklabels()][5] == "\\u1f600"


def test_an_error_beyond_the_tolerance_is_loud(matrix):
    bad = Caption("m", 0, "mean", 2e-3, 1e-5)
    assert "ABOVE tolerance" in plotting.attention_map(matrix, caption=bad).get_label()
    assert "ABOVE tolerance" in Caption("m", 0, "mean", float("nan"), 1e-5).note()


def test_large_maps_are_pooled_and_say_so():
    matrix = np.zeros((100, 100))
    matrix[77, 3] = -9.0
    figure = plotting.attention_map(matrix, most=25, caption=Caption(reduction="mean"), quantile=1)
    drawn = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert drawn.shape == (25, 25)
    assert drawn[19, 0] == -9.0
    assert "4 x 4" in figure.get_label()


def test_many_labels_are_thinned_but_stay_true():
    figure = plotting.attention_map(np.eye(300), [f"w{i}" for i in range(300)])
    ticks = figure.axes[0].get_xticks()
    texts = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert 1 < len(texts) <= 84
    assert all(text == f"w{round(at)}" for text, at in zip(texts, ticks))


def test_the_row_colours_each_token_by_its_value():
    values = np.array([0.0, -2.0, 2.0, 1.0])
    figure = plotting.token_row(values, ["zero", "minus", "plus", "half"], CAPTION, quantile=1)
    shades = [to_hex(box.get_facecolor()) for box in figure.axes[0].patches]
    colours = palette.diverging(255)
    assert shades == [colours[127], colours[0], colours[-1], colours[191]]
    assert [t.get_text() for t in figure.axes[0].texts] == ["zero", "minus", "plus", "half"]


def test_the_row_frames_its_reader():
    figure = plotting.token_row(np.ones(3), list("abc"), CAPTION, reader=1)
    assert [box.get_edgecolor()[3] > 0 for box in figure.axes[0].patches] == [False, True, False]
    assert "token 1" in figure.axes[0].get_title()


def test_half_lives_keep_order_for_few_heads_and_sort_many():
    few = plotting.half_life_map({0: [3.0, 1.0], 4: [np.inf, 2.0]}, CAPTION).axes[0]
    drawn = np.ma.filled(few.images[0].get_array(), np.nan)
    assert drawn[0].tolist() == [3.0, 1.0]
    assert [t.get_text() for t in few.get_yticklabels()] == ["layer 0", "layer 4"]
    image = few.images[0]
    assert to_hex(image.cmap(image.norm(drawn[1, 0]))) == palette.NEVER
    many = plotting.half_life_map({0: np.arange(100, 0, -1.0)}, CAPTION).axes[0]
    assert np.array_equal(np.ma.filled(many.images[0].get_array(), np.nan)[0], np.arange(1.0, 101.0))
    assert "sorted" in many.get_xlabel()


def test_half_lives_without_any_number_still_draw():
    plotting.half_life_map({0: [np.nan, np.inf]}).draw_without_rendering()
    plotting.half_life_map({0: [5.0]}).draw_without_rendering()
    with pytest.raises(ValueError, match="no layer"):
        plotting.half_life_map({})


def test_state_norms_are_one_labelled_curve_per_layer():
    curves = {1: np.array([1.0, 2.0, 4.0]), 3: np.array([2.0, 2.5, 3.0])}
    axes = plotting.state_norms(curves, list("abc"), CAPTION).axes[0]
    assert [line.get_label() for line in axes.lines] == ["layer 1", "layer 3"]
    for line, curve in zip(axes.lines, curves.values()):
        assert np.array_equal(line.get_ydata(), curve)
    assert axes.get_yscale() == "log"
    assert plotting.state_norms({0: [0.0, 1.0]}).axes[0].get_yscale() == "linear"
    with pytest.raises(ValueError, match="one value per token"):
        plotting.state_norms({0: [1.0], 1: [1.0, 2.0]})


@pytest.mark.parametrize("suffix", plotting.figures.FORMATS)
def test_nasty_tokens_are_written_to_every_format(matrix, tmp_path, suffix):
    for name, figure in {
        "map": plotting.attention_map(matrix, NASTY, CAPTION),
        "row": plotting.token_row(matrix[-1], NASTY, CAPTION),
        "norms": plotting.state_norms({0: np.arange(1.0, len(NASTY) + 1)}, NASTY, Caption("$m$ <b>")),
    }.items():
        path = plotting.save(figure, tmp_path / f"{name}{suffix}", dpi=60)
        assert path.stat().st_size > 1000
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file stays behind"


def test_files_are_the_same_every_time_and_carry_the_caption(matrix, tmp_path):
    from PIL import Image

    written = []
    for name in ("a.png", "b.png"):
        written.append(plotting.save(plotting.attention_map(matrix, NASTY, CAPTION), tmp_path / name, dpi=60))
    assert written[0].read_bytes() == written[1].read_bytes()
    with Image.open(written[0]) as image:
        assert image.text["Title"] == "Implicit attention: some-model, layer 2"
        assert "reconstruction error 3.1e-07" in image.text["Description"]


def test_unknown_formats_are_refused(matrix, tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        plotting.save(plotting.attention_map(matrix), tmp_path / "map.bmp")


def test_a_failed_write_leaves_nothing(matrix, tmp_path):
    with pytest.raises(OSError, match="gone"):
        plotting.save(plotting.attention_map(matrix), tmp_path / "gone" / "map.png")
    assert not list(tmp_path.iterdir())


def test_one_token_is_enough():
    plotting.attention_map([[0.5]], ["a"]).draw_without_rendering()
    plotting.token_row([0.5], ["a"]).draw_without_rendering()
    plotting.state_norms({0: [1.0]}, ["a"]).draw_without_rendering()
