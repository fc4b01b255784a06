"""How long a visitor waits, in headless Chromium: ``python tests/apps/timings.py [MODEL]``.

Prints, from the start of the server's process: when the inputs stand, when the first figure is drawn, and when every
panel of the opening page is; then the time from a click on another layer to its map, for layers seen for the first and
the second time, and the time to a map of 2048 x 2048. The machine's load is printed beside them: these are wall times
of two busy processes.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from serving import WAIT_MS, chromium, idle, serve

LONG = 2048
DRAWN = """(title) => new Promise((done) => {
  const canvas = () => [...document.querySelectorAll("*")].map((e) => e.shadowRoot?.querySelector("canvas[data-drawn]"))
    .find(Boolean);
  const look = () => canvas()?.dataset.drawn.includes(title) ? done(true) : requestAnimationFrame(look);
  look();
})"""

SIDE = """(size) => [...document.querySelectorAll("*")].map((e) => e.shadowRoot?.querySelector("canvas[data-cells]"))
  .some((canvas) => canvas && JSON.parse(canvas.dataset.cells).size === size)"""


def main(model: str) -> None:
    """Print the timings of one shipped model."""
    with chromium() as browser:
        start = time.perf_counter()
        with serve("--max-tokens", str(LONG)) as url:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{url}/?model={model}")
            cold_start(page, start)
            page.goto(f"{url}/attention?model={model}")
            layer_changes(page)
            long_map(page)
    spent = os.times()
    print(f"processor time of server and browser {spent.children_user + spent.children_system:.0f} s, ", end="")
    print(f"load average of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def cold_start(page: Any, start: float) -> None:
    """From the start of the server to the opening page."""
    page.get_by_role("textbox", name="Text").wait_for(timeout=WAIT_MS)
    print(f"inputs {time.perf_counter() - start:.1f} s", end=", ")
    page.wait_for_selector(".tokens[data-drawn]", timeout=WAIT_MS)
    print(f"first figure {time.perf_counter() - start:.1f} s", end=", ")
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=WAIT_MS)
    idle(page)
    print(f"every panel {time.perf_counter() - start:.1f} s after the start of the server")


def layer_changes(page: Any) -> None:
    """From a click on another layer to its map."""
    page.wait_for_selector("canvas[data-drawn]", timeout=WAIT_MS)
    choice = page.get_by_role("combobox", name="Layer")
    choice.click()
    layers = page.get_by_role("option").all_text_contents()
    choice.press("Escape")
    idle(page)
    for seen in ("first", "second"):
        waits = []
        for layer in layers:
            choice.click()
            option = page.get_by_role("option", name=layer, exact=True)
            option.wait_for()
            start = time.perf_counter()
            option.click()
            page.evaluate(DRAWN, f"layer {layer}")
            waits.append(time.perf_counter() - start)
            idle(page)
        print(f"layer seen for the {seen} time: median {statistics.median(waits):.2f} s, longest {max(waits):.2f} s")


def long_map(page: Any) -> None:
    """Read a text of 2048 tokens, then go to another of its layers and back: from the click to the drawn map."""
    box = page.get_by_role("textbox", name="Text")
    start = time.perf_counter()
    box.fill(" ".join(["the"] * LONG))
    box.press("Control+Enter")
    page.get_by_text(f"{LONG} tokens", exact=True).wait_for(timeout=WAIT_MS)
    page.wait_for_function(SIDE, arg=LONG, timeout=WAIT_MS)
    print(f"text of {LONG} tokens: read and drawn in {time.perf_counter() - start:.1f} s", end="; ")
    idle(page)
    choice = page.get_by_role("combobox", name="Layer")
    for layer in ("1", "2", "1"):
        choice.click()
        option = page.get_by_role("option", name=layer, exact=True)
        option.wait_for()
        start = time.perf_counter()
        option.click()
        page.evaluate(DRAWN, f"layer {layer}")
        waited = time.perf_counter() - start
        idle(page)
    print(f"its map of a layer seen before in {waited:.1f} s")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["mamba1-english"]))
