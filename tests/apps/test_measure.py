"""Studies beside the page: progress, cancel, results that stay; and the page in Streamlit's test runner."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlens.apps.measure import jobs
from ssmlens.apps.measure.catalogue import STUDIES

PROMPT = "r 7 a 19 m 3 b 12 . . r"
WAIT = 60


def messages(app: Any) -> list[str]:
    assert not app.exception, app.exception
    return [error.value for error in app.error]


def test_one_at_a_time_with_progress_cancel_and_kept_results() -> None:
    held, go = threading.Event(), threading.Event()

    def slow(progress: jobs.Progress) -> str:
        progress(1, 4)
        held.set()
        assert go.wait(WAIT)
        progress(2, 4)
        return "never"

    found = jobs.Jobs(most=2, waiting=2)
    first = found.start("a", slow)
    assert held.wait(WAIT)
    second = found.start("b", lambda progress: "b")
    assert (first.state, first.steps, second.state) == ("running", (1, 4), "waiting")
    assert found.start("a", slow) is first
    with pytest.raises(jobs.Busy, match="2 studies wait or run"):
        found.start("c", lambda progress: "c")
    first.cancel()
    go.set()
    first.wait(WAIT)
    second.wait(WAIT)
    assert (first.state, first.result, second.state, second.result) == ("cancelled", None, "done", "b")
    assert found.start("b", slow) is second
    third = found.start("c", lambda progress: 1 / 0)
    third.wait(WAIT)
    assert (third.state, third.error) == ("failed", "division by zero")
    assert found.find("a") is None
    assert found.find("b") is second


def test_a_waiting_study_is_cancelled_at_once() -> None:
    go = threading.Event()
    found = jobs.Jobs()
    first = found.start("a", lambda progress: go.wait(WAIT))
    second = found.start("b", lambda progress: "b")
    second.cancel()
    second.wait(WAIT)
    assert second.state == "cancelled"
    go.set()
    first.wait(WAIT)
    assert first.result is True


@pytest.mark.parametrize("name", list(STUDIES))
def test_each_study_runs_and_its_program_gives_its_figure(
    page: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    app = page(at="measure", model="mamba1-recall", text=PROMPT, study=STUDIES[name].title).run()
    assert messages(app) == []
    app.button(key="study_run").click().run()
    (job,) = jobs.shared()._jobs.values()
    job.wait(WAIT)
    assert job.state == "done", job.error
    app.run()
    assert messages(app) == []
    app.toggle(key=f"{name}_table").set_value(True).run()
    assert job.result.name in app.dataframe[0].value.columns
    names: dict[str, Any] = {}
    monkeypatch.chdir(models)
    exec(compile(app.code[0].value, name, "exec"), names)
    again = names["result"].value
    assert again.nan_to_num(-1.0).equal(job.result.value.nan_to_num(-1.0))
    assert hasattr(names["figure"], "savefig")


def test_a_running_study_is_watched_and_cancelled(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def run(self: Any, lens: Any, ids: Any, progress: jobs.Progress) -> None:
        progress(3, 8)
        assert go.wait(WAIT)
        progress(4, 8)

    monkeypatch.setattr(type(STUDIES["memory"]), "run", run)
    app = page(at="measure", model="mamba1-recall", text=PROMPT).run()
    app.button(key="study_run").click().run()
    (job,) = jobs.shared()._jobs.values()
    app.button(key="study_cancel").click().run()
    go.set()
    job.wait(WAIT)
    app.run()
    assert messages(app) == []
    assert "The study was cancelled." in [info.value for info in app.info]
    app.button(key="study_run").click().run()
    jobs.shared().find(next(iter(jobs.shared()._jobs))).wait(WAIT)
    assert app.text_area(key="text").value == PROMPT
