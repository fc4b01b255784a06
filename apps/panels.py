"""One function per panel; each is a fragment, so that its controls redraw it without touching the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

import streamlit as st

from ssmlens.apps import heatmap, store, wording
from ssmlens.errors import SsmlensError
from ssmlens.plotting import Caption, pages
from ssmlens.plotting.labels import label

__all__ = ["attention", "error_badge", "half_lives", "state_norms"]

LAST = -1
"""The target token that follows the end of the text."""

MAP = "map"
_TOKEN_CHARACTERS = 24

P = ParamSpec("P")


def _panel(draw: Callable[P, None]) -> Callable[P, None]:
    """A fragment that says in a sentence what it cannot show, and leaves the other panels alone."""

    @functools.wraps(draw)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except SsmlensError as error:
            st.error(wording.sentence(error))

    return st.fragment(guarded)


def error_badge(reading: store.Reading) -> None:
    """The largest reconstruction error as a number, judged by the tolerance; each layer's own in a popover."""
    trace = reading.trace
    errors = trace.reconstruction_error
    # A NaN compares false with everything: it must never look like a small error.
    good = all(error <= trace.tolerance for error in errors.values())
    worst = max(errors.values(), key=lambda error: (error != error, error))
    words = f"Reconstruction error {worst:.1e}, {'within' if good else 'ABOVE'} tolerance {trace.tolerance:.0e}"
    settings = trace.settings
    with st.container(horizontal=True, vertical_alignment="center"):
        st.badge(words, icon=":material/check:" if good else ":material/warning:", color="green" if good else "red")
        st.badge(f"{len(reading.tokens)} tokens", color="gray")
        st.badge(f"{settings['dtype']} on {settings['device']}", color="gray")
        with st.popover("Error of each layer", type="tertiary"):
            st.table([{"layer": layer, "reconstruction error": f"{e:.1e}"} for layer, e in errors.items()])
            st.caption(wording.ERROR)
    if not good:
        st.error("The figures below do not describe this model well enough to be relied on.")


@_panel
def attention(reading: store.Reading, dark: bool) -> None:
    """The implicit-attention map of one layer, and what one token reads."""
    st.subheader("Implicit attention", anchor=False)
    layer, view, head, target = _choose(reading)
    caption = Caption.of(reading.trace, layer, f"head {head}" if view == "head" else view)
    matrix = store.attention_map(reading.key, layer, view, head, reading.trace)
    row = len(reading.tokens) - 1 if target == LAST else target
    st.markdown(f"**Layer {layer}, {caption.reduction_words}**: rows read, columns are read from")
    heatmap.show(matrix, reading.tokens, caption, target=row, dark=dark, key=MAP, on_pick=_picked)
    _explain(replace(wording.MAP, means=f"{wording.MAP.means} {wording.SIGNED[caption.signed]}"))
    st.markdown(f"**What token {_position(row, reading.tokens)} reads**")
    _draw(pages.token_row(matrix[row, : row + 1], reading.tokens[: row + 1], caption, reader=row, dark=dark), "row")
    _explain(wording.ROW)


@_panel
def half_lives(reading: store.Reading) -> None:
    """Half-life of every head of every layer."""
    st.subheader("Half-lives", anchor=False)
    _draw(pages.half_life_map(store.half_lives(reading.key, reading.trace), Caption.of(reading.trace)), "half_lives")
    _explain(wording.HALF_LIFE, columns=1)


@_panel
def state_norms(reading: store.Reading) -> None:
    """Size of each layer's state after each token."""
    st.subheader("State norms", anchor=False)
    norms = store.state_norms(reading.key, reading.trace)
    _draw(pages.state_norms(norms, reading.tokens, Caption.of(reading.trace)), "state_norms")
    _explain(wording.STATE_NORM, columns=1)


def _choose(reading: store.Reading) -> tuple[int, str, int, int]:
    """The controls of the attention panel: layer, view, head and target token, each kept in the address."""
    layers = sorted(reading.trace.mixers)
    positions = [LAST, *range(len(reading.tokens))]
    # Reading from afar is rarely the first layer's work: start in the middle.
    middle = len(layers) // 2
    _reset_unless("layer", layers, layers[middle])
    _reset_unless("target", positions, LAST)
    columns = st.columns([1, 4, 1, 2], vertical_alignment="bottom")
    layer = columns[0].selectbox("Layer", layers, middle, key="layer", bind="query-params")
    view = columns[1].segmented_control(
        "Show",
        wording.VIEWS,
        default="mean",
        required=True,
        key="view",
        bind="query-params",
        help="; ".join(f"{name}: {words}" for name, words in wording.VIEWS.items()),
    )
    n_heads = reading.trace[layer].recurrence.n_heads
    _reset_unless("head", range(n_heads), 0)
    head = columns[2].number_input(
        "Head",
        0,
        n_heads - 1,
        key="head",
        bind="query-params",
        disabled=view != "head",
        help=f"This layer has {n_heads} heads. Choose “head” under Show to see one of them.",
    )
    target = columns[3].selectbox(
        "Target token",
        positions,
        key="target",
        bind="query-params",
        format_func=lambda t: "last token" if t == LAST else _position(t, reading.tokens),
        help="The token whose row is read out. A click on the map or on the text chooses it, too.",
    )
    return layer, view, int(head), target


def _picked() -> None:
    """A click in the map chooses the target token."""
    target = st.session_state[MAP].get("target")
    if isinstance(target, int):
        st.session_state["target"] = target


def _reset_unless(key: str, valid: Sequence[Any], default: Any) -> None:
    """Give a choice that this model or text does not have its default; dropped, the control would still show it."""
    if key in st.session_state and st.session_state[key] not in valid:
        st.session_state[key] = default


def _position(t: int, tokens: Sequence[str]) -> str:
    return f"{t} “{label(tokens[t], _TOKEN_CHARACTERS)}”"


def _draw(figure: Any, key: str) -> None:
    """A plotly figure whose title the page already says, with its note as text below, where it can wrap."""
    about = figure.layout.meta
    figure.update_layout(title=None, margin={"t": 10})
    # A logarithmic axis would otherwise label every digit.
    figure.update_yaxes(nticks=6)
    st.plotly_chart(figure, key=key, alt=f"{about['title']}. {about['note']}")
    st.caption(about["note"])


def _explain(text: wording.Explanation, columns: int = 2) -> None:
    places = st.columns(columns, gap="large")
    places[0].caption(f"**What it means.** {text.means}")
    places[-1].caption(f"**What it does not.** {text.does_not}")
