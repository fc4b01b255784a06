"""The pages served on a free local port, and a headless Chromium, for tests and for the scripts beside them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["DASHBOARD", "WAIT_MS", "chromium", "idle", "serve"]

DASHBOARD = Path(__file__).parents[2] / "apps" / "dashboard.py"
WAIT_MS = 120_000
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def serve(*arguments: str) -> Iterator[str]:
    """Start the pages with these arguments; gives their address once they answer.

    Raises:
        RuntimeError: with what the server said, when it ended before.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(DASHBOARD), f"--server.port={port}"]
    command += ["--server.headless=true", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    command += ["--browser.gatherUsageStats=false", "--", *arguments]
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
        raise RuntimeError("the server ended before it was ready:\n" + "".join(said))
    # A full pipe would stop the server.
    drain = threading.Thread(target=said.extend, args=(server.stdout,), daemon=True)
    drain.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            # It sometimes waits for a browser that is gone already.
            server.kill()
            server.wait(20)
        drain.join(20)
        server.stdout.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium.

    Raises:
        FileNotFoundError: when there is none on the PATH.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise FileNotFoundError("needs chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


def idle(page: Any) -> None:
    """Wait until the server has nothing left to say to this page."""
    page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')", timeout=WAIT_MS)
