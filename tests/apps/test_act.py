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


def test_every_kind_of_site_can_be_patched(page: Callable[..., Any]) -> None:
    from ssmlens.interventions import KINDS

    app = page(at="patch", model=RECALL, text=PROMPT).run()
    app.toggle(key="patch_table").set_value(True).run()
    for kind in KINDS:
        app.selectbox(key="site").select(kind).run()
        assert messages(app) == [], kind
        assert rows(app, "patch")["kind"].unique().tolist() == [kind]


ASKED = {
    "knockout": ("Knockout([1], None, None, PATHS, 'keep')", "PROMPT", "blocked", {"sources": "1"}),
    "steer": ("StateEdit(1, 9, scale=0.0)", "PROMPT", "edited", {"target": "9 “.”", "read": "next"}),
    "patch": (
        "Patch(PROMPT, ('residual', 1, 1))",
        "PROMPT.replace('7', '4')",
        "patched",
        {"corrupt": PROMPT.replace("7", "4"), "patch_pin": "1 “7”"},
    ),
}


@pytest.mark.parametrize("at", list(ASKED))
def test_every_figure_stands_beside_that_of_the_changed_run(page: Callable[..., Any], at: str) -> None:
    """The numbers on the page, those of the library, and those of the program under “Show the code” are the same."""
    import numpy as np

    import ssmlens
    from ssmlens import interventions

    change, prompt, run, address = ASKED[at]
    names: dict[str, Any] = {**vars(interventions), "PROMPT": PROMPT}
    lens = ssmlens.load(RECALL)
    found = interventions.observe(lens, eval(prompt, names), eval(change, names), read=address.get("read", "now"))
    answer = int(lens.trace(PROMPT).logits[0, -1].argmax())
    expected = {
        "map": found.attention(1, "norm"),
        "states": found.state_norm(1),
        "lens": found.lens(answer),
        "attribution": found.attribution(answer),
    }
    app = page(at=at, model=RECALL, text=PROMPT, figure_heads="norm", figure_layer="1", **address).run()
    for figure, sides in expected.items():
        app.button_group(key="figure").set_value(figure).run()
        app.toggle(key=f"runs_{figure}_table").set_value(True).run()
        assert messages(app) == []
        (shown,) = [each.value for each in app.dataframe if {run, "difference"} <= set(each.value.columns)]
        for column, values in ((run, sides.after), ("difference", sides.difference)):
            flat = (
                values[:, 0] if figure == "lens" else values[0][np.tril_indices(11)] if figure == "map" else values[0]
            )
            np.testing.assert_allclose(shown[column].to_numpy(float), flat.double().numpy(), rtol=1e-5, atol=1e-6)
        assert shown["difference"].abs().max() > 1e-4
        space: dict[str, Any] = {}
        exec(compile(app.code[-1].value, figure, "exec"), space)
        if figure != "map":
            np.testing.assert_allclose(space["table"]["after"], shown[run], rtol=1e-5, atol=1e-6)
        assert hasattr(space["figure"], "savefig")


def test_one_figure_that_cannot_be_drawn_leaves_the_others(
    page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmlens.apps.act import numbers

    def refuse(*given: Any, **named: Any) -> None:
        raise ValueError("no such figure")

    monkeypatch.setattr(numbers, "observed", refuse)
    app = page(at="steer", model=RECALL, text=PROMPT).run()
    assert messages(app) == ["The figure failed with ValueError: no such figure"]
    assert list(rows(app, "continued")["run"]) == ["free", "edited"]


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


def test_patching_tells_how_far_it_is_and_can_be_ended_by_another_choice(
    page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamlit.runtime.scriptrunner_utils.exceptions import StopException

    from ssmlens.apps.act import numbers

    told: list[tuple[int, int]] = []
    original, leaves = numbers.patch, [True]

    def patch(*args: Any, progress: Callable[[int, int], None], **given: Any) -> Any:
        def tell(done: int, total: int) -> None:
            progress(done, total)
            told.append((done, total))
            if leaves.pop() if leaves else False:
                # What Streamlit raises from any drawing once the visitor has chosen something else.
                raise StopException

        return original(*args, progress=tell, **given)

    monkeypatch.setattr(numbers, "patch", patch)
    app = page(at="patch", model=RECALL, text=PROMPT, where="everywhere").run()
    assert messages(app) == []
    assert told[-1][1] == 2 * 11
    assert not app.metric
    app.run()
    assert messages(app) == []
    assert told[-1] == (22, 22)
    assert app.metric
    before = len(told)
    app.run()
    assert len(told) == before


def test_what_was_patched_is_kept_whole_and_bounded() -> None:
    from ssmlens.apps.act.numbers import Patchings

    kept = Patchings(most=2)
    with pytest.raises(KeyboardInterrupt):
        kept.get("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    made = [kept.get(name, lambda name=name: [name]) for name in "abacab"]  # type: ignore[misc]
    assert made[0] is made[2] is made[4]
    assert made[1] is not made[5]


def test_a_collected_difference_names_the_change_and_the_error(page: Callable[..., Any]) -> None:
    app = page(at="knockout", model=RECALL, text=PROMPT, sources="1").run()
    app.button(key="runs_map_add").click().run()
    facts = app.session_state["collected"][0].facts
    assert facts["change"].startswith("Knockout(sources=[1]")
    assert "within tolerance 1e-05" in facts["error"]
