"""The frame without a browser: downloads carry what they are about, texts are kept in bounds, pages are well formed."""

from __future__ import annotations

import io
import re

import pandas as pd
import pytest

from ssmlens.apps.frame import downloads, pages
from ssmlens.apps.frame.runs import Runs
from ssmlens.apps.frame.shown import Shown, facts
from ssmlens.plotting import Caption, half_life_map
from ssmlens.plotting import pages as live

CAPTION = Caption(model="m <1>", layer=3, reduction="mean_abs", error=4e-7, tolerance=1e-5)
LIVES = {0: [1.0, 2.0], 1: [3.0, 4.0]}


@pytest.fixture
def shown() -> Shown:
    return Shown(
        name="half_lives",
        title=CAPTION.title("Half-lives"),
        caption=CAPTION,
        code="figure = 1 < 2",
        table=lambda: pd.DataFrame({"head": [0, 1], "half_life": [1.5, 2.5]}),
        live=lambda: live.half_life_map(LIVES, CAPTION),
        file=lambda: half_life_map(LIVES, CAPTION),
    )


def test_facts_name_model_layer_reduction_sign_and_error(shown: Shown) -> None:
    assert facts(shown) == {
        "title": "Half-lives: m <1>, layer 3",
        "model": "m <1>",
        "layer": "3",
        "reduction": "mean magnitude over heads",
        "sign": "magnitude",
        "error": "reconstruction error 4.0e-07 (within tolerance 1e-05)",
    }


def test_pictures_carry_title_and_note(shown: Shown) -> None:
    from PIL import Image

    picture = Image.open(io.BytesIO(downloads.picture(shown, ".png")))
    assert "m <1>, layer 3" in picture.text["Title"]
    assert "reconstruction error 4.0e-07" in picture.text["Description"]
    assert "reconstruction error 4.0e-07" in downloads.picture(shown, ".svg").decode()


def test_html_loads_nothing_and_says_what_it_shows(shown: Shown) -> None:
    page = downloads.html(shown).decode()
    assert "<title>Half-lives: m &lt;1&gt;, layer 3</title>" in page
    assert '<meta name="ssmlens:reduction" content="mean magnitude over heads">' in page
    assert "figure = 1 &lt; 2" in page
    assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="[^"]+"', page) == []
    picture = downloads.html(Shown(**{**shown.__dict__, "live": None})).decode()
    assert "<svg" in picture
    assert len(picture) < 500_000


def test_tables_carry_model_and_layer(shown: Shown) -> None:
    import json

    import pyarrow.parquet as pq

    table = pd.read_csv(io.BytesIO(downloads.csv(shown)))
    assert list(table.columns) == ["head", "half_life", "model", "layer", "reduction"]
    assert list(table["half_life"]) == [1.5, 2.5]
    found = pq.read_table(io.BytesIO(downloads.parquet(shown)))
    assert json.loads(found.schema.metadata[b"ssmlens"]) == facts(shown)
    assert found.to_pandas().equals(shown.table())


def test_formats_are_those_that_the_figure_has(shown: Shown) -> None:
    assert list(downloads.ways(shown)) == list(downloads.FORMATS)
    bare = Shown(**{**shown.__dict__, "live": None, "file": None})
    assert list(downloads.ways(bare)) == ["CSV", "Parquet"]
    assert downloads.file_name(shown, "PNG") == "half_lives_m-1_layer-3.png"


def test_long_texts_are_kept_in_bounds() -> None:
    runs = Runs(most=2, characters=100)
    first, second = runs.keep("a" * 10), runs.keep("b" * 10)
    assert runs.keep("a" * 10) == first
    third = runs.keep("c" * 10)
    assert runs.find(second) is None
    assert runs.find(first) == "a" * 10
    long = runs.keep("d" * 200)
    assert runs.find(third) is None
    assert runs.find(long) == "d" * 200
    assert runs.find("nothing") is None


def test_every_page_has_an_address_of_its_own_and_can_be_drawn() -> None:
    import importlib

    listed = [page for found in pages.groups().values() for page in found]
    paths = [page.path for page in listed]
    assert len(set(paths)) == len(paths)
    assert all(re.fullmatch(r"[a-z_]+", path) for path in paths)
    for page in listed:
        assert callable(importlib.import_module(page.module).draw)


@pytest.mark.parametrize("dark", [False, True])
def test_axes_can_be_read(monkeypatch: pytest.MonkeyPatch, dark: bool) -> None:
    import plotly.graph_objects as go
    import streamlit as st

    from ssmlens.apps.frame import panel

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    drawn: list[go.Figure] = []
    monkeypatch.setattr(st, "plotly_chart", lambda figure, **given: drawn.append(figure))
    monkeypatch.setattr(panel, "is_dark", lambda: dark)
    panel.draw_plotly(go.Figure(go.Bar(x=[1], y=[2])), "a")
    page = light("#0e1117" if dark else "#ffffff")
    for axis in (drawn[0].layout.xaxis, drawn[0].layout.yaxis):
        for colour in (axis.tickfont.color, axis.title.font.color):
            low, high = sorted((light(colour), page))
            assert (high + 0.05) / (low + 0.05) >= 4.5
