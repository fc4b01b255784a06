"""Every program under “Show the code” runs, and gives the figure or the table that it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlens.apps.frame import pages
from ssmlens.apps.frame.snippets import text_of

TINY = {"model": "local folder", "text": "the cat sat on the mat"}
# Choices that a page needs before it shows all its figures.
CHOICES = {
    "states": {"of": "head", "head": "2"},
    "attention": {"target": "9 “a”", "source": "4 “c”", "view": "head", "head": "2"},
}
PATHS = [page.path for listed in pages.groups().values() for page in listed]


@pytest.mark.parametrize("path", PATHS)
def test_every_snippet_runs(page: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    app = page(at=path if path != PATHS[0] else "", folder="two", **TINY, **CHOICES.get(path, {})).run()
    assert not app.exception, app.exception
    assert [error.value for error in app.error] == []
    monkeypatch.chdir(models)
    for code in app.code:
        names: dict[str, Any] = {}
        exec(compile(code.value, path, "exec"), names)
        figure, table = names.get("figure"), names.get("table")
        assert hasattr(figure, "savefig") or hasattr(figure, "to_html") or len(table) > 0, code.value


def test_the_snippet_of_a_map_gives_the_map_of_the_page(page: Callable[..., Any], models: Path) -> None:
    import numpy as np

    import ssmlens
    from ssmlens.apps import store
    from ssmlens.apps.sources import local

    opened = store.opened(local("one", [models]), "float64")
    reading = store.read(opened, TINY["text"], 64)
    drawn = store.attention_map(reading.key, 1, "norm", 0, reading.trace)
    again = ssmlens.load(models / "one", dtype="float64").trace(TINY["text"])[1].recurrence.attention.reduce("norm")[0]
    assert np.array_equal(drawn, again.float().numpy())


@pytest.mark.parametrize("text", ["short", "a 'quote' and a \\ and a\nline", "long " * 60, "“ü” " * 40])
def test_any_text_stands_in_a_snippet_as_it_is(models: Path, text: str) -> None:
    from ssmlens.apps import store
    from ssmlens.apps.sources import local

    reading = store.Reading(("", ()), None, store.Opened(local("two", [models]), "float32", None), text)  # type: ignore[arg-type]
    assert eval(text_of(reading)) == text
