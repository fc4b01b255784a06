"""``ssmlens memory remembrance``, ``influence`` and ``stream``: memory of the whole network, past its layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.cli.memory_shared import Length, Seed, emit, sequences
from ssmlens.cli.studies import Out, check_out, sentences
from ssmlens.cli.studies import whole_numbers as numbers
from ssmlens.errors import SsmlensError

__all__ = ["answers", "influence", "remembrance", "stream"]

NEWLINE = "\n"


def remembrance(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    length: Length = None,
    kept: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens kept before the prediction; by default powers of two.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """How far the next-token prediction moves when all but the last k tokens are never read."""
    from ssmlens.analyses import memory as study

    check_out(out)
    wanted = numbers(kept, "--kept")
    with sentences():
        lens = o.open_lens(model, dtype, device)
        rows, origin = sequences(lens, model, text, file, ids, length, seed)
        with output.progress(json) as step:
            result = study.effective_remembrance(
                lens, rows, wanted, seed=seed, progress=lambda done, total: step("cutting the past off", done, total)
            )
    about = {"model": lens.name, "sequences": len(rows), "tokens": rows.shape[1], "origin": origin}
    emit(result, about, out, json, "remembrance", _KEPT, _KEPT_LEGEND, rows=_over_rows(result))


_KEPT = {"kept": "kept", "mean": "moved", "low": "low", "high": "high", "last_token": "of"}
_KEPT_LEGEND = """\
moved: total variation between the prediction after the whole text and after its last tokens, 0 to 1, mean over the
sequences; of: the same after the last token alone, which is what there is to remember"""


def influence(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    position: Annotated[int, typer.Option(help="Token whose prediction is looked at; -1 is the last.")] = -1,
    probes: Annotated[int, typer.Option(help="Random directions of the output, one backward pass each.")] = 8,
    seed: Seed = 0,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """How strongly each earlier token moves a prediction, by gradients through the whole network."""
    from ssmlens.analyses import memory as study

    check_out(out)
    if probes < 1:
        raise SsmlensError(f"--probes is at least 1, got {probes}")
    with sentences():
        lens = o.open_lens(model, dtype, device)
        prompt = o.prompt(model, text, file, ids)
        with output.progress(json) as step:
            result = study.influence(
                lens, prompt, [position], probes=probes, seed=seed,
                progress=lambda done, total: step("going back", done, total),
            )  # fmt: skip
    tokens = int(result.settings["tokens"])
    about = {"model": lens.name, "sequences": 1, "tokens": tokens, "origin": "of the text"}
    rows = [row for row in result.table().to_dict("records") if row["back"] in _shown(tokens)]
    emit(result, about, out, json, "influence", _BACK, _BACK_LEGEND, rows=rows)


_BACK = {
    "back": "back",
    "influence": "influence",
    "low": "low",
    "high": "high",
    "share": "share",
    "near_slope": "slope near",
    "slope": "slope far",
    "slowest_head": "slowest head",
    "mean_distance": "mean back",
}
_BACK_LEGEND = """\
influence: norm of d logits / d token embedding, times the embedding's; share: of the sum over the text
slopes: nats per token, of the first 8 tokens back and of the far half; slowest head: log decay of the slowest state"""


def stream(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    train_length: Annotated[int, typer.Option(help="Tokens of one training sequence.")] = 512,
    bucket: Annotated[int, typer.Option(help="Tokens per bucket.")] = 128,
    newlines: Annotated[int | None, typer.Option(help="Read so many line breaks and no text.")] = None,
    forget: Annotated[float, typer.Option(help="Every decay to this power: above 1 forgets more.")] = 1.0,
    insert: Annotated[float, typer.Option(help="Every write times this: below 1 remembers less.")] = 1.0,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a head's state.")] = None,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Read a long text with carried state: sizes of the states and the loss, and when both give way."""
    from ssmlens.analyses import memory as study

    check_out(out)
    with sentences():
        lens = o.open_lens(model, dtype, device)
        if newlines is not None:
            prompt: Any = _repeated(lens, newlines)
        else:
            prompt = o.prompt(model, text, file, ids)
        with output.progress(json) as step:
            result = study.state_stream(
                lens, prompt, train_length, bucket=bucket, forget=forget, insert=insert, clip=clip,
                progress=lambda done, total: step("reading", done, total) if done % (16 * bucket) < bucket else None,
            )  # fmt: skip
    about = {"model": lens.name, "sequences": 1, "tokens": result.settings["tokens"], "origin": "read"}
    about |= {k: float(result.columns[k][0, 0, 0, 0]) for k in ("onset", "loss_onset", "variance_onset")}
    emit(result, about, out, json, "stream", _BUCKET, _BUCKET_LEGEND, rows=_buckets(result))


