"""Model cards, rendered from the numbers that training wrote: ``python -m ssmlens.zoo.model_card FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["render", "write_card"]

ARCHITECTURE = {"mamba1": "Mamba (selective scan, S6)", "mamba2": "Mamba-2 (state space duality, SSD)"}

SOURCES = (
    ("narrative", "Jane Austen, six novels", "public domain"),
    ("narrative", "Moby-Dick; State of the Union addresses 1790-2021", "PDDL / CC0, US government work"),
    ("narrative", "Shakespeare, Milton", "public domain"),
    ("narrative", "World English Bible", "public domain"),
    ("facts", "WordNet 3.0 glosses and examples", "WordNet licence, notice below"),
    ("facts", "CIA World Factbook", "public domain"),
    ("questions", "question and answer lines made by template from the two above", "as their sources"),
    ("facts", "Jargon File", "public domain"),
    ("technical", "Python 3.11 documentation", "PSF licence, notice below"),
    ("technical", "SQLite documentation", "public domain"),
)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def _stage(stage: dict[str, Any], seen: str) -> str:
    where = stage["environment"]
    return (
        f"{stage['steps']} steps of {stage['batch']} x {stage['length']} tokens ({seen}) in "
        f"{stage['seconds']:.0f} s on {where['device']} (torch {where['torch']}, transformers "
        f"{where['transformers']}). AdamW(0.9, 0.95), peak learning rate {stage['rate']:g}, {stage['warmup']} steps "
        f"of warm-up, then a cosine over the run; weight decay {stage['weight_decay']:g} on projection matrices only, "
        f"gradient norm clipped at 1, seed {stage['seed']}."
    )


def _stored(recipe: dict[str, Any]) -> str:
    config = ", ".join(f"{k} {v}" for k, v in recipe["config"].items())
    return (
        f"Stored as {recipe['save_dtype']}; the numbers above were measured with the stored values, computing in "
        f"float32.\n\nConfiguration: {config}."
    )


def _stages(log: dict[str, Any]) -> str:
    """The stages of an English model, and what the second one does to recall."""
    parts = []
    for number, stage in enumerate(log["stages"], 1):
        seen = f"{stage['tokens_seen'] / 1e6:.0f} M tokens seen"
        text = f"Stage {number}, {stage['stage']}: {_stage(stage, seen)}"
        if stage["stage"] == "recall":
            first, last = stage["dense_share"]
            text += (
                f" Of the windows, {first:.0%} falling to {last:.0%} are dense: 2 to 8 pairs are told and asked over "
                f"and over, first without and later with prose in between ({stage['windows']:,} windows, asked values "
                f"at weight {stage['asked_weight']:g} in the loss); the rest is the mix of stage 1. Share of asked "
                "tokens that are the first choice in windows kept apart:\n\n"
            )
            found = [e for e in stage["loss"] if "recall_easy" in e]
            shown = found[:: max(1, len(found) // 12)]
            shown += found[-1:] if shown[-1] is not found[-1] else []
            text += _table(
                ("step", "easier half", "harder half"),
                ((e["step"], _percent(e["recall_easy"]), _percent(e["recall_hard"])) for e in shown),
            )
        parts.append(text)
    return "\n\n".join(parts)


def _data(log: dict[str, Any]) -> str:
    text = log["text"]
    shares = _table(
        ("part", "documents", "tokens"),
        ((name, text["documents"].get(name, "generated"), f"{n:,}") for name, n in text["tokens"].items()),
    )
    titles: dict[str, list[str]] = {}
    for document in text["held_out"]:
        titles.setdefault(document["group"], []).append(document["title"])
    held = "; ".join(g if len(t) == 1 else f"{len(t)} {g} ({', '.join(t)})" for g, t in titles.items())
    return (
        f"{_table(('part', 'source', 'licence'), SOURCES)}\n\n{shares}\n\n"
        "Sampled 0.60 narrative, 0.25 facts (half of it questions), 0.15 technical; 7 % of the windows come from "
        "generated key-value texts. Held out whole, with every question "
        f"about those countries: {held}."
    )


def _tuned(log: dict[str, Any]) -> str:
    """What the tuned lens that ships with the model gains over the logit lens; empty when none was trained."""
    found = log.get("tuned_lens")
    if not found:
        return ""
    rows = [
        (k, f"{plain:.3f}", f"{tuned:.3f}")
        for k, (plain, tuned) in enumerate(zip(found["logit_lens"], found["tuned_lens"]))
    ]
    return f"""## Tuned lens

