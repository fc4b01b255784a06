"""``ssmlens memory`` and its subcommands: what a model's states remember, and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmlens.cli import memory_network, memory_probes, output
from ssmlens.cli import options as o
from ssmlens.cli.memory_shared import emit
from ssmlens.cli.studies import FIGURES, TABLES, Out, check_out, sentences
from ssmlens.errors import SsmlensError

__all__ = ["app"]

app = typer.Typer(help="What a model's states remember: half-lives, reach, and what a probe still reads of the past.")


@app.callback(invoke_without_command=True)
def memory(
    context: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    train_length: Annotated[
        int | None, typer.Option(help="Tokens of one training sequence, for the saturation; default: this text.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the table (.csv, .json, .parquet, .safetensors) or half-lives (.png, .svg, .pdf)."),
    ] = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Summarise each layer's memory: half-lives, how far back it reads, and whether its state has settled."""
    if context.invoked_subcommand is not None:
        _refuse_early(context)
        return
    output.check_target(out, (*TABLES, *FIGURES))
    if train_length is not None and train_length < 1:
        raise SsmlensError(f"--train-length is at least 1, got {train_length}")
    prompt = o.prompt(model, text, file, ids)
    found = o.open_lens(model, dtype, device).trace(prompt).check()
    from ssmlens.analyses import memory as study

    result = study.summary(found, train_length=train_length)
    if out is not None and out.suffix.lower() in FIGURES:
        from ssmlens import plotting

        lives = study.half_life(found)
        slowest = lives.value.amax(dim=-1) if "state" in lives.dims else lives.value
        caption = plotting.Caption.of(found, reduction="slowest state of each head")
        per_layer = {k: slowest[i, 0] for i, k in enumerate(lives.coords["layer"])}
        plotting.save(plotting.half_life_map(per_layer, caption), out)
    elif out is not None:
        with output.whole(out) as part:
            result.save(part)
    frame = result.table()
    if json:
        about = {"model": found.settings["model"], "tokens": len(found.tokens[0]), "tolerance": found.tolerance}
        about |= {"out": None if out is None else str(out)}
        output.print_json(about | {"layers": frame.to_dict("records"), "about": result.metadata()})
        return
    shown = [c for c in _COLUMNS if c in frame]
    print(f"{found.settings['model']}: {len(found.tokens[0])} tokens; distances and half-lives in tokens")
    rows = [[float(x) if isinstance(x, float) else x for x in row] for row in frame[shown].itertuples(index=False)]
    output.print_table([_COLUMNS[c] for c in shown], rows, left=())
    print(_LEGEND)
    for sentence in result.assumes:
        print(f"assumes: {sentence}")
    if out is not None:
        print(f"wrote {out}")


_COLUMNS = {
    "layer": "layer",
    "half_life": "half-life",
    "half_life_q10": "10 %",
    "half_life_q90": "90 %",
    "longer_than_text": "beyond text",
    "mean_distance": "reads back",
    "distance_q90": "90 % within",
    "fraction_of_uniform": "of uniform",
    "saturation": "saturation",
    "unsaturated": "unsaturated",
    "reconstruction_error": "error",
}

_LEGEND = """\
half-life: median over heads and states, between its 10 % and 90 % quantiles; beyond text: share that outlasts the text
reads back: mean distance of what the last token reads, with 90 % within; of uniform: 1 if it read every token alike
saturation: median share of its stationary level that a state has reached; unsaturated: share that could grow by 25 %"""


@app.command()
def spectrum(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    train_length: Annotated[
        int | None, typer.Option(help="Tokens of one training sequence, for local and global; default: this text.")
    ] = None,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Time constants of each layer's states from slow to fast, and how many of its channels are global."""
    check_out(out)
    from ssmlens.analyses import memory as study

    with sentences():
        found = o.open_lens(model, dtype, device).trace(o.prompt(model, text, file, ids)).check()
        result = study.timescale_spectrum(found, windows=min(8, found.ids.shape[1]))
        kinds = study.channel_class(found, train_length)
    rows = []
    for i, layer in enumerate(result.coords["layer"]):
        known = result.value[i, 0][~result.value[i, 0].isnan()]
        at = [known[min(len(known) - 1, int(q * len(known)))] for q in (0.0, 0.1, 0.5, 0.9)]
        of = zip(("slowest", "q10", "median", "q90"), at)
        beyond = float((known > result.control["observed_tokens"][i, 0, 0]).double().mean())
        rows.append(
            {"layer": layer, **{k: float(x) for k, x in of}, "fastest": float(known[-1]), "beyond": beyond}
            | {"global": float(kinds.value[i, 0].nanmean())}
        )
    about = {"model": found.settings["model"], "sequences": 1, "tokens": found.ids.shape[1], "origin": "of the text"}
    emit(result, about, out, json, "timescale_spectrum", {k: k for k in rows[0]}, _SPECTRUM_LEGEND, rows=rows)


_SPECTRUM_LEGEND = """\
time constants in tokens, 1 / mean(-log decay), over heads and states; beyond: share that is longer than the text
global: share of heads of which 1 % or more is left of a write over the training length, in their slowest state"""

for command in (
    memory_probes.fidelity,
    memory_probes.transport,
    memory_probes.cross,
    memory_probes.age,
    memory_network.remembrance,
    memory_network.influence,
    memory_network.stream,
    memory_network.answers,
):
    app.command()(command)


def _refuse_early(context: typer.Context) -> None:
    """Options before a subcommand would be lost."""
    given = [k for k in context.params if getattr(context.get_parameter_source(k), "name", "") == "COMMANDLINE"]
    if given:
        raise SsmlensError(
            f"--{given[0].replace('_', '-')} stands before {context.invoked_subcommand}: give options after it"
        )
