"""Which models a page may open: the shipped ones, and folders below the roots that were given at the start."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ssmlens import zoo
from ssmlens.errors import CheckpointError

__all__ = ["DEFAULT_MAX_TOKENS", "DTYPES", "Options", "Source", "folders", "local", "parse", "shipped"]

DTYPES = ("float32", "float64")
DEFAULT_MAX_TOKENS = 512
SEARCH_DEPTH = 3


@dataclass(frozen=True)
class Options:
    """What was given after ``--`` when the app was started.

    Args:
        roots: folders below which local models may be opened; none means shipped models only.
        max_tokens: longest text that the page traces, in tokens.
    """

    roots: tuple[Path, ...] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS


@dataclass(frozen=True)
class Source:
    """One model that may be opened.

    Args:
        name: what the page calls it.
        path: its folder, resolved.
        stamp: names, sizes and times of its files: a changed folder is another model.
    """

    name: str
    path: Path
    stamp: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would end the process; a page shows the sentence instead.
        raise ValueError(f"the app was started with arguments that it does not know: {message}")


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments after ``--``: ``--models DIR`` (repeated) and ``--max-tokens N``.

    Raises:
        ValueError: for an unknown argument, a root that is no folder or a limit below one token.
    """
    parser = _Parser(prog="dashboard.py", add_help=False)
    parser.add_argument("--models", action="append", default=[], metavar="DIR")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS)
    given = parser.parse_args(list(arguments))
    roots = tuple(Path(text).expanduser().resolve() for text in given.models)
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"--models needs an existing folder, got {root}")
    if given.max_tokens < 1:
        raise ValueError(f"--max-tokens is at least 1, got {given.max_tokens}")
    return Options(roots=roots, max_tokens=given.max_tokens)


def shipped(name: str) -> Source:
    """A model of the package. Raises KeyError when there is none of that name."""
    path = zoo.path(name).resolve()
    return Source(name=name, path=path, stamp=_stamp(path))


def local(text: str, roots: Sequence[Path]) -> Source:
    """A folder below one of the roots, named by an absolute path or one relative to a root.

    Links are followed before the check, for the folder and for each of its files, so neither ``..`` nor a
    link leads out.

    Raises:
        CheckpointError: when no root was given, the path leads outside every root, or there is no such folder.
    """
    if not roots:
        raise CheckpointError("no local folders are open: start the app with --models DIR to open those below DIR")
    if not text.strip() or "\0" in text:
        raise CheckpointError("give the name of a folder below one of the model roots")
    inside = [path for root in roots if _is_below(path := (root / text.strip()).resolve(), roots)]
    if not inside:
        # The same sentence whether or not the path exists: the page is no way to look around the disk.
        raise CheckpointError(f"“{text}” is not below a folder that was given with --models")
    for path in inside:
        if os.path.isdir(path):  # Path.is_dir raises for names that no disk takes.
            for file in path.iterdir():
                if not _is_below(file.resolve(), roots):
                    raise CheckpointError(f"“{text}” holds a link that leads outside the model roots: {file.name}")
            return Source(name=text.strip(), path=path, stamp=_stamp(path))
    raise CheckpointError(f"there is no folder “{text}” below the model roots")


def folders(roots: Sequence[Path]) -> list[str]:
    """Names, relative to their root, of the folders with a config.json, at most three levels down."""
    return sorted({name for root in roots for name in _search(root, root, SEARCH_DEPTH)})


def _search(folder: Path, root: Path, depth: int) -> Iterator[str]:
    if (folder / "config.json").is_file():
        yield str(folder.relative_to(root))
    if depth == 0:
        return
    try:
        inner = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except PermissionError:
        return
    for path in inner:
        yield from _search(Path(path), root, depth - 1)


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _stamp(path: Path) -> str:
    if not path.is_dir():
        return ""
    files = sorted((file.name, file.stat()) for file in path.iterdir() if file.is_file())
    return ";".join(f"{name}:{about.st_size}:{about.st_mtime_ns}" for name, about in files)
