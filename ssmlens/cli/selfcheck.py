"""``ssmlens selfcheck``: every closed form that the studies are held to, measured anew beside what is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib import import_module, util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.analyses._check import Check

__all__ = ["SOURCES", "collect", "measure", "selfcheck"]

SOURCES = {
    "memory": "ssmlens.analyses.memory.checks",
    "lyapunov": "ssmlens.analyses.lyapunov.checks",
    "capacity": "ssmlens.analyses.capacity.checks",
    "precision": "ssmlens.analyses.precision.checks",
    "sensitivity": "ssmlens.analyses.sensitivity.checks",
    "tasks": "ssmlens.tasks.checks",
}
"""Whose checks there are: the study, and the module that lists them as ``CHECKS``."""

FAILED = 1


def selfcheck(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A study, or part of a check's name; may be given several times."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure every closed form of the studies anew, and print it beside the exact value; exit 1 when one fails."""
    checks = choose(collect(), only or [])
    rows = []
    with output.progress(json or not sys.stderr.isatty()) as step:
        for done, (study, check) in enumerate(checks):
            step(check.name, done, len(checks))
            rows.append(measure(study, check))
    failed = [row for row in rows if not row["passed"]]
    if json:
        output.print_json({"passed": not failed, "checks": rows})
    else:
        _print(rows)
    if failed:
        raise typer.Exit(FAILED)


def collect() -> list[tuple[str, Check]]:
    """(study, check) of every study of this installation, in the order of `SOURCES`."""
    found = []
    for study, module in SOURCES.items():
        if _exists(module):
            found += [(study, check) for check in import_module(module).CHECKS]
    return found


def choose(checks: Sequence[tuple[str, Check]], only: Sequence[str]) -> list[tuple[str, Check]]:
    """The checks of the studies that ``only`` names, and those whose name holds one of its words; all without any.

    Raises:
        SsmlensError: when a word names nothing.
    """
    chosen: set[int] = set()
    known = dict.fromkeys(study for study, _ in checks)
    for word in only:
        named = word in known
        hits = {
            i for i, (study, c) in enumerate(checks) if (word == study if named else word.lower() in c.name.lower())
        }
        if not hits:
            studies = ", ".join(known)
            raise SsmlensError(f"no check is called {word!r}: give a study ({studies}) or part of a check's name")
        chosen |= hits
    return [pair for i, pair in enumerate(checks) if i in chosen or not only]


def measure(study: str, check: Check) -> dict[str, Any]:
    """What one check found. A check that raises has failed, and ``problem`` says how."""
    start = time.perf_counter()
    row: dict[str, Any] = {"study": study, "name": check.name, "law": check.law, "source": check.source}
    try:
        found = check()
    except Exception as error:
        missing = float("nan")
        numbers = {"measured": missing, "exact": missing, "error": missing, "tolerance": check.tolerance}
        row |= numbers | {"passed": False, "problem": f"{type(error).__name__}: {error}"}
    else:
        numbers = {"measured": found.measured, "exact": found.exact, "error": found.error}
        row |= numbers | {"tolerance": found.tolerance, "passed": found.passed}
    row["relative"] = check.relative
    row["seconds"] = time.perf_counter() - start
    return row


def _exists(module: str) -> bool:
    """Whether this installation has the module; a parent that is missing, or no package, counts as not."""
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _print(rows: Sequence[dict[str, Any]]) -> None:
    cells = [
        (
            row["name"],
            f"{row['measured']:.9g}",
            f"{row['exact']:.9g}",
            f"{row['error']:.1e}",
            f"{row['tolerance']:.0e}" + (" rel" if row["relative"] else ""),
            f"{row['seconds']:.2f}",
            "pass" if row["passed"] else "FAIL",
        )
        for row in rows
    ]
    output.print_table(("check", "measured", "exact", "error", "tolerance", "s", ""), cells, left=(0, 6))
    for row in rows:
        if "problem" in row:
            print(f"{row['name']} raised {' '.join(row['problem'].split())}")
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} of {len(rows)} checks passed in {sum(row['seconds'] for row in rows):.1f} s")
