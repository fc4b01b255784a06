"""A folder of tiny models, the page in Streamlit's own test runner, and the page in a real headless browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_mamba1

DASHBOARD = Path(__file__).parents[2] / "apps" / "dashboard.py"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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
    """The page, served on a free local port, with the tiny models as its root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(DASHBOARD), f"--server.port={port}"]
    command += ["--server.headless=true", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    command += ["--browser.gatherUsageStats=false", "--", "--models", str(models)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert server.stdout is not None
    said: list[str] = []
    for line in server.stdout:
        said.append(line)
        if "URL:" in line:
            break
    else:
        pytest.fail("the server ended before it was ready:\n" + "".join(said))
    # A full pipe would stop the server.
    drain = threading.Thread(target=said.extend, args=(server.stdout,), daemon=True)
    drain.start()
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        # It sometimes waits for a browser that is gone already.
        server.kill()
        server.wait(20)
    drain.join(20)
    server.stdout.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None and os.environ.get("CI"):
        pytest.fail("CI needs chromium on the PATH: install it, do not skip this test")
    if path is None:
        pytest.skip("needs chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()
