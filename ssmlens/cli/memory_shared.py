"""What the memory commands share: options, the sequences that they read, and how results are printed and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output, studies
from ssmlens.errors import PromptError, SsmlensError

if TYPE_CHECKING:
    from torch import Tensor

    from ssmlens.analyses._result import Result
    from ssmlens.lens import Lens

__all__ = ["Features", "Lags", "Length", "Rank", "Seed", "emit", "read", "sequences"]

Lags = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Steps back; by default about two for each doubling.")
]
Length = Annotated[int | None, typer.Option(help="Cut the text into sequences of so many tokens.")]
Features = Annotated[str, typer.Option(help="What is probed: state, output or residual.")]
Rank = Annotated[int, typer.Option(help="Most principal components of a layer that the probe sees.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]


ROWS = 24
"""Sequences that are made where no text is given, and from which on a text is cut into some."""

LENGTH = 256
PAIRS = 16


def sequences(
    lens: Lens, model: str, text: str | None, file: str | None, ids: str | None, length: int | None, seed: int
) -> tuple[Tensor, str]:
    """Ids (b, t), and where they are from, in words.

    A given text becomes rows of ``length`` tokens, what is left over dropped; without a length it stays one row while
    it is short of 24 rows of 256. Without a text the recall models read their task, and every other model what it
    writes itself.
    """
    import torch

    if length is not None and length < 2:
        raise SsmlensError(f"--length is at least 2 tokens, got {length}")
    if (text, file, ids) == (None, None, None):
        if model.endswith("-recall"):
            return _recall(length or LENGTH, seed), "of the recall task"
        return _sampled(lens, ROWS, length or LENGTH, seed), "written by the model itself"
    from ssmlens.prompt import prepare

    whole: Tensor = prepare(o.prompt(model, text, file, ids), lens.tokenizer, lens.vocab_size).ids[0]
    cut = length or (LENGTH if len(whole) >= ROWS * LENGTH else len(whole))
    if cut > len(whole):
        raise PromptError(f"the text has {len(whole)} tokens, fewer than a --length of {cut}")
    rows = len(whole) // cut
    return torch.as_tensor(whole[: rows * cut]).reshape(rows, cut), "of the text"


def _recall(length: int, seed: int) -> Tensor:
    from ssmlens.zoo import recall_task

    pairs = max(1, min(PAIRS, length // 4))
    ids: Tensor = recall_task.batch(4 * ROWS, length, pairs, seed).ids
    return ids


def _sampled(lens: Lens, rows: int, length: int, seed: int) -> Tensor:
    """Texts that the model writes, one token drawn from each of its predictions, after its first token."""
    import torch

    from ssmlens.stepping import Stepper

    net = Stepper(lens)
    start = getattr(lens.model.config, "bos_token_id", None)
    g = torch.Generator().manual_seed(seed)
    state, written = net.initial(rows), [torch.full((rows,), start or 0, dtype=torch.long)]
    with torch.no_grad():
        for _ in range(length - 1):
            state, logits = net.step(state, written[-1].to(lens.device))
            law = torch.softmax(logits.double().cpu(), -1)
            written.append(torch.multinomial(law, 1, generator=g)[:, 0])
    return torch.stack(written, 1)


def read(
    model: str, text: str | None, file: str | None, ids: str | None, length: int | None, seed: int, dtype: str,
    device: str,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The trace of the sequences to be probed, and what to say about them."""
    lens = o.open_lens(model, dtype, device)
    rows, origin = sequences(lens, model, text, file, ids, length, seed)
    found = lens.trace(rows).check()
    return found, {"model": lens.name, "sequences": len(rows), "tokens": rows.shape[1], "origin": origin}


def emit(
    result: Result, about: dict[str, Any], out: list[Path] | None, json: bool, figure: str, columns: Mapping[str, str],
    legend: str, rows: Sequence[Mapping[Any, Any]] | None = None,
) -> None:  # fmt: skip
    """Write the result, and print it as a table or as JSON.

    Args:
        about: what was read: model, sequences, tokens, origin.
        out: files to write; a figure is drawn by the function ``figure`` of ssmlens.plotting.studies.memory.
        columns: which columns of the table are printed, and under what name.
        legend: lines below the table.
        rows: what is printed where that is not the result's whole table.
    """
    studies.save(result, out, "memory", figure)
    if rows is None:
        rows = result.table().dropna(subset=[result.name]).to_dict("records")
    if json:
        about = about | {"out": studies.listed(out)}
        output.print_json(about | {"rows": list(rows), "about": result.metadata()})
        return
    known = [c for c in columns if rows and c in rows[0]]
    print(f"{about['model']}: {about['sequences']} x {about['tokens']} tokens {about['origin']}")
    output.print_table([columns[c] for c in known], [[_number(row[c]) for c in known] for row in rows], left=())
    print(legend)
    for key in ("onset", "loss_onset", "variance_onset"):
        if key in about:
            print(f"{key.replace('_', ' ')}: {about[key]:g}")
    if "interval" in result.settings:
        print(f"interval: {result.settings['interval']}")
    for sentence in result.assumes:
        print(f"assumes: {sentence}")
    if "contested" in result.settings:
        print(f"contested: {result.settings['contested']}")
    studies.wrote(out)


def _number(x: Any) -> Any:
    return int(x) if float(x).is_integer() else float(x)
