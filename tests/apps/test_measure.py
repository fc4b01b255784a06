"""Studies beside the page: options, queue, progress, cancel, results that stay; and the page in Streamlit's runner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ssmlens.apps.measure import jobs
from ssmlens.apps.measure.catalogue import STUDIES, stretches
from ssmlens.errors import SsmlensError

PROMPT = "r 7 a 19 m 3 b 12 . . r"
RECALL = {"at": "measure", "model": "mamba1-recall", "text": PROMPT}
WAIT = 60
# Options other than the defaults, as the controls hold them; what stands in the code; how the page tells them.
OTHER = {
    "memory": (
        {"kept": "1-3, 5", "stretches": 2},
        "(lens, rows, kept=(1, 2, 3, 5))",
        "Tokens kept: 1, 2, 3 and 5; Stretches of the text: 2",
    ),
    "lyapunov": (
        {"k": 2, "discard": "3", "dtype": "float32", "seed": 7},
        "(lens, text, k=2, discard=3, dtype=torch.float32, seed=7)",
        "Exponents: 2; Tokens before the measurement: 3; Computed in: float32; Seed: 7",
    ),
    "capacity": (
        {"layer": "1", "r_grid": "0 2", "token_cut": "4", "metric": "kl", "readings": ["rerun"], "stretches": 2},
        "(lens, rows, layer=(1,), r_grid=(0, 2), token_cut=4, metric='kl', readings=('rerun',))",
        "Layers: 1; Ranks: 0 and 2; Cut before token: 4; Measured by: KL from the whole state; "
        "Layers above: computed anew; Stretches of the text: 2",
    ),
    "precision": (
        {"dtypes": ["float8_e5m2"], "variants": ["slow", "all"], "share": 0.5, "seed": 1, "conv": True},
        "(lens, text, dtypes=('float8_e5m2',), variants=('all', 'slow'), share=0.5, seed=1, conv=True)",
        "Formats of the state: float8 e5m2; Heads rounded: all, slow ones; Share that is slow: 0.5; Seed: 1; "
        "Also the convolution's window: yes",
    ),
}


def messages(app: Any) -> list[str]:
    assert not app.exception, app.exception
    return [error.value for error in app.error]


def words(app: Any) -> str:
    return "\n".join(x.value for kind in (app.caption, app.info, app.text, app.warning) for x in kind)


def only_job() -> jobs.Job:
    (job,) = jobs.shared()._jobs.values()
    return job


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Studies that have done 3 of 8 steps and wait until the gate opens; each start counts in ``gate.starts``."""
    go = threading.Event()
    go.starts = []  # type: ignore[attr-defined]

    def run(self: Any, lens: Any, ids: Any, settings: Any, progress: jobs.Progress) -> None:
        go.starts.append(settings)  # type: ignore[attr-defined]
        progress(3, 8)
        assert go.wait(WAIT)
        progress(4, 8)

    monkeypatch.setattr(type(STUDIES["memory"]), "run", run)
    yield go
    go.set()


def held_up(go: threading.Event, begun: threading.Event) -> Callable[[jobs.Progress], str]:
    def run(progress: jobs.Progress) -> str:
        progress(1, 4)
        begun.set()
        assert go.wait(WAIT)
        progress(2, 4)
        return "through"

    return run


def test_the_queue_keeps_its_limits_and_its_order() -> None:
    begun, go = threading.Event(), threading.Event()
    found = jobs.Jobs(kept=2, going=3)
    first = found.start("a", held_up(go, begun))
    second, third = found.start("b", lambda progress: "b"), found.start("c", lambda progress: 1 / 0)
    assert begun.wait(WAIT)
    assert (first.state, first.steps, second.state) == ("running", (1, 4), "waiting")
    assert [found.before(job) for job in (first, second, third)] == [0, 1, 2]
    with pytest.raises(jobs.Busy, match=r"^3 studies wait or run on this server, its most"):
        found.start("d", lambda progress: "d")
    with pytest.raises(jobs.Busy, match=r"^3 of your studies wait or run"):
        found.start("d", lambda progress: "d", mine=[job.name for job in (first, second, third)])
    go.set()
    for job in (first, second, third):
        assert job.wait(WAIT)
    assert [job.state for job in (first, second, third)] == ["done", "done", "failed"]
    assert (second.result, third.result, third.error) == ("b", None, "ZeroDivisionError: division by zero")
    # Two that have ended are kept: the result of the first, unused for the longest time, goes.
    found.find(second.name)
    last = found.start("e", lambda progress: "e")
    assert last.wait(WAIT)
    found.start("f", lambda progress: "f").wait(WAIT)
    found.start("g", lambda progress: "g").wait(WAIT)
    assert found.find(first.name) is None
    assert found.find(last.name) is last


