"""``ssmlens sensitivity``: what a model can do without, its outliers, and the curvature of its loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import studies
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

__all__ = ["app"]

app = typer.Typer(help="What a model can do without, the outliers of its tensors, and the curvature of its loss.")

Part = Annotated[str, typer.Option(help="What is taken out: block, ssm or head.")]
Group = Annotated[int | None, typer.Option(help="Neighbouring heads that go together; by default one, or 1/16.")]
Targets = Annotated[
    str | None, typer.Option(metavar="T,T,...", help="Positions whose loss counts, such as -1; all by default.")
]
Layers = Annotated[str | None, typer.Option(metavar="0,4-7", help="Layers that take part; all by default.")]


@app.callback(invoke_without_command=True)
def sensitivity(
    context: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    part: Part = "block",
    group: Group = None,
    layers: Layers = None,
    targets: Targets = None,
    control: Annotated[bool, typer.Option(help="Also replace each part by its mean over the text.")] = True,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Change of the loss without each block, scan or head; the subcommands drop other things and look further."""
    if context.invoked_subcommand is not None:
        studies.refuse_early(context)
        return
    from ssmlens.analyses import sensitivity as study

    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    where = studies.layers(layers, len(lens.layers))
    with studies.step(json, "parts taken out") as step:
        result = study.removal(lens, prompt, part, layers=where, group=group, control=control,
                               targets=studies.positions(targets),
                               resume=resume, progress=step)  # fmt: skip
    frame = result.table()
    rows = []
    for name, of in frame.groupby("part", sort=False):
        by = of.set_index("split")
        row = {"part": name, "loss": float(by["loss_change"]["all"]), "low": float(by["low"]["all"])}
        row["high"] = float(by["high"]["all"])
        if "mean_change" in by:
            row["mean kept"] = float(by["mean_change"]["all"])
        names = {"first third": "first", "middle third": "middle", "last third": "last", "recall": "recall"}
        rows.append(row | {short: float(by["loss_change"][split]) for split, short in names.items()})
    head = f"{lens.name}: loss {float(result.columns['loss'][0]):.4g} nats a token; change without each {part}"
    legend = "mean kept: its mean in its place; first, middle, last: thirds of the text; recall: pairs seen before"
    _report(result, out, json, "removal", rows, head, legend)


