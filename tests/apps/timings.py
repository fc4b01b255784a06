"""How long a visitor waits, in headless Chromium: ``python tests/apps/timings.py [MODEL]``.

Prints, from the start of the server's process: when the inputs stand, when the first map is drawn, and when every
figure is; then the time from a click on another layer to its map, for layers seen for the first and the second time.
The machine's load is printed beside them: these are wall times of two busy processes.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "apps" / "dashboard.py"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WAIT_MS = 120_000
DRAWN = """(title) => new Promise((done) => {
  const canvas = () => [...document.querySelectorAll("*")].map((e) => e.shadowRoot?.querySelector("canvas[data-drawn]"))
    .find(Boolean);
  const look = () => canvas()?.dataset.drawn.includes(title) ? done(true) : requestAnimationFrame(look);
  look();
})"""


def main(model: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, socket.socket() as free:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "streamlit", "run", str(DASHBOARD), f"--server.port={port}"]
        start = time.perf_counter()
        server = subprocess.Popen([*command, "--server.headless=true"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            next(line for line in server.stdout if "URL:" in line)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"http://localhost:{port}/?model={model}")
            cold_start(page, start)
            layer_changes(page)
        finally:
            browser.close()
            server.kill()
            server.wait(20)
    print(f"load average of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def cold_start(page: Any, start: float) -> None:
    page.get_by_role("textbox", name="Text").wait_for(timeout=WAIT_MS)
    print(f"inputs {time.perf_counter() - start:.1f} s", end=", ")
    page.wait_for_selector("canvas[data-drawn]", timeout=WAIT_MS)
    print(f"first map {time.perf_counter() - start:.1f} s", end=", ")
    page.wait_for_selector(".js-plotly-plot >> nth=2", timeout=WAIT_MS)
    print(f"every figure {time.perf_counter() - start:.1f} s after the start of the server")


def layer_changes(page: Any) -> None:
    choice = page.get_by_role("combobox", name="Layer")
    choice.click()
    layers = page.get_by_role("option").all_text_contents()
    choice.press("Escape")
    page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')", timeout=WAIT_MS)
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
        print(f"layer seen for the {seen} time: median {statistics.median(waits):.2f} s, longest {max(waits):.2f} s")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["mamba1-english"]))
