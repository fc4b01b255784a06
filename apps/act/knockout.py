"""Knockout: block tokens, and see what the predictions lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store
from ssmlens.apps.act import beside, figures, numbers, wording
from ssmlens.apps.components import strip
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import boundary, is_dark, panel, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.errors import SsmlensError
from ssmlens.interventions import DECAYS, PATHS, Knockout
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    from ssmlens.interventions import Contrast

__all__ = ["draw", "supports"]

STRIP = "knockout_strip"
ROWS = ("every later token", "the target token")


@dataclass(frozen=True)
class Blocked:
    """What is blocked: sources, the one row that cannot read them or None for all later ones, layers or None for all,
    paths and what becomes of the decay."""

    sources: tuple[int, ...]
    row: int | None
    layers: tuple[int, ...] | None
    paths: tuple[str, ...]
    decay: str

    @property
    def call(self) -> str:
        """The arguments of the library's call."""
        layers = None if self.layers is None else list(self.layers)
        return (
            f"sources={list(self.sources)}, targets={self.row}, layers={layers}, paths={self.paths!r}, "
            f"decay={self.decay!r}"
        )


def draw(reading: store.Reading) -> None:
    """The page."""
    blocked(reading)


@panel()
def blocked(reading: store.Reading) -> None:
    """The text by what the knockout changes; below it the prediction at the target, and what leaks."""
    target = controls.target(reading)
    chosen = _choices(reading, target)
    if chosen is None:
        st.info("Choose at least one source token, here or by a click on the text, and one path.")
        return
    names = ", ".join(controls.position_name(s, reading.tokens) for s in chosen.sources)
    st.markdown(f"**The text without access to {names}**")
    found = None
    with boundary("The knockout"), st.spinner("Running the model with the tokens blocked ..."):
        found = numbers.knocked(
            reading.key, chosen.sources, chosen.row, chosen.layers, chosen.paths, chosen.decay, reading.trace,
            reading.lens,
        )  # fmt: skip
    strip.show(
        reading.tokens,
        [0.0] * len(reading.tokens) if found is None else found.kl[0].numpy(),
        title="What the knockout changes",
        quantity="KL(free || blocked), nats",
        signed=False,
        dark=is_dark(),
        key=STRIP,
        target=target,
        source=chosen.sources[0],
        picks=("source", "target"),
        on_pick=_picked,
    )
    if found is None:
        return
    present(_course(reading, chosen, found))
    st.subheader(f"What follows token {controls.position_name(target, reading.tokens)}", anchor=False)
    present(_next(reading, chosen, found, target))
    st.subheader("How much gets through", anchor=False)
    with boundary("The leak"), st.spinner("Measuring what leaks ..."):
        present(_leak(reading, chosen))
    beside.figures(reading, _asked(reading, chosen, target))


def _asked(reading: store.Reading, chosen: Blocked, target: int) -> beside.Asked:
    """Both runs, whose figures can be held against each other."""
    layers = None if chosen.layers is None else list(chosen.layers)
    return beside.Asked(
        change=Knockout(list(chosen.sources), chosen.row, layers, chosen.paths, chosen.decay),
        call=f"Knockout({chosen.call})",
        runs=("free", "blocked"),
        target=target,
        answer=store.candidates(reading.key, target, reading.trace, reading.lens)[0].id,
        prompt=reading.key[1],
        imports="Knockout",
    )


def _choices(reading: store.Reading, target: int) -> Blocked | None:
    """What the visitor blocks; None where that is nothing."""
    # A list of tags would be the usual control; its white letters are too faint on the dark page.
    typed = st.text_input(
        "Source tokens",
        str(numbers.default_source(reading)),
        key="sources",
        bind="query-params",
        placeholder="positions, such as 3, 8",
        help="Positions of the tokens that cannot be read, parted by commas. A click on the text adds one or takes it "
        "out again.",
    )
    sources = _positions(typed)
    wrong = [s for s in sources if not 0 <= s < len(reading.tokens)]
    if wrong:
        raise SsmlensError(
            f"this text has tokens 0 to {len(reading.tokens) - 1}, so that there is no source {wrong[0]}"
        )
    columns = st.columns([4, 2, 2], vertical_alignment="bottom")
    rows = columns[0].segmented_control(
        "Rows that cannot read them", ROWS, default=ROWS[0], required=True, key="rows", bind="query-params"
    )
    paths = columns[1].segmented_control(
        "Paths",
        PATHS,
        default=list(PATHS),
        selection_mode="multi",
        key="paths",
        bind="query-params",
        help="ssm: what the scan carries; conv: what the short convolution carries into the next tokens.",
    )
    decay = columns[2].segmented_control(
        "Their decay",
        DECAYS,
        default=DECAYS[0],
        required=True,
        key="decay",
        bind="query-params",
        help="keep: a blocked token still makes the state forget. skip: it does not.",
    )
    known = sorted(reading.trace.mixers)
    if any(k not in known for k in st.session_state.get("layers", ())):
        st.session_state["layers"] = []
    layers = st.pills(
        "Layers", known, selection_mode="multi", key="layers", bind="query-params", help="All where none is chosen."
    )
    if not sources or not paths:
        return None
    return Blocked(
        tuple(sorted(sources)), target if rows == ROWS[1] else None, tuple(sorted(layers)) or None, tuple(paths), decay
    )


def _picked() -> None:
    """A click on the text chooses the target, or adds a source or takes it out."""
    event = st.session_state[STRIP]
    if isinstance(event.get("target"), int):
        st.session_state["target"] = event["target"]
    source = event.get("source")
    if isinstance(source, int):
        there = _positions(st.session_state["sources"])
        chosen = [s for s in there if s != source] if source in there else sorted([*there, source])
        st.session_state["sources"] = ", ".join(map(str, chosen))


def _positions(typed: str) -> list[int]:
    """Positions as they were typed, each once.

    Raises:
        SsmlensError: for what is no whole number.
    """
    words = typed.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise SsmlensError(f"source tokens are positions such as 3, 8, got “{typed}”")
    return sorted({int(word) for word in words})


_IMPORTS = ("from ssmlens.interventions import contrast, knockout",)


def _call(chosen: Blocked) -> str:
    return f"found = contrast(trace.logits, knockout(lens, text, {chosen.call}))"


def _course(reading: store.Reading, chosen: Blocked, found: Contrast) -> Shown:
    return figures.course(
        reading,
        found,
        name="knockout",
        words="Knockout",
        call=_call(chosen),
        imports=_IMPORTS,
        explanation=wording.KNOCKOUT,
        more={"blocked": chosen.call},
    )


def _next(reading: store.Reading, chosen: Blocked, found: Contrast, target: int) -> Shown:
    return figures.following(
        reading,
        found,
        target,
        name="blocked_next",
        words=f"Next token after token {target}, with a knockout",
        runs=("free", "blocked"),
        call=_call(chosen),
        imports=_IMPORTS,
        more={"blocked": chosen.call},
    )


def _leak(reading: store.Reading, chosen: Blocked) -> Shown:
    source, layers = chosen.sources[0], chosen.layers
    table = numbers.leaks(reading.key, source, layers, reading.lens)
    caption = Caption.of(reading.trace)
    listed = None if layers is None else list(layers)
    return Shown(
        name="leak",
        title=caption.title(f"Leak of a knockout of token {source}"),
        caption=caption,
        code=snippet(
            reading,
            f"table = knockout_leak(lens, text, {source}, layers={listed})",
            ("from ssmlens.interventions import knockout_leak",),
        ),
        table=lambda: table,
        explanation=wording.LEAK,
    )
