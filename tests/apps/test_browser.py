"""The pages in a real browser: what a person sees, clicks and links to."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any
from urllib.parse import urlencode

import pytest
from serving import idle

from ssmlens.apps.frame import pages

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

WAIT_MS = 60_000
TEXT = "the cat sat on the mat"


def address(page_url: str, path: str = "attention", **query: str) -> str:
    return f"{page_url}/{path}?{urlencode({'model': 'local folder', 'folder': 'two', 'text': TEXT, **query})}"


def drawn(page: Any, words: str) -> Any:
    """The map once it shows what the words say."""
    return page.locator(f"canvas[data-drawn*='{words}']")


def cell(canvas: Any, t: int, s: int) -> dict[str, float]:
    """Where on the canvas the pair stands."""
    cells = json.loads(canvas.get_attribute("data-cells"))
    return {
        "x": cells["left"] + (s - cells["s"] + 0.5) * cells["side"],
        "y": cells["top"] + (t - cells["t"] + 0.5) * cells["side"],
    }


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

    canvas = view.locator("canvas[data-drawn]")
    canvas.scroll_into_view_if_needed()
    canvas.hover(position=cell(canvas, 4, 1))
    expect(view.locator("output.readout")).to_contain_text("Token 4 “c” reads token 1 “h”, 3 back")
    expect(view.locator(".strip .reader")).to_have_text("c")
    expect(view.locator(".strip .source")).to_have_text("h")
    canvas.click(position=cell(canvas, 4, 1))
    expect(heading(view, "Path from token 1 “h” to token 4 “c”, 3 back, in layer 2")).to_be_visible(timeout=WAIT_MS)
    expect(heading(view, "What token 4 “c” reads")).to_be_visible(timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("target=.*source=|source=.*target="), timeout=WAIT_MS)

    link = view.url
    view.goto("about:blank")
    view.goto(link)
    expect(drawn(view, "layer 2")).to_be_visible(timeout=WAIT_MS)
    expect(heading(view, "What token 4 “c” reads")).to_be_visible(timeout=WAIT_MS)
    expect(heading(view, "Path from token 1 “h”")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Text")).to_have_value(TEXT)


def test_dragging_zooms_and_the_keyboard_goes_back(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url))
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    idle(view)
    canvas = view.locator("canvas[data-drawn]")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    start, end = cell(canvas, 9, 2), cell(canvas, 14, 7)
    view.mouse.move(box["x"] + start["x"], box["y"] + start["y"])
    view.mouse.down()
    view.mouse.move(box["x"] + end["x"], box["y"] + end["y"], steps=4)
    view.mouse.up()
    expect(view.get_by_text("Tokens 9 to 14 read from 2 to 7.")).to_be_visible()
    canvas.hover(position=cell(canvas, 10, 3))
    expect(view.locator("output.readout")).to_contain_text("Token 10 ")
    canvas.press("0")
    expect(view.get_by_text("Tokens 9 to 14 read from 2 to 7.")).to_have_count(0)
    canvas.press("+")
    expect(view.get_by_role("button", name="Whole map")).to_be_visible()
    view.get_by_role("button", name="Whole map").click()
    expect(view.get_by_role("button", name="Whole map")).to_be_hidden()


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
    canvas = view.locator("canvas[data-drawn]")
    canvas.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft"):
        canvas.press(key)
    last = len(TEXT) - 1
    expect(view.locator("output.readout")).to_contain_text(f"Token {last - 2} ")
    expect(view.locator("output.readout")).to_contain_text(f"reads token {last - 3} ")
    canvas.press("Enter")
    expect(heading(view, f"What token {last - 2} ")).to_be_visible(timeout=WAIT_MS)


def test_another_model_shows_its_own_text_and_layer(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    from ssmlens import zoo

    view.goto(f"{page_url}/attention?{urlencode({'model': 'mamba2-english', 'layer': '8', 'target': '100'})}")
    expect(drawn(view, "layer 8")).to_be_visible(timeout=WAIT_MS)
    view.get_by_role("combobox", name="Model").click()
    view.get_by_role("option", name="mamba1-recall").click()
    expect(drawn(view, "layer 1")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Text")).to_have_value(zoo.passage("mamba1-recall"))
    for name, value in (("Layer", "1"), ("Target token", "last token")):
        control = view.get_by_test_id("stSelectbox").filter(has_text=name)
        assert value in control.inner_text().splitlines() or control.get_by_role("combobox").input_value() == value
    expect(view.get_by_text("Session State API")).to_have_count(0)


def test_home_tells_where_the_answer_came_from_and_leads_on(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(page_url)
    expect(view.get_by_text("holds the largest part")).to_be_visible(timeout=WAIT_MS)
    strip = view.locator(".tokens")
    expect(strip).to_be_visible(timeout=WAIT_MS)
    expect(view.locator(".tokens .source")).to_have_text(" K")
    strip.focus()
    strip.press("Home")
    expect(view.locator("output.readout")).to_contain_text("Token 0 “The”: part of the logit = ")
    view.get_by_role("button", name="Copy link to this view").click()
    expect(view.locator("output.said")).not_to_be_empty()
    view.get_by_role("link", name="States and memory").click()
    expect(view.get_by_role("heading", name="Half-lives")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("combobox", name="Model")).to_have_value("mamba1-english")


def test_a_click_on_the_text_chooses_the_token_of_the_lens(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "tokens"))
    expect(view.locator(".tokens span").nth(4)).to_be_visible(timeout=WAIT_MS)
    view.locator(".tokens span").nth(4).click()
    expect(view.get_by_role("heading", name="After token 4 “c”, layer by layer")).to_be_visible(timeout=WAIT_MS)
    strip = view.locator(".tokens")
    strip.focus()
    for key in ("Home", "ArrowRight", "Enter"):
        strip.press(key)
    expect(view.get_by_role("heading", name="After token 1 “h”, layer by layer")).to_be_visible(timeout=WAIT_MS)


def test_a_figure_of_the_states_is_downloaded_and_collected(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "states"))
    expect(view.get_by_role("heading", name="State norms")).to_be_visible(timeout=WAIT_MS)
    idle(view)
    view.get_by_role("button", name="Download", exact=True).nth(1).click()
    menu = view.get_by_test_id("stPopoverBody")
    starts = {"PNG": b"\x89PNG", "SVG": b"<?xml", "HTML": b"<!doctype html>", "CSV": b"layer,head", "Parquet": b"PAR1"}
    for kind, start in starts.items():
        with view.expect_download(timeout=WAIT_MS) as coming:
            menu.get_by_role("button", name=kind, exact=True).click()
        assert coming.value.suggested_filename == f"half_lives_two.{'parquet' if kind == 'Parquet' else kind.lower()}"
        with open(coming.value.path(), "rb") as file:
            assert file.read(len(start)) == start
    view.keyboard.press("Escape")
    view.get_by_role("button", name="Add to report").last.click()
    expect(view.get_by_text("Added: the report now has 1 figure.")).to_be_visible(timeout=WAIT_MS)


def test_another_method_colours_the_text(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "attribution"))
    expect(view.locator(".tokens[data-drawn='Scores by decompose']")).to_be_visible(timeout=WAIT_MS)
    view.get_by_role("combobox", name="Method").click()
    view.get_by_role("option", name="relevance", exact=True).click()
    expect(view.locator(".tokens[data-drawn='Scores by relevance']")).to_be_visible(timeout=WAIT_MS)
    view.locator(".tokens span").nth(5).click()
    expect(view.get_by_text("after token 5 “a”, by relevance")).to_be_visible(timeout=WAIT_MS)


def test_a_click_on_the_text_blocks_a_token(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "knockout", sources="2"))
    expect(heading(view, "The text without access to 2 “e”")).to_be_visible(timeout=WAIT_MS)
    idle(view)
    view.locator(".tokens span").nth(5).click()
    expect(heading(view, "The text without access to 2 “e”, 5 “a”")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Source tokens")).to_have_value("2, 5")
    expect(view).to_have_url(re.compile("sources=2(%2C|,)(%20|[+])5"), timeout=WAIT_MS)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_barrier(view: Any, page_url: str, theme: str) -> None:
    """axe finds no serious or critical violation on any page of the navigation."""
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
    view.emulate_media(color_scheme=theme)
    view.goto(address(page_url, "", target="9 “a”", source="4 “c”"))
    view.get_by_role("button", name="Copy link to this view").wait_for(timeout=WAIT_MS)
    found = {}
    for page in [each for listed in pages.groups().values() for each in listed]:
        view.get_by_role("link", name=page.title, exact=True).click()
        view.get_by_role("heading", name=page.title, exact=True, level=2).wait_for(timeout=WAIT_MS)
        view.wait_for_selector("[data-testid=stExpander], [data-testid=stAlert]", timeout=WAIT_MS)
        idle(view)
        view.evaluate(axe)
        # Streamlit's own sign that a script runs, with its Stop button, fades in and out at any moment.
        where = "{ exclude: [['[data-testid=stStatusWidget]']] }"
        result = view.evaluate(f"axe.run({where}, {{ resultTypes: ['violations'] }})")
        worst = [each for each in result["violations"] if each["impact"] in ("serious", "critical")]
        found[page.path] = [(each["id"], each["nodes"][0]["html"][:200]) for each in worst]
    assert {path: each for path, each in found.items() if each} == {}
