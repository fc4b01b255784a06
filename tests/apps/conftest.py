"""A folder of tiny models, the page in Streamlit's own test runner, and the page in a real headless browser."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import DASHBOARD, chromium, serve
from tiny import save_tiny, tiny_mamba1


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with the folders ``one`` (Mamba-1) and ``two`` (Mamba-2)."""
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "one", tiny_mamba1())
    save_tiny(root / "two")
    return root


@pytest.fixture
def page(models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a page in Streamlit's test runner: ``page(*arguments, at="attention", text=...)``, not run yet."""
    import streamlit as st
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    st.cache_data.clear()
    st.cache_resource.clear()

    def make(*arguments: str, at: str = "", **address: str) -> AppTest:
        given = arguments or ("--models", str(models))
        monkeypatch.setattr(sys, "argv", [str(DASHBOARD), *given])
        app = AppTest.from_file(str(DASHBOARD), default_timeout=60)
        for name, value in address.items():
            app.query_params[name] = value
        # Its own `switch_page` knows pages by file; ours are functions, known by their place in the address.
        app._page_hash = calc_hash(at) if at else ""
        return app

    return make


@pytest.fixture(scope="session")
def page_url(models: Path) -> Iterator[str]:
    """The pages, served on a free local port, with the tiny models as their root."""
    with serve("--models", str(models)) as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        if os.environ.get("CI"):
            pytest.fail("CI needs chromium on the PATH: install it, do not skip this test")
        pytest.skip("needs chromium on the PATH")
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    """One window for all tests of a file, so that the scripts of the pages are read once."""
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
