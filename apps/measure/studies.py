"""Measure: studies that take a while, beside the page and not in its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.frame.panel import panel
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.measure import jobs, options
from ssmlens.apps.measure.catalogue import STUDIES, Study
from ssmlens.apps.read.suits import attributable as supports
from ssmlens.plotting import Caption

__all__ = ["draw", "supports"]

SECONDS = 1.0
"""Between two looks at a study that runs."""

ADDRESS = "job"
"""Where the id of the study that is shown stands in the address."""

LISTED = 12
"""Most studies of a visitor that the page lists, the newest ones."""

_MINE, _LOST, _BUSY, _BEGUN = "jobs", "job_lost", "job_busy", "job_begun"
_WATCHED = "jobs_watched"
_SIDEBAR = ("model", "folder", "text", "dtype")
_STATES = {
    "waiting": "waits for its turn",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}


def draw(reading: store.Reading) -> None:
    """The page."""
    st.caption(
        "A study runs beside the pages: look at something else meanwhile, and find it again here. A study that this "
        "server has already done with the same model, text and settings is there at once. The link to a study opens it "
        "in any browser; without the link nobody else sees it."
    )
    _adopt()
    study(reading)
    _mine()


@panel()
def study(reading: store.Reading) -> Shown | None:
    """One study: chosen, started, watched, cancelled, or its result."""
    if st.session_state.pop(_BEGUN, None):
        # The list of studies stands outside this panel.
        st.rerun()
    name = st.segmented_control(
        "Study",
        list(STUDIES),
        default="memory",
        required=True,
        key="study",
        bind="query-params",
        format_func=lambda name: STUDIES[name].title,
    )
    chosen = STUDIES[name]
    tokens, layers = len(reading.tokens), tuple(sorted(reading.trace.mixers))
    held = options.draw(chosen.options, name)
    settings = chosen.settings(held, tokens, layers)
    key = (name, reading.key, tuple(settings.items()))
    job = _current(key)
    _address(job)
    if st.session_state.pop(_LOST, None):
        st.warning("The study of this link is no longer kept on this server. Its settings are: run it again.")
    if job is not None and job.going:
        _watch(job.name)
        return None
    if job is not None and job.state == "done":
        return _result(reading, name, settings, job)
    if job is not None and job.state == "failed":
        st.error(f"The study failed. {job.error}")
    elif job is not None:
        st.info("The study was cancelled.", icon=":material/info:")
    else:
        st.info(chosen.explanation.means, icon=":material/info:")
    st.caption(f"**What it will do.** {chosen.plan(settings, chosen.text(held, tokens, layers))}")
    st.button("Run the study", key="study_run", icon=":material/play_arrow:", on_click=_start,
              args=(reading, name, settings, key))  # fmt: skip
    busy = st.session_state.pop(_BUSY, None)
    if busy:
        st.error(busy)
    return None


def _start(reading: store.Reading, name: str, settings: Mapping[str, Any], key: Any) -> None:
    """Begin it. The study has the model and the ids, and nothing of the page."""
    chosen, lens, ids = STUDIES[name], reading.lens, reading.key[1]
    words = chosen.words(settings)
    title = f"{chosen.title} · {lens.name} · {len(ids)} tokens" + (f" · {words}" if words else "")
    try:
        job = jobs.shared().start(
            key,
            lambda progress: chosen.run(lens, ids, settings, progress),
            title=title,
            view=_view(chosen, name),
            mine=_ids(),
        )
    except jobs.Busy as error:
        st.session_state[_BUSY] = wording.sentence(error)
        return
    st.session_state[_MINE] = (*_ids(), job.name)
    st.session_state[_BEGUN] = True


@st.fragment(run_every=SECONDS)
def _watch(name: str) -> None:
    """How far it is, looked at again and again; when it has ended, the page draws what came of it."""
    found = jobs.shared()
    job = found.find(name)
    if job is None or not job.going:
        st.rerun()
    done, total = job.steps
    if job.state == "waiting":
        before = found.before(job)
        words = f"Waiting for its turn: {before} {'study' if before == 1 else 'studies'} before it"
    else:
        words = f"Step {done} of {total}" if total else "Beginning"
        words += f", {_duration(job.seconds)} so far"
        if 0 < done < total:
            words += f", about {_duration(job.seconds * (total - done) / done)} left"
    st.progress(min(done / total, 1.0) if total else 0.0, text=words)
    st.button("Cancel", key="study_cancel", icon=":material/close:", on_click=found.cancel, args=(job,))


def _result(reading: store.Reading, name: str, settings: Mapping[str, Any], job: jobs.Job) -> Shown:
    chosen, result, caption = STUDIES[name], job.result, Caption.of(reading.trace)
    units = "without a unit" if result.units == "1" else f"in {result.units}"
    words = " ".join(each[:1].upper() + each[1:].rstrip(".") + "." for each in result.assumes)
    quantity = chosen.quantity(settings)
    st.caption(f"{quantity}, {units}; took {_duration(job.seconds)}. Assumed: {words}")
    return Shown(
        name=name,
        title=caption.title(f"{chosen.title} study"),
        caption=caption,
        code=snippet(reading, chosen.code(settings), chosen.imports(settings)),
        table=result.table,
        file=lambda: chosen.figure(result),
        explanation=chosen.explanation,
        more={"quantity": quantity, "units": result.units, "settings": chosen.words(settings)},
    )


def _ids() -> tuple[str, ...]:
    """Ids of the studies that this visitor has started, or opened by a link; oldest first."""
    found: tuple[str, ...] = st.session_state.get(_MINE, ())
    return found


def _adopt() -> None:
    """Take the study of the address among this visitor's own, or remember that it is not kept any more."""
    name = st.query_params.get(ADDRESS)
    if name is None or name in _ids():
        return
    if jobs.shared().find(name) is None:
        st.session_state[_LOST] = True
        del st.query_params[ADDRESS]
    else:
        st.session_state[_MINE] = (*_ids(), name)


