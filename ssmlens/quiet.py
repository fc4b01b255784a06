"""transformers without its progress bars and advice on standard error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_transformers"]

_LOCK = threading.Lock()
_INSIDE: list[tuple[int, bool]] = []
"""One entry per thread that is inside; each holds the settings that the first one found."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors are logged inside; the former settings come back when the last thread leaves."""
    from transformers.utils import logging

    with _LOCK:
        former = _INSIDE[0] if _INSIDE else (logging.get_verbosity(), logging.is_progress_bar_enabled())
        _INSIDE.append(former)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.pop()
            if not _INSIDE:
                level, bars = former
                logging.set_verbosity(level)
                if bars:
                    logging.enable_progress_bar()
