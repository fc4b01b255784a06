"""A `Shown` as bytes of a file: PNG, SVG, HTML that loads nothing, CSV and Parquet, each with what it is about."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from ssmlens.apps.frame.shown import Shown, facts

__all__ = ["FORMATS", "csv", "file_name", "html", "parquet", "picture", "ways"]

FORMATS = {
    "PNG": ("png", "image/png"),
    "SVG": ("svg", "image/svg+xml"),
    "HTML": ("html", "text/html"),
    "CSV": ("csv", "text/csv"),
    "Parquet": ("parquet", "application/vnd.apache.parquet"),
}
"""Format to suffix and media type."""


def ways(shown: Shown) -> dict[str, Callable[[], bytes]]:
    """Format to the function that makes the file, for the formats that this figure has."""
    found: dict[str, Callable[[], bytes]] = {}
    if shown.file is not None:
        found["PNG"] = lambda: picture(shown, ".png")
        found["SVG"] = lambda: picture(shown, ".svg")
    if shown.live is not None or shown.file is not None:
        found["HTML"] = lambda: html(shown)
    return {**found, "CSV": lambda: csv(shown), "Parquet": lambda: parquet(shown)}


def file_name(shown: Shown, kind: str) -> str:
    """Name of the file: figure, model and layer."""
    about = facts(shown)
    parts = [shown.name, about.get("model", ""), f"layer-{about['layer']}" if "layer" in about else ""]
    stem = "_".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts if part)
    return f"{stem}.{FORMATS[kind][0]}"


def picture(shown: Shown, suffix: str, dark: bool = False) -> bytes:
    """PNG or SVG; title and note are in the picture and in its metadata. Dark is for a dark page, not for paper."""
    from ssmlens.plotting import save
    from ssmlens.plotting.dark import darken

    assert shown.file is not None
    figure = darken(shown.file()) if dark else shown.file()
    with TemporaryDirectory() as folder:
        return save(figure, Path(folder) / f"figure{suffix}").read_bytes()


def html(shown: Shown) -> bytes:
    """One page that loads nothing: the interactive figure where there is one, else the picture."""
    about = facts(shown)
    if shown.live is not None:
        figure = shown.live().to_html(include_plotlyjs=True, include_mathjax=False, full_html=False)
    else:
        svg = picture(shown, ".svg").decode("utf-8")
        figure = svg[svg.index("<svg") :]
    names = "".join(f'<meta name="ssmlens:{escape(k)}" content="{escape(v)}">' for k, v in about.items())
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{names}<title>{escape(shown.title)}</title>'
        "<style>body{font-family:sans-serif;margin:1.5rem}dl{display:grid;grid-template-columns:max-content 1fr;"
        f"gap:.2rem 1rem}}dd{{margin:0}}</style></head><body><h1>{escape(shown.title)}</h1>{figure}<dl>{rows}</dl>"
        f"<h2>Code</h2><pre>{escape(shown.code)}</pre></body></html>"
    )
    return page.encode("utf-8")


def csv(shown: Shown) -> bytes:
    """The table, with one column for each of model, layer and reduction that it does not have itself."""
    table = shown.table()
    about = facts(shown)
    for name in ("model", "layer", "reduction"):
        if name in about and name not in table.columns:
            table = table.assign(**{name: about[name]})
    text: str = table.to_csv(index=False)
    return text.encode("utf-8")


def parquet(shown: Shown) -> bytes:
    """The table; what it is about stands in the file's metadata under ``ssmlens``."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(shown.table(), preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), "ssmlens": json.dumps(facts(shown))})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()
