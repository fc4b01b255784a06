"""Studies and the report in a real browser: what a person starts, stops, collects, links to and takes away."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import pytest
from serving import idle

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

WAIT_MS = 60_000
TINY = {"model": "local folder", "folder": "two", "text": "the cat sat on the mat"}


def address(page_url: str, path: str, **query: str) -> str:
    return f"{page_url}/{path}?{urlencode(query)}"


def visit(view: Any, link: str) -> Any:
    """The page of a link as another visitor opens it: every tab is a session of its own to the server."""
    page = view.context.new_page()
    page.goto(link)
    return page


def copied(page: Any) -> str:
    """What “Copy link” copies."""
    from playwright.sync_api import expect

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy link to this view").click()
    expect(page.locator("output.said")).to_have_text("Link copied.", timeout=WAIT_MS)
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def run(page: Any) -> None:
    page.get_by_role("button", name="Run the study").click(timeout=WAIT_MS)


def test_a_study_is_set_started_and_linked_to(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "measure", model="mamba1-english", study="Capacity", capacity_r_grid="0-4"))
    layers = view.get_by_role("textbox", name="Layers", exact=True)
    layers.fill("12", timeout=WAIT_MS)
    layers.press("Enter")
    said = "Layers takes numbers of 0 to 9, or nothing for all; 12 is not among them."
    expect(view.get_by_text(said)).to_be_visible(timeout=WAIT_MS)
    expect(layers).to_have_value("12")
    layers.fill("9")
    layers.press("Enter")
    expect(view.get_by_text("Cuts the state before token 70 in 1 layer to 5 ranks")).to_be_visible(timeout=WAIT_MS)
    unstarted = view.url
    run(view)
    mine = view.get_by_text(
        re.compile("^1. Capacity · mamba1-english · 141 tokens · Layers: 9; Ranks: 0, 1, 2, 3 and 4")
    )
    expect(mine).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("img", name=re.compile("^Capacity study: mamba1-english"))).to_be_visible(timeout=WAIT_MS)
    expect(mine).to_contain_text(": done", timeout=WAIT_MS)
    expect(view).to_have_url(re.compile("job="), timeout=WAIT_MS)

    link = view.url
    view.reload()
    expect(view.get_by_role("img", name=re.compile("^Capacity study"))).to_be_visible(timeout=WAIT_MS)
    expect(layers).to_have_value("9")
    other = visit(view, link)
    expect(other.get_by_role("img", name=re.compile("^Capacity study"))).to_be_visible(timeout=WAIT_MS)
    other.close()
    # Without the id in its link another visitor sees the settings, and nothing of the study.
    other = visit(view, unstarted)
    expect(other.get_by_role("button", name="Run the study")).to_be_visible(timeout=WAIT_MS)
    idle(other)
    expect(other.get_by_text("Your studies")).to_have_count(0)
    other.close()


def test_a_study_is_watched_and_cancelled_and_makes_room_for_the_next(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "measure", model="mamba1-english", study="Capacity", capacity_r_grid="0-15"))
    run(view)
    steps = view.get_by_text(re.compile(r"^Step \d+ of 320"))
    expect(steps).to_be_visible(timeout=WAIT_MS)
    first = steps.inner_text().split(",")[0]
    expect(view.get_by_text(first)).to_have_count(0, timeout=WAIT_MS)
    expect(steps).to_be_visible(timeout=WAIT_MS)
    view.get_by_role("button", name="Cancel", exact=True).click()
    expect(view.get_by_text("The study was cancelled.")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_text(re.compile("^1. Capacity .*: cancelled"))).to_be_visible(timeout=WAIT_MS)
    # One runs at a time, and the rest of the cancelled one would take longer than this is waited for.
    view.get_by_role("radio", name="Memory").click()
    expect(view.get_by_text("Reads the last 1, 2, 4, ..., 141 of 141 tokens")).to_be_visible(timeout=WAIT_MS)
    run(view)
    expect(view.get_by_role("img", name=re.compile("^Memory study"))).to_be_visible(timeout=12_000)
    expect(view.get_by_text(re.compile("^2. Memory .*: done"))).to_be_visible(timeout=WAIT_MS)
    view.get_by_role("button", name="Open study 1").click()
    expect(view.get_by_text("The study was cancelled.")).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Ranks")).to_have_value("0-15")


def test_figures_are_collected_kept_and_taken_away(view: Any, browser: Any, page_url: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    view.goto(address(page_url, "states", **TINY))
    view.locator(".st-key-state_norms_add button").click(timeout=WAIT_MS)
    expect(view.get_by_text("Added: the report now has 1 figure.")).to_be_visible(timeout=WAIT_MS)
    view.reload()
    expect(view.locator(".st-key-state_norms_add")).to_be_visible(timeout=WAIT_MS)
    view.get_by_role("link", name="Home", exact=True).click()
    view.locator(".st-key-verify_add button").click(timeout=WAIT_MS)
    expect(view.get_by_text("Added: the report now has 2 figures.")).to_be_visible(timeout=WAIT_MS)
    assert "report=" in view.url
    assert "report=" not in copied(view)
    view.get_by_role("link", name="Report", exact=True).click()
    titles = ("State norm over time: two", "Reconstruction error of every layer: two")
    for title in titles:
        expect(view.get_by_role("img", name=title)).to_be_visible(timeout=WAIT_MS)
    assert copied(view) == view.url
    other = visit(view, address(page_url, "report"))
    expect(other.get_by_text("Nothing is in the report yet.")).to_be_visible(timeout=WAIT_MS)
    other.close()

    view.get_by_role("textbox", name="Title").fill("Two <tiny> layers")
    view.get_by_role("textbox", name="Title").press("Enter")
    expect(view).to_have_url(re.compile("report_title="), timeout=WAIT_MS)
    view.reload()
    for title in titles:
        expect(view.get_by_role("img", name=title)).to_be_visible(timeout=WAIT_MS)
    expect(view.get_by_role("textbox", name="Title")).to_have_value("Two <tiny> layers")
    idle(view)
    with view.expect_download(timeout=WAIT_MS) as coming:
        view.get_by_role("button", name="HTML", exact=True).click()
    assert coming.value.suggested_filename == "two-tiny-layers.html"
    coming.value.save_as(tmp_path / "report.html")
    opens_alone(browser, tmp_path / "report.html", titles)
    with view.expect_download(timeout=WAIT_MS) as coming:
        view.get_by_role("button", name="Data (zip)").click()
    holds_the_numbers(Path(coming.value.path()))


def opens_alone(browser: Any, file: Path, titles: tuple[str, ...]) -> None:
    """The document draws its figures without asking anybody for anything."""
    from playwright.sync_api import expect

    context = browser.new_context(offline=True)
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    expect(page.get_by_role("heading", name="Two <tiny> layers")).to_be_visible()
    for i, title in enumerate(titles, 1):
        expect(page.get_by_role("heading", name=f"{i}. {title}")).to_be_visible()
        expect(page.locator(f"#plot-{i} svg.main-svg").first).to_be_visible(timeout=WAIT_MS)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1
    assert errors == []
    context.close()


def holds_the_numbers(file: Path) -> None:
    """The zip has each figure's table, facts, code and picture."""
    with zipfile.ZipFile(file) as archive:
        folders = ("01_state-norm-over-time-two", "02_reconstruction-error-of-every-layer-two")
        parts = ("table.csv", "about.json", "code.py", "figure.svg")
        assert archive.namelist() == [f"{folder}/{part}" for folder in folders for part in parts]
        norms = pd.read_csv(io.BytesIO(archive.read(f"{folders[0]}/table.csv")))
        assert len(norms) == len(TINY["text"])
        assert (norms[["layer 0", "layer 1", "layer 2"]] > 0).all(axis=None)
        errors = pd.read_csv(io.BytesIO(archive.read(f"{folders[1]}/table.csv")))
        assert (errors["reconstruction error"].astype(float) < 1e-5).all()
        assert json.loads(archive.read(f"{folders[1]}/about.json"))["model"] == "two"
