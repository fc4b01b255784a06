"""The pages of the group Read in Streamlit's test runner: what each shows, and what it recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import ssmlens
from ssmlens import zoo

TEXT = "the cat sat on the mat"
TINY = {"model": "local folder", "folder": "two", "text": TEXT}


def words(app: Any) -> str:
    return "\n".join(str(x.value) for kind in (app.markdown, app.caption, app.subheader, app.info) for x in kind)


def messages(app: Any) -> list[str]:
    assert not app.exception, app.exception
    return [error.value for error in app.error]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the expensive calls that were really made."""
    from ssmlens.apps import store

    made: list[str] = []

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    counted(ssmlens.Lens, "trace")
    counted(store, "attribute")
    counted(store, "pair_path")
    return made


def test_home_opens_on_a_recalled_value_and_where_it_came_from(page: Callable[..., Any]) -> None:
    app = page("--max-tokens", "512").run()
    assert messages(app) == []
    assert app.selectbox(key="model").value == zoo.names()[0]
    shown = words(app)
    assert "After this text the model says `·K` with probability **9" in shown
    # The passage tells the code of the red box first of all and asks for it last.
    assert "token 8 “·K”, 132 back, holds the largest part" in shown
    assert "With that token taken out of the text, `·K` keeps 2" in shown
    app.toggle(key="verify_table").set_value(True).run()
    table = app.dataframe[0].value
    assert list(table["layer"]) == list(range(10))
    assert set(table["within tolerance"]) == {"yes"}
    assert any("Intended use" in each.value for each in app.markdown)


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_home_finds_the_told_value_in_the_recall_models(page: Callable[..., Any], name: str) -> None:
    app = page(model=name).run()
    assert messages(app) == []
    assert "holds the largest part" in words(app)
    assert "token 7 “24”" in words(app)


def test_home_says_what_it_cannot_tell(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens.apps.read import home

    monkeypatch.setattr(home, "attributable", lambda lens: "its layers 1 are of another kind")
    app = page(**TINY).run()
    assert messages(app) == []
    assert "cannot be told for this model: its layers 1" in words(app)


def test_tokens_changes_lens_stream_and_target_without_the_model(page: Callable[..., Any], calls: list[str]) -> None:
    app = page(at="tokens", **TINY).run()
    assert messages(app) == []
    assert "stream after the last layer" in words(app)
    app.selectbox(key="stream").select(1).run()
    assert "stream entering layer 1" in words(app)
    app.selectbox(key="target").select(3).run()
    assert "After token 3 “·”, layer by layer" in words(app)
    app.selectbox(key="lens_colour").select("kl").run()
    assert messages(app) == []
    assert calls == ["trace"]


def test_the_tuned_lens_needs_trained_translators(page: Callable[..., Any]) -> None:
    app = page(at="tokens", **TINY).run()
    app.button_group(key="lens").set_value("tuned lens").run()
    (message,) = messages(app)
    assert "no translators ship" in message.lower()
    app.button_group(key="lens").set_value("logit lens").run()
    assert messages(app) == []


def test_a_model_without_a_known_head_is_told_why(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssmlens.Lens, "has_head", False)
    app = page(at="tokens", **TINY).run()
    assert messages(app) == []
    assert app.info[0].value.startswith("This page cannot show two because its final norm")
    assert app.text_area(key="text").value == TEXT


def test_a_pinned_pair_opens_its_path(page: Callable[..., Any], calls: list[str]) -> None:
    app = page(at="attention", **TINY).run()
    assert "opens the path between them" in words(app)
    app.selectbox(key="target").select(9).run()
    app.selectbox(key="source").select(4).run()
    assert messages(app) == []
    assert "Path from token 4 “c” to token 9 “a”, 5 back, in layer 1" in words(app)
    assert app.metric[0].label == "Contribution"
    app.selectbox(key="layer").select(2).run()
    app.selectbox(key="layer").select(1).run()
    assert calls == ["trace", "pair_path", "pair_path"]
    # A source after the new target is no pair any more.
    app.selectbox(key="target").select(2).run()
    assert messages(app) == []
    assert app.selectbox(key="source").value == -1


def test_attribution_by_method_target_and_explained_token(page: Callable[..., Any], calls: list[str]) -> None:
    app = page(at="attribution", **TINY).run()
    assert messages(app) == []
    app.selectbox(key="method").select("relevance").run()
    assert "by relevance" in words(app)
    app.selectbox(key="method").select("decompose").run()
    app.selectbox(key="target").select(5).run()
    app.selectbox(key="explained").select_index(2).run()
    assert messages(app) == []
    assert "after token 5 “a”, by decompose" in words(app)
    assert calls.count("trace") == 1
    assert calls.count("attribute") == 4


def test_an_unknown_explained_token_is_a_message(page: Callable[..., Any]) -> None:
    app = page(at="attribution", explained="two tokens", **TINY).run()
    assert len(messages(app)) == 1
    assert app.text_area(key="text").value == TEXT


def test_attribution_is_refused_with_the_reason(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens.apps.read import attribution

    monkeypatch.setattr(attribution, "supports", lambda lens: "its layers 1 are of another kind")
    app = page(at="attribution", **TINY).run()
    assert messages(app) == []
    assert app.info[0].value == "This page cannot show two because its layers 1 are of another kind."


def test_states_draws_its_panels_and_their_tables(page: Callable[..., Any]) -> None:
    app = page(at="states", **TINY).run()
    assert messages(app) == []
    assert [x.value for x in app.subheader] == ["Token by token", "Half-lives", "State norms"]
    app.toggle(key="half_lives_table").set_value(True).run()
    assert list(app.dataframe[0].value.columns) == ["layer", "head", "half_life"]
    assert len(app.dataframe[0].value) == 3 * 8


def test_the_course_of_a_state_by_layer_and_head(page: Callable[..., Any], calls: list[str]) -> None:
    app = page(at="states", **TINY).run()
    app.toggle(key="course_table").set_value(True).run()
    assert "head" not in app.dataframe[0].value.columns
    app.button_group(key="of").set_value("head").run()
    app.number_input(key="head").set_value(3).run()
    assert messages(app) == []
    table = app.dataframe[0].value
    assert list(table["text"]) == list(TEXT)
    assert set(table["head"]) == {3}
    assert set(table["layer"]) == {1}
    assert calls == ["trace"]


def test_figures_are_collected_once(page: Callable[..., Any]) -> None:
    app = page(at="states", **TINY).run()
    app.button(key="state_norms_add").click().run()
    app.button(key="state_norms_add").click().run()
    (item,) = app.session_state["collected"]
    assert item.title == "State norm over time: two"
    assert item.facts["model"] == "two"
    assert "reconstruction error" in item.facts["error"]
    assert "<svg" in item.svg
    assert item.plotly.startswith("{")
    assert len(item.table) == len(TEXT)
