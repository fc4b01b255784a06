"""``ssmlens report``, ``models`` and ``app``: pages to look at."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import SsmlensError

__all__ = ["app", "models", "report"]

_FIRST_PORT, _LAST_PORT = 1, 65535
_PATIENCE_S = 5.0


def report(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    out: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page; by default it names the model.")] = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Write one self-contained HTML page about what the model remembers of a text; progress goes to stderr."""
    output.check_target(out, (".html", ".htm"))
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    from ssmlens import report as pages

    with output.progress(quiet=json) as tell:
        tell("forward pass", 0, 1)
        found = pages.check_length(lens.trace(prompt))
        decode = None if lens.tokenizer is None else lens.tokenizer.decode
        html = pages.build(found, title=title, decode=decode, progress=tell, lens=lens)
    pages.write(out, html)
    good = all(error <= found.tolerance for error in found.reconstruction_error.values())
    if json:
        size = len(html.encode("utf-8"))
        name = found.settings["model"]
        output.print_json({"out": str(out), "bytes": size, "model": name, "verified": good})
        return
    print(f"wrote {out}" if good else f"wrote {out}; some layer was rebuilt with an error above the tolerance")


def models(json: o.Json = False) -> None:
    """List the shipped models with a line each."""
    from ssmlens import zoo

    listed = [
        {"name": name, "about": _first_sentence(zoo.card(name)), "path": str(zoo.path(name))} for name in zoo.names()
    ]
    if json:
        output.print_json(listed)
        return
    output.print_table(("model", ""), [(x["name"], x["about"]) for x in listed], left=(0, 1))


def app(
    port: Annotated[int, typer.Option(help="Port on localhost.")] = 8501,
    models: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Also offer the model folders below DIR; repeatable.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest text that the page traces; default: 512 tokens.")
    ] = None,
    headless: Annotated[bool, typer.Option("--headless", help="Do not open a browser window.")] = False,
) -> int:
    """Start the interactive page on localhost."""
    if not _FIRST_PORT <= port <= _LAST_PORT:
        raise SsmlensError(f"--port is {_FIRST_PORT} to {_LAST_PORT}, got {port}")
    if max_tokens is not None and max_tokens < 1:
        raise SsmlensError(f"--max-tokens is at least 1, got {max_tokens}")
    roots = [str(folder.resolve()) for folder in models or []]
    for folder in models or []:
        if not folder.is_dir():
            raise SsmlensError(f"--models needs an existing folder, got {folder}")
    return _serve(_app_command(port, roots, max_tokens, headless))


def _serve(command: Sequence[str]) -> int:
    """Run the page's server until it ends, and end it whenever this process is told to end."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    kept = {number: signal.signal(number, end) for number in numbers}
    try:
        with subprocess.Popen(command) as server:
            try:
                return server.wait()
            finally:
                if server.poll() is None:
                    _end(server)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        # It sometimes waits for a browser that is gone already.
        server.kill()


def _app_command(port: int, roots: list[str], max_tokens: int | None, headless: bool) -> list[str]:
    from importlib import resources

    page = resources.files("ssmlens.apps").joinpath("dashboard.py")
    command = [sys.executable, "-m", "streamlit", "run", str(page), f"--server.port={port}"]
    command += ["--server.address=127.0.0.1", "--browser.gatherUsageStats=false", "--server.fileWatcherType=none"]
    command += ["--server.showEmailPrompt=false"]
    command += ["--server.headless=true"] if headless else []
    extra = [part for root in roots for part in ("--models", root)]
    extra += [] if max_tokens is None else ["--max-tokens", str(max_tokens)]
    return [*command, "--", *extra] if extra else command


def _first_sentence(card: str) -> str:
    """The first sentence of a card's text, front matter, headings and tables left out."""
    body = card.split("---\n", 2)[2] if card.startswith("---\n") and card.count("---\n") > 1 else card
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
    first = next((text for text in paragraphs if text and text[0] not in "#|<!-"), "")
    return re.split(r"(?<=[.:;])\s", first)[0].rstrip(".:;")
