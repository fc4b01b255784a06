"""``ssmlens attend``: one layer's implicit attention."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import MemoryLimitError, SsmlensError

if TYPE_CHECKING:
    from torch import Tensor

    from ssmlens.plotting import Caption
    from ssmlens.recurrence import Recurrence

__all__ = ["attend"]

FIGURES = (".png", ".svg", ".pdf")
MAPS = (*FIGURES, ".html", ".csv")
APART = "none"
_TOP = 12


def attend(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    layer: Annotated[int | None, typer.Option(help="Layer; by default the last one with a recurrence.")] = None,
    reduction: Annotated[
        str, typer.Option(help="Over heads: mean (signed), mean_abs, max_abs, norm, or none to keep them apart.")
    ] = "mean",
    heads: Annotated[str | None, typer.Option(metavar="0,4-7", help="Heads that take part; all by default.")] = None,
    row: Annotated[int | None, typer.Option(help="Only what this token reads; -1 is the last.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a .png, .svg, .pdf, .html or .csv file.")] = None,
    max_memory: Annotated[float, typer.Option(metavar="GB", help="Refuse maps that would be larger.")] = 2.0,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Draw or list the implicit attention of one layer: which earlier tokens each token reads, and with what sign."""
    from ssmlens.attention import REDUCTIONS

    output.check_target(out, MAPS)
    if reduction not in (*REDUCTIONS, APART):
        raise SsmlensError(f"unknown reduction {reduction!r}: choose one of {', '.join((*REDUCTIONS, APART))}")
    if not max_memory > 0:
        raise SsmlensError(f"--max-memory is a number of GB above 0, got {max_memory:g}")
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    layer = o.ssm_layer(lens, layer)
    found = lens.trace(prompt, layers=[layer]).check()
    rec, tokens = found[layer].recurrence, found.tokens[0]
    chosen = o.heads(heads, rec.n_heads)
    apart = reduction == APART
    if apart and len(chosen or range(rec.n_heads)) > 1 and out is not None and out.suffix.lower() != ".csv":
        raise SsmlensError("a figure shows one map: give one head with --heads, or a --reduction over them")
    whole_map = row is None and (out is not None or json)
    reader = o.position(-1 if row is None else row, len(tokens))
    values = _map(rec, reduction, chosen, max_memory) if whole_map else _row(rec, reduction, chosen, reader)
    from ssmlens.plotting import Caption

    single = chosen[0] if apart and chosen and len(chosen) == 1 else None
    caption = Caption.of(found, layer, f"head {single}" if single is not None else reduction)
    names = (chosen or list(range(rec.n_heads))) if apart else [reduction]
    if out is not None:
        _write(out, values, names, tokens, caption, None if whole_map else reader)
    if json:
        about = {"model": found.settings["model"], "layer": layer, "reduction": reduction, "heads": chosen}
        about |= {"tokens": tokens, "row": None if whole_map else reader, "out": None if out is None else str(out)}
        errors = {"reconstruction_error": found.reconstruction_error[layer], "tolerance": found.tolerance}
        plain = values.double().tolist()
        output.print_json(about | errors | {"values": plain if apart else plain[0]})
    elif out is not None:
        print(f"wrote {out}")
    else:
        _print_row(values, names, tokens, caption, reader)


def _map(rec: Recurrence, reduction: str, heads: list[int] | None, max_memory: float) -> Tensor:
    """(h, t, s) of the heads kept apart, or (1, t, s) of their reduction."""
    count = len(heads or range(rec.n_heads)) if reduction == APART else 1
    size, limit = count * rec.length**2 * rec.dtype.itemsize, max_memory * 1e9
    if size > limit:
        what = f"{count} maps" if count > 1 else "a map"
        advice = "fewer --heads, a --reduction over them, " if count > 1 else ""
        raise MemoryLimitError(
            f"{what} of {rec.length} x {rec.length} tokens {'need' if count > 1 else 'needs'} {size / 1e9:.2g} GB "
            f"(limit {max_memory:g} GB): use {advice}--row for one token, or a shorter text"
        )
    if reduction == APART:
        return rec.attention.dense(heads, limit=limit)[0]
    return rec.attention.reduce(reduction, heads, limit=limit)


def _row(rec: Recurrence, reduction: str, heads: list[int] | None, reader: int) -> Tensor:
    """(h, s) of the heads kept apart, or (1, s) of their reduction: the same rules as for whole maps."""
    row = rec.attention.row(reader)[0]
    row = row if heads is None else row[heads]
    reduced = {
        APART: lambda x: x,
        "mean": lambda x: x.mean(0, keepdim=True),
        "mean_abs": lambda x: x.abs().mean(0, keepdim=True),
        "max_abs": lambda x: x.abs().amax(0, keepdim=True),
        "norm": lambda x: x.norm(dim=0, keepdim=True),
    }
    return reduced[reduction](row)


def _write(
    out: Path, values: Tensor, names: Sequence[Any], tokens: list[str], caption: Caption, reader: int | None
) -> None:
    suffix = out.suffix.lower()
    if suffix == ".csv":
        with output.whole(out) as part:
            _write_csv(part, values, names, tokens, reader)
        return
    from ssmlens import plotting

    if suffix == ".html":
        from ssmlens.plotting import pages

        drawing = pages.attention_map if reader is None else pages.token_row
        pages.save(drawing(values[0], tokens, caption), out)
    elif reader is None:
        plotting.save(plotting.attention_map(values[0], tokens, caption), out)
    else:
        plotting.save(plotting.token_row(values[0], tokens, caption, reader=reader), out)


def _write_csv(path: Path, values: Tensor, names: Sequence[Any], tokens: list[str], reader: int | None) -> None:
    """One line per head (or reduction), reading token and earlier-or-same source token."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        lines = csv.writer(stream)
        lines.writerow(("heads", "t", "t_token", "s", "s_token", "value"))
        for name, matrix in zip(names, values.double().tolist()):
            rows = enumerate(matrix) if reader is None else [(reader, matrix)]
            for t, row in rows:
                lines.writerows((name, t, tokens[t], s, tokens[s], repr(row[s])) for s in range(t + 1))


def _print_row(values: Tensor, names: Sequence[Any], tokens: list[str], caption: Caption, reader: int) -> None:
    from ssmlens.plotting.labels import label, visible

    print(caption.title(f"What token {reader} “{visible(tokens[reader])}” reads"))
    print(caption.note())
    for name, row in zip(names, values[:, : reader + 1].double()):
        order = row.abs().argsort(descending=True, stable=True)[:_TOP].tolist()
        peak = float(row.abs().max()) or 1.0
        lines = [
            [s, label(tokens[s], 24), reader - s, float(row[s]), output.bar(abs(float(row[s])) / peak)] for s in order
        ]
        print(f"head {name}" if isinstance(name, int) else "")
        output.print_table(("s", "token", "back", "M[t, s]", ""), lines, left=(1, 4))
