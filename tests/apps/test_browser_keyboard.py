"""A visitor without a mouse: chooses a model, opens a page, moves in the map and reads its values."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

WAIT_MS = 60_000
MOST_STOPS = 80
# What has the focus, in the open or inside a component's shadow: role or tag, and name or text.
FOCUSED = """() => {
  let e = document.activeElement;
  while (e?.shadowRoot?.activeElement) e = e.shadowRoot.activeElement;
  const name = e.getAttribute("aria-label") || e.labels?.[0]?.innerText || e.innerText || e.alt || "";
  return `${e.getAttribute("role") || e.tagName.toLowerCase()}: ${name.trim()}`;
}"""


def tab_to(view: Any, wanted: str) -> None:
    """Press Tab until something of this description has the focus; fails when a round of stops does not meet it."""
    met = []
    for _ in range(MOST_STOPS):
        view.keyboard.press("Tab")
        met.append(view.evaluate(FOCUSED))
        if re.match(wanted, met[-1]):
            return
    pytest.fail(f"no stop is {wanted}: {met}")


def test_a_keyboard_is_enough(view: Any, page_url: str) -> None:
    from playwright.sync_api import expect

    view.goto(f"{page_url}/?{urlencode({'model': 'mamba2-recall'})}")
    expect(view.locator("[data-drawn]").first).to_be_visible(timeout=WAIT_MS)

    tab_to(view, "combobox: .*Model")
    view.keyboard.press("ArrowDown")
    expect(view.get_by_role("option", name="mamba1-recall")).to_be_visible()
    view.keyboard.type("mamba1-recall")
    view.keyboard.press("Enter")
    expect(view).to_have_url(re.compile("model=mamba1-recall"), timeout=WAIT_MS)
    expect(view.get_by_text("mamba1-recall").first).to_be_visible()

    view.evaluate("document.activeElement.blur()")
    tab_to(view, r"a: [\s\S]*Implicit attention")
    view.keyboard.press("Enter")
    expect(view.locator("canvas[data-drawn*='mamba1-recall']")).to_be_visible(timeout=WAIT_MS)

    tab_to(view, "application: |img: |grid: |canvas: ")
    readout = view.locator("output.readout")
    view.keyboard.press("ArrowUp")
    expect(readout).to_have_text(re.compile(r"Token \d+ .* reads itself: .* = [-−]?[\d.]+"))
    view.keyboard.press("ArrowLeft")
    expect(readout).to_have_text(re.compile(r"Token \d+ .* reads token \d+ .* = [-−]?[\d.]+"))
    view.keyboard.press("Enter")
    expect(view.locator("strong").filter(has_text=re.compile(r"What token \d+ "))).to_be_visible(timeout=WAIT_MS)
