"""The page in a real browser: what a person sees, clicks and links to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

pytestmark = pytest.mark.browser

WAIT_MS = 60_000
TEXT = "the cat sat on the mat"


@pytest.fixture
def view(browser: Any, page_url: str) -> Iterator[Any]:
    """A fresh window; the test fails when the page asks for anything but its own server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors
    assert [url for url in asked if not re.match(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:", url)] == []


def address(page_url: str, **query: str) -> str:
    return f"{page_url}/?{urlencode({'model': 'local folder', 'folder': 'two', 'text': TEXT, **query})}"


def drawn(page: Any, words: str) -> Any:
    """The map once it shows what the words say."""
    return page.locator(f"canvas[data-drawn*='{words}']")


def heading(page: Any, words: str) -> Any:
    """A panel's heading, as the server wrote it."""
    return page.locator("strong").filter(has_text=words)


def test_map_badge_layer_click_and_link(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url))
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_text(re.compile(r"Reconstruction error \d\.\de-\d\d, within tolerance 1e-05"))).to_be_visible()
    expect(view.get_by_text("Layer 1, mean over heads (signed)")).to_be_visible()

    view.get_by_role("combobox", name="Layer").click()
    view.get_by_role("option", name="2", exact=True).click()
    expect(view.get_by_text("Layer 2, mean over heads (signed)")).to_be_visible(timeout=WAIT_MS)
    expect(drawn(view, "layer 2")).to_be_visible(timeout=WAIT_MS)

    canvas = view.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    cells = json.loads(canvas.get_attribute("data-cells"))
    row_4_column_1 = {
        axis: cells[start] + i * cells["side"] for axis, start, i in (("x", "left", 1.5), ("y", "top", 4.5))
    }
    canvas.hover(position=row_4_column_1)
    expect(view.locator("output")).to_contain_text("Token 4 “c” reads token 1 “h”, 3 back")
    expect(view.locator(".strip .reader")).to_have_text("c")
    expect(view.locator(".strip .source")).to_have_text("h")
    canvas.click(position=row_4_column_1)
    expect(heading(view, "What token 4 “c” reads")).to_be_visible(timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("target="), timeout=WAIT_MS)

    link = view.url
    view.goto("about:blank")
    view.goto(link)
    expect(drawn(view, "layer 2")).to_be_visible(timeout=WAIT_MS)
    expect(heading(view, "What token 4 “c” reads")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Text")).to_have_value(TEXT)


def test_the_same_row_can_be_picked_again(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url))
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    word = view.locator(".strip span").nth(4)
    word.click()
    expect(heading(view, "What token 4 ")).to_be_visible(timeout=WAIT_MS)
    view.locator(".strip span").nth(9).click()
    expect(heading(view, "What token 9 ")).to_be_visible(timeout=WAIT_MS)
    choice = view.get_by_role("combobox", name="Target token")
    choice.click()
    view.get_by_role("option", name="last token").click()
    expect(heading(view, f"What token {len(TEXT) - 1} ")).to_be_visible(timeout=WAIT_MS)
    view.locator(".strip span").nth(9).click()
    expect(heading(view, "What token 9 ")).to_be_visible(timeout=WAIT_MS)


def test_an_error_keeps_what_was_typed(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    typed = "x" * 600
    view.goto(address(page_url))
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    box = view.get_by_role("textbox", name="Text")
    box.fill(typed)
    box.press("Control+Enter")
    expect(view.get_by_text("The text has 600 tokens and this page traces at most 512")).to_be_visible(timeout=WAIT_MS)
    expect(box).to_have_value(typed)
    box.fill("short again")
    box.press("Control+Enter")
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)


def test_keyboard_reads_the_map(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url))
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    canvas = view.locator("canvas").first
    canvas.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft"):
        canvas.press(key)
    last = len(TEXT) - 1
    expect(view.locator("output")).to_contain_text(f"Token {last - 2} ")
    expect(view.locator("output")).to_contain_text(f"reads token {last - 3} ")
    canvas.press("Enter")
    expect(heading(view, f"What token {last - 2} ")).to_be_visible(timeout=WAIT_MS)


def test_another_model_shows_its_own_text_and_layer(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    from ssmlens import zoo

    view.goto(f"{page_url}/?{urlencode({'model': 'mamba2-english', 'layer': '8', 'target': '100'})}")
    expect(drawn(view, "layer 8")).to_be_visible(timeout=WAIT_MS)
    view.get_by_role("combobox", name="Model").click()
    view.get_by_role("option", name="mamba1-recall").click()
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Text")).to_have_value(zoo.passage("mamba1-recall"))
    for name, value in (("Layer", "1"), ("Target token", "last token")):
        control = view.get_by_test_id("stSelectbox").filter(has_text=name)
        assert value in control.inner_text().splitlines() or control.get_by_role("combobox").input_value() == value
    expect(view.get_by_text("Session State API")).to_have_count(0)
