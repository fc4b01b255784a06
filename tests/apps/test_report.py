"""The report: figures put aside on one page, taken away as a document and its numbers."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import pandas as pd

from ssmlens.apps.frame.collected import Item
from ssmlens.apps.report import bundle

TINY = {"model": "local folder", "folder": "two", "text": "the cat sat on the mat"}
PLOT = '{"data":[{"type":"bar","x":[1,2],"y":[3.25,4]}],"layout":{}}'


def item(title: str = "A & <b>", **changes: Any) -> Item:
    given = {
        "title": title,
        "facts": {"model": "two", "layer": "1"},
        "code": "table = 1 < 2\n",
        "table": pd.DataFrame({"token": ["<i>", "b"], "value": [0.125, 2.5]}),
        "plotly": None,
        "svg": None,
        "means": "It means.",
        "does_not": "It does not.",
        "added": "2026-01-01T00:00:00+00:00",
    }
    return Item(**{**given, **changes})


def test_the_document_holds_everything_and_loads_nothing() -> None:
    items = [
        item(plotly=PLOT),
        item("B", plotly=PLOT),
        item("C", svg='<?xml version="1.0"?><svg id="c"></svg>'),
        item(),
    ]
    text = bundle.page("Title <x>", "One.\n\nTwo & three.", items)
    assert "<title>Title &lt;x&gt;</title>" in text
    assert "<p>One.</p><p>Two &amp; three.</p>" in text
    assert text.count("Plotly.newPlot") >= 2
    assert text.count("plotly.js v") == 1
    assert '<svg id="c"></svg>' in text
    assert "<?xml" not in text
    assert text.count("&lt;i&gt;") == 4
    assert text.count("table = 1 &lt; 2") == 4
    assert 'id="figure-4"' in text
    assert "A &amp; &lt;b&gt;" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", text)


def test_a_document_without_interactive_figures_is_small() -> None:
    assert len(bundle.page("T", "", [item()])) < 10_000


def test_the_zip_has_numbers_facts_and_code() -> None:
    items = [item(svg="<svg></svg>"), item("Über: ../x")]
    raw = bundle.data_zip(items)
    assert raw == bundle.data_zip(items)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[:4] == [f"01_a-b/{name}" for name in ("table.csv", "about.json", "code.py", "figure.svg")]
        assert "02_ber-x/table.csv" in names
        assert "02_ber-x/figure.svg" not in names
        pd.testing.assert_frame_equal(pd.read_csv(archive.open("01_a-b/table.csv")), items[0].table)
        assert json.loads(archive.read("01_a-b/about.json"))["layer"] == "1"


def test_figures_are_put_aside_and_taken_out(page: Callable[..., Any]) -> None:
    from streamlit.util import calc_hash

    app = page(at="states", **TINY).run()
    app.button(key="state_norms_add").click().run()
    app.button(key="half_lives_add").click().run()
    app._page_hash = calc_hash("report")
    app.run()
    assert not app.exception
    assert [each.value for each in app.text] == ["State norm over time: two", "Half-life by layer and head: two"]
    found = app.session_state["collected"]
    assert found[0].code.strip() in [each.value for each in app.code]
    text = bundle.page("T", "", found)
    assert text.count('class="plotly-graph-div"') == 2
    app.button(key="report_remove_0").click().run()
    assert [each.value for each in app.text] == ["Half-life by layer and head: two"]
    app.button(key="report_clear").click().run()
    assert app.info[0].value.startswith("Nothing is in the report yet")


def test_an_empty_report_says_how_to_fill_it(page: Callable[..., Any]) -> None:
    app = page(at="report", **TINY).run()
    assert not app.exception
    assert "Add to report" in app.info[0].value
