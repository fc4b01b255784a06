"""The report: figures put aside on one page, taken away as a document and its numbers."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from ssmlens.apps.frame import collected
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


def titles(app: Any) -> list[str]:
    assert not app.exception, app.exception
    return [each.value for each in app.text]


def test_figures_are_put_aside_moved_and_taken_out(page: Callable[..., Any]) -> None:
    from streamlit.util import calc_hash

    app = page(at="states", **TINY).run()
    app.button(key="state_norms_add").click().run()
    app.button(key="half_lives_add").click().run()
    app._page_hash = calc_hash("report")
    app.run()
    assert titles(app) == ["State norm over time: two", "Half-life by layer and head: two"]
    found = app.session_state["collected"]
    assert found[0].code.strip() in [each.value for each in app.code]
    text = bundle.page("T", "", found)
    assert text.count('class="plotly-graph-div"') == 2
    app.button(key="report_up_1").click().run()
    assert titles(app) == ["Half-life by layer and head: two", "State norm over time: two"]
    app.button(key="report_remove_0").click().run()
    assert titles(app) == ["State norm over time: two"]
    app.button(key="report_clear").click().run()
    assert app.info[0].value.startswith("Nothing is in the report yet")
    assert "report" not in app.query_params


def visit(app: Any, **address: str) -> Any:
    """The report as another visitor of the same server opens it."""
    from serving import DASHBOARD
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    other = AppTest.from_file(str(DASHBOARD), default_timeout=60)
    for key, value in address.items():
        other.query_params[key] = value
    other._page_hash = calc_hash("report")
    return other.run()


def test_a_link_brings_the_figures_back_and_nobody_changes_anothers(page: Callable[..., Any]) -> None:
    app = page(at="states", **TINY).run()
    app.button(key="state_norms_add").click().run()
    first = app.query_params["report"]
    app.button(key="half_lives_add").click().run()
    second = app.query_params["report"]
    assert first != second

    assert titles(visit(app)) == []
    linked = visit(app, report=second)
    assert titles(linked) == ["State norm over time: two", "Half-life by layer and head: two"]
    assert titles(visit(app, report=first)) == ["State norm over time: two"]
    linked.button(key="report_remove_0").click().run()
    assert titles(linked) == ["Half-life by layer and head: two"]
    assert linked.query_params["report"] not in (first, second)
    assert [each.title for each in app.session_state["collected"]] == titles(visit(app, report=second))

    lost = visit(app, report="gone")
    assert lost.warning[0].value == "The report of this link is no longer kept on this server."
    assert titles(lost) == []
    assert "report" not in lost.query_params


def test_reports_are_kept_in_bounds_and_a_shared_figure_once() -> None:
    one = item(svg="x" * 1000)
    found = collected.Reports(most=3, size=3 * one.size)
    names = [found.keep((one,) * count) for count in (1, 2, 3)]
    assert all(found.find(name) is not None for name in names)
    assert len(set(names)) == 3
    found.find(names[0])
    found.keep((one,))
    assert [found.find(name) is None for name in names] == [False, True, False]
    found.keep((item(svg="y" * 1000), item(svg="z" * 1000), item(svg="w" * 1000)))
    assert [found.find(name) is None for name in names] == [True, True, True]


def test_a_figure_with_too_many_numbers_is_refused(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collected, "MAX_FIGURE_BYTES", 1_000_000)
    app = page(at="states", **TINY).run()
    monkeypatch.setattr(collected.Item, "size", 2_000_000)
    app.button(key="state_norms_add").click().run()
    assert app.toast[0].value == (
        "This figure has 2 MB of numbers, and one in the report at most 1 MB: download it instead."
    )
    assert "report" not in app.query_params


def test_an_empty_report_says_how_to_fill_it(page: Callable[..., Any]) -> None:
    app = page(at="report", **TINY).run()
    assert not app.exception
    assert "Add to report" in app.info[0].value
