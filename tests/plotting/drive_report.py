"""Open a report in headless Chromium, use it, and print what was seen as JSON: ``python drive_report.py FILE``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]

STATE = """() => ({
  reader: document.getElementById("reader").textContent,
  framed: [...document.querySelectorAll(".tok.reader")].map((x) => Number(x.dataset.i)),
  later: document.querySelectorAll(".tok.later").length,
  negative: document.querySelectorAll(".tok.n").length,
  value: document.getElementById("value").textContent,
  distance: document.getElementById("distance").textContent,
  low: document.getElementById("low").textContent,
  pressed: [...document.querySelectorAll(".thumbs [aria-pressed=true]")].map((x) => x.dataset.layer),
  scroll: document.documentElement.scrollWidth,
  width: document.documentElement.clientWidth,
})"""

CORNER = """() => {
  const canvas = document.getElementById("map");
  return [...canvas.getContext("2d").getImageData(canvas.width - 3, 3, 1, 1).data].slice(0, 3);
}"""


def use(page: Page) -> dict[str, object]:
    """Everything a reader can do, once."""
    seen: dict[str, object] = {"first": page.evaluate(STATE)}
    page.select_option("#layer", "1")
    page.click('.tok[data-i="20"]')
    page.hover('.tok[data-i="4"]')
    seen["chosen"] = page.evaluate(STATE)
    page.focus("#cursor")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    seen["keys"] = page.evaluate(STATE)
    page.select_option("#how", "norm")
    seen["norm"] = page.evaluate(STATE)
    light = page.evaluate(CORNER)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(50)
    seen["blank"] = {"light": light, "dark": page.evaluate(CORNER)}
    page.focus("#norms svg")
    page.keyboard.press("ArrowRight")
    seen["chart"] = page.text_content("#normvalue")
    return seen


def main(path: Path) -> None:
    """Drive one browser; print JSON on standard output."""
    requests: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.resolve().as_uri())
        seen = use(page)
        browser.close()
    print(json.dumps({"requests": requests, "errors": errors, **seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
