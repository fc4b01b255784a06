"""Options that the commands share, and what is made of them: a lens, a prompt, positions, heads."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.errors import LayerError, PromptError, SsmlensError

if TYPE_CHECKING:
    from ssmlens.lens import Lens

__all__ = [
    "DEFAULT_MODEL",
    "Device",
    "Dtype",
    "File",
    "Ids",
    "Json",
    "Model",
    "Text",
    "heads",
    "open_lens",
    "position",
    "prompt",
    "ssm_layer",
]

DEFAULT_MODEL = "mamba1-english"
STDIN = "-"

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="SOURCE", help="A shipped model, a local folder or a Hub id.", show_default=True
    ),
]
Text = Annotated[
    str | None, typer.Option("--text", "-t", help="The text to read. Default: the model's shipped passage.")
]
File = Annotated[
    str | None, typer.Option("--file", "-f", metavar="PATH", help="Read the text from a file, or from - (stdin).")
]
Ids = Annotated[
    str | None, typer.Option("--ids", metavar="N,N,...", help="Token ids instead of a text, separated by commas.")
]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16, or auto for the checkpoint's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


def open_lens(model: str, dtype: str, device: str) -> Lens:
    """The model of ``--model``, ``--dtype`` and ``--device``."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SsmlensError(f"unknown device {device!r}: give cpu, cuda or cuda:N")
    import torch

    import ssmlens

    if ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise SsmlensError(f"there is no device {device}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return ssmlens.load(model, device=device, dtype=dtype)


def prompt(model: str, text: str | None, file: str | None, ids: str | None) -> str | list[int]:
    """The text or ids to read: one of ``--text``, ``--file``, ``--ids``, or the shipped passage."""
    given = [name for name, x in (("--text", text), ("--file", file), ("--ids", ids)) if x is not None]
    if len(given) > 1:
        raise PromptError(f"{' and '.join(given)} were given: choose one")
    if file is not None:
        text = _read(file)
    if ids is not None:
        return _ids(ids)
    if text is None:
        from ssmlens import zoo

        return zoo.passage(model) if model in zoo.names() else zoo.passage()
    if not text:
        raise PromptError("the prompt is empty: give at least one token")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
        raise PromptError(f"--text is not UTF-8 text: character {error.start} cannot be encoded") from error
    return text


def _read(file: str) -> str:
    data = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    name = "standard input" if file == STDIN else file
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def _ids(text: str) -> list[int]:
    parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        raise PromptError(f"--ids takes whole numbers separated by commas, got {text!r}")
    if not parts:
        raise PromptError("the prompt is empty: give at least one token")
    return [int(part) for part in parts]


def position(t: int, length: int) -> int:
    """A token position, negative ones counted from the end."""
    if not -length <= t < length:
        raise PromptError(f"token {t} does not exist: the text has tokens 0 to {length - 1}")
    return t % length


def heads(text: str | None, n_heads: int) -> list[int] | None:
    """``--heads`` such as "0,4-7" as a list; None for all."""
    if text is None:
        return None
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise SsmlensError(f"--heads takes numbers and ranges such as 0,4-7, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) >= n_heads or first > last:
            raise LayerError(f"heads {part.strip()} do not exist: this layer has heads 0 to {n_heads - 1}")
        chosen += [h for h in range(first, last + 1) if h not in chosen]
    return chosen


def ssm_layer(lens: Any, layer: int | None) -> int:
    """The layer to look at; by default the last one with a recurrence."""
    there = [x.index for x in lens.layers if x.kind == "ssm"]
    if layer is None:
        return there[-1]
    if layer not in there:
        known = f"layers with a recurrence are {', '.join(map(str, there))}"
        what = "has no recurrence" if 0 <= layer < len(lens.layers) else "does not exist"
        raise LayerError(f"layer {layer} {what}: {known}")
    return layer
