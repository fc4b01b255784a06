"""``ssmlens memory fidelity``, ``transport``, ``cross`` and ``age``: what is still there of the past in the states."""

from __future__ import annotations

from typing import Annotated

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.cli.memory_shared import Features, Lags, Length, Rank, Seed, emit, read
from ssmlens.cli.studies import Out, Resume, check_out, sentences
from ssmlens.cli.studies import whole_numbers as numbers
from ssmlens.errors import SsmlensError

__all__ = ["age", "cross", "fidelity", "transport"]


def fidelity(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    lags: Lags = None,
    length: Length = None,
    features: Features = "state",
    layer: Annotated[list[int] | None, typer.Option(help="Probe only this layer; may be repeated.")] = None,
    rank: Rank = 256,
    repeats: Annotated[int, typer.Option(help="Bootstrap repeats for the intervals.")] = 1000,
    seed: Seed = 0,
    resume: Resume = None,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Memory fidelity (ETMF): how well each layer's state still tells the token k steps back, against controls."""
    from ssmlens.analyses import memory as study

    check_out(out)
    steps = numbers(lags, "--lags")
    with sentences():
        found, about = read(model, text, file, ids, length, seed, dtype, device)
        with output.progress(json) as step:
            result = study.fidelity(
                found, None, steps, features=features, layers=layer, rank=rank, repeats=repeats, seed=seed,
                resume=resume, progress=lambda done, total: step("probing layers", done, total),
            )  # fmt: skip
    emit(result, about, out, json, "fidelity", _FIDELITY, _FIDELITY_LEGEND)


_FIDELITY = {
    "layer": "layer",
    "lag": "back",
    "fidelity": "R2",
    "low": "low",
    "high": "high",
    "current": "alone",
    "chance": "chance",
    "net_r2": "net R2",
    "cosine": "cosine",
    "cosine_current": "alone",
    "net": "net",
    "etmf": "ETMF",
    "etmf_r2": "of R2",
    "span_r2": "span",
}
_FIDELITY_LEGEND = """\
R2 and cosine: of what a ridge decoder reads and the embedding of the token so many steps back, on held-out tokens
alone: the same told by the reading token itself; chance: with shuffled targets; net: (x - control) / (1 - control)
ETMF: mean of net over the steps back, by cosine and by R2; span: the farthest with a net R2 above 0.1"""


def cross(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    length: Length = None,
    features: Features = "state",
    rank: Rank = 128,
    seed: Seed = 0,
    resume: Resume = None,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Fidelity across layers (ECLMF): how much of a layer's state a later layer's state tells at the same token."""
    from ssmlens.analyses import memory as study

    check_out(out)
    with sentences():
        found, about = read(model, text, file, ids, length, seed, dtype, device)
        with output.progress(json) as step:
            result = study.cross_layer_fidelity(
                found, features=features, rank=rank, seed=seed, resume=resume,
                progress=lambda done, total: step("reading layers", done, total),
            )  # fmt: skip
    emit(result, about, out, json, "cross_layer_fidelity", _CROSS, _CROSS_LEGEND)


_CROSS = {
    "layer": "layer",
    "reader": "reader",
    "cross_layer_fidelity": "R2",
    "low": "low",
    "high": "high",
    "residual": "from residual",
    "chance": "chance",
    "cka": "CKA",
    "net_ratio": "net ratio",
}
_CROSS_LEGEND = """\
R2: of the layer's whitened components, told by the reader's; from residual: told by the stream that enters the reader,
which a low R2 has to be read against; CKA: debiased, linear; net ratio: net fidelity of the reader over the layer's"""


def age(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    lags: Lags = None,
    length: Length = None,
    rank: Rank = 256,
    seed: Seed = 0,
    resume: Resume = None,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Recall against age: what a probe reads k tokens later, beside what the decays alone predict."""
    from ssmlens.analyses import memory as study

    check_out(out)
    steps = numbers(lags, "--lags")
    with sentences():
        found, about = read(model, text, file, ids, length, seed, dtype, device)
        with output.progress(json) as step:
            result = study.recall_by_age(
                found, None, steps, rank=rank, seed=seed, resume=resume,
                progress=lambda done, total: step("probing layers", done, total),
            )  # fmt: skip
    emit(result, about, out, json, "recall_by_age", _AGE, _AGE_LEGEND)


_AGE = {
    "layer": "layer",
    "lag": "age",
    "recall_by_age": "measured R2",
    "low": "low",
    "high": "high",
    "predicted": "predicted",
    "predicted_best": "best head",
    "read": "read",
    "current": "token alone",
    "chance": "chance",
    "rank_correlation": "rank corr.",
}
_AGE_LEGEND = """\
predicted: share of the state's energy that a write of this age makes up, by its decay; best head: where it is largest
read: share of the weight in its row of the implicit attention; rank corr.: Spearman's, of predicted and measured"""


def transport(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    lags: Lags = None,
    reads: Annotated[int, typer.Option(help="Tokens, evenly spaced, at which the state is looked at.")] = 64,
    seed: Seed = 0,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """How much of a write is left k tokens later, and how it stands out in the state: exact, without a probe."""
    from ssmlens.analyses import memory as study

    check_out(out)
    if reads < 1:
        raise SsmlensError(f"--reads is at least 1, got {reads}")
    steps = numbers(lags, "--lags")
    with sentences():
        found = o.open_lens(model, dtype, device).trace(o.prompt(model, text, file, ids)).check()
        result = study.transport(found, steps, reads=reads, seed=seed)
    columns = {"survival": result.value, "stands out": result.columns["addressability"], **result.control}
    rows = [
        {"layer": layer, "lag": lag, **{k: float(x[i, :, :, j].nanmean()) for k, x in columns.items()}}
        for i, layer in enumerate(result.coords["layer"])
        for j, lag in enumerate(result.coords["lag"])
    ]
    about = {"model": found.settings["model"], "sequences": 1, "tokens": found.ids.shape[1], "origin": "of the text"}
    emit(result, about, out, json, "transport", _TRANSPORT, _TRANSPORT_LEGEND, rows=rows)


_TRANSPORT = {
    "layer": "layer",
    "lag": "back",
    "survival": "survival",
    "stands out": "stands out",
    "absent": "absent",
}
_TRANSPORT_LEGEND = """\
means over heads; survival: share of the write's norm that its decay left; stands out: cosine of what is left with the
state; absent: the same for the write of a token that is still to come, which is what counts for nothing"""