def test_the_same_is_computed_once_and_stops_when_nobody_wants_it() -> None:
    begun, go = threading.Event(), threading.Event()
    found = jobs.Jobs()
    mine, theirs = found.start("a", held_up(go, begun)), found.start("a", lambda progress: "computed again")
    assert begun.wait(WAIT)
    assert mine.name != theirs.name
    found.cancel(mine)
    assert (mine.state, theirs.state) == ("cancelled", "running")
    go.set()
    assert theirs.wait(WAIT)
    assert (theirs.state, theirs.result, mine.state) == ("done", "through", "cancelled")
    later = found.start("a", lambda progress: "computed again")
    assert (later.state, later.result) == ("done", "through")

    begun.clear()
    go.clear()
    alone = found.start("b", held_up(go, begun))
    waiting = found.start("c", lambda progress: "c")
    assert begun.wait(WAIT)
    found.cancel(waiting)
    assert waiting.wait(0)
    assert waiting.state == "cancelled"
    found.cancel(alone)
    again = found.start("b", lambda progress: "b")
    go.set()
    assert alone.wait(WAIT)
    assert again.wait(WAIT)
    assert (alone.state, alone.result, again.result) == ("cancelled", None, "b")


@pytest.mark.parametrize("name", list(STUDIES))
def test_options_become_arguments_and_stand_in_the_code(name: str) -> None:
    study = STUDIES[name]
    held, called, told = OTHER[name]
    settings = study.settings(held, 11, (0, 1))
    assert study.words(settings) == told
    assert called in study.code(settings)
    assert ("view(2, size)" in study.code(settings)) == ("stretches" in held)
    assert study.plan(settings, study.text(held, 11, (0, 1))).endswith(".")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("memory", {"kept": "0"}, "Tokens kept takes numbers of 1 to 11, or nothing for powers of two; 0 is not"),
        ("memory", {"kept": "1, x"}, "“x” is no whole number"),
        ("memory", {"kept": "6", "stretches": 2}, "numbers of 1 to 5, .*; 6 is not among them"),
        ("memory", {"stretches": 6}, "the text has 11 tokens, so that stretches of the text are 1 to 5, .*; got 6"),
        ("lyapunov", {"discard": "11"}, "Tokens before the measurement takes one of 0 to 10"),
        ("capacity", {"layer": "2"}, "Layers takes numbers of 0 to 1, or nothing for all; 2 is not among them"),
        ("capacity", {"token_cut": "1, 2"}, "takes one of 1 to 10, .*; got 1 and 2"),
        ("capacity", {"readings": []}, "Layers above takes at least one of computed anew, gates frozen"),
        ("precision", {"dtypes": []}, "Formats of the state takes at least one of bfloat16, float16, float8"),
    ],
)
def test_what_a_text_does_not_have_is_one_sentence(name: str, changes: dict[str, Any], said: str) -> None:
    usual = {"memory": {"kept": "", "stretches": 1}}.get(name, OTHER[name][0] | {"stretches": 1})
    with pytest.raises(SsmlensError, match=said):
        STUDIES[name].settings({**usual, **changes}, 11, (0, 1))


