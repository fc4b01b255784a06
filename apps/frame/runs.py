"""Texts too long for an address, kept by an id that stands in the address instead."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import streamlit as st

__all__ = ["MAX_CHARACTERS", "MAX_RUNS", "Runs", "kept"]

MAX_RUNS = 256
MAX_CHARACTERS = 8_000_000


class Runs:
    """Texts by id, the longest unused dropped first. The id is a digest: only who knows the link finds the text."""

    def __init__(self, most: int = MAX_RUNS, characters: int = MAX_CHARACTERS) -> None:
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        self._most = most
        self._characters = characters

    def keep(self, text: str) -> str:
        """Keep a text; returns its id, the same for the same text."""
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
        with self._lock:
            self._texts[name] = text
            self._texts.move_to_end(name)
            # The newest one always stays, however long.
            while len(self._texts) > 1 and (
                len(self._texts) > self._most or sum(map(len, self._texts.values())) > self._characters
            ):
                self._texts.popitem(last=False)
        return name

    def find(self, name: str) -> str | None:
        """The text of this id, None when it is not kept (any more)."""
        with self._lock:
            if name in self._texts:
                self._texts.move_to_end(name)
            return self._texts.get(name)


@st.cache_resource(show_spinner=False)
def kept() -> Runs:
    """The texts of this server, for as long as it runs."""
    return Runs()
