"""The pages that act and compare, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from serving import idle

pytestmark = pytest.mark.browser

WAIT_MS = 30_000
PROMPT = "r 7 a 19 m 3 b 12 . . r"


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    """One window for all tests, so that the scripts of the pages are read once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def view(window: Any) -> Iterator[Any]:
    """A fresh tab; the test fails when the page raises an error or asks for anything but its own server."""
    page = window.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors
    assert [url for url in asked if not re.match(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:", url)] == []


def address(page_url: str, path: str, **query: str) -> str:
    return f"{page_url}/{path}?{urlencode({'model': 'mamba1-recall', 'text': PROMPT, **query})}"


def again(page: Any) -> None:
    """The address that the page has now, opened anew."""
    link = page.url
    page.goto("about:blank")
    page.goto(link)


def cell(canvas: Any, t: int, s: int) -> dict[str, float]:
    """Where on the canvas the pair stands."""
    cells = json.loads(canvas.get_attribute("data-cells"))
    return {
        "x": cells["left"] + (s - cells["s"] + 0.5) * cells["side"],
        "y": cells["top"] + (t - cells["t"] + 0.5) * cells["side"],
    }


def test_pointing_at_one_map_lights_the_pair_in_the_other(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "compare", right_text="r 4 a 19 m 3"))
    maps, said = view.locator("canvas[data-drawn]"), view.locator("output.readout")
    expect(maps).to_have_count(2, timeout=WAIT_MS)
    idle(view)
    left, right = maps.nth(0), maps.nth(1)
    left.scroll_into_view_if_needed()
    left.hover(position=cell(left, 3, 1))
    expect(said.nth(0)).to_contain_text("Token 3 “19” reads token 1 “7”, 2 back")
    expect(said.nth(1)).to_contain_text("Token 3 “19” reads token 1 “4”, 2 back")
    expect(view.locator(".strip").nth(1).locator(".source")).to_have_text("4")
    # The text at the right ends before token 9.
    left.hover(position=cell(left, 9, 1))
    expect(said.nth(0)).to_contain_text("Token 9 ")
    expect(said.nth(1)).to_contain_text("Point at a cell")
    view.mouse.move(5, 5)
    expect(said.nth(0)).to_contain_text("Point at a cell")

    right.focus()
    for key in ("ArrowUp", "ArrowLeft"):
        right.press(key)
    expect(said.nth(1)).to_contain_text("Token 4 “m” reads token 3 “19”")
    expect(said.nth(0)).to_contain_text("Token 4 “m” reads token 3 “19”")
    right.press("Enter")
    expect(view.get_by_text("Left after token 4 “m”, right after token 4 “m”.")).to_be_visible(timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("[?&]source=3"), timeout=WAIT_MS)
    idle(view)
    right.press("Escape")
    expect(said.nth(0)).to_contain_text("Point at a cell")
    again(view)
    expect(view.get_by_text("Left after token 4 “m”, right after token 4 “m”.")).to_be_visible(timeout=WAIT_MS)
    expect(view.locator(".strip .source")).to_have_text(["19", "19"], timeout=WAIT_MS)
