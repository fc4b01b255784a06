"""The page that compares in Streamlit's test runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPT = "r 7 a 19 m 3 b 12 . . r"


def words(app: Any) -> str:
    return "\n".join(str(x.value) for kind in (app.markdown, app.caption, app.subheader) for x in kind)


def messages(app: Any) -> list[str]:
    assert not app.exception, app.exception
    return [error.value for error in app.error]


def test_two_texts_and_two_models(page: Callable[..., Any]) -> None:
    app = page(at="compare", model="mamba1-recall", text=PROMPT, right_text=PROMPT.replace("7", "4")).run()
    assert messages(app) == []
    app.toggle(key="following_table").set_value(True).run()
    told = app.dataframe[0].value.set_index("token")
    assert told.loc["7", "left"] > 0.9
    assert told.loc["4", "right"] > 0.9
    app.selectbox(key="right_model").select("mamba2-recall").run()
    assert messages(app) == []
    assert "Right: mamba2-recall, layer" in words(app)
    told = app.dataframe[0].value.set_index("token")
    assert told.loc["4", "right"] > 0.9
    app.selectbox(key="layer").select(0).run()
    assert messages(app) == []
    assert "Left: mamba1-recall, layer 0" in words(app)


def test_sides_of_different_length_read_where_both_have_a_token(page: Callable[..., Any]) -> None:
    app = page(at="compare", model="mamba1-recall", text=PROMPT, right_text="r 7 a").run()
    assert messages(app) == []
    assert "Left after token 10 “r”, right after token 2 “a”." in words(app)
    app.selectbox(key="target").select(1).run()
    assert "Left after token 1 “7”, right after token 1 “7”." in words(app)
    app.text_area(key="right_text").set_value("x " * 600).run()
    (message,) = messages(app)
    assert "at most 512" in message
    assert app.text_area(key="text").value == PROMPT


def test_a_collected_comparison_names_position_and_errors_of_both_sides(page: Callable[..., Any]) -> None:
    app = page(at="compare", model="mamba1-recall", right_model="mamba2-recall", text=PROMPT, right_text="r 7 a").run()
    app.button(key="following_add").click().run()
    facts = app.session_state["collected"][0].facts
    assert facts["target"] == "10 at the left, 2 at the right"
    for side in ("left: mamba1-recall: ", "right: mamba2-recall: "):
        assert f"{side}reconstruction error " in facts["error"]
    assert facts["error"].count("within tolerance 1e-05") == 2
