"""Python's garbage collector, kept away from what a server never gives back.

Streamlit collects garbage after every rerun, and each time the collector looks through all objects that may be part of
a cycle: with torch and transformers imported half a million, a quarter of a second in which every visitor waits.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["moved", "settled"]

_moved = True


def moved() -> None:
    """A model came or went: what was set aside is looked through again, so that nothing of it stays by mistake."""
    global _moved
    _moved = True
    gc.unfreeze()


@contextmanager
def settled() -> Iterator[None]:
    """Around a page. After one that imported libraries or saw models come or go, all that is there is set aside.

    While such a page is drawn nothing is collected: imports make a million objects and no garbage.
    """
    global _moved
    if _moved:
        gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if _moved:
            _moved = False
            gc.collect()
            gc.freeze()