def _current(key: Any) -> jobs.Job | None:
    """This visitor's newest study of what is chosen."""
    found = jobs.shared()
    mine = [job for name in reversed(_ids()) if (job := found.find(name)) is not None]
    return next((job for job in mine if job.key == key), None)


def _address(job: jobs.Job | None) -> None:
    """Name the study that is shown in the page's address, and no other."""
    if job is None:
        st.query_params.pop(ADDRESS, None)
    elif st.query_params.get(ADDRESS) != job.name:
        st.query_params[ADDRESS] = job.name


def _view(chosen: Study, name: str) -> dict[str, Any]:
    """The choices on the page, by the key of their control: they lead back to the study."""
    keys = (*_SIDEBAR, "study", *(f"{name}_{option.name}" for option in chosen.options))
    return {key: st.session_state[key] for key in keys if st.session_state.get(key) is not None}


def _mine() -> None:
    """This visitor's studies; looked at again while one of them goes on."""
    found = jobs.shared()
    listed = [job for name in reversed(_ids()) if (job := found.find(name)) is not None][:LISTED]
    if listed:
        st.subheader("Your studies", anchor=False)
        st.fragment(_rows, run_every=SECONDS if any(job.going for job in listed) else None)(listed)


def _rows(listed: list[jobs.Job]) -> None:
    shown = st.query_params.get(ADDRESS)
    if not any(job.going for job in listed) and st.session_state.pop(_WATCHED, None):
        st.rerun()
    for i, job in enumerate(listed):
        number = len(listed) - i
        with st.container(horizontal=True, vertical_alignment="center"):
            done, total = job.steps
            state = f"{done / total:.0%} done" if job.state == "running" and total else _STATES[job.state]
            st.text(f"{number}. {job.title}: {state}", width="stretch")
            if job.going and job.name != shown:
                st.session_state[_WATCHED] = True
                st.button(f"Cancel study {number}", key=f"study_cancel_{job.name}", type="tertiary",
                          on_click=jobs.shared().cancel, args=(job,))  # fmt: skip
            here = job.name == shown
            words = "Shown above" if here else f"Open study {number}"
            key = f"study_open_{job.name}"
            if st.button(words, key=key, type="tertiary", disabled=here, on_click=_open, args=(job,)):
                st.rerun()


def _open(job: jobs.Job) -> None:
    """Go back to what a study was started with."""
    for key, value in job.view.items():
        st.session_state[key] = value
    # Else the sidebar could take the text for the other model's passage, and put this model's in its place.
    st.session_state.pop("passage", None)


def _duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
