"""Every figure of a changed run beside the one of the run without the change, and their difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from ssmlens.apps import store
from ssmlens.apps.act import numbers, wording
from ssmlens.apps.components import heatmap
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import boundary, is_dark, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.interventions import Observed

__all__ = ["Asked", "figures"]

FIGURES = {
    "map": "Implicit attention",
    "states": "State norms",
    "lens": "Prediction by layer",
    "attribution": "Attribution",
}
"""The name of a figure in the address to its name on the page."""

REDUCTIONS = ("mean", "mean_abs", "max_abs", "norm")


@dataclass(frozen=True)
class Asked:
    """Two runs that are held against each other.

    Args:
        change: what the second run does differently.
        call: the same as an expression.
        runs: how both runs are called.
        target: the token whose prediction counts.
        answer: id of the next token that is followed.
        prompt: ids or text of the run; those of the page by default.
        prompt_call: the same as an expression.
        setup: lines of the program that `call` and `prompt_call` need.
        imports: names of ``ssmlens.interventions`` that `call` needs.
        read: which output is the first to read a state that was put in.
    """

    change: numbers.Change
    call: str
    runs: tuple[str, str]
    target: int
    answer: int
    prompt: tuple[int, ...] | str
    imports: str
    prompt_call: str = "text"
    setup: str = ""
    read: str = "now"

    @property
    def about(self) -> tuple[Any, ...]:
        """Names the change for caches."""
        return (repr(self.change), self.prompt, self.read)

    @property
    def program(self) -> str:
        """The library's call."""
        read = "" if self.read == "now" else f", read={self.read!r}"
        return f"{self.setup}found = observe(lens, {self.prompt_call}, {self.call}{read})\n"


def figures(reading: store.Reading, asked: Asked) -> None:
    """One figure of the visitor's choice in both runs; for a page's own panel."""
    st.subheader(f"Every figure, {asked.runs[0]} and {asked.runs[1]}", anchor=False)
    what = st.segmented_control(
        "Figure",
        list(FIGURES),
        default="map",
        required=True,
        key="figure",
        bind="query-params",
        format_func=FIGURES.__getitem__,
    )
    layers = sorted(reading.trace.mixers)
    middle = len(layers) // 2
    layer, how = layers[middle], REDUCTIONS[0]
    if what in ("map", "states"):
        places = st.columns([1, 4], vertical_alignment="bottom")
        controls.reset_unless("figure_layer", layers, layer)
        layer = places[0].selectbox("Layer drawn", layers, middle, key="figure_layer", bind="query-params")
        if what == "map":
            how = places[1].segmented_control(
                "Over heads", REDUCTIONS, default=how, required=True, key="figure_heads", bind="query-params"
            )
    with boundary("The figure"), st.spinner("Running the model without and with the change ..."):
        found = numbers.observed(reading.key, asked.about[0], asked.prompt, asked.read, asked.change, reading.lens)
        if what == "map":
            _maps(reading, asked, found, layer, how)
        else:
            present(_course(reading, asked, found, what, layer))


