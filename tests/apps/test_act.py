"""The pages of the group Act in Streamlit's test runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TEXT = "the cat sat on the mat"
TINY = {"model": "local folder", "folder": "two", "text": TEXT}
RECALL = "mamba1-recall"
ROUNDING = 1e-9
PROMPT = "r 7 a 19 m 3 b 12 . . r"


def words(app: Any) -> str:
    return "\n".join(str(x.value) for kind in (app.markdown, app.caption, app.subheader, app.info) for x in kind)


def messages(app: Any) -> list[str]:
    assert not app.exception, app.exception
    return [error.value for error in app.error]


COLUMNS = {
    "knockout": "kl",
    "steer": "kl",
    "blocked_next": "after",
    "leak": "leak",
    "patch": "recovered",
    "continued": "run",
}


def rows(app: Any, name: str) -> Any:
    """A table that is on the page, known by a column of its own."""
    (found,) = [each.value for each in app.dataframe if COLUMNS[name] in each.value.columns]
    return found


def table(app: Any, name: str) -> Any:
    """The table under a figure."""
    app.toggle(key=f"{name}_table").set_value(True).run()
    assert messages(app) == []
    return rows(app, name)


def test_knockout_of_the_told_value_takes_the_answer_away(page: Callable[..., Any]) -> None:
    app = page(at="knockout", model=RECALL, text=PROMPT).run()
    assert messages(app) == []
    app.text_input(key="sources").set_value("0, 1").run()
    told = table(app, "blocked_next").set_index("token")
    assert told.loc["7", "before"] > 0.9
    assert told.loc["7", "after"] < 0.5
    course = table(app, "knockout")
    assert course["kl"].iloc[0] == 0
    assert course["kl"].iloc[-1] > 0.5
    leak = rows(app, "leak")
    assert list(leak["paths"]) == ["ssm", "ssm", "conv", "ssm+conv", "ssm+conv"]
    assert leak["leak"].iloc[-1] < 1e-4 < leak["leak"].iloc[0]


def test_knockout_of_one_row_leaves_those_before_it(page: Callable[..., Any]) -> None:
    app = page(at="knockout", model=RECALL, text=PROMPT, rows="the target token").run()
    app.text_input(key="sources").set_value("1").run()
    app.selectbox(key="target").select(5).run()
    course = table(app, "knockout")
    assert course["kl"].iloc[:5].max() < ROUNDING < course["kl"].iloc[5]


def test_a_knockout_that_blocks_nothing_is_a_message(page: Callable[..., Any]) -> None:
    app = page(at="knockout", model=RECALL, text=PROMPT).run()
    app.text_input(key="sources").set_value("").run()
    assert "at least one source" in words(app)
    for typed, said in (("10", "source"), ("99", "tokens 0 to 10"), ("two", "positions such as 3, 8")):
        app.text_input(key="sources").set_value(typed).run()
        (message,) = messages(app)
        assert said in message
    assert app.text_area(key="text").value == PROMPT


def test_patching_the_exchanged_token_repairs_the_run(page: Callable[..., Any]) -> None:
    app = page(at="patch", model=RECALL, text=PROMPT, exchanged="1 “7”").run()
    app.selectbox(key="exchanged").select(1).run()
    assert messages(app) == []
    app.selectbox(key="layer").select(0).run()
    assert "At token 10 “r” the clean run says “7”" in words(app)
    found = table(app, "patch").set_index(["layer", "position"])
    # The stream entering the first layer is the embedding: with the clean one the runs are the same.
    assert found.loc[(0, 1), "recovered"] == pytest.approx(1, abs=1e-4)
    assert found.loc[(0, 10), "recovered"] == pytest.approx(0, abs=1e-4)
    assert app.metric[3].label == "Recovered"
    assert app.metric[3].value == "100.0%"
    app.selectbox(key="site").select("state").run()
    app.button_group(key="where").set_value("everywhere").run()
    assert messages(app) == []
    assert len(rows(app, "patch")) == 2 * 11


def test_a_corrupt_text_of_another_length_is_a_message(page: Callable[..., Any]) -> None:
    app = page(at="patch", model=RECALL, text=PROMPT).run()
    app.text_input(key="corrupt").set_value("r 4 a").run()
    (message,) = messages(app)
    assert "tokens" in message
    app.text_input(key="corrupt").set_value(PROMPT.replace("7", "4")).run()
    assert messages(app) == []
    assert "the corrupt one “4”" in words(app)


def test_steering_changes_what_follows_and_only_from_there(page: Callable[..., Any]) -> None:
    app = page(at="steer", model=RECALL, text=PROMPT).run()
    assert messages(app) == []
    app.selectbox(key="layer").select(0).run()
    app.selectbox(key="target").select(9).run()
    assert "State of layer 0 after token 9 “.”, all heads: times 0" in words(app)
    course = table(app, "steer")
    assert course["kl"].iloc[:9].max() < ROUNDING
    assert course["kl"].iloc[9:].max() > 0.1
    assert list(rows(app, "continued")["run"]) == ["free", "edited"]
    app.number_input(key="amount").set_value(1.0).run()
    same = rows(app, "continued")["text"]
    assert same[0] == same[1]
    assert course["kl"].max() > rows(app, "steer")["kl"].max()
    app.number_input(key="new_tokens").set_value(0).run()
    assert messages(app) == []
    assert "Choose a number of new tokens" in words(app)


@pytest.mark.parametrize("at", ["knockout", "patch", "steer"])
def test_a_model_without_recurrence_is_told_why(
    page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    import importlib

    module = importlib.import_module(f"ssmlens.apps.act.{at}")
    monkeypatch.setattr(module, "supports", lambda lens: "none of its layers has a recurrence")
    app = page(at=at, **TINY).run()
    assert messages(app) == []
    assert app.info[0].value == "This page cannot show two because none of its layers has a recurrence."
