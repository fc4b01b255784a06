"""What the components are given, and the map's module in a notebook's hands."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ssmlens.apps.components.map_data import map_data, parts
from ssmlens.plotting import Caption

N = 20


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(N, N)).astype(np.float32)
    # Above the diagonal stands what must never be seen.
    return np.where(np.tri(N, dtype=bool), values, 1e6).astype(np.float32)


TOKENS = [f"t{i}" for i in range(N)]


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def test_a_map_is_sent_as_its_lower_triangle(matrix: np.ndarray) -> None:
    data = map_data(matrix, TOKENS, Caption(reduction="mean"), target=5)
    assert data["triangle"]
    assert np.array_equal(numbers(data["values"], "<f4"), matrix[np.tril_indices(N)])
    assert np.array_equal(numbers(data["row"], "<f4"), matrix[5])
    assert data["limit"] < 10
    json.dumps(data, allow_nan=False)


def test_a_long_map_is_pooled_and_says_where_each_value_stands(matrix: np.ndarray) -> None:
    data = map_data(matrix, TOKENS, Caption(reduction="mean"), target=5, most=7)
    assert data["factor"] == 3
    values, where = numbers(data["values"], "<f4").reshape(7, 7), numbers(data["where"], "<u2").reshape(7, 7)
    for row in range(7):
        for column in range(row + 1):
            t, s = 3 * row + where[row, column] // 3, 3 * column + where[row, column] % 3
            assert s <= t
            assert values[row, column] == matrix[t, s]
            block = matrix[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert abs(values[row, column]) == np.abs(block[block < 1e5]).max()


@pytest.mark.parametrize("window", [(4, 2, 6), (10, 0, 10)])
def test_a_part_of_a_long_map_is_sent_exactly(matrix: np.ndarray, window: tuple[int, int, int]) -> None:
    t, s, size = window
    data = map_data(matrix, TOKENS, Caption(), target=5, most=12, window=window)
    assert data["factor"] == 1
    assert np.array_equal(numbers(data["values"], "<f4").reshape(size, size), matrix[t : t + size, s : s + size])
    whole = map_data(matrix, TOKENS, Caption(), target=5)
    assert data["limit"] == whole["limit"]
    assert data["map"] != whole["map"]


def test_the_strip_takes_one_score_per_token() -> None:
    from ssmlens.apps.components import strip

    with pytest.raises(ValueError, match="2 scores for 3 tokens"):
        strip.show(["a", "b", "c"], [1, 2], title="", quantity="", dark=False, key="k")


def test_a_page_sends_the_part_that_was_asked_for(matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens.apps.components import heatmap

    state: dict[str, Any] = {}
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(heatmap.st, "session_state", state)
    monkeypatch.setattr(heatmap, "_component", lambda: lambda **given: sent.append(given))

    def show(layer: int) -> dict[str, Any]:
        caption = Caption(layer=layer, reduction="mean")
        heatmap.show(matrix, TOKENS, caption, target=5, dark=False, key="map", most=7)
        return sent[-1]["data"]

    assert show(1)["factor"] == 3
    state["map"] = {"window": [4, 2, 6]}
    sent[-1]["on_window_change"]()
    assert (show(1)["window"], show(1)["factor"]) == ([4, 2, 6], 1)
    # Another map is shown whole, and a window beyond the map is none.
    assert show(2)["window"] == [0, 0, N]
    for wrong in ([-1, 0, 5], [15, 0, 6], [0, 0, 0]):
        state["map"] = {"window": wrong}
        sent[-1]["on_window_change"]()
        assert show(2)["window"] == [0, 0, N]


@pytest.fixture(scope="module")
def widget(browser: Any) -> Iterator[Any]:
    """The module as a notebook runs it, over a model that is plain JavaScript."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_content("<div id=el style='width:900px'></div>")
    code = base64.b64encode(parts("heatmap")["js"].encode()).decode()
    page.evaluate(
        """async ([code, frame]) => {
          const listeners = {};
          const model = {
            state: { _frame: frame }, saved: 0,
            get(name) { return this.state[name]; },
            set(name, value) {
              const all = typeof name === "string" ? { [name]: value } : name;
              for (const [key, x] of Object.entries(all)) {
                this.state[key] = x;
                (listeners[`change:${key}`] ?? []).forEach((f) => f());
              }
            },
            on(name, f) { (listeners[name] ??= []).push(f); },
            save_changes() { this.saved += 1; },
          };
          window.model = model;
          window.start = async () => {
            const module = await import(`data:text/javascript;base64,${code}`);
            module.default().render({ model, el: document.querySelector("#el") });
          };
        }""",
        [code, parts("heatmap")["html"]],
    )
    yield page
    page.close()


def show(page: Any, data: dict[str, Any], target: int, source: int | None) -> None:
    page.evaluate("x => Object.assign(window.model.state, x)", {"data": data, "target": target, "source": source})
    page.evaluate("window.start()")
    page.wait_for_selector("canvas[data-drawn]")


