"""Collected figures as one HTML page that loads nothing, and as a zip of their numbers and programs."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from html import escape

from ssmlens.apps.frame.collected import Item

__all__ = ["data_zip", "page", "stem"]

_STYLE = (
    ":root{color-scheme:light}body{font-family:sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
    "line-height:1.45;background:#fff;color:#222}section{border-top:1px solid #bbb;margin-top:2rem}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dd{margin:0;overflow-wrap:anywhere}"
    "pre{background:#f4f4f4;padding:.8rem;overflow:auto}svg{max-width:100%;height:auto}table{border-collapse:collapse}"
    "td,th{padding:.15rem .6rem;text-align:left;border-bottom:1px solid #ddd}.wide{overflow:auto;max-height:30rem}"
)
_ROWS = 200
"""Longest table that stands on the page; the zip has all lines."""


def page(title: str, notes: str, items: Sequence[Item]) -> str:
    """One HTML document with every figure, its explanation, facts, table and code; plotly is in it once.

    Args:
        title: heading of the report.
        notes: words below it; paragraphs are parted by empty lines.
        items: the figures, in order.
    """
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>{_library(items)}</head><body><h1>{escape(title)}</h1>"
    )
    words = "".join(f"<p>{escape(part)}</p>" for part in notes.split("\n\n") if part.strip())
    links = "".join(f'<li><a href="#figure-{i}">{escape(item.title)}</a></li>' for i, item in enumerate(items, 1))
    sections = "".join(_section(i, item) for i, item in enumerate(items, 1))
    return f"{head}{words}<nav><ol>{links}</ol></nav><main>{sections}</main></body></html>"


def data_zip(items: Sequence[Item]) -> bytes:
    """For each figure a folder with its table (CSV), facts (JSON), program (Python), and the picture where it has one.

    The same figures give the same bytes.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:

        def write(name: str, text: str) -> None:
            # With a date of its own, the same figures would give other bytes each time.
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)

        for i, item in enumerate(items, 1):
            folder = f"{i:02}_{stem(item.title)}"
            write(f"{folder}/table.csv", item.table.to_csv(index=False))
            about = {"title": item.title, **item.facts, "added": item.added}
            write(f"{folder}/about.json", json.dumps(about, indent=2, ensure_ascii=False))
            write(f"{folder}/code.py", item.code)
            if item.svg is not None:
                write(f"{folder}/figure.svg", item.svg)
    return out.getvalue()


def stem(title: str) -> str:
    """A title as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "figure"


def _library(items: Sequence[Item]) -> str:
    """Plotly itself, once, where any figure needs it."""
    if all(item.plotly is None for item in items):
        return ""
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def _section(number: int, item: Item) -> str:
    # The heading is the title.
    told = {k: v for k, v in {**item.facts, "added": item.added}.items() if k != "title"}
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in told.items())
    said = "".join(
        f"<p><b>{name}</b> {escape(text)}</p>"
        for name, text in (("What it means.", item.means), ("What it does not.", item.does_not))
        if text
    )
    return (
        f'<section id="figure-{number}"><h2>{number}. {escape(item.title)}</h2>{_figure(number, item)}{said}'
        f"<dl>{facts}</dl>{_table(item)}<details><summary>Code</summary><pre>{escape(item.code)}</pre></details></section>"
    )


def _figure(number: int, item: Item) -> str:
    if item.plotly is not None:
        import plotly.io

        figure = plotly.io.from_json(item.plotly)
        drawn: str = figure.to_html(
            include_plotlyjs=False, include_mathjax=False, full_html=False, div_id=f"plot-{number}"
        )
        return f'<div role="img" aria-label="{escape(item.title)}">{drawn}</div>'
    if item.svg is not None:
        return item.svg[item.svg.index("<svg") :]
    return ""


def _table(item: Item) -> str:
    lines = item.table.head(_ROWS)
    more = f", the first {_ROWS} of {len(item.table)} lines" if len(item.table) > _ROWS else ""
    rows = lines.to_html(index=False, border=0, escape=True, float_format="{:.6g}".format)
    opened = " open" if item.plotly is None and item.svg is None else ""
    return f'<details{opened}><summary>Table{more}</summary><div class="wide">{rows}</div></details>'