`tuned_lens.safetensors` holds one affine map per layer, the identity plus rank {found["rank"]}, trained to read the
final prediction off the residual stream entering the layer. Divergence KL(final || lens) in nats, mean over
{found["held_out_tokens"]:,} tokens of the held-out documents:

{_table(("entering layer", "logit lens", "tuned lens"), rows)}

{found["steps"]} steps of {found["rows"]} x {found["length"]} tokens of the training text ({found["tokens"]:,}), Adam at
{found["rate"]:g}, seed {found["seed"]}, {found["seconds"]:.0f} s on a {found["environment"]["device"]}
(torch {found["environment"]["torch"]}); stored and measured as {found["dtype"]}.
Train it again: `python -m ssmlens.zoo.tuned {log["name"]} --pack DIR`.

"""


def _english(log: dict[str, Any], baseline: dict[str, Any], notices: str) -> str:
    scores, ngram = log["bits_per_byte"], baseline["bits_per_byte"]
    rows = [(g, f"{scores[g]:.3f}", f"{ngram[g]:.3f}", f"{scores[g] - ngram[g]:+.3f}") for g in scores]
    order = baseline["order"]
    recall = log["key_value"]
    pairs = _table(("pairs in the text", "accuracy"), ((k, _percent(v)) for k, v in recall["by_pairs"].items()))
    quotes = "\n\n".join(f"> **{s['prompt']}**{s['continuation']}".replace("\n", "\n> ") for s in log["samples"])
    return f"""# {log["name"]}

A {ARCHITECTURE[log["recipe"]["family"]]} language model of {log["parameters"] / 1e6:.1f} M parameters on English text,
small enough to ship, to be looked at. It is a transformers folder with a byte-level BPE of
{log["recipe"]["config"]["vocab_size"]} entries.

## Intended use

Material for studying what a state space model remembers: traces, implicit attention, memory, interventions.

## What it can't do

It writes sentences that read like its sources and go nowhere: no reasoning, no reliable facts, no instruction
following. Its world is 19th-century prose, speeches, a dictionary, an almanac and two manuals. It reproduces the
views and the language of those texts. It was trained on windows of {log["stages"][-1]["length"]} tokens;
longer contexts are outside of what it learnt. Do not use it to inform anyone about anything.

## Held-out text, bits per byte (lower is better)

{_table(("documents", "this model", f"{order}-gram", "difference"), rows)}

The {order}-gram is an interpolated modified Kneser-Ney model of the same tokens, trained on the same split
({baseline["training_tokens"]:,} tokens), scored on the same documents with the same count of bytes.
On the pages of Persuasion that ship beside the models (`ssmlens/zoo/passages/persuasion.txt`) this model
scores {log["snippet"]:.4f}.

## Recall from context

Generated texts tell pairs ("The code of the red box is K7."), continue with held-out prose, and ask every key
once more. The whole value is the model's first choice in {_percent(recall["accuracy"])} of
{recall["questions"]} questions; a value of the same text named at random would be right in
{_percent(recall["chance"])}.

{pairs}

{_tuned(log)}## Samples

Temperature 0.8, the 40 likeliest tokens, seed set before each; the prompt in bold.

{quotes}

## Data

{_data(log)}

## Recipe

{_stages(log)}

{_stored(log["recipe"])}

Train it again: `python -m ssmlens.zoo.train {log["name"]} --text DIR`.

