"""Steer: change the state after one token, and see what the model then says."""

from __future__ import annotations

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
from ssmlens.interventions import READS, StateEdit
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.interventions import Contrast

__all__ = ["draw", "supports"]

STRIP = "steer_strip"
HOWS = {"scale": "times", "add": "plus", "set": "replaced by"}
"""The library's name of an edit to what the page calls it."""

HEADS = ("all heads", "one head")
MOST_NEW = 64


def draw(reading: store.Reading) -> None:
    """The page."""
    steering(reading)


@panel()
def steering(reading: store.Reading) -> None:
    """The text by what the edit changes; below it the next token after the text, and how the text goes on."""
    edit, read, new_tokens = _choices(reading)
    layer, step, how, number, head = edit
    heads = "all heads" if head is None else f"head {head}"
    where = controls.position_name(step, reading.tokens)
    st.markdown(f"**State of layer {layer} after token {where}, {heads}: {HOWS[how]} {number:g}**")
    found = None
    with boundary("The edit"), st.spinner("Running the model with its state edited ..."):
        found = numbers.steered(reading.key, edit, read, reading.trace, reading.lens)
    strip.show(
        reading.tokens,
        [0.0] * len(reading.tokens) if found is None else found.kl[0].numpy(),
        title="What the edit changes",
        quantity="KL(free || edited), nats",
        signed=False,
        dark=is_dark(),
        key=STRIP,
        target=step,
        on_pick=lambda: controls.picked(STRIP),
    )
    if found is None:
        return
    call = f"found = contrast(trace.logits, steer(lens, text, {_edit(edit)}, read={read!r}).logits)"
    imports = ("from ssmlens.interventions import StateEdit, contrast, steer",)
    more = {"edit": _edit(edit), "read": read}
    present(
        figures.course(
            reading, found, name="steer", words="Steering", call=call, imports=imports,
            explanation=wording.STEER, more=more,
        )
    )  # fmt: skip
    st.subheader("What follows the text", anchor=False)
    present(_next(reading, found, call, imports, more))
    st.subheader("How the text goes on", anchor=False)
    if new_tokens == 0:
        st.caption("Choose a number of new tokens above.")
    else:
        with boundary("The continuation"), st.spinner("Writing on ..."):
            present(_continued(reading, edit, read, new_tokens))
    beside.figures(reading, _asked(reading, edit, read))


def _asked(reading: store.Reading, edit: numbers.Edit, read: str) -> beside.Asked:
    """Both runs, whose figures can be held against each other."""
    last = len(reading.tokens) - 1
    return beside.Asked(
        change=numbers.steering(edit),
        call=_edit(edit),
        runs=("free", "edited"),
        target=last,
        answer=store.candidates(reading.key, last, reading.trace, reading.lens)[0].id,
        prompt=reading.key[1],
        imports="StateEdit",
        read=read,
    )


def _choices(reading: store.Reading) -> tuple[numbers.Edit, str, int]:
    """The edit, which output is the first to read it, and how many tokens to write."""
    first = st.columns([1, 3, 2, 1], vertical_alignment="bottom")
    layer = controls.layer(reading, first[0])
    step = controls.target(reading, first[1])
    of = first[2].segmented_control(
        "Edited", HEADS, default=HEADS[0], required=True, key="edited_heads", bind="query-params"
    )
    head = controls.head(reading, layer, first[3], disabled=of != HEADS[1])
    second = st.columns([3, 2, 2, 2], vertical_alignment="bottom")
    how = second[0].segmented_control(
        "The state is", list(HOWS), default="scale", required=True, key="edit", bind="query-params",
        format_func=HOWS.__getitem__,
    )  # fmt: skip
    number = second[1].number_input("Number", value=0.0, key="amount", bind="query-params", format="%g")
    read = second[2].segmented_control(
        "First read", READS, default=READS[0], required=True, key="read", bind="query-params",
        help="now: the token's own output reads the edited state; next: only later tokens do.",
    )  # fmt: skip
    new_tokens = second[3].number_input("New tokens", 0, MOST_NEW, 12, key="new_tokens", bind="query-params")
    return (layer, step, how, float(number), head if of == HEADS[1] else None), read, int(new_tokens)


def _edit(edit: numbers.Edit) -> str:
    """The library's call for an edit."""
    layer, step, how, number, head = edit
    heads = "" if head is None else f", heads=[{head}]"
    return f"{StateEdit.__name__}({layer}, {step}, {how}={number!r}{heads})"


def _next(reading: store.Reading, found: Contrast, call: str, imports: tuple[str, ...], more: dict[str, str]) -> Shown:
    return figures.following(
        reading,
        found,
        len(reading.tokens) - 1,
        name="steered_next",
        words="Next token, with an edited state",
        runs=("free", "edited"),
        call=call,
        imports=imports,
        more=more,
    )


def _continued(reading: store.Reading, edit: numbers.Edit, read: str, new_tokens: int) -> Shown:
    # A factor of 1 leaves the state as it is.
    free: numbers.Edit = (edit[0], edit[1], "scale", 1.0, None)
    runs = {
        "free": numbers.continued(reading.key, free, "now", new_tokens, reading.lens),
        "edited": numbers.continued(reading.key, edit, read, new_tokens, reading.lens),
    }
    caption = Caption.of(reading.trace)

    def table() -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([{"run": name, "text": run.text[0]} for name, run in runs.items()])

    return Shown(
        name="continued",
        title=caption.title(f"The next {new_tokens} tokens"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            free = steer(lens, text, {_edit(free)}, new_tokens={new_tokens})
            edited = steer(lens, text, {_edit(edit)}, new_tokens={new_tokens}, read={read!r})
            table = pd.DataFrame({{"run": ["free", "edited"], "text": [free.text[0], edited.text[0]]}})
            """,
            ("from ssmlens.interventions import StateEdit, steer", "import pandas as pd"),
        ),
        table=table,
        explanation=wording.CONTINUED,
        more={"edit": _edit(edit), "read": read},
    )
