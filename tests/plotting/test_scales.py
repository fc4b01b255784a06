"""Colour limits, pooling and labels: the rules that figures print."""

import numpy as np
import pytest
import torch

from ssmlens.plotting import palette, pool_max_abs, symmetric_limits
from ssmlens.plotting.labels import drawable, label, positions, thin, visible
from ssmlens.plotting.scales import as_array, causal


def test_limits_are_the_quantile_of_magnitude():
    x = np.arange(-500, 500) / 100.0
    limits = symmetric_limits(x, quantile=0.9)
    assert limits.value == pytest.approx(4.5, abs=0.01)
    assert limits.clipped == pytest.approx((np.abs(x) > limits.value).mean())
    assert "90 %" in limits.rule
    assert f"{limits.value:.3g}" in limits.rule


def test_limits_ignore_what_is_not_drawn():
    x = np.array([[1.0, np.nan], [-2.0, np.inf]])
    assert symmetric_limits(x, quantile=1).value == 2.0


def test_limits_of_zeros_and_of_a_lone_spike():
    assert symmetric_limits(np.zeros(9)).value == 1.0
    spike = np.zeros(10_000)
    spike[7] = -3.0
    assert symmetric_limits(spike).value == 3.0, "a quantile of zero would colour noise"


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.1])
def test_limits_refuse_a_quantile_outside_its_range(quantile):
    with pytest.raises(ValueError, match="at most 1"):
        symmetric_limits(np.ones(3), quantile)


def test_pooling_keeps_the_spike_and_its_sign():
    x = np.full((10, 10), 0.1)
    x[3, 7] = -5.0
    pooled = pool_max_abs(x, 4)
    assert pooled.factor == 3
    assert pooled.matrix.shape == (4, 4)
    assert pooled.matrix[1, 2] == -5.0
    assert "3 x 3" in pooled.rule


def test_pooling_equals_a_loop_and_skips_missing_entries():
    x = causal(np.random.default_rng(0).normal(size=(11, 11)))
    pooled = pool_max_abs(x, 4).matrix
    for i in range(4):
        for j in range(4):
            block = x[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].ravel()
            block = block[~np.isnan(block)]
            if block.size:
                assert pooled[i, j] == block[np.abs(block).argmax()]
            else:
                assert np.isnan(pooled[i, j])


def test_small_maps_are_not_pooled():
    x = np.eye(5)
    pooled = pool_max_abs(x, 5)
    assert pooled.factor == 1
    assert pooled.rule == ""
    assert np.array_equal(pooled.matrix, x)


def test_causal_blanks_the_future_and_refuses_other_shapes():
    x = causal(torch.ones(3, 3, dtype=torch.bfloat16, requires_grad=True))
    assert np.array_equal(np.isnan(x), np.triu(np.ones((3, 3), dtype=bool), 1))
    for wrong in (np.ones((2, 3)), np.ones(4), np.ones((0, 0)), np.ones((1, 2, 2))):
        with pytest.raises(ValueError, match="as many rows as columns"):
            causal(wrong)


def test_arrays_come_from_anything():
    assert as_array([1, 2]).dtype == np.float64
    assert as_array(torch.tensor([1.5], dtype=torch.bfloat16)).tolist() == [1.5]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("\n", "↵"),
        ("\t", "⇥"),
        ("", "∅"),
        ("\x00", "␀"),
        ("a\u200bb", "a\\u200bb"),
        ("\u202e", "\\u202e"),
        ("é", "é"),
        ("😀", "😀"),
    ],
)
def test_invisible_characters_become_visible(token, shown):
    assert visible(token) == shown


def test_labels_are_cut_with_a_mark():
    assert label("abcdefghijklm", 6) == "abcde…"
    assert label("abc", 3) == "abc"


def test_drawable_replaces_only_what_the_font_lacks():
    assert drawable("é·↵∅⇥") == "é·↵∅⇥"
    assert drawable("😀中") == "\\u1f600\\u4e2d"


@pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 1000, 12345])
def test_thinning_keeps_the_first_and_at_most_so_many(n):
    chosen = thin(n, 64)
    assert len(chosen) <= 64
    assert n == 0 or chosen[0] == 0
    assert n > 64 or len(chosen) == n


def test_one_name_per_position():
    assert positions(None, 3) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="2 tokens for 3 positions"):
        positions(["a", "b"], 3)


def _luminance(colour):
    part = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in part]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("dark", [False, True])
def test_the_signed_map_is_neutral_in_the_middle_and_even_in_its_arms(dark):
    colours = palette.diverging(255, dark=dark)
    assert len({colours[127][i : i + 2] for i in (1, 3, 5)}) == 1, "zero has no hue"
    light = np.array([_luminance(c) for c in colours])
    outwards = np.diff(light[127:]), np.diff(light[127::-1])
    for arm in outwards:
        assert (arm >= -1e-3).all() if dark else (arm <= 1e-3).all(), "magnitude is monotone in lightness"
    assert np.abs(light - light[::-1]).max() < 0.1, "both signs look equally strong"


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
@pytest.mark.parametrize("dark", [False, True])
def test_the_two_signs_stay_apart_for_colour_blind_readers(kind, dark):
    colours = palette.diverging(255, dark=dark)
    for strength in (60, 90, 127):
        pair = []
        for c in (colours[127 - strength], colours[127 + strength]):
            linear = (np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)])) ** 2.2
            pair.append(np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1) ** (1 / 2.2))
        assert np.linalg.norm(pair[0] - pair[1]) > 0.2


def test_ramps_keep_their_ends():
    assert palette.ramp(("#000000", "#ffffff"), 3) == ["#000000", "#808080", "#ffffff"]
    assert len(set(palette.layer_colours(24))) == 24
    assert palette.positive_half(5)[0] == palette.diverging(255)[127]
    assert palette.positive_half(5)[-1] == palette.diverging(255)[-1]
