"""What the pages of the group Act keep: each intervention's result, under everything that it depends on, bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from ssmlens.apps import store
from ssmlens.interventions import (
    Contrast,
    Knockout,
    Observed,
    Patch,
    Patching,
    Sides,
    StateEdit,
    Steered,
    contrast,
    knockout,
    knockout_leak,
    observe,
    patch,
    steer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    import pandas as pd

    import ssmlens

__all__ = [
    "MAX_RUNS",
    "Change",
    "Edit",
    "Patchings",
    "Sided",
    "both_courses",
    "both_maps",
    "continued",
    "default_source",
    "knocked",
    "leaks",
    "observed",
    "other_token",
    "patched",
    "patchings",
    "steered",
    "steering",
    "top",
]

MAX_RUNS = 6
"""Logits of whole texts are large."""

MAX_OBSERVED = 3
"""Two traces each."""

MAX_SIDES = 24
MAX_PATCHINGS = 8
MAX_LEAKS = 32

Edit = tuple[int, int, str, float, int | None]
"""Layer, step, "scale", "add" or "set", its number, and the head or None for all."""


Change = Knockout | Patch | StateEdit

Sided = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""One map of both runs, and their difference, (t, s) each."""


def default_source(reading: store.Reading) -> int:
    """The token that a page starts with: the strongest one of the exact decomposition, or the first one."""
    from ssmlens.apps.read.suits import attributable

    last = len(reading.tokens) - 1
    if attributable(reading.lens):
        return 0
    found = store.attribution(reading.key, "decompose", None, last, reading.lens).strongest()
    return found if found < last else 0


def other_token(key: store.Key, position: int) -> int | None:
    """Id of the last token of the text that differs from the one at a position; None where all are the same."""
    ids = key[1]
    return next((i for i in ids[::-1] if i != ids[position]), None)


@st.cache_resource(max_entries=MAX_RUNS, show_spinner=False)
def knocked(
    key: store.Key,
    sources: tuple[int, ...],
    target: int | None,
    layers: tuple[int, ...] | None,
    paths: tuple[str, ...],
    decay: str,
    _trace: ssmlens.Trace,
    _lens: ssmlens.Lens,
) -> Contrast:
    """The model's own run beside the one in which the target, or every later token, cannot read the sources."""
    after = knockout(_lens, list(key[1]), list(sources), target, layers, paths, decay)
    return contrast(_trace.logits, after)


@st.cache_data(max_entries=MAX_LEAKS, show_spinner=False)
def leaks(key: store.Key, source: int, layers: tuple[int, ...] | None, _lens: ssmlens.Lens) -> pd.DataFrame:
    """What is left of one token's influence under every kind of knockout."""
    return knockout_leak(_lens, list(key[1]), source, layers=layers)


class Patchings:
    """What was patched, by everything that it depends on, the longest unused dropped first.

    Not a cache of Streamlit's: those forbid to draw the progress, and a page that draws it can be left meanwhile.
    """

    def __init__(self, most: int = MAX_PATCHINGS) -> None:
        self._found: OrderedDict[Hashable, Patching] = OrderedDict()
        self._lock = threading.Lock()
        self._most = most

    def get(self, key: Hashable, make: Callable[[], Patching]) -> Patching:
        """What is kept under this key, made where it is not; kept only once it is whole."""
        with self._lock:
            found = self._found.get(key)
        if found is None:
            found = make()
        with self._lock:
            self._found[key] = found
            self._found.move_to_end(key)
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        return found


@st.cache_resource(show_spinner=False)
def patchings() -> Patchings:
    """What this server keeps."""
    return Patchings()


def patched(
    key: store.Key,
    corrupt: tuple[int, ...] | str,
    kind: str,
    metric: str,
    positions: tuple[int, ...],
    position: int,
    layers: tuple[int, ...],
    lens: ssmlens.Lens,
    progress: Callable[[int, int], None],
) -> Patching:
    """Every layer at these positions, patched one by one."""
    sites = [(kind, layer, t) for layer in layers for t in positions]
    other = corrupt if isinstance(corrupt, str) else list(corrupt)
    return patchings().get(
        (key, corrupt, kind, metric, positions, position),
        lambda: patch(lens, list(key[1]), other, sites, metric, position=position, progress=progress),
    )


def top(found: Patching, decode: Callable[[Sequence[int]], str] | None) -> str:
    """The likeliest token after the position that the metric reads, in the corrupt run."""
    runs = contrast(found.corrupt_logits, found.corrupt_logits)
    return str(runs.table(int(found.settings["position"]), 1, decode)["token"].iloc[0])


@st.cache_resource(max_entries=MAX_RUNS, show_spinner=False)
def steered(key: store.Key, edit: Edit, read: str, _trace: ssmlens.Trace, _lens: ssmlens.Lens) -> Contrast:
    """The model's own run beside the one with its state edited."""
    return contrast(_trace.logits, steer(_lens, list(key[1]), steering(edit), read=read).logits)


@st.cache_resource(max_entries=2 * MAX_RUNS, show_spinner=False)
def continued(key: store.Key, edit: Edit, read: str, new_tokens: int, _lens: ssmlens.Lens) -> Steered:
    """The run that goes on after the text."""
    return steer(_lens, list(key[1]), steering(edit), new_tokens=new_tokens, read=read)


def steering(edit: Edit) -> StateEdit:
    """The library's form of an edit."""
    layer, step, how, number, head = edit
    change: dict[str, Any] = {how: number}
    return StateEdit(layer, step, heads=None if head is None else [head], **change)


@store.dropped_with_models
@st.cache_resource(max_entries=MAX_OBSERVED, show_spinner=False)
def observed(
    key: store.Key, change: str, prompt: tuple[int, ...] | str, read: str, _change: Change, _lens: ssmlens.Lens
) -> Observed:
    """Both runs of a prompt, without and with the change that the string names in full."""
    return observe(_lens, prompt if isinstance(prompt, str) else list(prompt), _change, read=read)


@st.cache_data(max_entries=MAX_SIDES, show_spinner=False)
def both_maps(about: tuple[Any, ...], layer: int, how: str, _found: Observed) -> Sided:
    """The implicit attention of one layer in both runs."""
    sides = _found.attention(layer, how)
    before, after, difference = (x[0].float().cpu().numpy() for x in (sides.before, sides.after, sides.difference))
    return before, after, difference


@st.cache_data(max_entries=MAX_SIDES, show_spinner=False)
def both_courses(
    about: tuple[Any, ...], what: str, layer: int, token: int, position: int, _found: Observed
) -> pd.DataFrame:
    """Numbers of both runs, one line for each token or layer.

    Args:
        about: names both runs.
        what: "states", "lens" or "attribution".
        layer: whose states.
        token: whose logit the lens and the attribution are about.
        position: after which token.
    """
    import pandas as pd

    sides: Sides = {
        "states": lambda: _found.state_norm(layer),
        "lens": lambda: _found.lens(token, position),
        "attribution": lambda: _found.attribution(token, position),
    }[what]()
    columns = {"before": sides.before, "after": sides.after, "difference": sides.difference}
    if what == "lens":
        return pd.DataFrame({"layer": range(len(sides.before)), **{k: x[:, 0].numpy() for k, x in columns.items()}})
    tokens = _found.before.tokens[0]
    return pd.DataFrame(
        {"position": range(len(tokens)), "token": tokens, **{k: x[0].numpy() for k, x in columns.items()}}
    )