@pytest.mark.browser
def test_the_module_serves_a_notebook(widget: Any, matrix: np.ndarray) -> None:
    show(widget, map_data(matrix, TOKENS, Caption(reduction="mean"), target=9), 9, None)
    canvas = widget.locator("canvas")
    cells = json.loads(canvas.get_attribute("data-cells"))
    at = {"x": cells["left"] + 3.5 * cells["side"], "y": cells["top"] + 12.5 * cells["side"]}
    canvas.hover(position=at)
    assert f"= {matrix[12, 3]:.3g}"[:5] in widget.locator("output").inner_text()
    canvas.click(position=at)
    assert widget.evaluate("[model.state.target, model.state.source, model.saved]") == [12, 3, 1]


@pytest.mark.browser
def test_a_pooled_map_reads_exact_values_and_asks_for_its_parts(widget: Any, matrix: np.ndarray) -> None:
    data = map_data(matrix, TOKENS, Caption(reduction="mean"), target=9, most=7)
    show(widget, data, 9, None)
    canvas = widget.locator("canvas")
    cells = json.loads(canvas.get_attribute("data-cells"))
    canvas.hover(position={"x": cells["left"] + 4.5 * cells["side"], "y": cells["top"] + 13.5 * cells["side"]})
    block = np.abs(matrix[12:15, 3:6])
    t, s = 12 + int(block.argmax()) // 3, 3 + int(block.argmax()) % 3
    assert widget.locator("output").inner_text().startswith(f"Largest of 3 × 3: Token {t} “t{t}” reads token {s} ")
    canvas.focus()
    canvas.press("+")
    first, second, size = widget.evaluate("model.state.window")
    assert size == 10
    assert first <= t < first + size
    assert second <= s < second + size
    widget.get_by_role("button", name="Whole map").click()
    assert widget.evaluate("model.state.window") == [0, 0, N]


@pytest.mark.browser
def test_maps_of_one_group_share_a_cursor_until_one_is_gone(browser: Any, matrix: np.ndarray) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_content(
        "<div style='display:flex'><p id=m0 style='width:600px'></p><p id=m1 style='width:600px'></p></div>"
    )
    code = base64.b64encode(parts("heatmap")["js"].encode()).decode()
    both = [
        map_data(matrix, TOKENS, Caption(reduction="mean"), target=9, group="g"),
        map_data(matrix[:12, :12], TOKENS[:12], Caption(reduction="mean"), target=9, group="g", like=matrix),
    ]
    assert both[0]["limit"] == both[1]["limit"]
    page.evaluate(
        """async ([code, frame, both]) => {
          const module = await import(`data:text/javascript;base64,${code}`);
          window.listening = new Set();
          const [add, remove] = [document.addEventListener.bind(document), document.removeEventListener.bind(document)];
          document.addEventListener = (name, f) => (add(name, f), listening.add(f));
          document.removeEventListener = (name, f) => (remove(name, f), listening.delete(f));
          window.stops = both.map((data, i) => {
            const state = { _frame: frame, data, target: 9, source: null };
            const model = { get: (name) => state[name], on() {}, set() {}, save_changes() {} };
            return module.default().render({ model, el: document.querySelector(`#m${i}`) });
          });
        }""",
        [code, parts("heatmap")["html"], both],
    )
    maps, said = page.locator("canvas[data-drawn]"), page.locator("output")

    def point(t: int, s: int) -> list[str]:
        cells = json.loads(maps.nth(0).get_attribute("data-cells"))
        at = {"x": cells["left"] + (s + 0.5) * cells["side"], "y": cells["top"] + (t + 0.5) * cells["side"]}
        maps.nth(0).hover(position=at)
        return [text[:8] for text in said.all_inner_texts()]

    assert point(8, 3) == ["Token 8 ", "Token 8 "]
    assert point(15, 3) == ["Token 15", "Point at"]
    maps.nth(1).focus()
    page.keyboard.press("ArrowUp")
    assert [text[:8] for text in said.all_inner_texts()] == ["Token 8 ", "Token 8 "]
    # The map that is closed takes its cursor along, and hears no more.
    assert page.evaluate("listening.size") == 2
    page.evaluate("stops[1]()")
    assert page.evaluate("listening.size") == 1
    assert said.nth(0).inner_text()[:8] == "Point at"
    left = said.nth(1).inner_text()
    assert point(5, 2)[0] == "Token 5 "
    assert said.nth(1).inner_text() == left
    page.close()


def test_the_notebook_widget_follows_its_traits(matrix: np.ndarray) -> None:
    pytest.importorskip("anywidget")
    from ssmlens.apps import notebook

    made = notebook.attention_map(matrix, TOKENS, Caption(model="m", layer=2, reduction="mean"))
    assert made.target == N - 1
    assert made.data["title"] == "Implicit attention, mean over heads (signed): m, layer 2"
    made.target = 4
    assert made.data["target"] == 4
    assert np.array_equal(numbers(made.data["row"], "<f4")[:5], matrix[4, :5])
    made.window = [4, 2, 6]
    assert made.data["window"] == [4, 2, 6]
    with pytest.raises(ValueError, match="target 20 is outside"):
        notebook.attention_map(matrix, target=N)


def test_a_notebook_without_anywidget_is_told_so(matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from ssmlens.apps import notebook
    from ssmlens.errors import SsmlensError

    monkeypatch.setitem(sys.modules, "anywidget", None)
    notebook._widget.cache_clear()
    with pytest.raises(SsmlensError, match="pip install"):
        notebook.attention_map(matrix)
