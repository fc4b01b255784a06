"""Two models or two texts side by side."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens import zoo
from ssmlens.apps import sources, store
from ssmlens.apps.compare import numbers
from ssmlens.apps.components import heatmap
from ssmlens.apps.frame import controls, snippets
from ssmlens.apps.frame.panel import is_dark, panel, present
from ssmlens.apps.frame.shell import error_badge
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.apps.wording import Explanation
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["draw", "supports"]

SAME = "the model at the left"
NAMES = ("left", "right")
REDUCTIONS = ("mean", "mean_abs", "max_abs", "norm")
NEXT = Explanation(
    means=(
        "The likeliest next tokens of either side after the target token, matched by their text. Both sides read the "
        "same position."
    ),
    does_not=(
        "Models cut texts into tokens of their own, so that the same position need not be the same word, and a token "
        "that a model does not have has no bar."
    ),
)
MAPS = Explanation(
    means=(
        "Implicit attention of one layer on each side: what each token reads, with the factors that the recurrence "
        "gives. Pointing at a pair in one map lights it in both; a click in either map chooses the same target and "
        "source in both."
    ),
    does_not=(
        "Colours end at each map's own largest value, so that shades of one map say nothing about those of the other; "
        "layers of the same number need not do the same work."
    ),
)


def draw(reading: store.Reading) -> None:
    """The page."""
    st.caption("The left side is the model and the text of the sidebar.")
    other = _other(reading)
    error_badge(other)
    both(reading, other)


def _other(reading: store.Reading) -> store.Reading:
    """The right side. What cannot be opened or read is raised as a sentence."""
    columns = st.columns([1, 3])
    model = columns[0].selectbox("Model at the right", [SAME, *zoo.names()], key="right_model", bind="query-params")
    opened = reading.opened
    if model != SAME:
        opened = store.opened(sources.shipped(model), reading.opened.dtype)
    text = columns[1].text_area(
        "Text at the right",
        key="right_text",
        bind="query-params",
        height=110,
        placeholder="empty: the text at the left",
    )
    limit = sources.parse(sys.argv[1:]).max_tokens
    with st.spinner(f"Reading the right text with {opened.lens.name} ..."):
        return store.read(opened, text or reading.text, limit)


@panel()
def both(left: store.Reading, right: store.Reading) -> None:
    """Predictions and maps: one fragment, so that a click in a map moves everything to its tokens."""
    places = st.columns(2)
    target = controls.target(left, places[0])
    source = controls.source(left, target, places[1])
    st.subheader("What comes next", anchor=False)
    present(_following(left, right, target))
    st.subheader("What each token reads", anchor=False)
    _maps(left, right, target, source)


def _following(left: store.Reading, right: store.Reading, target: int) -> Shown:
    """The distribution after the target token on both sides."""
    at = _within(target, right)
    runs = tuple(f"{name}: {side.lens.name}" for name, side in zip(NAMES, (left, right)))
    table = numbers.side_by_side(
        numbers.chances(left.key, target, left.trace, left.lens),
        numbers.chances(right.key, at, right.trace, right.lens),
    )
    st.caption(
        f"Left after token {controls.position_name(target, left.tokens)}, right after token "
        f"{controls.position_name(at, right.tokens)}."
    )
    caption = Caption(model=_names(left, right))

    def live() -> object:
        from ssmlens.plotting import effect_pages

        return effect_pages.distributions(table, caption, runs=(runs[0], runs[1]))

    def file() -> object:
        from ssmlens.plotting import effects

        return effects.distributions(table, caption, runs=(runs[0], runs[1]))

    body = f"""
        tables = [
            pd.DataFrame(predictions(one.trace(words), decode=one.tokenizer.decode, position=t))
            for one, words, t in ((lens, text, {target}), (right, right_text, {at}))
        ]
        table = pd.concat(tables, keys={NAMES!r})
        """
    return Shown(
        name="following",
        title=caption.title("Next token"),
        caption=caption,
        code=_code(left, right, body, ("import pandas as pd", "from ssmlens.report.numbers import predictions")),
        table=lambda: table.rename(columns=dict(zip(("before", "after"), NAMES))),
        live=live,
        file=file,
        explanation=NEXT,
        more={
            "target": f"{target} at the left, {at} at the right",
            "error": "; ".join(
                f"{run}: {Caption.of(side.trace).error_words}" for run, side in zip(runs, (left, right))
            ),
        },
    )


def _maps(left: store.Reading, right: store.Reading, target: int, source: int | None) -> None:
    """One map of each side, with a common target and source."""
    controls_at = st.columns([1, 1, 4], vertical_alignment="bottom")
    layer = controls.layer(left, controls_at[0])
    known = sorted(right.trace.mixers)
    default = layer if layer in known else known[len(known) // 2]
    controls.reset_unless("right_layer", known, default)
    right_layer = controls_at[1].selectbox(
        "Layer at the right", known, known.index(default), key="right_layer", bind="query-params"
    )
    how = controls_at[2].segmented_control(
        "Show", REDUCTIONS, default="mean", required=True, key="compare_view", bind="query-params"
    )
    places = st.columns(2)
    for place, name, side, k in zip(places, NAMES, (left, right), (layer, right_layer)):
        with place:
            matrix = store.attention_map(side.key, k, how, 0, side.trace)
            caption = Caption.of(side.trace, k, how)
            st.markdown(f"**{name.capitalize()}: {side.lens.name}, layer {k}, {caption.reduction_words}**")
            at, key = _within(target, side), f"map_{name}"
            heatmap.show(
                matrix,
                side.tokens,
                caption,
                target=at,
                source=None if source is None or source > at else source,
                dark=is_dark(),
                key=key,
                on_pick=lambda key=key: controls.picked(key),  # type: ignore[misc]
                on_pin=lambda key=key: controls.pinned(key),  # type: ignore[misc]
                group="sides",
            )
            present(_map(left, right, name, side, k, how, matrix))


def _map(
    left: store.Reading, right: store.Reading, name: str, side: store.Reading, k: int, how: str, matrix: NDArray
) -> Shown:
    caption = Caption.of(side.trace, k, how)

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.attention_map(matrix, side.tokens, caption)

    def file() -> object:
        from ssmlens.plotting import attention_map

        return attention_map(matrix, side.tokens, caption)

    call = "lens.trace(text)" if name == NAMES[0] else "right.trace(right_text)"
    body = f"""
        side = {call}
        matrix = side[{k}].recurrence.attention.reduce({how!r})[0]
        figure = attention_map(matrix, side.tokens[0], Caption.of(side, {k}, {how!r}))
        """
    return Shown(
        name=f"map_of_{name}",
        title=caption.title(f"Implicit attention, {name}"),
        caption=caption,
        code=_code(left, right, body, ("from ssmlens.plotting import Caption, attention_map",)),
        table=lambda: store.map_table(matrix, side.tokens),
        live=live,
        file=file,
        explanation=MAPS,
        draw=False,
        narrow=True,
    )


def _code(left: store.Reading, right: store.Reading, body: str, imports: tuple[str, ...]) -> str:
    """A program with both sides; the left one as every page has it."""
    import textwrap

    words = snippets.text_of(right)
    shipped = ("from ssmlens import zoo",) if words.startswith("zoo.") else ()
    opening = f"{snippets.opening(right.opened, 'right')}\nright_text = {words}\n"
    return snippets.snippet(left, opening + textwrap.dedent(body), (*imports, *shipped))


def _names(left: store.Reading, right: store.Reading) -> str:
    names = dict.fromkeys((left.lens.name, right.lens.name))
    return " and ".join(names)


def _within(position: int, side: store.Reading) -> int:
    """The position, or the last one of a shorter text."""
    return min(position, len(side.tokens) - 1)
