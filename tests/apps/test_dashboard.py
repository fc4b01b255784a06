"""What all pages share, in Streamlit's test runner: inputs, addresses, what is recomputed, and how they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import DASHBOARD

import ssmlens
from ssmlens import zoo

TEXT = "the cat sat on the mat"
LOCAL = {"at": "attention", "model": "local folder", "text": TEXT}


def words(app: Any) -> str:
    """All running text of the page."""
    return "\n".join(str(x.value) for kind in (app.markdown, app.caption, app.subheader) for x in kind)


def messages(app: Any) -> list[str]:
    """What the page complains about; an uncaught exception fails the test."""
    assert not app.exception, app.exception
    return [error.value for error in app.error]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that models were really run on."""
    calls: list[int] = []
    original = ssmlens.Lens.trace

    def counting(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompt))
        return original(self, prompt, *args, **kwargs)

    monkeypatch.setattr(ssmlens.Lens, "trace", counting)
    return calls


@pytest.mark.parametrize("folder", ["one", "two"])
def test_page_shows_badges_and_explains_every_figure(page: Callable[..., Any], folder: str) -> None:
    app = page(folder=folder, **LOCAL).run()
    assert messages(app) == []
    assert app.main[0].type == "header"
    shown = words(app)
    assert "Layer 1, mean over heads (signed)" in shown
    assert "Reconstruction error" in shown
    assert "within tolerance 1e-05" in shown
    assert f"{len(TEXT)} tokens" in shown
    assert shown.count("**What it means.**") == shown.count("**What it does not.**") == len(app.code) == 2


def test_layer_head_and_target_redraw_without_tracing_again(page: Callable[..., Any], traced: list[int]) -> None:
    app = page(folder="two", **LOCAL).run()
    assert traced == [len(TEXT)]
    app.selectbox(key="layer").select(2).run()
    assert "Layer 2, mean over heads (signed)" in words(app)
    app.button_group(key="view").set_value("head").run()
    app.number_input(key="head").set_value(5).run()
    assert "Layer 2, head 5" in words(app)
    app.selectbox(key="target").select(3).run()
    assert "What token 3 " in words(app)
    assert messages(app) == []
    assert traced == [len(TEXT)]


def test_another_text_is_traced_once_and_remembered(page: Callable[..., Any], traced: list[int]) -> None:
    app = page(folder="two", **LOCAL).run()
    app.text_area(key="text").set_value("another text").run()
    app.text_area(key="text").set_value(TEXT).run()
    assert messages(app) == []
    assert traced == [len(TEXT), len("another text")]


def test_view_restores_from_its_address(page: Callable[..., Any]) -> None:
    app = page(folder="two", layer="2", view="head", head="3", dtype="float64", **LOCAL).run()
    assert messages(app) == []
    assert "Layer 2, head 3" in words(app)
    assert "within tolerance 1e-10" in words(app)
    assert app.text_area(key="text").value == TEXT


def test_choices_that_a_model_lacks_fall_back(page: Callable[..., Any]) -> None:
    app = page(folder="one", view="head", head="60", target="21 “t”", **LOCAL).run()
    assert "Layer 1, head 60" in words(app)
    app.selectbox(key="folder").select("two").run()
    app.text_area(key="text").set_value("short").run()
    assert messages(app) == []
    assert "Layer 1, head 0" in words(app)
    assert "What token 4 " in words(app)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text_is_a_message(page: Callable[..., Any], text: str) -> None:
    app = page(folder="two", **LOCAL).run()
    app.text_area(key="text").set_value(text).run()
    assert messages(app) == ["The text is empty: type at least one word."]


def test_text_beyond_the_limit_is_a_message_and_stays(
    page: Callable[..., Any], models: Path, traced: list[int]
) -> None:
    app = page("--models", str(models), "--max-tokens", "10", folder="two", **LOCAL).run()
    (message,) = messages(app)
    assert message.startswith(f"The text has {len(TEXT)} tokens and this page traces at most 10")
    assert app.text_area(key="text").value == TEXT
    assert traced == []