def test_stretches_are_of_equal_length_and_in_order() -> None:
    assert stretches(range(11), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("name", list(STUDIES))
def test_each_study_runs_and_its_program_gives_its_figure(
    page: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    app = page(**RECALL, study=STUDIES[name].title).run()
    for option, value in OTHER[name][0].items():
        app.session_state[f"{name}_{option}"] = value
    app.run()
    assert messages(app) == []
    assert "What it will do" in words(app)
    app.button(key="study_run").click().run()
    job = only_job()
    assert job.wait(WAIT)
    assert job.state == "done", job.error
    app.run()
    assert messages(app) == []
    app.toggle(key=f"{name}_table").set_value(True).run()
    assert job.result.name in app.dataframe[0].value.columns
    assert OTHER[name][2] in words(app)
    names: dict[str, Any] = {}
    monkeypatch.chdir(models)
    exec(compile(app.code[0].value, name, "exec"), names)
    again = names["result"].value
    assert again.nan_to_num(-1.0).equal(job.result.value.nan_to_num(-1.0))
    assert hasattr(names["figure"], "savefig")


def test_a_running_study_is_watched_cancelled_and_started_again(
    page: Callable[..., Any], gate: threading.Event
) -> None:
    app = page(**RECALL).run()
    app.button(key="study_run").click().run()
    job = only_job()
    assert "job" in app.query_params
    assert f"Memory · mamba1-recall · {len(PROMPT.split())} tokens" in words(app)
    app.button(key="study_cancel").click().run()
    assert job.state == "cancelled"
    gate.set()
    assert job.wait(WAIT)
    app.run()
    assert messages(app) == []
    assert "The study was cancelled." in words(app)
    app.button(key="study_run").click().run()
    assert only_job().wait(WAIT)
    assert len(gate.starts) == 2  # type: ignore[attr-defined]
    assert app.text_area(key="text").value == PROMPT


def test_a_study_is_its_visitors_own_and_whoever_has_the_link(page: Callable[..., Any], gate: threading.Event) -> None:
    mine = page(**RECALL).run()
    mine.button(key="study_run").click().run()
    name = only_job().name
    other = page_beside(mine, RECALL)
    assert "Your studies" not in [each.value for each in other.subheader]
    assert "job" not in other.query_params
    # The same study of another visitor joins the computation; what one cancels goes on for the other.
    other.button(key="study_run").click().run()
    other.button(key="study_cancel").click().run()
    assert jobs.shared().find(name).state == "running"
    linked = page_beside(mine, {**RECALL, "job": name})
    assert linked.button(key="study_cancel")
    gate.set()
    assert jobs.shared().find(name).wait(WAIT)
    assert len(gate.starts) == 1  # type: ignore[attr-defined]


def test_an_earlier_study_is_opened_again_with_all_its_choices(page: Callable[..., Any]) -> None:
    app = page(**RECALL, memory_kept="1, 3").run()
    app.button(key="study_run").click().run()
    job = only_job()
    assert job.wait(WAIT)
    app.text_area(key="text").set_value("b 1 c 2 . b").run()
    app.text_input(key="memory_kept").set_value("2").run()
    app.button_group(key="study").set_value("precision").run()
    assert messages(app) == []
    assert "job" not in app.query_params
    app.button(key=f"study_open_{job.name}").click().run()
    app.run()
    assert messages(app) == []
    assert app.text_area(key="text").value == PROMPT
    assert app.text_input(key="memory_kept").value == "1, 3"
    assert app.query_params["job"] == job.name
    assert app.button(key=f"study_open_{job.name}").disabled


def test_a_wrong_option_or_a_lost_study_is_a_sentence_and_costs_nothing(page: Callable[..., Any]) -> None:
    app = page(**RECALL, job="gone", memory_kept="1, 99").run()
    (said,) = messages(app)
    assert said.startswith("Tokens kept takes numbers of 1 to 11")
    app.text_input(key="memory_kept").set_value("1, 9").run()
    assert messages(app) == []
    assert "no longer kept on this server" in words(app)
    assert app.text_input(key="memory_kept").value == "1, 9"


def test_a_crash_is_told_and_leaves_the_page(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(STUDIES["memory"]), "run", run)
    app = page(**RECALL).run()
    app.button(key="study_run").click().run()
    assert only_job().wait(WAIT)
    app.run()
    assert messages(app) == ["The study failed. RuntimeError: out of luck"]
    monkeypatch.undo()
    app.button(key="study_run").click().run()


def page_beside(app: Any, address: dict[str, str]) -> Any:
    """Another visitor of the same server; the fixture alone would begin with an empty one."""
    from serving import DASHBOARD
    from streamlit.testing.v1 import AppTest

    other = AppTest.from_file(str(DASHBOARD), default_timeout=60)
    for key, value in address.items():
        if key != "at":
            other.query_params[key] = value
    other._page_hash = app._page_hash
    return other.run()
