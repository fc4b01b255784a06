"""A picture of every page in both themes: ``python tests/apps/screenshots.py FOLDER [MODEL]``, to be looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from serving import WAIT_MS, chromium, idle, serve

from ssmlens.apps.frame import pages

WIDTH, HEIGHT, TALLEST = 1280, 800, 2600
# What stands on a page once its first figure is drawn.
DRAWN = "[data-drawn], .js-plotly-plot, [data-testid=stDataFrame], [data-testid=stAlert]"


def main(folder: str, model: str = "mamba1-english") -> None:
    """Write ``PAGE-THEME.png`` into the folder."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    listed = [page for found in pages.groups().values() for page in found]
    with serve() as url, chromium() as browser:
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)
            view = context.new_page()
            for i, page in enumerate(listed):
                view.goto(f"{url}/{page.path if i else ''}?model={model}")
                shoot(view, out / f"{page.path}-{theme}.png", page.title)
            context.close()


def shoot(view: Any, path: Path, title: str) -> None:
    """One picture, as tall as the page."""
    view.get_by_role("heading", name=title, exact=True, level=2).wait_for(timeout=WAIT_MS)
    view.wait_for_selector(DRAWN, state="visible", timeout=WAIT_MS)
    idle(view)
    tall = view.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    view.set_viewport_size({"width": WIDTH, "height": min(tall, TALLEST)})
    # Figures lay themselves out anew after the window has changed; nothing tells when they are done.
    view.wait_for_timeout(800)
    view.screenshot(path=path)
    view.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
