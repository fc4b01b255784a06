"""What the commands print and write: tables, JSON, progress, and files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmlens.errors import SsmlensError

__all__ = ["bar", "check_target", "print_json", "print_table", "progress", "whole"]


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int] = (0,)) -> None:
    """Columns aligned with spaces: the same on a terminal and in a pipe, and never cut.

    Args:
        head: names of the columns.
        rows: cells; floats are printed with three digits.
        left: columns that are aligned to the left.
    """
    table = [[str(x) for x in head], *([_cell(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        cells = (x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths)))
        print("  ".join(cells).rstrip())


def _cell(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)


def print_json(data: Any) -> None:
    """Strict JSON on one line of stdout; numbers that JSON lacks become the words "nan", "inf" and "-inf"."""
    print(json.dumps(_plain(data), allow_nan=False, ensure_ascii=False))


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    if isinstance(x, bool | int | float | str) or x is None:
        return x
    return str(x)


def check_target(path: Path | None, suffixes: Sequence[str]) -> None:
    """Refuse an output that could not be written, before anything is computed.

    Raises:
        SsmlensError: for an unknown suffix, a folder that does not exist or one that cannot be written to.
    """
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise SsmlensError(f"cannot write {path}: choose a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise SsmlensError(f"cannot write {path}: it is a folder")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise SsmlensError(f"cannot write {path}: the folder {folder} does not exist")
    if path.exists() and not os.access(path, os.W_OK):
        raise SsmlensError(f"cannot write {path}: permission denied")
    probe = folder / f".{path.stem}.{os.getpid()}.probe"
    try:
        # Access rights do not tell: a file system may be read-only, and an administrator has every right.
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SsmlensError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` when the block ends well, and is removed otherwise."""
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def bar(share: float, width: int = 20) -> str:
    """A bar of ``share`` of the width, in a character that stdout can show."""
    block = "█"
    try:
        block.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        block = "#"
    return block * max(0, min(width, round(share * width)))


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that shows a bar on a terminal's stderr, and one line per step elsewhere.

    The first step prints no line: when it fails, the error stays the only sentence on stderr.
    """
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("", total=None)
            yield lambda what, done, total: shown.update(task, description=what, completed=done, total=total)
    else:
        yield _line


def _line(what: str, done: int, total: int) -> None:
    if done and done < total:
        print(f"{what} ({done} of {total} done)", file=sys.stderr)
