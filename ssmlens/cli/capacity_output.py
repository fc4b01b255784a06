"""What the commands of the capacity study share: writing, printing, and refusing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmlens.cli import output, studies

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

__all__ = ["assumptions", "emit", "rows_of", "save"]


def emit(
    result: Result, about: dict[str, Any], out: Sequence[Path] | None, json: bool, names: dict[str, str], head: str,
    legend: str,
) -> None:  # fmt: skip
    """The result as a table, or as JSON."""
    frame = result.table()
    if json:
        rows = frame.to_dict("records")
        output.print_json(about | {"out": studies.listed(out), "rows": rows, "about": result.metadata()})
        return
    shown = {k: x for k, x in names.items() if k in frame}
    start = f"{about['model']}: " if "model" in about else ""
    tokens = f"{about['tokens']} tokens; " if "tokens" in about else ""
    print(f"{start}{tokens}{head}")
    output.print_table(list(shown.values()), rows_of(frame, shown), left=())
    if legend:
        print(legend)
    assumptions(result, out)


def rows_of(frame: Any, names: dict[str, str]) -> list[list[Any]]:
    return [[number(x) for x in row] for row in frame[list(names)].itertuples(index=False)]


def number(x: Any) -> Any:
    if isinstance(x, str):
        return x
    return int(x) if float(x).is_integer() else float(x)


def save(result: Result, out: Sequence[Path] | None, figure: str) -> None:
    studies.save(result, out, "capacity", figure)


def assumptions(result: Result, out: Sequence[Path] | None) -> None:
    if result.settings.get("interval"):
        print(f"interval: {result.settings['interval']}")
    for sentence in result.assumes:
        print(f"assumes: {sentence}")
    studies.wrote(out)
