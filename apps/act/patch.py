"""Patch: which activations of a clean run repair a corrupt one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store
from ssmlens.apps.act import beside, numbers, wording
from ssmlens.apps.components import strip
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import explain, is_dark, panel, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.interventions import KINDS, METRICS, Patch
from ssmlens.plotting import Caption
from ssmlens.plotting.labels import visible

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.interventions import Patching

__all__ = ["draw", "supports"]

STRIP = "patch_strip"
WHERE = ("around the change", "everywhere")
KIND_WORDS = {
    "residual": "residual stream",
    "mixer": "output of the mixer",
    "state": "state",
    "conv": "memory of the convolution",
    "full_state": "state with the memory of the convolution",
}
MEASURED = {
    "kl": "KL divergence from the clean run, in nats",
    "probability": "probability of the clean run’s answer",
    "logit": "logit of the clean run’s answer",
    "logit_difference": "logit of the clean run’s answer less that of the corrupt one’s",
}
"""What each metric is, in words."""

AFTER = 3
"""Tokens after the exchanged one, and before the target, that are patched unless all are asked for."""


@dataclass(frozen=True)
class Asked:
    """What is patched: the corrupt text or ids, the kind of site, the metric, the positions, and whose logits count."""

    corrupt: str | tuple[int, ...]
    call: str
    kind: str
    metric: str
    positions: tuple[int, ...]
    target: int


def draw(reading: store.Reading) -> None:
    """The page."""
    patching(reading)


@panel()
def patching(reading: store.Reading) -> None:
    """The map of layers and tokens; below it the pinned layer along the text."""
    asked = _choices(reading)
    if asked is None:
        st.info("All tokens of this text are the same: write a corrupt text of as many tokens.")
        return
    layers = tuple(sorted(reading.trace.mixers))
    found = _found(reading, asked, layers)
    left, right = st.columns(2)
    layer = controls.layer(reading, left)
    pin = _pinned(reading, asked, right)
    st.markdown(f"**How much comes back when the {KIND_WORDS[asked.kind]} is patched, by layer and token**")
    _numbers(reading, asked, found, layer, pin)
    grid = found.grid(values=found.recovered)
    present(_map(reading, asked, found, (layer, pin)))
    st.markdown(f"**Layer {layer} along the clean text**")
    strip.show(
        reading.tokens,
        grid[layer].numpy(),
        title=f"What layer {layer} recovers",
        quantity="share recovered",
        dark=is_dark(),
        key=STRIP,
        target=asked.target,
        source=pin,
        picks=("source", "target"),
        on_pick=_picked,
    )
    explain(wording.PINNED)
    beside.figures(reading, _beside(reading, asked, (asked.kind, layer, pin)))


def _found(reading: store.Reading, asked: Asked, layers: tuple[int, ...]) -> Patching:
    """Every site patched. Drawing how far it is lets Streamlit end it when the visitor changes or leaves the page."""
    place = st.empty()

    def tell(done: int, total: int) -> None:
        place.progress(done / total, text=f"Patched {done} of {total} sites; any other choice ends this")

    with place, st.spinner("Running the clean and the corrupt text ..."):
        found = numbers.patched(
            reading.key, asked.corrupt, asked.kind, asked.metric, asked.positions, asked.target, layers, reading.lens,
            tell,
        )  # fmt: skip
    place.empty()
    return found


def _beside(reading: store.Reading, asked: Asked, site: tuple[str, int, int]) -> beside.Asked:
    """The corrupt run without and with the pinned site patched, whose figures can be held against each other."""
    return beside.Asked(
        change=Patch(list(reading.key[1]), site),
        call=f"Patch(ids, {site!r})",
        runs=("corrupt", "patched"),
        target=asked.target,
        answer=store.candidates(reading.key, asked.target, reading.trace, reading.lens)[0].id,
        prompt=asked.corrupt,
        prompt_call="corrupt",
        setup=f"ids = trace.ids[0].tolist()\ncorrupt = {asked.call}\n",
        imports="Patch",
    )


def _choices(reading: store.Reading) -> Asked | None:
    """What the visitor patches."""
    target = controls.target(reading)
    typed = st.text_input(
        "Corrupt text",
        key="corrupt",
        bind="query-params",
        placeholder="empty: the clean text with one token exchanged",
        help="As many tokens as the clean text at the left.",
    )
    positions = list(range(len(reading.tokens)))
    first = numbers.default_source(reading)
    controls.reset_unless("exchanged", positions, first)
    columns = st.columns([2, 2, 2, 3], vertical_alignment="bottom")
    exchanged = columns[0].selectbox(
        "Exchanged token", positions, first, key="exchanged", bind="query-params", disabled=bool(typed),
        format_func=lambda t: controls.position_name(t, reading.tokens),
    )  # fmt: skip
    kind = columns[1].selectbox(
        "Patched", KINDS, key="site", bind="query-params",
        help="residual: the stream entering a layer; mixer: its mixer's output; state: h[t]; conv: the inputs that "
        "the convolution carries on; full_state: both.",
    )  # fmt: skip
    metric = columns[2].selectbox("Metric", METRICS, METRICS.index("kl"), key="metric", bind="query-params")
    where = columns[3].segmented_control(
        "Tokens", WHERE, default=WHERE[0], required=True, key="where", bind="query-params",
        help="everywhere: one run for each layer and token, which takes long for long texts.",
    )  # fmt: skip
    other = numbers.other_token(reading.key, exchanged)
    if not typed and other is None:
        return None
    ids = reading.key[1]
    corrupt = typed or (*ids[:exchanged], other, *ids[exchanged + 1 :])
    call = repr(typed) if typed else f"[*ids[:{exchanged}], {other}, *ids[{exchanged + 1} :]]"
    near = [t for t in positions if exchanged <= t <= exchanged + AFTER or target - AFTER <= t <= target]
    chosen = positions if where == WHERE[1] or typed else near
    # Behind the last token nothing reads what its convolution carries on.
    end = len(positions) - 2 if kind == "conv" else len(positions) - 1
    return Asked(corrupt, call, kind, metric, tuple(t for t in chosen if t <= min(target, end)), target)


def _pinned(reading: store.Reading, asked: Asked, place: st.delta_generator.DeltaGenerator) -> int:
    """The token whose cell is read out; it starts with the first one that was patched."""
    controls.reset_unless("patch_pin", asked.positions, asked.positions[0])
    chosen: int = place.selectbox(
        "Pinned token",
        asked.positions,
        key="patch_pin",
        bind="query-params",
        format_func=lambda t: controls.position_name(t, reading.tokens),
        help="Its cell of the map is read out. A click on the text below pins a patched token, too.",
    )
    return chosen


def _picked() -> None:
    """A click on the text pins a token, or chooses the target."""
    event = st.session_state[STRIP]
    if isinstance(event.get("target"), int):
        st.session_state["target"] = event["target"]
    if isinstance(event.get("source"), int):
        st.session_state["patch_pin"] = event["source"]


def _numbers(reading: store.Reading, asked: Asked, found: Patching, layer: int, pin: int) -> None:
    """Both runs, and the pinned cell."""
    table = found.table()
    cell = table[(table["layer"] == layer) & (table["position"] == pin)]
    clean, corrupt = _tops(reading, asked, found)
    places = st.columns(4)
    places[0].metric("Clean", f"{float(found.clean[0]):.3g}", help=f"The clean run says “{clean}”.")
    places[1].metric("Corrupt", f"{float(found.corrupt[0]):.3g}", help=f"The corrupt run says “{corrupt}”.")
    if len(cell):
        line = cell.iloc[0]
        places[2].metric("Patched", f"{line['value']:.3g}", help=f"Layer {layer}, token {pin}.")
        places[3].metric("Recovered", f"{line['recovered']:.1%}", help="Share of the distance between both runs.")
    target, pinned = (controls.position_name(t, reading.tokens) for t in (asked.target, pin))
    st.caption(
        f"Measured: {MEASURED[asked.metric]}. At token {target} the clean run says “{clean}”, the corrupt one "
        f"“{corrupt}”. Pinned: layer {layer}, token {pinned}."
    )


def _tops(reading: store.Reading, asked: Asked, found: Patching) -> tuple[str, str]:
    """The likeliest token after the target, clean and corrupt."""
    clean = store.candidates(reading.key, asked.target, reading.trace, reading.lens)[0]
    return visible(clean.text), visible(numbers.top(found, store.decoder(reading.lens)))


def _map(reading: store.Reading, asked: Asked, found: Patching, pinned: tuple[int, int]) -> Shown:
    caption = Caption.of(reading.trace)
    words = f"Patching {asked.kind}, recovered {asked.metric}"
    grid = found.grid(values=found.recovered)
    tokens = reading.tokens[: grid.shape[1]]

    def live() -> object:
        from ssmlens.plotting import effect_pages

        return effect_pages.patch_map(grid, tokens, caption, name=words, pinned=pinned, dark=is_dark())

    def file() -> object:
        from ssmlens.plotting import effects

        return effects.patch_map(grid, tokens, caption, name=words)

    def table() -> pd.DataFrame:
        return found.table()

    layers = sorted({site.layer for site in found.sites})
    return Shown(
        name="patch",
        title=caption.title(words),
        caption=caption,
        code=snippet(
            reading,
            f"""
            ids = trace.ids[0].tolist()
            corrupt = {asked.call}
            sites = [({asked.kind!r}, layer, t) for layer in {layers} for t in {list(asked.positions)}]
            found = patch(lens, ids, corrupt, sites, {asked.metric!r}, position={asked.target})
            grid = found.grid(values=found.recovered)
            figure = effects.patch_map(grid, trace.tokens[0], Caption.of(trace), name={words!r})
            """,
            ("from ssmlens.interventions import patch", "from ssmlens.plotting import Caption, effects"),
        ),
        table=table,
        live=live,
        file=file,
        explanation=wording.PATCH,
        more={"target": str(asked.target), "sites": asked.kind, "metric": asked.metric},
    )
