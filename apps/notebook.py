"""The map of the pages as a widget in a notebook; needs anywidget (the extra ``notebook``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ssmlens.apps.components.map_data import map_data, parts
from ssmlens.errors import SsmlensError
from ssmlens.plotting import Caption
from ssmlens.plotting.labels import positions
from ssmlens.plotting.scales import causal

__all__ = ["attention_map"]


def attention_map(
    matrix: Any,
    tokens: Sequence[str] | None = None,
    caption: Caption | None = None,
    *,
    target: int = -1,
    source: int | None = None,
    dark: bool = False,
) -> Any:
    """One implicit-attention map to point at, zoom into and click.

    Args:
        matrix: (t, s), a tensor, array or nested list in units of y per value.
        tokens: one text per position; the positions themselves by default.
        caption: model, layer, reduction and error.
        target: the row that is framed; negative ones count from the end.
        source: the column of the pinned pair, None for none.
        dark: draw for a dark notebook.

    Returns:
        an anywidget. Its traits ``target`` and ``source`` follow clicks, may be set and observed, and ``window``
        (first row, first column, tokens per side) asks for a part of a map of more than 2048 tokens.

    Raises:
        SsmlensError: without anywidget.
        ValueError: a matrix that is not square, tokens that do not fit it, or a target outside it.
    """
    values = causal(matrix)
    names = positions(tokens, len(values))
    if not -len(names) <= target < len(names):
        raise ValueError(f"target {target} is outside the {len(names)} tokens of this map")
    return _widget()(values, names, caption or Caption(), target % len(names), source, dark)


@lru_cache
def _widget() -> type:
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise SsmlensError("a map in a notebook needs anywidget: pip install 'ssmlens[notebook]'") from error

    files = parts("heatmap")

    class AttentionMap(anywidget.AnyWidget):
        """A map in a notebook."""

        _esm = files["js"]
        _css = files["css"]
        _frame = traitlets.Unicode(files["html"]).tag(sync=True)
        data = traitlets.Dict().tag(sync=True)
        target = traitlets.Int().tag(sync=True)
        source = traitlets.Int(None, allow_none=True).tag(sync=True)
        window = traitlets.List(trait=traitlets.Int(), default_value=None, allow_none=True).tag(sync=True)

        def __init__(
            self, values: Any, tokens: list[str], caption: Caption, target: int, source: int | None, dark: bool
        ) -> None:
            self._about = (values, tokens, caption, dark)
            super().__init__(target=target, source=source, data=self._draw(target, source, None))
            self.observe(self._again, names=["target", "source", "window"])

        def _draw(self, target: int, source: int | None, window: list[int] | None) -> dict[str, Any]:
            values, tokens, caption, dark = self._about
            part = None if window is None else (window[0], window[1], window[2])
            return map_data(values, tokens, caption, target=target, source=source, dark=dark, window=part)

        def _again(self, change: Any) -> None:
            self.data = self._draw(self.target, self.source, self.window)

    return AttentionMap
