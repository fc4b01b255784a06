"""``ssmlens precision``: what a state that is kept in a short number format forgets, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import studies

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result

__all__ = ["app"]

app = typer.Typer(help="What a state that is kept in a short number format forgets, and what that costs.")

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
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Per layer: how much of its decay a short state loses, and how far it is off. See also stall and divergence."""
    if context.invoked_subcommand is not None:
        studies.refuse_early(context)
        return
    studies.check_out(out)
    from ssmlens.analyses import precision as study

    study.format_of(state_dtype)
    prompt = o.prompt(model, text, file, ids)
    found = o.open_lens(model, dtype, device).trace(prompt).check()
    result = study.horizon(found, state_dtype, scaled=scaled)
    studies.save(result, out, "precision", "horizon")
    law, longest = result.settings["stall_law"], result.settings["longest_time_constant"]
    head = (
        f"{found.settings['model']}: {len(found.tokens[0])} tokens, state in {result.settings['dtype_of_state']}: "
        f"decays with 1 - a below {law:.3g} are lost to rounding ({longest:.0f} tokens)"
    )
    studies.report(result, _layers(result), out=out, json=json, head=head, legend=_LEGEND, left=())


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
    out: studies.Out = None,
    json: o.Json = False,
) -> None:
    """Half-life of a state that nothing is written to, rounded at every token, against the exact one."""
    studies.check_out(out)
    numbers = studies.numbers(decays, "--decays")
    from ssmlens.analyses import precision as study

    result = study.stall(numbers, state_dtype)
    studies.save(result, out, "precision", "stall")
    columns = ("decay", "half_life", "exact", "stochastic", "floor")
    rows = result.table()[list(columns)].to_dict("records")
    if not json:
        rows = [{"decay": f"{row['decay']:g}", **{k: row[k] for k in columns[1:]}} for row in rows]
    to = study.format_of(state_dtype)
    head = f"{to.name}: a state stops at once where 1 - a < {to.stalls_at_once:.3g}, soon where < {to.stalls_soon:.3g}"
    legend = "half-life in tokens, from 1 to 1/2; floor: share of the start at which it stops"
    studies.report(result, rows, out=out, json=json, head=head, legend=legend, left=())


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
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """KL between the model's predictions with its state exact and with its state rounded after every token."""
    studies.check_out(out)
    from ssmlens.analyses import precision as study

    formats = [study.format_of(x.strip()).name for x in state_dtypes.split(",") if x.strip()]
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    with studies.step(json, "rounding states", every=128) as step:
        result = study.divergence(
            lens, prompt, formats, share=share, scaled=scaled, conv=conv, resume=resume, progress=step
        )
    studies.save(result, out, "precision", "divergence")
    noise = float(result.control["own_forward"].nanmean())
    head = f"{lens.name}: {result.shape[-1]} tokens; KL in nats, mean over the text; float32 itself: {noise:.1e}"
    legend = (
        f"slow: the {share:.0%} of heads with the longest half-lives; random: as many others; rest: all but the slow\n"
        "growth: second half of the text over the first; same first: share of tokens with the same first choice"
    )
    studies.report(result, _means(result), out=out, json=json, head=head, legend=legend, left=(0, 1))


def _layers(result: Result) -> list[dict[str, Any]]:
    """One row for each layer, over its heads, states and texts."""
    frame: Any = result.table()
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
