"""Measure: studies that take a while, beside the page and not in its way."""

from __future__ import annotations

import streamlit as st

from ssmlens.apps import store
from ssmlens.apps.frame.panel import panel
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.measure import jobs
from ssmlens.apps.measure.catalogue import STUDIES, Study
from ssmlens.apps.read.suits import attributable as supports
from ssmlens.plotting import Caption

__all__ = ["draw", "supports"]

SECONDS = 1.0
"""Between two looks at a study that runs."""


def draw(reading: store.Reading) -> None:
    """The page."""
    st.caption(
        "A study runs beside the pages, one at a time on this server: look at something else meanwhile. Its result "
        "stays, and is found again with the same model and text."
    )
    study(reading)


@panel()
def study(reading: store.Reading) -> Shown | None:
    """One study: started, watched, cancelled, or its result."""
    name = st.segmented_control(
        "Study",
        list(STUDIES),
        default="memory",
        required=True,
        key="study",
        bind="query-params",
        format_func=lambda name: STUDIES[name].title,
    )
    chosen, key = STUDIES[name], (name, reading.key)
    there = jobs.shared().find(key)
    if there is not None and there.going:
        _watch(key)
        return None
    if there is not None and there.state == "done":
        return _result(reading, name, chosen, there)
    if there is not None and there.state == "failed":
        st.error(f"The study failed: {there.error}")
    elif there is not None:
        st.info("The study was cancelled.", icon=":material/info:")
    else:
        st.info(chosen.explanation.means, icon=":material/info:")
    st.button("Run the study", key="study_run", icon=":material/play_arrow:", on_click=_start,
              args=(reading, chosen, key))  # fmt: skip
    if st.session_state.pop("study_busy", None):
        st.error(f"{jobs.MOST_WAITING} studies wait or run already: try again when one of them has ended.")
    return None


def _start(reading: store.Reading, chosen: Study, key: tuple[str, store.Key]) -> None:
    """Begin it. The study has the model and the ids, and nothing of the page."""
    lens, ids = reading.lens, reading.key[1]
    try:
        jobs.shared().start(key, lambda progress: chosen.run(lens, ids, progress))
    except jobs.Busy:
        st.session_state["study_busy"] = True


@st.fragment(run_every=SECONDS)
def _watch(key: tuple[str, store.Key]) -> None:
    """How far it is, looked at again and again; when it has ended, the page draws what came of it."""
    job = jobs.shared().find(key)
    if job is None or not job.going:
        st.rerun()
    done, total = job.steps
    words = "Waiting for its turn" if job.state == "waiting" else f"Step {done} of {total}" if total else "Beginning"
    st.progress(min(done / total, 1.0) if total else 0.0, text=words)
    st.button("Cancel", key="study_cancel", icon=":material/close:", on_click=job.cancel)


def _result(reading: store.Reading, name: str, chosen: Study, job: jobs.Job) -> Shown:
    result, caption = job.result, Caption.of(reading.trace)
    st.caption(f"{result.name}, in {result.units}. It rests on this: {' '.join(result.assumes)}")
    return Shown(
        name=name,
        title=caption.title(f"{chosen.title} study"),
        caption=caption,
        code=snippet(reading, chosen.code, chosen.imports),
        table=result.table,
        file=lambda: chosen.figure(result),
        explanation=chosen.explanation,
        more={"quantity": result.name, "units": result.units},
    )
