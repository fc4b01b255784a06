"""Trains organisms on a CPU: ``python -m ssmlens.zoo.organisms_train NAME ... --work DIR``.

Progress is kept in DIR: a run that was killed goes on from its last checkpoint, and since the batch of each step is
drawn from a seed of its own, it ends with the same weights. Each organism is then measured and written to
``--out`` / NAME with its card.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlens.tasks import Lorenz

from .folder import save_folder, write_json
from .loop import environment, make_optimizer, scheduled_rate
from .organisms_models import Forecaster, SignCounter, save_organism
from .organisms_recipes import ORGANISMS, Organism, organism
from .recipes import make_model
from .scans import training_scans

__all__ = ["build", "main", "run", "train"]

LOG_EVERY = 50
CHECKPOINT_EVERY = 250  # a multiple of LOG_EVERY, so that no mean is cut in two
FIRST_SEED = 1_000_000  # of training batches; measurements use seeds below it


def build(plan: Organism) -> Any:
    """The untrained model of a recipe, from its seed."""
    torch.manual_seed(plan.seed)
    if plan.kind == "mamba2":
        return make_model("mamba2", plan.config)
    return Forecaster(**plan.config) if plan.kind == "forecaster" else SignCounter(**plan.config)


def _optimizer(plan: Organism, model: Any) -> torch.optim.Optimizer:
    """The zoo's AdamW; of a sign counter only the writes decay, so that those nobody needs vanish: a channel that keeps
    everything would add them up for ever."""
    if plan.kind != "sign-counter":
        return make_optimizer(model, plan.rate, plan.weight_decay)
    rest = [p for name, p in model.named_parameters() if name != "b"]
    groups = [{"params": [model.b], "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95))


def _loss(plan: Organism, model: nn.Module, step: int) -> Tensor:
    """The loss of a step's batch: cross-entropy in nats, or the squared error of the forecast change."""
    task, rows = plan.at(step)
    batch = task.batch(rows, FIRST_SEED + step)
    if plan.kind == "forecaster":
        assert isinstance(task, Lorenz)
        # The flow says what follows a displaced point, so noise on the input teaches how displacements shrink.
        noise = torch.Generator().manual_seed(step)
        series = batch.ids + plan.jitter * torch.randn(batch.ids.shape, generator=noise, dtype=torch.float64)
        change = (task.step(series) - series).float()
        series = series.float()
        return (model(series) - series - change).square().sum(-1).mean() / change.square().sum(-1).mean()
    logits = model(batch.ids) if plan.kind == "sign-counter" else model(batch.ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def narrowed(weights: dict[str, Tensor], wide: dict[str, Any], narrow: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a Mamba-2 with fewer states: in each layer those whose write and read rows are largest.

    Args:
        weights: state dict of the wide model.
        wide, narrow: configurations, which differ in ``state_size`` at most.
    """
    n, kept = wide["state_size"], narrow["state_size"]
    if n == kept:
        return weights
    found = dict(weights)
    inner = wide["expand"] * wide["hidden_size"]
    for layer in range(wide["num_hidden_layers"]):
        name = f"backbone.layers.{layer}.mixer."
        rows = weights[f"{name}in_proj.weight"]  # gate, value, write, read, step
        write, read = (rows[2 * inner + i * n :][:n].norm(dim=1) for i in (0, 1))
        chosen = (write * read).argsort(descending=True)[:kept].sort().values
        # The convolution has the same rows as the projection but for the gate.
        for part, start in (("in_proj.weight", 2 * inner), ("conv1d.weight", inner), ("conv1d.bias", inner)):
            key = name + part
            x = weights[key]
            found[key] = torch.cat([x[:start], x[start + chosen], x[start + n + chosen], x[start + 2 * n :]])
    return found


def train(plan: Organism, work: Path, initial: dict[str, Tensor] | None = None, label: str = "") -> dict[str, Any]:
    """Train, or go on, to the end of the recipe.

    Args:
        plan: the recipe.
        work: folder of checkpoints.
        initial: weights to start from.
        label: of the checkpoint file; the organism's name by default.

    Returns:
        ``model`` in eval mode, ``log`` (step, loss, rate) and ``seconds`` of all parts of the run.
    """
    label = label or plan.name
    file = work / f"{label}.pt"
    model = build(plan)
    if initial:
        model.load_state_dict(initial)
    optimizer = _optimizer(plan, model.train())
    step, seconds, total = 0, 0.0, 0.0
    log: list[dict[str, float]] = []
    if file.is_file():
        held = torch.load(file, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        step, seconds, log = held["step"], held["seconds"], held["log"]
    start, spent = time.monotonic(), seconds
    while step < plan.steps:
        now = scheduled_rate(plan.rate, step, plan.warmup, step / plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = _loss(plan, model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += float(loss.detach())
        step += 1
        if step % LOG_EVERY == 0 or step == plan.steps:
            since = step - (int(log[-1]["step"]) if log else 0)
            if not math.isfinite(total):
                raise RuntimeError(f"{label}: the loss is {total / since} at step {step}")
            log.append({"step": step, "loss": float(f"{total / since:.5g}"), "rate": now})
            total = 0.0
        if step % CHECKPOINT_EVERY == 0 or step == plan.steps:
            spent = seconds + time.monotonic() - start
            held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**held, "step": step, "seconds": spent, "log": log}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
            print(f"{label} step {step} of {plan.steps} {spent:.0f} s loss {log[-1]['loss']:.5f}", flush=True)
    return {"model": model.eval().requires_grad_(False), "log": log, "seconds": spent}


def _save(plan: Organism, model: Any, out: Path) -> None:
    """Write the model: as a transformers folder with a word tokenizer where it is a Mamba-2."""
    if plan.kind != "mamba2":
        save_organism(model, out)
        return
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = plan.task.words()  # type: ignore[attr-defined]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_folder(model, tokenizer, out, torch.float32)


def run(plan: Organism, work: Path, out: Path, measure: Callable[[Organism, Any], dict[str, Any]]) -> dict[str, Any]:
    """Train an organism at its rate and the others, measure it, and write its folder.

    Args:
        plan: the recipe.
        work: folder of checkpoints.
        out: folder to write; the organism that ``plan.start`` names stands beside it.
        measure: (plan, model) to what the card says.

    Returns:
        what training.json holds.
    """
    work.mkdir(parents=True, exist_ok=True)
    initial = None
    if plan.start:
        source = work / f"{plan.start}.pt"
        if not source.is_file():
            raise ValueError(f"{plan.name} goes on from {plan.start}: train that first, with the same --work")
        initial = narrowed(torch.load(source, weights_only=True)["model"], organism(plan.start).config, plan.config)
    with training_scans(torch.device("cpu"), "chunked"):
        found = train(plan, work, initial)
        result: dict[str, Any] = {"name": plan.name, "topic": plan.topic, "kind": plan.kind}
        result["parameters"] = sum(p.numel() for p in found["model"].parameters())
        result["recipe"] = {
            "config": plan.config, "rate": plan.rate, "warmup": plan.warmup, "weight_decay": plan.weight_decay,
            "seed": plan.seed, "start": plan.start, "jitter": plan.jitter, "steps": plan.steps,
            "stages": [{"tasks": [t.settings for t in s.tasks], "rows": s.rows, "steps": s.steps} for s in plan.stages],
        }  # fmt: skip
        result["seconds"] = round(found["seconds"], 1)
        result["environment"] = environment(torch.device("cpu"))
        result["measured"] = measure(plan, found["model"])
        sweep = [{"rate": plan.rate, "loss": found["log"][-1]["loss"], "measured": result["measured"]}]
        for rate in plan.others:
            other = train(replace(plan, rate=rate), work, initial, f"{plan.name}-rate-{rate:g}")
            sweep.append({"rate": rate, "loss": other["log"][-1]["loss"], "measured": measure(plan, other["model"])})
        result["rates"] = sorted(sweep, key=lambda r: r["rate"]) if plan.others else []
        result["loss"] = found["log"]
    _save(plan, found["model"], out)
    write_json(out / "training.json", result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    from .organisms_card import write_organism_card
    from .organisms_measure import measure

    parser = argparse.ArgumentParser(prog="python -m ssmlens.zoo.organisms_train", description="Train organisms.")
    parser.add_argument("names", nargs="+", help=f"all, or some of {', '.join(ORGANISMS)}")
    parser.add_argument("--work", default="organisms", help="folder of checkpoints (default organisms)")
    parser.add_argument("--out", default=".", help="folder in which each organism gets its own (default: this one)")
    parser.add_argument("--one-rate", action="store_true", help="leave the other learning rates of a window out")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a few rows")
    options = parser.parse_args(arguments)
    try:
        for name in list(ORGANISMS) if options.names == ["all"] else options.names:
            plan = organism(name)
            plan = plan.smoke() if options.smoke else plan
            plan = replace(plan, others=()) if options.one_rate else plan
            run(plan, Path(options.work), Path(options.out) / name, measure)
            write_organism_card(Path(options.out) / name)
            print(f"{name}: written", flush=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(error.args[0] if isinstance(error, KeyError) else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
