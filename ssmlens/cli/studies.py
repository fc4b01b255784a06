"""What the commands of the studies share: options, progress, files, figures and tables."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

__all__ = [
    "FIGURES",
    "TABLES",
    "Out",
    "Resume",
    "check_out",
    "figures",
    "layers",
    "listed",
    "numbers",
    "positions",
    "refuse_early",
    "report",
    "save",
    "sentences",
    "step",
    "whole_numbers",
    "wrote",
]

FIGURES = (".png", ".svg", ".pdf")
TABLES = (".csv", ".json", ".parquet", ".safetensors")

Out = Annotated[
    list[Path] | None,
    typer.Option(
        help="Write the numbers (.csv, .json, .parquet, .safetensors) or a figure (.png, .svg, .pdf); repeatable."
    ),
]
Resume = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what is done here, and go on from it.")]


def refuse_early(context: typer.Context) -> None:
    """Refuse options that stand before a subcommand, where they would be lost."""
    given = [k for k in context.params if getattr(context.get_parameter_source(k), "name", "") == "COMMANDLINE"]
    if given:
        raise SsmlensError(
            f"--{given[0].replace('_', '-')} stands before {context.invoked_subcommand}: give options after it"
        )


@contextmanager
def step(quiet: bool, what: str, every: int = 1) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) for a study's progress, shown at every so many parts."""
    with output.progress(quiet) as shown:

        def call(done: int, total: int) -> None:
            if done % every == 0 or done == total:
                shown(what, done, total)

        yield call


def numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        found = [float(x) for x in text.split(",") if x.strip()]
    except ValueError as error:
        raise SsmlensError(f"{option} takes numbers separated by commas, got {text!r}") from error
    if not found:
        raise SsmlensError(f"{option} takes numbers separated by commas, got none")
    return found


def positions(text: str | None) -> list[int] | None:
    """Token positions separated by commas; None for all."""
    if text is None:
        return None
    found = numbers(text, "--targets")
    if any(x != int(x) for x in found):
        raise SsmlensError(f"--targets takes whole numbers separated by commas, got {text!r}")
    return [int(x) for x in found]


def layers(text: str | None, count: int) -> list[int] | None:
    """``--layers`` such as "0,4-7"; None for all."""
    if text is None:
        return None
    try:
        return o.heads(text, count)
    except SsmlensError as error:
        raise SsmlensError(f"--layers takes layers 0 to {count - 1} as in 0,4-7, got {text!r}") from error


@contextmanager
def sentences() -> Iterator[None]:
    """A study's refusals, as the command line says them."""
    try:
        yield
    except SsmlensError:
        raise
    except (ValueError, KeyError) as error:
        raise SsmlensError(str(error.args[0] if error.args else error)) from error


def whole_numbers(text: str | None, option: str) -> list[int] | None:
    """ "0,1,4" as a list; None stays None."""
    if text is None:
        return None
    try:
        return [int(x) for x in text.split(",") if x.strip()]
    except ValueError as error:
        raise SsmlensError(f"{option} takes whole numbers separated by commas, got {text!r}") from error


def check_out(out: Sequence[Path] | None) -> None:
    """Refuse files that could not be written, before anything is computed."""
    for target in out or ():
        output.check_target(target, (*TABLES, *FIGURES))


def figures(out: Sequence[Path] | None) -> list[Path]:
    """Those of the files that are figures."""
    return [target for target in out or () if target.suffix.lower() in FIGURES]


def listed(out: Sequence[Path] | None) -> list[str]:
    """The files, as JSON names them."""
    return [str(target) for target in out or ()]


def wrote(out: Sequence[Path] | None) -> None:
    """Say what was written."""
    for target in out or ():
        print(f"wrote {target}")


def save(result: Result, out: Sequence[Path] | None, study: str, figure: str) -> None:
    """Write the result, and the figure that this function of `ssmlens.plotting.studies` draws of it."""
    for target in out or ():
        if target.suffix.lower() not in FIGURES:
            with output.whole(target) as part:
                result.save(part)
            continue
        from ssmlens import plotting

        drawn = importlib.import_module(f"ssmlens.plotting.studies.{study}")
        plotting.save(getattr(drawn, figure)(result), target)


def report(
    result: Result, rows: Sequence[dict[Any, Any]], *, out: Sequence[Path] | None, json: bool, head: str,
    legend: str = "", about: dict[str, Any] | None = None, left: Sequence[int] = (0,),
) -> None:  # fmt: skip
    """Print a result's rows as JSON with its metadata, or as a table with its assumptions below."""
    if json:
        model = {"model": result.settings["model"]} if "model" in result.settings else {}
        known = {**model, **(about or {}), "out": listed(out)}
        output.print_json(known | {"rows": list(rows), "about": result.metadata()})
        return
    print(head)
    output.print_table(list(rows[0]), [list(row.values()) for row in rows], left=left)
    if legend:
        print(legend)
    for sentence in result.assumes:
        print(f"assumes: {sentence}")
    wrote(out)
