"""What the commands of the capacity study share: writing, printing, and refusing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ssmlens.cli import output
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

__all__ = [
    "FIGURES",
    "TABLES",
    "assumptions",
    "emit",
    "is_figure",
    "numbers",
    "refuse_early",
    "rows_of",
    "save",
    "sentences",
]

FIGURES = (".png", ".svg", ".pdf")
TABLES = (".csv", ".json", ".parquet", ".safetensors")


@contextmanager
def sentences() -> Iterator[None]:
    """A study's refusals, as the command line says them."""
    try:
        yield
    except SsmlensError:
        raise
    except (ValueError, KeyError) as error:
        raise SsmlensError(str(error.args[0] if error.args else error)) from error


def emit(
    result: Result, about: dict[str, Any], out: Path | None, json: bool, names: dict[str, str], head: str, legend: str
) -> None:
    """The result as a table, or as JSON."""
    frame = result.table()
    if json:
        rows = frame.to_dict("records")
        output.print_json(about | {"out": None if out is None else str(out), "rows": rows, "about": result.metadata()})
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


def is_figure(out: Path | None) -> bool:
    return out is not None and out.suffix.lower() in FIGURES


def save(result: Result, out: Path | None, figure: str) -> None:
    if out is None:
        return
    if is_figure(out):
        from ssmlens import plotting
        from ssmlens.plotting.studies import capacity as drawn

        plotting.save(getattr(drawn, figure)(result), out)
        return
    with output.whole(out) as part:
        result.save(part)


def assumptions(result: Result, out: Path | None) -> None:
    if result.settings.get("interval"):
        print(f"interval: {result.settings['interval']}")
    for sentence in result.assumes:
        print(f"assumes: {sentence}")
    if out is not None:
        print(f"wrote {out}")


def numbers(text: str | None, option: str) -> list[int] | None:
    """ "0,1,4" as a list; None stays None."""
    if text is None:
        return None
    try:
        return [int(x) for x in text.split(",") if x.strip()]
    except ValueError as error:
        raise SsmlensError(f"{option} takes whole numbers separated by commas, got {text!r}") from error


def refuse_early(context: typer.Context) -> None:
    """Options before a subcommand would be lost."""
    given = [k for k in context.params if getattr(context.get_parameter_source(k), "name", "") == "COMMANDLINE"]
    if given:
        raise SsmlensError(
            f"--{given[0].replace('_', '-')} stands before {context.invoked_subcommand}: give options after it"
        )