def test_millions_of_characters_are_refused_unread(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens.apps import store

    app = page(folder="two", **LOCAL).run()
    monkeypatch.setattr(store, "prepare", lambda *args: pytest.fail("the text was cut into tokens"))
    app.text_area(key="text").set_value("word " * 100_000).run()
    (message,) = messages(app)
    assert message.startswith("The text has 500000 characters and this page traces at most 512 tokens")


def test_an_error_does_not_lose_the_view(page: Callable[..., Any]) -> None:
    app = page(folder="two", layer="2", **LOCAL).run()
    app.text_area(key="text").set_value("").run()
    app.text_area(key="text").set_value(TEXT).run()
    assert "Layer 2, " in words(app)


def test_folders_outside_the_roots_are_refused(
    page: Callable[..., Any], models: Path, tmp_path: Path, traced: list[int]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (models / "link").symlink_to(outside, target_is_directory=True)
    try:
        for name in (str(outside), "../outside", str(models.parent), "two/../../..", "link", "/etc", "~"):
            app = page(folder=name, **LOCAL).run()
            (message,) = messages(app)
            assert "below" in message, name
            assert app.text_area(key="text").value == TEXT
    finally:
        (models / "link").unlink()
    assert traced == []


def test_files_that_link_outside_are_refused(page: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "model").mkdir(parents=True)
    (root / "model" / "config.json").symlink_to(models / "two" / "config.json")
    app = page("--models", str(root), folder="model", **LOCAL).run()
    (message,) = messages(app)
    assert "link that leads outside" in message


def test_missing_and_damaged_folders_are_messages(page: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    said = {"nowhere": "no folder", "bare": "“bare” holds no config.json", "broken": "JSON", "x" * 300: "no folder"}
    for name, words_of_it in said.items():
        app = page("--models", str(tmp_path), folder=name, **LOCAL).run()
        (message,) = messages(app)
        assert words_of_it in message
        assert str(tmp_path) not in message


def test_without_roots_local_folders_are_closed(page: Callable[..., Any], models: Path) -> None:
    app = page("--max-tokens", "100", folder=str(models / "two"), **LOCAL).run()
    (message,) = messages(app)
    assert "--models" in message


@pytest.mark.parametrize(
    "arguments", [("--models", "no/such/folder"), ("--model", "x", "y"), ("--max-tokens", "0"), ("--max-tokens", "x")]
)
def test_wrong_start_arguments_are_messages(page: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    app = page(*arguments).run()
    assert len(messages(app)) == 1


def test_a_crash_is_a_message_and_the_page_recovers(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(folder="two", **LOCAL)
    with monkeypatch.context() as broken:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of luck")

        broken.setattr(ssmlens.Lens, "trace", fail)
        app.run()
        assert messages(app) == ["Reading failed with RuntimeError: out of luck"]
    app.run()
    assert messages(app) == []
    assert "Layer 1, " in words(app)


def test_an_error_above_the_tolerance_is_said_everywhere(
    page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmlens import trace

    monkeypatch.setattr(trace, "TOLERANCE", dict.fromkeys(trace.TOLERANCE, 1e-30))
    app = page(folder="two", **LOCAL).run()
    complaints = messages(app)
    assert complaints[0].startswith("The figures below do not describe this model")
    assert "ABOVE tolerance 1e-30" in words(app)
    assert "Layer 1, mean over heads (signed)" in words(app)
    # The study of half-lives refuses such a trace; the other panels still draw.
    app = page(folder="two", **{**LOCAL, "at": "states"}).run()
    assert any("above the tolerance" in complaint for complaint in messages(app)[1:])
    assert len(app.code) == 2


def test_a_changed_folder_is_another_model(page: Callable[..., Any], tmp_path: Path, traced: list[int]) -> None:
    from tiny import save_tiny, tiny_mamba2

    save_tiny(tmp_path / "m")
    app = page("--models", str(tmp_path), folder="m", **LOCAL).run()
    save_tiny(tmp_path / "m", tiny_mamba2(seed=1))
    app.run()
    assert messages(app) == []
    assert traced == [len(TEXT), len(TEXT)]


def test_the_passage_follows_the_model_until_it_is_edited(
    page: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "names", lambda: ["one", "two"])
    monkeypatch.setattr(zoo, "path", lambda name: models / name)
    monkeypatch.setattr(zoo, "card", lambda name: f"# {name}")
    monkeypatch.setattr(zoo, "passage", lambda name="one": f"passage of {name}")
    app = page().run()
    assert app.text_area(key="text").value == "passage of one"
    app.selectbox(key="model").select("two").run()
    assert app.text_area(key="text").value == "passage of two"
    app.text_area(key="text").set_value("mine").run()
    app.selectbox(key="model").select("one").run()
    assert app.text_area(key="text").value == "mine"
    assert messages(app) == []


def test_long_texts_stand_in_the_address_by_an_id(page: Callable[..., Any], models: Path) -> None:
    start = ("--models", str(models), "--max-tokens", "4000")
    app = page(*start, folder="two", **LOCAL).run()
    long = "long " * 400
    app.text_area(key="text").set_value(long).run()
    assert messages(app) == []
    assert app.text_area(key="text").value == long
    name = "".join(app.query_params["run"])
    assert len(name) == 20
    app.text_area(key="text").set_value(TEXT).run()
    assert "run" not in app.query_params

    other = {key: value for key, value in LOCAL.items() if key != "text"}
    from streamlit.testing.v1 import AppTest

    again = AppTest.from_file(str(DASHBOARD), default_timeout=60)
    for key, value in {**other, "folder": "two", "run": name}.items():
        again.query_params[key] = value
    again.run()
    assert again.text_area(key="text").value == long
    lost = page(*start, folder="two", run="0" * 20, **other).run()
    assert "no longer kept" in lost.warning[0].value
    assert messages(lost) == []


def test_choices_stay_from_page_to_page(page: Callable[..., Any], traced: list[int]) -> None:
    from streamlit.util import calc_hash

    app = page(folder="two", layer="2", **LOCAL).run()
    for path in ("states", "attention"):
        app._page_hash = calc_hash(path)
        app.run()
        assert messages(app) == []
        assert app.text_area(key="text").value == TEXT
        assert app.selectbox(key="folder").value == "two"
    assert "Layer 2, " in words(app)
    assert traced == [len(TEXT)]


def test_visitors_do_not_see_each_other(page: Callable[..., Any]) -> None:
    first = page(folder="two", **LOCAL).run()
    second = page(folder="one", **LOCAL).run()
    second.selectbox(key="layer").select(0).run()
    first.run()
    assert "Layer 1, " in words(first)
    assert "Layer 0, " in words(second)
    assert first.selectbox(key="folder").value == "two"


@pytest.mark.parametrize("name", zoo.names())
def test_shipped_models_open_on_their_passage(page: Callable[..., Any], name: str) -> None:
    app = page(at="attention", model=name).run()
    assert messages(app) == []
    assert "within tolerance 1e-05" in words(app)
    assert app.text_area(key="text").value == zoo.passage(name)


def test_the_page_opens_on_a_shipped_model(page: Callable[..., Any]) -> None:
    app = page("--max-tokens", "512").run()
    assert messages(app) == []
    assert app.selectbox(key="model").value == zoo.names()[0]


def test_a_dropped_model_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    import gc
    import weakref

    import streamlit as st
    from tiny import save_tiny

    from ssmlens.apps import sources, store

    st.cache_resource.clear()
    save_tiny(tmp_path / "three")

    def visit(root: Path, name: str) -> weakref.ref[Any]:
        opened = store.opened(sources.local(name, [root]), "float32")
        # The trace holds the weights as well.
        return weakref.ref(store.read(opened, TEXT, 64).trace)

    first, second = visit(models, "one"), visit(models, "two")
    gc.collect()
    assert first() is not None
    visit(tmp_path, "three")
    gc.collect()
    assert first() is None
    assert second() is None
    assert visit(models, "two")() is not None


def test_what_was_observed_goes_with_its_model(models: Path, tmp_path: Path) -> None:
    import gc
    import weakref

    import streamlit as st
    from tiny import save_tiny

    from ssmlens.apps import sources, store
    from ssmlens.apps.act import numbers
    from ssmlens.interventions import Knockout

    st.cache_resource.clear()
    save_tiny(tmp_path / "three")

    def visit(root: Path, name: str) -> weakref.ref[Any]:
        reading = store.read(store.opened(sources.local(name, [root]), "float32"), TEXT, 64)
        numbers.observed(reading.key, "a", reading.key[1], "now", Knockout([1]), reading.lens)
        return weakref.ref(reading.lens.model)

    first = visit(models, "one")
    visit(models, "two")
    gc.collect()
    assert first() is not None
    visit(tmp_path, "three")
    gc.collect()
    assert first() is None


def test_reruns_do_not_look_through_the_libraries_for_garbage(page: Callable[..., Any]) -> None:
    import gc

    app = page(folder="two", **LOCAL).run()
    assert messages(app) == []
    assert gc.isenabled()
    set_aside = gc.get_freeze_count()
    assert set_aside > 10 * len(gc.get_objects())
    app.selectbox(key="layer").select(2).run()
    assert gc.get_freeze_count() > 0.9 * set_aside


def test_a_dropped_model_in_a_cycle_is_collected_although_it_was_set_aside(page: Callable[..., Any]) -> None:
    import gc
    import weakref

    from ssmlens.apps import store
    from ssmlens.apps.sources import shipped

    app = page(model="mamba1-recall", at="attention").run()
    model = store.opened(shipped("mamba1-recall"), "float32").lens.model
    model.ring = [model]  # type: ignore[assignment]
    dropped = weakref.ref(model)
    del model
    for name in ("mamba2-recall", "mamba1-english"):
        app.selectbox(key="model").select(name).run()
        assert messages(app) == []
    gc.collect()
    assert dropped() is None


def test_an_address_with_an_unknown_model_says_which_one_is_shown(page: Callable[..., Any]) -> None:
    app = page(at="attention", model="mamba9-english").run()
    assert [x.value for x in app.sidebar.warning] == [
        f"No model here is called “mamba9-english”. Shown is {zoo.names()[0]}."
    ]
    assert not page(at="attention", model="mamba1-recall").run().sidebar.warning
