"""What the pages keep between reruns: models, traces and the numbers drawn from them; by content, and bounded.

A cache key names all that a result depends on: folder, file stamps and dtype for a model; the model's fingerprint and
the token ids for a trace; layer and reduction for a map. Arguments with a leading underscore are no part of a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st
from numpy.typing import NDArray

import ssmlens
from ssmlens.analyses import memory
from ssmlens.apps.sources import Source
from ssmlens.errors import PromptError
from ssmlens.prompt import prepare
from ssmlens.report.numbers import state_norms as norms_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Key",
    "Opened",
    "Reading",
    "attention_map",
    "half_life_table",
    "half_lives",
    "lens",
    "map_table",
    "opened",
    "read",
    "state_norms",
]

MAX_LENSES = 2
MAX_TRACES = 4
MAX_MAPS = 64
MAX_SUMMARIES = 16

Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Opened:
    """One model.

    Args:
        source: where it comes from.
        dtype: its precision.
        lens: the ``ssmlens.Lens``.
    """

    source: Source
    dtype: str
    lens: ssmlens.Lens

    @property
    def key(self) -> str:
        """Names its weights and files; whatever is computed from the model alone is kept under it."""
        return f"{self.lens.fingerprint} {self.source.stamp}"


@dataclass(frozen=True)
class Reading:
    """One traced text.

    Args:
        key: model fingerprint and token ids; whatever is computed from this reading is kept under it.
        trace: the ``ssmlens.Trace``, of this one text.
        opened: the model.
        text: the text as it was typed.
    """

    key: Key
    trace: ssmlens.Trace
    opened: Opened
    text: str

    @property
    def lens(self) -> ssmlens.Lens:
        """The model."""
        return self.opened.lens

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return self.trace.tokens[0]


def opened(source: Source, dtype: str) -> Opened:
    """Open a model, or find it open.

    Raises:
        SsmlensError: when it cannot be opened.
    """
    return Opened(source, dtype, lens(str(source.path), dtype, source.stamp))


def read(model: Opened, text: str, max_tokens: int) -> Reading:
    """Trace a text, or find the trace of the same token ids.

    Raises:
        PromptError: when the text is empty or longer than ``max_tokens`` tokens.
    """
    if not text.strip():
        raise PromptError("the text is empty: type at least one word")
    ids = prepare(text, model.lens.tokenizer, model.lens.vocab_size).ids
    if ids.shape[1] > max_tokens:
        raise PromptError(
            f"the text has {ids.shape[1]} tokens and this page traces at most {max_tokens}: shorten it, "
            "or start the app with a larger --max-tokens"
        )
    key = (model.key, tuple(ids[0].tolist()))
    return Reading(key, _trace(key, model.lens), model, text)


@st.cache_resource(max_entries=MAX_LENSES, show_spinner=False)
def lens(path: str, dtype: str, stamp: str) -> ssmlens.Lens:
    """The model in that folder. The stamp makes a changed folder another model."""
    return ssmlens.load(path, dtype=dtype)


@st.cache_resource(max_entries=MAX_TRACES, show_spinner=False)
def _trace(key: Key, _model: ssmlens.Lens) -> ssmlens.Trace:
    return _model.trace(list(key[1]))


@st.cache_data(max_entries=MAX_MAPS, show_spinner=False)
def attention_map(key: Key, layer: int, view: str, head: int, _trace: ssmlens.Trace) -> NDArray[np.float32]:
    """The map of one layer, (t, s): of one head for the view "head", else that reduction over heads."""
    attention = _trace[layer].recurrence.attention
    chosen = attention.dense(heads=[head])[0, 0] if view == "head" else attention.reduce(view)[0]
    return chosen.float().numpy()


@st.cache_data(max_entries=MAX_SUMMARIES, show_spinner=False)
def half_lives(key: Key, _trace: ssmlens.Trace) -> dict[int, NDArray[np.float64]]:
    """Layer to the half-life of each head in tokens, (h,): of its slowest state where the states differ."""
    slowest = half_life_table(key, _trace).set_index(["layer", "head"])["half_life"]
    return {layer: slowest[layer].to_numpy() for layer in _trace.mixers}


@st.cache_data(max_entries=MAX_SUMMARIES, show_spinner=False)
def half_life_table(key: Key, _trace: ssmlens.Trace) -> pd.DataFrame:
    """One line per layer and head: half-life in tokens, of the head's slowest state where its states differ."""
    result = memory.half_life(_trace)
    return result.table().groupby(["layer", "head"])[result.name].max().rename("half_life").reset_index()


def map_table(matrix: NDArray[np.float32], tokens: list[str]) -> pd.DataFrame:
    """One line per pair t >= s of a map (t, s): both positions, both tokens, the value."""
    import pandas as pd

    t, s = np.tril_indices(len(matrix))
    names = np.array(tokens, dtype=object)
    return pd.DataFrame({"t": t, "s": s, "reads": names[t], "read from": names[s], "value": matrix[t, s]})


@st.cache_data(max_entries=MAX_SUMMARIES, show_spinner=False)
def state_norms(key: Key, _trace: ssmlens.Trace) -> dict[int, NDArray[np.float64]]:
    """Layer to the Euclidean norm of its whole state after each token, (t,)."""
    return {mixer.layer: norms_of(mixer.recurrence)[0] for mixer in _trace}
