"""``ssmlens capacity`` and its subcommands: how much a model's states can hold, and how much of it the model uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import capacity_memory, output, studies
from ssmlens.cli import options as o
from ssmlens.cli.capacity_output import assumptions, emit, rows_of, save
from ssmlens.cli.studies import refuse_early, sentences
from ssmlens.cli.studies import whole_numbers as numbers
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.lens import Lens

__all__ = ["app"]

app = typer.Typer(help="How much a model's states can hold, and how much of it the model uses.")

Seed = Annotated[int, typer.Option(help="Of every random choice.")]
Tolerance = Annotated[float, typer.Option(help="Smallest singular value of M that counts in the tolerance form.")]


@app.callback(invoke_without_command=True)
def capacity(
    context: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    cut: Annotated[int | None, typer.Option(help="Token where past and future part; default: the middle.")] = None,
    tolerance: Tolerance = 1e-3,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Per layer: effective state size and ranks of the state, beside their bounds. See also rank-floor."""
    if context.invoked_subcommand is not None:
        refuse_early(context)
        return
    studies.check_out(out)
    prompt = o.prompt(model, text, file, ids)
    found = o.open_lens(model, dtype, device).trace(prompt).check()
    from ssmlens.analyses import capacity as study

    with sentences():
        result = study.summary(found, cut, tolerance=tolerance)
        figures = studies.figures(out)
        if figures:
            save(study.effective_state_size(found, tolerance=tolerance), figures, "state_size")
    save(result, [target for target in out or () if target not in figures], "state_size")
    about = {"model": found.settings["model"], "tokens": len(found.tokens[0]), "cut": result.settings["cut"]}
    emit(result, about, out, json, _SUMMARY, f"past and future part at token {about['cut']}", _SUMMARY_LEGEND)


_SUMMARY = {
    "layer": "layer",
    "effective_state_size": "state size",
    "state_size_q90": "90 %",
    "tolerance_size": "above tol.",
    "rank_bound": "at most",
    "participation": "rank PR",
    "centred_participation": "centred",
    "null": "random writes",
    "mean_energy": "mean's share",
}
_SUMMARY_LEGEND = """\
state size: effective number of state dimensions per channel that the tokens after the cut need of those before it
(entropy form), median over heads, and the 90 % quantile; above tol.: singular values above --tolerance
rank PR: participation ratio of the state matrix, also less its mean, beside that of random writes with the same decay;
mean's share: of the state's energy in its mean over tokens. None of the ranks is a capacity: see rank-floor"""


