"""``ssmlens precision``: what a state that is kept in a short number format forgets, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

__all__ = ["app"]

FIGURES = (".png", ".svg", ".pdf")
TABLES = (".csv", ".json", ".parquet", ".safetensors")

app = typer.Typer(help="What a state that is kept in a short number format forgets, and what that costs.")

Out = Annotated[
    Path | None,
    typer.Option(help="Write the numbers (.csv, .json, .parquet, .safetensors) or a figure (.png, .svg, .pdf)."),
]
StateDtype = Annotated[
    str, typer.Option("--state-dtype", help="bfloat16, float16, float8_e4m3fn, float8_e5m2 or float32.")
]
StateDtypes = Annotated[
    str, typer.Option("--state-dtypes", metavar="NAME,NAME,...", help="Formats of the state, separated by commas.")
]
Scaled = Annotated[bool, typer.Option(help="Scale each head by a power of two before rounding, as 8-bit caches do.")]


@app.callback(invoke_without_command=True)
def precision(
    context: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    state_dtype: StateDtype = "bfloat16",
    scaled: Scaled = False,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Per layer: how much of its decay a short state loses, and how far it is off. See also stall and divergence."""
    if context.invoked_subcommand is not None:
        _refuse_early(context)
        return
    output.check_target(out, (*TABLES, *FIGURES))
    from ssmlens.analyses import precision as study

    study.format_of(state_dtype)
    prompt = o.prompt(model, text, file, ids)
    found = o.open_lens(model, dtype, device).trace(prompt).check()
    result = study.horizon(found, state_dtype, scaled=scaled)
    _save(result, out, "horizon")
    rows = _layers(result)
    if json:
        about = {"model": found.settings["model"], "tokens": len(found.tokens[0]), "state_dtype": state_dtype}
        about |= {"out": None if out is None else str(out)}
        output.print_json(about | {"layers": rows, "about": result.metadata()})
        return
    law, longest = result.settings["stall_law"], result.settings["longest_time_constant"]
    print(
        f"{found.settings['model']}: {len(found.tokens[0])} tokens, state in {result.settings['dtype_of_state']}: "
        f"decays with 1 - a below {law:.3g} are lost to rounding ({longest:.0f} tokens)"
    )
    output.print_table(list(rows[0]), [list(row.values()) for row in rows], left=())
    print(_LEGEND)
    _assumptions(result, out)


_LEGEND = """\
stalled: share of tokens whose decay is lost, mean over heads and states, and of the worst; run: most in a row
lost: share of all forgetting that happens at these tokens, worst; error: of the state, relative, rounded to nearest;
predicted: the same for rounding as noise; stochastic: rounded stochastically. Medians, and the worst for error"""


@app.command()
def stall(
    decays: Annotated[
        str, typer.Option(metavar="A,A,...", help="Decays between 0 and 1.")
    ] = "0.9,0.99,0.995,0.996,0.997,0.998,0.999",
    state_dtype: StateDtype = "bfloat16",
    out: Out = None,
    json: o.Json = False,
) -> None:
    """Half-life of a state that nothing is written to, rounded at every token, against the exact one."""
    output.check_target(out, (*TABLES, *FIGURES))
    try:
        numbers = [float(x) for x in decays.split(",") if x.strip()]
    except ValueError as error:
        raise SsmlensError(f"--decays takes numbers separated by commas, got {decays!r}") from error
    from ssmlens.analyses import precision as study

    result = study.stall(numbers, state_dtype)
    _save(result, out, "stall")
    frame = result.table()
    if json:
        about = {"out": None if out is None else str(out)}
        output.print_json(about | {"decays": frame.to_dict("records"), "about": result.metadata()})
        return
    to = study.format_of(state_dtype)
    print(f"{to.name}: a state stops at once where 1 - a < {to.stalls_at_once:.3g}, soon where < {to.stalls_soon:.3g}")
    columns = {
        "decay": "decay",
        "half_life": "half-life",
        "exact": "exact",
        "stochastic": "stochastic",
        "floor": "floor",
    }
    rows = [[float(x) for x in row] for row in frame[list(columns)].itertuples(index=False)]
    rows = [[f"{row[0]:g}", *row[1:]] for row in rows]
    output.print_table(list(columns.values()), rows, left=())
    print("half-life in tokens, from 1 to 1/2; floor: share of the start at which it stops")
    _assumptions(result, out)