_BUCKET = {"tokens": "tokens", "loss": "loss", "growth": "growth", "layer": "layer", "head": "head", "rms": "its rms"}
_BUCKET_LEGEND = """\
growth: variance of the state that has grown most, over its own at the end of the training length, and where it is
onset: both 0.5 nats above the best bucket and three times that variance, in tokens; inf: never"""


def answers(
    model: o.Model = "mamba2-recall",
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 256,
    pairs: Annotated[int, typer.Option(help="Pairs of key and value told in each.")] = 16,
    count: Annotated[int, typer.Option(help="Sequences.")] = 128,
    seed: Seed = 0,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """How often a recall model still names a value that it was told so many tokens ago."""
    from ssmlens.analyses import memory as study
    from ssmlens.zoo import recall_task

    check_out(out)
    lens = o.open_lens(model, dtype, device)
    words = recall_task.VALUES.stop
    if lens.vocab_size != words:
        raise SsmlensError(f"{lens.name} does not know the {words} words of the recall task: choose a recall model")
    with sentences():
        batch = recall_task.batch(count, tokens, pairs, seed)
        result = study.answers_by_age(lens, batch.ids, batch.targets, seed=seed)
    origin = f"with {pairs} pairs each"
    about = {"model": lens.name, "sequences": count, "tokens": tokens, "origin": origin}
    emit(result, about, out, json, "answers_by_age", _ANSWERS, _ANSWERS_LEGEND)


_ANSWERS = {
    "age": "from age",
    "mean_age": "mean",
    "count": "asked",
    "accuracy": "right",
    "low": "low",
    "high": "high",
    "guess": "guess",
    "retained_slowest": "slowest keeps",
    "retained_median": "median keeps",
}
_ANSWERS_LEGEND = """\
right: share of right answers by tokens since the value was told; guess: with each question given another's answer
slowest, median keeps: what the decay leaves of a write of that age, in the slowest and the median head and state"""


def _repeated(lens: Any, count: int) -> list[int]:
    if count < 2 or lens.tokenizer is None:
        raise SsmlensError("--newlines takes at least 2, and a model with a tokenizer")
    pieces = lens.tokenizer.encode(NEWLINE)
    if not len(pieces):
        raise SsmlensError("this model's tokenizer has no line break: give a text or --ids")
    return [int(pieces[-1])] * count


def _over_rows(result: Any) -> list[dict[str, Any]]:
    """One row for each number of tokens kept, over the sequences."""
    parts = {k: x[0] for k, x in result.columns.items()}
    of = float(result.control["last_token"].mean())
    return [
        {"kept": k, **{name: float(x[i]) for name, x in parts.items()}, "last_token": of}
        for i, k in enumerate(result.coords["kept"])
    ]


def _shown(total: int) -> set[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, ... below ``total``."""
    return {k for i in range(total.bit_length()) for k in (0, 2**i, 3 * 2**i) if k < total}


def _buckets(result: Any) -> list[dict[str, Any]]:
    """One row for each of at most 16 buckets: the loss, and the head whose variance has grown most."""
    growth = (result.value / result.control["trained_variance"])[:, 0]  # (layer, bucket, head)
    ends = result.coords["bucket"]
    step = max(1, len(ends) // 16)
    rows = []
    for i in sorted({*range(0, len(ends), step), len(ends) - 1}):
        flat = int(growth[:, i].nan_to_num(-1.0).argmax())
        layer, head = divmod(flat, growth.shape[2])
        rows.append(
            {
                "tokens": ends[i] + 1,
                "loss": float(result.columns["loss"][0, 0, i, 0]),
                "growth": float(growth[layer, i, head]),
                "layer": result.coords["layer"][layer],
                "head": head,
                "rms": float(result.columns["rms"][layer, 0, i, head]),
            }
        )
    return rows