@app.command("state-size")
def state_size(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
    cuts: Annotated[str | None, typer.Option(metavar="N,N,...", help="Tokens, or all; default: 16 of them.")] = None,
    form: Annotated[str, typer.Option(help="entropy, tolerance, relative or rank.")] = "entropy",
    tolerance: Tolerance = 1e-3,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Effective state size of every layer and head, cut by cut."""
    studies.check_out(out)
    where = "all" if cuts == "all" else numbers(cuts, "--cuts")
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    found = lens.trace(prompt, layers=None if layer is None else [layer]).check()
    from ssmlens.analyses import capacity as study

    with sentences():
        result = study.effective_state_size(found, where, form=form, tolerance=tolerance)
    save(result, out, "state_size")
    about = {"model": lens.name, "tokens": len(found.tokens[0]), "form": form}
    if json:
        emit(result, about, out, True, {}, "", "")
        return
    frame = result.table().groupby(["layer", "cut"])[["effective_state_size", "largest", "rank_bound"]]
    rows: list[list[Any]] = []
    for labels, part in frame:
        where_at: Any = labels
        sizes, bound = part["effective_state_size"], int(part["rank_bound"].iloc[0])
        rows.append([*map(int, where_at), *(float(sizes.quantile(q)) for q in (0.1, 0.5, 0.9)), bound])
    print(f"{lens.name}: {len(found.tokens[0])} tokens, {form} form, over the heads of each layer")
    output.print_table(("layer", "cut", "10 %", "median", "90 %", "at most"), rows, left=())
    assumptions(result, out)


@app.command("rank-floor")
def rank_floor(
    model: o.Model = "mamba2-recall",
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be repeated.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="loss, accuracy, kl or agreement; default: accuracy on recall, else loss.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(metavar="N,N,...", help="Ranks; default: 0, 1, 2, 3, 4, 6, 8...")] = None,
    cut: Annotated[
        int | None, typer.Option(help="Truncate before this token; default: after the pairs, or half.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Key-value pairs of each prompt, for the recall models.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    prompts: Annotated[int, typer.Option(help="Prompts at most.")] = 100,
    together: Annotated[bool, typer.Option(help="Truncate the layers at once.")] = False,
    centred: Annotated[bool, typer.Option(help="Keep the mean state and truncate the rest.")] = False,
    tolerance: Annotated[float, typer.Option(help="Distance from the whole state's metric that is kept.")] = 0.02,
    seed: Seed = 0,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Causal rank floor: truncate the state at a token, and see from which rank on the model does as well as before."""
    studies.check_out(out)
    grid = numbers(ranks, "--ranks")
    if prompts < 1 or length < 2:
        raise SsmlensError(f"--prompts is at least 1 and --length 2, got {prompts} and {length}")
    from ssmlens.analyses import capacity as study

    task = text is None and file is None and ids is None and model.endswith("-recall")
    lens = o.open_lens(model, dtype, device)
    with sentences(), output.progress(json) as step:
        rows, targets, start = (
            _recall(pairs, length, prompts, seed)
            if task
            else _windows(lens, o.prompt(model, text, file, ids), length, prompts)
        )
        name = metric or ("accuracy" if task else "loss")
        result = study.rank_floor(
            lens, rows, layer or None, name, grid, start if cut is None else cut,
            targets=targets if name in ("accuracy", "loss") else None, together=together, centred=centred,
            tolerance=tolerance, seed=seed, progress=lambda done, total: step("truncating states", done, total),
        )  # fmt: skip
    save(result, out, "rank_floor")
    about = {"model": lens.name, "prompts": len(rows), "tokens": rows.shape[1], "cut": result.settings["token_cut"]}
    emit(result, about, out, json, _FLOOR | {name: name}, f"state truncated before token {about['cut']}", _FLOOR_LEGEND)


_FLOOR = {"layer": "layer", "reading": "reading", "rank": "rank", "change": "change", "change_low": "low"}
_FLOOR |= {"change_high": "high", "untruncated": "whole state", "floor": "floor", "kept_energy": "energy kept"}
_FLOOR_LEGEND = """\
reading: rerun computes all above anew, frozen keeps dt, B and C above as they were; change: from the whole state, low
to high its 95 % bootstrap over prompts; floor: the rank from which on the change stays within --tolerance"""


@app.command()
def collapse(
    train_length: Annotated[int, typer.Option(help="Tokens of one training sequence; no checkpoint states it.")],
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    length: Annotated[int | None, typer.Option(help="Repeat the text to so many tokens.")] = None,
    bucket: Annotated[int, typer.Option(help="Tokens of one mean.")] = 128,
    smooth: Annotated[int, typer.Option(help="Buckets of the running mean that the onset is read from.")] = 8,
    control: Annotated[bool, typer.Option(help="Also with a state that starts anew every --train-length.")] = True,
    by: Annotated[str, typer.Option(help="bucket, or head for the state of every head in the files.")] = "bucket",
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep chunks here, and go on from them.")] = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Stream a long text with carried state: loss by position, states that leave their range, and when."""
    studies.check_out(out)
    if by == "head" and studies.figures(out):
        raise SsmlensError("a figure shows the loss: leave --by out, or write a table")
    from ssmlens.analyses import capacity as study

    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    with sentences(), output.progress(json) as step:
        result = study.collapse(
            lens, prompt, train_length, length, by=by, bucket=bucket, smooth=smooth, control=control, resume=resume,
            progress=lambda done, total: step("streaming tokens", done, total),
        )  # fmt: skip
    save(result, out, "collapse")
    about = {"model": lens.name, "tokens": result.settings["tokens"], "train_length": train_length}
    if json or by == "head":
        emit(result, about, out, json, _HEAD, "", "")
        return
    onsets = {k: float(result.columns[k].reshape(-1)[0]) for k in ("loss_onset", "state_onset", "onset")}
    frame = result.table()
    # About twenty lines, the powers of two apart.
    marks = {min(range(len(frame)), key=lambda i: abs(frame["bucket"][i] - bucket * 2 ** (k / 2))) for k in range(64)}
    names = {"bucket": "token", "loss": "loss", "low": "low", "high": "high", "restarted": "restarted"}
    names |= {"growth": "growth", "growing": "growing"}
    shown = {k: x for k, x in names.items() if k in frame}
    print(f"{lens.name}: {about['tokens']} tokens, buckets of {bucket}, trained on {train_length}")
    output.print_table(list(shown.values()), rows_of(frame.loc[sorted(marks)], shown), left=())
    print(
        "; ".join(
            f"{k.replace('_', ' ')}: {'none' if x == float('inf') else f'token {x:.0f}'}" for k, x in onsets.items()
        )
    )
    print(f"restarted: with a state never older than {train_length} tokens; growth: of the widest head's variance")
    assumptions(result, out)


_HEAD = {"layer": "layer", "head": "head", "bucket": "token", "variance": "variance", "rms": "rms", "decay": "decay"}
_HEAD |= {"factor": "factor", "state_onset": "onset"}


def _recall(pairs: int, length: int, prompts: int, seed: int) -> tuple[Any, Any, int]:
    """Prompts of the recall task, their targets, and where the pairs end."""
    from ssmlens.zoo import recall_task

    batch = recall_task.batch(prompts, length, pairs, seed)
    return batch.ids, batch.targets, 2 * pairs


def _windows(lens: Lens, prompt: Any, length: int, prompts: int) -> tuple[Any, None, None]:
    """The text in windows of ``length`` tokens."""
    from ssmlens.prompt import prepare

    ids = prepare(prompt, lens.tokenizer, lens.vocab_size).ids[0]
    length = min(length, len(ids))
    count = min(prompts, len(ids) // length)
    return ids[: count * length].reshape(count, length), None, None


for _command in (capacity_memory.memory, capacity_memory.processing, capacity_memory.load, capacity_memory.bits):
    app.command()(_command)