@app.command()
def greedy(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    part: Part = "block",
    steps: Annotated[int | None, typer.Option(help="How many to take out; half of them by default.")] = None,
    group: Group = None,
    layers: Layers = None,
    targets: Targets = None,
    orders: Annotated[int, typer.Option(help="Random orders of the control.")] = 3,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Take out the part that is missed least, again and again, against single-removal and random orders."""
    from ssmlens.analyses import sensitivity as study

    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    where = studies.layers(layers, len(lens.layers))
    with studies.step(json, "parts taken out") as step:
        result = study.greedy(lens, prompt, part, steps, layers=where, group=group, orders=orders,
                              targets=studies.positions(targets),
                              resume=resume, progress=step)  # fmt: skip
    order = ["-", *result.settings["order"]]
    columns = {"loss": "loss", "low": "low", "high": "high", "single_order": "by single", "random_order": "random"}
    rows = [
        {"step": i, "out": order[i], **{short: float(row[name]) for name, short in columns.items()}}
        for i, row in enumerate(result.table().to_dict("records"))
    ]
    rho = {k: float(result.columns[k][0]) for k in ("rank_correlation", "rank_low", "rank_high")}
    head = (
        f"{lens.name}: loss in nats a token; rank correlation of single changes with this order "
        f"{rho['rank_correlation']:.2f} ({rho['rank_low']:.2f} to {rho['rank_high']:.2f}; "
        f"95 % of random orders below {float(result.control['rank_null'][0]):.2f})"
    )
    _report(result, out, json, "greedy", rows, head, "by single: the order of single removals; random: mean of orders")


@app.command()
def tokens(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    layer: Annotated[int | None, typer.Option(help="Tokens are dropped above it; the middle one by default.")] = None,
    keep: Annotated[str, typer.Option(metavar="X,X,...", help="Shares of the context that stay.")] = "0.75,0.5,0.25",
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Drop the context's lowest-scored tokens above a layer, and measure the loss on the rest of the text."""
    from ssmlens.analyses import sensitivity as study

    shares = studies.numbers(keep, "--keep")
    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    with studies.step(json, "scores") as step:
        result = study.token_reduction(lens, prompt, layer, shares, resume=resume, progress=step)
    rows = [
        {"score": name, "keep": share, "loss": float(result.value[i, j]), "low": float(result.columns["low"][i, j]),
         "high": float(result.columns["high"][i, j]), "random": float(result.control["random_change"][j])}
        for i, name in enumerate(result.coords["score"]) for j, share in enumerate(result.coords["keep"])
    ]  # fmt: skip
    where = f"above layer {result.settings['layer']}, on the last {result.settings['measured_tokens']} targets"
    nothing = f"without any context there: {float(result.control['no_context']):+.3g}"
    _report(result, out, json, "tokens", rows, f"{lens.name}: change of the loss {where}; {nothing}", "")


@app.command()
def layers(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """How sure each layer's residual stream already is of the next token, and how often it is right about it."""
    from ssmlens.analyses import sensitivity as study

    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    result = study.layer_confidence(lens.trace(prompt).check())
    names = {"confidence": "confidence", "entropy": "entropy", "agreement": "agreement", "low": "low", "high": "high",
             "repeats": "repeats", "kl": "KL"}  # fmt: skip
    means: Any = result.table().groupby("layer")[list(names)].mean()
    rows = [{"layer": int(k), **{short: float(row[n]) for n, short in names.items()}} for k, row in means.iterrows()]
    head = f"{lens.name}: a constant would agree {float(result.control['unigram_agreement']):.3g}"
    legend = "agreement: same first choice as the model, 95 % between low and high; repeats: it is the token itself"
    _report(result, out, json, "layers", rows, head, legend)


@app.command()
def exits(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    thresholds: Annotated[str, typer.Option(metavar="P,P,...", help="Probabilities above which a token leaves.")] = (
        "0.3,0.5,0.7,0.9"
    ),
    repeats: Annotated[bool, typer.Option(help="Let a token leave while its first choice is itself.")] = False,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Let each token leave at the first layer that is sure enough, with three answers to what its state becomes."""
    from ssmlens.analyses import sensitivity as study

    levels = studies.numbers(thresholds, "--thresholds")
    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    with studies.step(json, "tokens", every=128) as step:
        result = study.early_exit(lens, prompt, levels, repeats=repeats, resume=resume, progress=step)
    rows = [
        {"states": row["states"], "threshold": row["threshold"], "depth": row["depth"], "loss": row["loss_change"],
         "low": row["low"], "high": row["high"], "agreement": row["agreement"], "random": row["random_change"]}
        for row in result.table().to_dict("records")
    ]  # fmt: skip
    legend = "depth: share of the layers that ran; random: the same depths on tokens at random, all states right"
    _report(result, out, json, "exits", rows, f"{lens.name}: change of the loss, nats a token", legend)


@app.command()
def outliers(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Tails of each tensor before and after Hadamard, Karhunen-Loeve and random rotations."""
    from ssmlens.analyses import sensitivity as study

    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    result = study.outliers(lens.trace(prompt).check())
    names = {"kurtosis": "kurtosis", "max_over_median": "max/median", "gini": "Gini", "top_energy": "top 1 %",
             "int8_error": "int8 error", "normal_int8_error": "normal"}  # fmt: skip
    means: Any = result.table().groupby(["tensor", "rotation"], sort=False)[list(names)].median()
    rows = [
        {"tensor": tensor, "rotation": rotation, **{short: float(row[n]) for n, short in names.items()}}
        for (tensor, rotation), row in means.iterrows()
    ]
    legend = (
        "medians over layers; Gini of channel variances; top 1 %: energy of the largest channels; normal: int8 error"
    )
    _report(result, out, json, "outliers", rows, f"{lens.name}: outliers", legend + " of normal numbers")


@app.command()
def hessian(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    k: Annotated[int, typer.Option("-k", help="Largest eigenvalues.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Part of parameter names; may be given several times.")
    ] = None,
    most: Annotated[int, typer.Option(metavar="TOKENS", help="Cut the text: a product costs several passes.")] = 64,
    probes: Annotated[int, typer.Option(help="Random vectors for the trace and the negative share.")] = 2,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Largest eigenvalues of the loss's Hessian, its trace, and the share of it that is negative."""
    from ssmlens.analyses import sensitivity as study

    if most < 2:
        raise SsmlensError(f"--most is at least 2 tokens, got {most}")
    lens, prompt = _open(out, model, text, file, ids, dtype, device)
    read = lens.trace(prompt, layers=[]).ids[:, :most]
    with studies.step(json, "Lanczos runs") as step:
        result = study.hessian(lens, read, k, only=only, probes=probes, resume=resume, progress=step)
    where = [", ".join(f"{name} {share:.0%}" for name, share in list(x.items())[:3]) for x in result.settings["where"]]
    rows = [
        {
            "index": i,
            "eigenvalue": float(result.value[i]),
            "residual": float(result.columns["residual"][i]),
            "in": where[i],
        }
        for i in range(len(result.value))
    ]
    single = {name: float(result.columns[name][0]) for name in ("smallest", "trace", "trace_error", "negative_share")}
    head = (
        f"{lens.name}: {read.shape[1]} tokens, {result.settings['parameters']} parameters, loss "
        f"{result.settings['loss']:.4g}; smallest {single['smallest']:.3g}, trace {single['trace']:.4g} +- "
        f"{single['trace_error']:.2g}, negative share {single['negative_share']:.2f}; largest with shuffled targets "
        f"{float(result.control['shuffled_targets'][0]):.4g}"
    )
    _report(result, out, json, "hessian", rows, head, "in: weights that hold most of the eigenvector")


def _open(
    out: Sequence[Path] | None, model: str, text: str | None, file: str | None, ids: str | None, dtype: str, device: str
) -> tuple[Any, Any]:
    studies.check_out(out)
    prompt = o.prompt(model, text, file, ids)
    return o.open_lens(model, dtype, device), prompt


def _report(
    result: Result,
    out: Sequence[Path] | None,
    json: bool,
    figure: str,
    rows: Sequence[dict[str, Any]],
    head: str,
    legend: str,
) -> None:
    studies.save(result, out, "sensitivity", figure)
    studies.report(result, rows, out=out, json=json, head=head, legend=legend)
