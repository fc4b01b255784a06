"""Figures of interventions: every number is in the figure, in files and on pages."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ssmlens.plotting import Caption, effect_pages, effects

TABLE = pd.DataFrame({"token": [" a", "$b<i>"], "before": [0.75, 0.1], "after": [0.2, 0.6]})
GRID = np.array([[0.0, 0.5, np.nan], [1.0, -0.25, np.nan]])


def test_both_runs_stand_beside_each_other() -> None:
    caption = Caption(model="m", error=1e-7, tolerance=1e-5)
    page = effect_pages.distributions(TABLE, caption, name="Knockout", runs=("free", "blocked"), note="KL 0.5 nats")
    assert [list(bars.x) for bars in page.data] == [[0.75, 0.1], [0.2, 0.6]]
    assert "&lt;i&gt;" in page.layout.yaxis.ticktext[1]
    assert page.layout.meta["title"] == "Knockout: m"
    assert "KL 0.5 nats" in page.layout.meta["note"]
    axes = effects.distributions(TABLE, caption, note="KL 0.5 nats").axes[0]
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[0.75, 0.1], [0.2, 0.6]]


def test_the_map_of_sites_keeps_every_number_and_its_sign() -> None:
    page = effect_pages.patch_map(GRID, ["x", "y", "z"], pinned=(1, 0))
    np.testing.assert_array_equal(np.array(page.data[0].z, dtype=float), GRID)
    assert page.data[0].zmin == -page.data[0].zmax
    assert page.layout.shapes[0].x0 == -0.5
    image = effects.patch_map(GRID, ["x", "y", "z"]).axes[0].images[0]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), GRID)


def test_two_runs_and_their_difference_keep_every_number() -> None:
    table = pd.DataFrame(
        {"token": ["x", "$y<i>"], "before": [1.0, 2.0], "after": [1.5, -1.0], "difference": [0.5, -3.0]}
    )
    given = {"name": "State norm", "quantity": "norm of h[t]", "runs": ("free", "blocked")}
    page = effect_pages.two_runs(table, Caption(model="m", layer=3), **given)
    assert [list(each.y) for each in page.data] == [[1.0, 2.0], [1.5, -1.0], [0.5, -3.0]]
    assert page.layout.meta["title"] == "State norm: m, layer 3"
    assert page.layout.yaxis2.title.text == "blocked − free"
    assert "&lt;i&gt;" in page.layout.xaxis2.ticktext[1]
    axes, below = effects.two_runs(table, Caption(model="m", layer=3), **given).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 2.0], [1.5, -1.0]]
    assert [bar.get_height() for bar in below.containers[0]] == [0.5, -3.0]
    layers = table.rename(columns={"token": "layer"}).assign(layer=[0, 1])
    assert effect_pages.two_runs(layers, axis="layer", **given).layout.xaxis2.ticktext == ("0", "1")


@pytest.mark.parametrize("module", [effects, effect_pages])
def test_what_cannot_be_drawn_is_refused(module: object) -> None:
    with pytest.raises(ValueError, match="one column per token"):
        module.patch_map(GRID, ["x"])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="at least one line"):
        module.distributions(TABLE[:0])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="at least one line"):
        module.two_runs(TABLE[:0], name="x", quantity="y")  # type: ignore[attr-defined]
