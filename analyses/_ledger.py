"""Finished parts of a long run, kept on disk, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssmlens.analyses import _result_io as io
from ssmlens.errors import SsmlensError

__all__ = ["Ledger", "Progress"]

Progress = Callable[[int, int], None]
"""Called with the parts done and the parts there are, after each part of a long run."""

FORMAT = "ssmlens ledger 1"


class Ledger:
    """A file with one line of JSON for each finished part; without a path, kept in memory alone.

    Each part is on the disk before `put` returns. A last line that was cut off is dropped and done again.

    Args:
        path: the file; made when it does not exist, and continued when it does.
        settings: what the parts depend on. A file written for others is refused, not mixed.

    Raises:
        SsmlensError: the file holds another run, or is no ledger.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.parts: dict[str, Any] = {}
        header = {"format": FORMAT, "settings": io.encode(io.plain(dict(settings)))}
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._read(header)
        else:
            if not self.path.absolute().parent.is_dir():
                raise SsmlensError(f"the folder {self.path.parent} does not exist: create it first")
            self._append(header)

    def __contains__(self, key: str) -> bool:
        return key in self.parts

    def __len__(self) -> int:
        return len(self.parts)

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The part ``key``, as JSON holds it; computed and kept when it is not there yet.

        Args:
            key: name of the part.
            compute: returns numbers, words, lists and dicts; infinities and NaN stay what they are.
        """
        if key not in self.parts:
            self.put(key, compute())
        return self.parts[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a finished part."""
        encoded = io.encode(io.plain(value))
        if self.path is not None:
            self._append({"key": key, "value": encoded})
        self.parts[key] = io.decode(encoded)

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, header: Mapping[str, Any]) -> None:
        assert self.path is not None
        whole = self.path.read_bytes()
        complete, _, rest = whole.rpartition(b"\n")
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
            found = lines[0] if lines else {}
            parts = {line["key"]: io.decode(line["value"]) for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise SsmlensError(f"{self.path} does not hold a run that can go on: choose another file") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise SsmlensError(f"{self.path} does not hold a run that can go on: choose another file")
        given = header["settings"]
        differing = sorted(k for k in {*given, *found["settings"]} if given.get(k) != found["settings"].get(k))
        if differing:
            raise SsmlensError(
                f"{self.path} holds a run with other settings ({', '.join(differing)}): choose another file"
            )
        if rest:
            with self.path.open("r+b") as file:
                file.truncate(len(complete) + 1)
        self.parts.update(parts)
