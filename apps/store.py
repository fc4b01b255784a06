"""What the pages keep between reruns: models, traces and the numbers drawn from them; by content, and bounded.

A cache key names all that a result depends on: folder, file stamps and dtype for a model; the model's fingerprint and
the token ids for a trace; layer and reduction for a map. Arguments with a leading underscore are no part of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import streamlit as st
from numpy.typing import NDArray

import ssmlens
from ssmlens.analyses import memory
from ssmlens.apps.frame import garbage
from ssmlens.apps.sources import Source
from ssmlens.attribution import Attribution, PairPath, attribute, pair_path
from ssmlens.errors import PromptError
from ssmlens.interventions import LensReading, logit_lens, tuned_lens
from ssmlens.prompt import prepare
from ssmlens.report.numbers import Prediction, predictions
from ssmlens.report.numbers import state_norms as norms_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LENSES",
    "Key",
    "Opened",
    "Prediction",
    "Reading",
    "attention_map",
    "attribution",
    "candidates",
    "decoder",
    "dropped_with_models",
    "half_life_table",
    "half_lives",
    "lens",
    "lens_reading",
    "lens_table",
    "map_table",
    "opened",
    "pair",
    "read",
    "state_course",
    "state_norms",
    "verify_table",
    "without",
]

MAX_LENSES = 2
MAX_TRACES = 4
MAX_MAPS = 64
MAX_SUMMARIES = 16
MAX_LENS_READINGS = 4
MAX_ATTRIBUTIONS = 64

MAX_TOKEN_CHARACTERS = 64
"""More characters than this for each allowed token are refused unread."""

LENSES: dict[str, Callable[[ssmlens.Trace], LensReading]] = {"logit lens": logit_lens, "tuned lens": tuned_lens}

Key = tuple[str, tuple[int, ...]]

Cached = TypeVar("Cached")


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
    # Cutting millions of characters into tokens takes seconds from everybody, only to refuse them.
    if len(text) > max_tokens * MAX_TOKEN_CHARACTERS:
        raise PromptError(
            f"the text has {len(text)} characters and this page traces at most {max_tokens} tokens: shorten it, or "
            "start the app with a larger --max-tokens"
        )
    ids = prepare(text, model.lens.tokenizer, model.lens.vocab_size).ids
    if ids.shape[1] > max_tokens:
        raise PromptError(
            f"the text has {ids.shape[1]} tokens and this page traces at most {max_tokens}: shorten it, "
            "or start the app with a larger --max-tokens"
        )
    key = (model.key, tuple(ids[0].tolist()))
    return Reading(key, _trace(key, model.lens), model, text)


_WITH_MODELS: list[Any] = []


def dropped_with_models(cached: Cached) -> Cached:
    """A cache whose entries hold the weights of a model, such as traces: a model that is dropped takes them along."""
    _WITH_MODELS.append(cached)
    return cached


def _released(model: ssmlens.Lens) -> None:
    """What is dropped must not live on in what was computed with it."""
    for cached in _WITH_MODELS:
        cached.clear()
    garbage.moved()


@st.cache_resource(max_entries=MAX_LENSES, show_spinner=False, on_release=_released)
def lens(path: str, dtype: str, stamp: str) -> ssmlens.Lens:
    """The model in that folder. The stamp makes a changed folder another model."""
    garbage.moved()
    return ssmlens.load(path, dtype=dtype)


@dropped_with_models
@st.cache_resource(max_entries=MAX_TRACES, show_spinner=False)
def _trace(key: Key, _model: ssmlens.Lens) -> ssmlens.Trace:
    return _model.trace(list(key[1]))


@st.cache_data(max_entries=MAX_MAPS, show_spinner=False)
def attention_map(key: Key, layer: int, view: str, head: int, _trace: ssmlens.Trace) -> NDArray[np.float32]:
    """The map of one layer, (t, s): of one head for the view "head", else that reduction over heads."""
    attention = _trace[layer].recurrence.attention
    chosen = attention.dense(heads=[head])[0, 0] if view == "head" else attention.reduce(view)[0]
    return chosen.float().numpy()


@st.cache_resource(max_entries=MAX_MAPS, show_spinner=False)
def pair(key: Key, layer: int, target: int, source: int, _trace: ssmlens.Trace) -> PairPath:
    """How one token reaches another in one layer."""
    return pair_path(_trace[layer], target, source)


@st.cache_resource(max_entries=MAX_LENS_READINGS, show_spinner=False)
def lens_reading(key: Key, name: str, _trace: ssmlens.Trace) -> LensReading:
    """What the "logit lens" or the "tuned lens" reads off every layer's stream."""
    return LENSES[name](_trace)


@st.cache_data(max_entries=MAX_SUMMARIES, show_spinner=False)
def lens_table(key: Key, name: str, _trace: ssmlens.Trace, _lens: ssmlens.Lens) -> pd.DataFrame:
    """One line per layer and position: the top next token, its probability and the divergence from the final one."""
    return lens_reading(key, name, _trace).table(decode=decoder(_lens))


@st.cache_resource(max_entries=MAX_ATTRIBUTIONS, show_spinner=False)
def attribution(key: Key, method: str, target: int | None, position: int, _lens: ssmlens.Lens) -> Attribution:
    """The scores of every token for one logit; the model's top token when ``target`` is None."""
    return attribute(_lens, list(key[1]), method, target, position)


@st.cache_data(max_entries=MAX_SUMMARIES, show_spinner=False)
def candidates(
    key: Key, position: int, _trace: ssmlens.Trace, _lens: ssmlens.Lens, most: int = 10
) -> tuple[Prediction, ...]:
    """The likeliest tokens after a position, likeliest first."""
    return predictions(_trace, decode=decoder(_lens), most=most, position=position)


@st.cache_data(max_entries=MAX_SUMMARIES, show_spinner=False)
def without(key: Key, position: int, token: int, _lens: ssmlens.Lens) -> float | None:
    """Probability of a next token after the text with one of its tokens taken out; None for a text of one token."""
    ids = [x for i, x in enumerate(key[1]) if i != position]
    if not ids:
        return None
    likely = predictions(_lens.trace(ids, layers=[]), most=_lens.vocab_size)
    return next(each.probability for each in likely if each.id == token)


@st.cache_data(max_entries=MAX_MAPS, show_spinner=False)
def state_course(key: Key, layer: int, head: int | None, _trace: ssmlens.Trace) -> pd.DataFrame:
    """One line per token for the state of one head, or of all heads together when ``head`` is None."""
    if head is None:
        return memory.state_norm(_trace[layer], reduce="pooled").table()
    table = memory.state_norm(_trace[layer]).table()
    return table[table["head"] == head].reset_index(drop=True)


def verify_table(trace: ssmlens.Trace) -> pd.DataFrame:
    """One line per traced layer: its sizes and its reconstruction error."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "layer": mixer.layer,
                "family": mixer.family,
                "heads": mixer.recurrence.n_heads,
                "channels per head": mixer.recurrence.head_dim,
                "states per channel": mixer.recurrence.d_state,
                # As text: a table would round 4e-07 to 0.
                "reconstruction error": f"{mixer.reconstruction_error:.1e}",
                "within tolerance": "yes" if mixer.reconstruction_error <= trace.tolerance else "NO",
            }
            for mixer in trace
        ]
    )


def decoder(lens: ssmlens.Lens) -> Callable[[Sequence[int]], str] | None:
    """Token ids to text, None without a tokenizer."""
    return None if lens.tokenizer is None else lens.tokenizer.decode


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
