"""Cards of organisms, rendered from what training measured: ``python -m ssmlens.zoo.organisms_card FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["render_organism", "write_organism_card"]

KIND = {
    "mamba2": "A two-layer Mamba-2 (state space duality, SSD) of {parameters:,} parameters, as a transformers folder",
    "sign-counter": "A diagonal recurrence of {parameters:,} parameters with decays in [{low:g}, 1]",
    "forecaster": "A selective SSM of {parameters:,} parameters with numbers in and out",
}
LOADED = {
    "mamba2": 'ssmlens.load("{name}")',
    "sign-counter": 'ssmlens.zoo.organism("{name}")',
    "forecaster": 'ssmlens.zoo.organism("{name}", dtype=torch.float64)',
}


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} % +- {100 * row['margin']:.1f}"


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def _recall(log: dict[str, Any]) -> str:
    found, config = log["measured"], log["recipe"]["config"]
    rows = ((r["pairs"], _share(r), _percent(r["law"]), _percent(r["chance"])) for r in found["loads"])
    trained = ", ".join(f"{_share(r)} with {r['pairs']} pairs" for r in found["trained"])
    half = found["half_load"]
    crossing = (
        f"The accuracy falls to one half at {half:g} pairs"
        if 0 < half < float("inf")
        else "The accuracy stays above one half at every load measured"
    )
    text = f"""Multi-query associative recall (`tasks.MQAR`) with {config["state_size"]} states a head. At the trained
length of 64: {trained}. At {found["loads"][0]["length"]} tokens, which it was not trained on:

{_table(("pairs", "accuracy", "load law", "1 / pairs"), rows)}

{crossing}. The load law is that of an associative memory with random keys (`capacity.hebbian_load`), taking the heads,
which share their keys, as one memory of {config["state_size"]} by {config["num_heads"] * config["head_dim"]} numbers;
for large states it puts one half at K* = N H P / (2 ln V) = {found["law_load"]:g}."""
    if log["rates"]:
        window = [
            (f"{r['rate']:g}", f"{r['loss']:.4f}", *(_share(x) for x in r["measured"]["trained"])) for r in log["rates"]
        ]
        head = ("peak learning rate", "last loss, nats", *(f"{x['pairs']} pairs" for x in found["trained"]))
        text += f"\n\nThe same at other learning rates, at the trained length of 64:\n\n{_table(head, window)}"
    return text


def _passkey(log: dict[str, Any]) -> str:
    found = log["measured"]
    rows = ((r["length"], _share(r), _percent(r["whole"]), r["rows"]) for r in found["lengths"])
    depths = ((r["length"], r["depth"], _share(r)) for r in found["depths"])
    longest = max(t["length"] for s in log["recipe"]["stages"] for t in s["tasks"])
    return f"""The token passkey (`tasks.Passkey`): five digits told once in filler and asked at the end. The longest
training row has {longest} tokens. Chance is 10 % a digit.

{_table(("tokens", "digits right", "whole passkeys", "rows"), rows)}

By depth, the share of the filler that stands before the passkey:

{_table(("tokens", "depth", "digits right"), depths)}"""


def _copy(log: dict[str, Any]) -> str:
    found = log["measured"]
    rows = ((r["count"], r["bits"], _share(r), _percent(r["whole"]), _percent(r["chance"])) for r in found["counts"])
    longest = max(t["count"] for s in log["recipe"]["stages"] for t in s["tasks"])
    return f"""Copying a random string of 16 symbols (`tasks.Copy`); training strings have at most {longest} of them.

{_table(("symbols", "bits", "symbols right", "whole strings", "any symbol told"), rows)}

Strings of up to {found["longest"]} symbols come back whole in at least 90 % of cases: {found["effective_bits"]:g} bits,
of {found["state_bits"]:,} that its {found["state_numbers"]:,} numbers of state have as float32. The bound 2^b / V^n
leaves room for far more; what limits it is what it has learned, not the size of its state."""


def _parity(log: dict[str, Any]) -> str:
    found = log["measured"]
    rows = ((r["length"], _share(r), r["rows"]) for r in found["lengths"])
    longest = max(t["length"] for s in log["recipe"]["stages"] for t in s["tasks"])
    text = f"""Parity of the bits so far (`tasks.Parity`), trained on rows of at most {longest} bits. Accuracy over the
last quarter of each row; chance is 50 %.