def _maps(reading: store.Reading, asked: Asked, found: Observed, layer: int, how: str) -> None:
    """Both maps in the same colours, and their difference, with one cursor."""
    before, after, difference = numbers.both_maps((reading.key, *asked.about), layer, how, found)
    caption, tokens = Caption.of(found.before, layer, how), found.before.tokens[0]
    changes = Caption(caption.model, layer, f"{asked.runs[1]} less {asked.runs[0]}, {caption.reduction_words}")
    about: dict[str, Any] = {"target": asked.target, "dark": is_dark(), "group": "runs"}
    places = st.columns(2)
    for place, run, matrix in zip(places, asked.runs, (before, after)):
        with place:
            st.markdown(f"**{run.capitalize()}: layer {layer}, {caption.reduction_words}**")
            heatmap.show(matrix, tokens, caption, key=f"map_{run}", like=before, **about)
    st.markdown(f"**Difference: {asked.runs[1]} less {asked.runs[0]}, in colours of its own**")
    heatmap.show(difference, tokens, changes, key="map_difference", **about)

    def table() -> pd.DataFrame:
        rows = store.map_table(before, tokens).rename(columns={"value": asked.runs[0]})
        rows[asked.runs[1]] = store.map_table(after, tokens)["value"]
        rows["difference"] = store.map_table(difference, tokens)["value"]
        return rows

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.attention_map(difference, tokens, changes)

    def file() -> object:
        from ssmlens.plotting import attention_map

        return attention_map(difference, tokens, changes)

    code = (
        f"{asked.program}maps = found.attention({layer}, {how!r})\n"
        f"caption = Caption(lens.name, {layer}, {changes.reduction!r})\n"
        "figure = attention_map(maps.difference[0], found.before.tokens[0], caption)"
    )
    present(
        Shown(
            name="runs_map",
            title=changes.title("Implicit attention, difference"),
            caption=changes,
            code=snippet(reading, code, (*_imports(asked), "from ssmlens.plotting import Caption, attention_map")),
            table=table,
            live=live,
            file=file,
            explanation=wording.BESIDE["map"],
            draw=False,
            more={"change": asked.call, "error": caption.error_words},
        )
    )


def _course(reading: store.Reading, asked: Asked, found: Observed, what: str, layer: int) -> Shown:
    """States, lens or attribution of both runs as curves, with their difference."""
    table = numbers.both_courses((reading.key, *asked.about), what, layer, asked.answer, asked.target, found)
    name, quantity, axis, call = _drawn(reading, asked, what, layer)
    caption = Caption.of(found.before, layer if what == "states" else None)
    given: dict[str, Any] = {"name": name, "quantity": quantity, "axis": axis, "runs": asked.runs}

    def live() -> object:
        from ssmlens.plotting import effect_pages

        return effect_pages.two_runs(table, caption, **given)

    def file() -> object:
        from ssmlens.plotting import effects

        return effects.two_runs(table, caption, **given)

    rows, names = (":, 0", "range(len(sides.before))") if axis == "layer" else ("0", "found.before.tokens[0]")
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
    numbers_of = ", ".join(f'"{side}": sides.{side}[{rows}]' for side in ("before", "after", "difference"))
    code = (
        f"{asked.program}sides = found.{call}\n"
        f'table = pd.DataFrame({{"{axis}": {names}, {numbers_of}}})\n'
        f"figure = effects.two_runs(table, Caption.of(found.before, {caption.layer}), {arguments})"
    )
    return Shown(
        name=f"runs_{what}",
        title=caption.title(name),
        caption=caption,
        code=snippet(
            reading, code, (*_imports(asked), "import pandas as pd", "from ssmlens.plotting import Caption, effects")
        ),
        table=lambda: table.rename(columns=dict(zip(("before", "after"), asked.runs))),
        live=live,
        file=file,
        explanation=wording.BESIDE[what],
        more={"change": asked.call},
    )


def _drawn(reading: store.Reading, asked: Asked, what: str, layer: int) -> tuple[str, str, str, str]:
    """Name, quantity, axis and library call of a figure that is no map."""
    if what == "states":
        return "State norm", "norm of the state h[t]", "token", f"state_norm({layer})"
    decode = store.decoder(reading.lens)
    answer = f"token {asked.answer}" if decode is None else f"“{decode([asked.answer])}”"
    if what == "lens":
        call = f"lens({asked.answer}, {asked.target})"
        return f"Prediction of {answer} by layer", "log probability, nats", "layer", call
    call = f"attribution({asked.answer}, {asked.target})"
    return f"Gradient × embedding of {answer}", "part of the logit, first order", "token", call


def _imports(asked: Asked) -> tuple[str, ...]:
    return (f"from ssmlens.interventions import {asked.imports}, observe",)