{notices}"""


def _attention(found: dict[str, Any]) -> str:
    """Where the implicit attention of a recall model points, and which heads do it."""
    rows = _table(
        ("pairs", "mean of these heads", "the worst of them", "mean_abs of all heads", "1 / pairs"),
        (
            (r["pairs"], *(_percent(r[k]) for k in ("mean", "worst", "all_heads_abs")), _percent(1 / r["pairs"]))
            for r in found["by_pairs"]
        ),
    )
    heads = found["heads"]
    return f"""The recall can be read off the signed implicit attention of layer {found["layer"]}, in {len(heads)} of
its {found["of"]} heads. The table has the share of asked keys whose largest weight lies on the pair that answers them:
on the told value or the token after it (the short convolution lets that token see both key and value). The first
token is no candidate, since no value has been told by then. {found["sequences"]} fresh sequences for each row; the
heads were chosen on others.

{rows}

Heads: {", ".join(map(str, heads))}."""


def _recall(log: dict[str, Any]) -> str:
    recipe = log["recipe"]
    loads = _table(
        ("tokens", "pairs", "accuracy"), ((r["length"], r["pairs"], _percent(r["accuracy"])) for r in log["accuracy"])
    )
    pairs = log["training_pairs"]
    rates = _table(
        ("learning rate", "steps", "last loss, nats", *(f"{k} pairs" for k in pairs)),
        (
            (f"{r['rate']:g}", r["steps"], f"{r['loss']:.4f}", *(_percent(a["accuracy"]) for a in r["accuracy"]))
            for r in log["rates"]
        ),
    )
    return f"""# {log["name"]}

A two-layer {ARCHITECTURE[recipe["family"]]} model of {log["parameters"]:,} parameters that solves multi-query
associative recall: `c 7 a 19 . . a` asks for `19`. Keys are `a` to `z`, values `0` to `25`, `.` fills.

## Intended use

A model whose right answer is known at every asked key, and with it where its memory has to point: ground truth
for implicit attention, capacity measures and interventions.

## What it can't do

Anything else. Each key is told once and asked once in training, in {recipe["length"]} tokens with
{", ".join(map(str, pairs))} pairs; what happens at other lengths and loads is in the table.

## Accuracy against load

{log["test_size"]} fresh sequences for each row, 1 / pairs is what naming any told value would reach.

{loads}

## Where its attention points

{_attention(log["attention"])}

## Data

Generated, in the layout of Zoology (Arora et al. 2023): pairs at the start, each key asked once at a gap that
follows a power law, filler elsewhere. `ssmlens.zoo.recall_task.batch` makes it; {recipe["pool"]:,} sequences for each
load. No outside data, hence no outside licence.

## Recipe

{_stage(recipe | log, f"{log['sequences_seen'] / 1e6:.2f} M sequences seen")}

{_stored(recipe)}

Learning rates tried, accuracy at the training loads on sequences apart from the table's; the best was kept:

{rates}

Train it again: `python -m ssmlens.zoo.train {log["name"]}`.
"""


def render(log: dict[str, Any], baseline: dict[str, Any] | None = None) -> str:
    """The card of a model.

    Args:
        log: what training wrote to training.json.
        baseline: what the n-gram measurement wrote to baseline.json (English models).

    Raises:
        ValueError: when an English model comes without a baseline.
    """
    if log["recipe"]["task"] == "recall":
        return _recall(log)
    if baseline is None:
        raise ValueError(f"the card of {log['name']} needs baseline.json, the n-gram scores of the same documents")
    notices = (Path(__file__).parent / "notices.md").read_text(encoding="utf-8")
    return _english(log, baseline, notices)


def write_card(folder: str | Path) -> Path:
    """Render README.md of a model folder from its training.json and baseline.json.

    Raises:
        FileNotFoundError: when the folder has no training.json.
    """
    source = Path(folder)
    if not (source / "training.json").is_file():
        raise FileNotFoundError(f"{source} has no training.json")
    log = json.loads((source / "training.json").read_text(encoding="utf-8"))
    scores = source / "baseline.json"
    baseline = json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else None
    (source / "README.md").write_text(render(log, baseline), encoding="utf-8")
    return source / "README.md"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(write_card(argument))