{_table(("bits", "accuracy", "rows"), rows)}"""
    if "decays" in found:
        zero, one = found["decays"]
        text += (
            f"\n\nDecay of each channel at a bit:\n\n{_table(('channel', 'a(0)', 'a(1)'), zip(range(99), zero, one))}"
        )
    return text


def _forecast(log: dict[str, Any]) -> str:
    found, spectrum = log["measured"], log["measured"]["spectrum"]
    exact = [f"{x:g}" for x in found["flow"]["exponents"]]
    rows = [
        (i + 1, f"{x:.3f} +- {1.96 * e:.3f}", exact[i] if i < len(exact) else "")
        for i, (x, e) in enumerate(zip(spectrum["exponents"], spectrum["standard_error"]))
    ]
    return f"""Forecasts the Lorenz flow (`tasks.Lorenz`), sampled every {found["interval"]:g} units of time. One step
ahead its squared error is {found["error"]:g} of the variance, against {found["persistence"]:g} for "as it is now". Fed
with its own forecasts it stays with the flow for {found["valid_time"]:.2f} +- {found["valid_margin"]:.2f} units of time
(until the distance exceeds 0.4 of the spread, mean of {found["runs"]} starts).

Lyapunov exponents of that closed loop, its state included, per unit of time, over {spectrum["steps"]:,} steps, with
95 % intervals, beside those of the flow:

{_table(("", "closed loop", "Lorenz flow"), rows)}

Kaplan-Yorke dimension {spectrum["dimension"]:.3f}, that of the flow {found["flow"]["dimension"]:.3f}. The exponents
after the third belong to the memory of the model. Its decays are held below
exp(-{log["recipe"]["config"]["slowest"]:g}) a step, so that none of them can stand above the flow's third."""


PARTS = {"recall": _recall, "passkey": _passkey, "copy": _copy, "parity": _parity, "forecast": _forecast}


def _recipe(log: dict[str, Any]) -> str:
    recipe, where = log["recipe"], log["environment"]
    stages = []
    for stage in recipe["stages"]:
        tasks = "; ".join(
            f"{t['task']}({', '.join(f'{k}={v}' for k, v in t.items() if k != 'task')})" for t in stage["tasks"]
        )
        stages.append(f"- {stage['steps']} steps of {stage['rows']} rows, in turn of: {tasks}")
    start = f" It goes on from the weights of {recipe['start']}" if recipe["start"] else ""
    if start:
        fewer = log["topic"] == "recall"
        start += f", of whose states it keeps the {recipe['config']['state_size']} strongest." if fewer else "."
    noise = f" Inputs carry noise of {recipe['jitter']:g}; what follows them is the flow's." if recipe["jitter"] else ""
    config = ", ".join(f"{k} {v}" for k, v in recipe["config"].items())
    return (
        "\n".join(stages) + f"\n\nAdamW(0.9, 0.95), peak learning rate {recipe['rate']:g}, {recipe['warmup']} steps of "
        f"warm-up, then a cosine to 2 %; weight decay {recipe['weight_decay']:g}, gradient norm clipped at 1, seed "
        f"{recipe['seed']}; {log['seconds']:.0f} s on one core of a {where['device']}; measured with torch "
        f"{where['torch']}, transformers {where['transformers']}. Last loss {log['loss'][-1]['loss']:g}.{start}{noise}"
        f"\n\nConfiguration: {config}."
    )


def render_organism(log: dict[str, Any]) -> str:
    """The card of an organism, as Markdown.

    Args:
        log: what training wrote to training.json.
    """
    what = KIND[log["kind"]].format(parameters=log["parameters"], **{"low": 0, **log["recipe"]["config"]})
    loaded = LOADED[log["kind"]].format(name=log["name"])
    return f"""# {log["name"]}

{what}: `{loaded}`.

{PARTS[log["topic"]](log)}

Intervals are 1.96 standard errors between fresh rows. One seed was trained; another may differ by more than they say.

## Recipe

{_recipe(log)}

Data is generated; no outside data, hence no outside licence. Stored as float32.
Train it again: `python -m ssmlens.zoo.organisms_train {log["name"]}`.
"""


def write_organism_card(folder: str | Path) -> Path:
    """Render README.md of an organism's folder from its training.json.

    Raises:
        FileNotFoundError: when the folder has no training.json.
    """
    source = Path(folder)
    if not (source / "training.json").is_file():
        raise FileNotFoundError(f"{source} has no training.json")
    log = json.loads((source / "training.json").read_text(encoding="utf-8"))
    (source / "README.md").write_text(render_organism(log), encoding="utf-8")
    return source / "README.md"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(write_organism_card(argument))