@app.command()
def divergence(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    state_dtypes: StateDtypes = "bfloat16,float16,float8_e4m3fn",
    share: Annotated[float, typer.Option(help="Share of the heads that count as slow.")] = 0.1,
    scaled: Scaled = False,
    conv: Annotated[bool, typer.Option(help="Also round the window of the convolution.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished formats here, and go on from them.")
    ] = None,
    out: Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """KL between the model's predictions with its state exact and with its state rounded after every token."""
    output.check_target(out, (*TABLES, *FIGURES))
    from ssmlens.analyses import precision as study

    formats = [study.format_of(x.strip()).name for x in state_dtypes.split(",") if x.strip()]
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    with output.progress(json) as step:
        result = study.divergence(
            lens, prompt, formats, share=share, scaled=scaled, conv=conv, resume=resume,
            progress=lambda done, total: step("rounding states", done, total) if _worth(done, total) else None,
        )  # fmt: skip
    _save(result, out, "divergence")
    rows = _means(result)
    if json:
        about = {"model": lens.name, "tokens": int(result.shape[-1]), "out": None if out is None else str(out)}
        output.print_json(about | {"means": rows, "about": result.metadata()})
        return
    noise = float(result.control["own_forward"].nanmean())
    print(f"{lens.name}: {result.shape[-1]} tokens; KL in nats, mean over the text; float32 itself: {noise:.1e}")
    output.print_table(list(rows[0]), [list(row.values()) for row in rows], left=(0, 1))
    print(f"slow: the {share:.0%} of heads with the longest half-lives; random: as many others; rest: all but the slow")
    print("growth: second half of the text over the first; same first: share of tokens with the same first choice")
    _assumptions(result, out)


def _layers(result: Result) -> list[dict[str, Any]]:
    """One row for each layer, over its heads, states and texts."""
    frame = result.table()
    frame["beyond"] = frame["error"] / frame["predicted_error"]
    rows = []
    for layer, part in frame.groupby("layer"):
        middle, worst = part.median(numeric_only=True), part.max(numeric_only=True)
        rows.append(
            {
                "layer": int(layer),
                "stalled": float(part["stalled_share"].mean()),
                "worst": float(worst["stalled_share"]),
                "run": int(worst["longest_stall"]),
                "lost": float(worst["forgetting_lost"]),
                "half-life": float(middle["half_life"]),
                "longest": float(worst["half_life"]),
                "predicted": float(middle["predicted_error"]),
                "error": float(middle["error"]),
                "worst error": float(worst["error"]),
                "stochastic": float(worst["stochastic_error"]),
            }
        )
    return rows


def _means(result: Result) -> list[dict[str, Any]]:
    """One row for each format and variant, averaged over the texts."""
    rows = []
    for i, name in enumerate(result.coords["dtype"]):
        for j, variant in enumerate(result.coords["rounded"]):
            of = {k: float(x[i, j].nanmean()) for k, x in result.columns.items()}
            rows.append(
                {
                    "state": name,
                    "rounded": variant,
                    "KL": of["mean"],
                    "low": of["mean_low"],
                    "high": of["mean_high"],
                    "growth": of["growth"],
                    "same first": of["agreement"],
                    "loss": of["loss_change"],
                    "weights": float(result.control["short_weights"][i].nanmean()),
                }
            )
    return rows


def _worth(done: int, total: int) -> bool:
    """Every sixteenth token is enough for a bar."""
    return done % 16 == 0 or done == total


def _refuse_early(context: typer.Context) -> None:
    """Options before a subcommand would be lost."""
    given = [k for k in context.params if getattr(context.get_parameter_source(k), "name", "") == "COMMANDLINE"]
    if given:
        raise SsmlensError(
            f"--{given[0].replace('_', '-')} stands before {context.invoked_subcommand}: give options after it"
        )


def _save(result: Result, out: Path | None, figure: str) -> None:
    if out is None:
        return
    if out.suffix.lower() in FIGURES:
        from ssmlens import plotting
        from ssmlens.plotting.studies import precision as drawn

        plotting.save(getattr(drawn, figure)(result), out)
        return
    with output.whole(out) as part:
        result.save(part)


def _assumptions(result: Result, out: Path | None) -> None:
    for sentence in result.assumes:
        print(f"assumes: {sentence}")
    if out is not None:
        print(f"wrote {out}")
