"""Trains, saves and measures an English model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .corpus import WEIGHTS
from .data import Pack
from .evaluate import held_out_scores, key_value_recall, samples, snippet_score
from .folder import round_weights, save_folder, write_json
from .loop import Batch, Budget, describe, environment, optimise
from .recall_stage import ASKED_WEIGHT, WINDOWS, RecallMix, dense_share
from .recipes import RECALL_SHARE, Recipe, make_model, recall_stage
from .scans import training_scans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KEY_VALUE_WEIGHT", "STAGES", "Sampler", "train_english"]

KEY_VALUE_WEIGHT = 0.07
STAGES = ("both", "text", "recall")


class Sampler:
    """Draws windows of the packed text on the device: a part by its weight, then a position in it.

    Args:
        pack: the packed text.
        device: where the tokens live.
        length: tokens of a window, not counting the one to predict.
        seed: of the draws.
    """

    def __init__(self, pack: Pack, device: torch.device, length: int, seed: int) -> None:
        weights = {k: w * (1 - KEY_VALUE_WEIGHT) for k, w in WEIGHTS.items()} | {"keyvalue": KEY_VALUE_WEIGHT}
        sizes = [len(pack.parts[name]) for name in weights]
        short = [name for name, size in zip(weights, sizes) if size < length + 2]
        if short:
            raise ValueError(f"fewer than {length + 2} tokens of {', '.join(short)}: the text is too small")
        tokens = torch.cat([torch.from_numpy(pack.parts[name].astype("int32")) for name in weights])
        self.tokens = tokens.to(device)
        self.sizes = torch.tensor(sizes, device=device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.weights = torch.tensor(list(weights.values()), device=device)
        self.steps = torch.arange(length + 1, device=device)
        self.random = torch.Generator(device).manual_seed(seed)

    def draw(self, rows: int) -> Tensor:
        """(rows, length + 1) token ids."""
        part = torch.multinomial(self.weights, rows, replacement=True, generator=self.random)
        where = torch.rand(rows, generator=self.random, device=part.device, dtype=torch.float64)
        start = self.starts[part] + (where * (self.sizes[part] - len(self.steps))).long()
        return self.tokens[start[:, None] + self.steps].long()


def _text_batches(sampler: Sampler, rows: int) -> Iterator[Batch]:
    while True:
        ids = sampler.draw(rows)
        yield ids[:, :-1], ids[:, 1:]


def _start(plan: Recipe, pack: Pack, source: Path | None) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A new model, or that of a folder with the stages it has been through.

    Raises:
        FileNotFoundError: when the folder holds no trained model.
        ValueError: when it is another model, or its tokenizer is not the pack's.
    """
    if source is None:
        torch.manual_seed(plan.seed)
        return make_model(plan.family, plan.config), []
    if not (source / "training.json").is_file():
        raise FileNotFoundError(f"{source} has no training.json: it is no folder that training wrote")
    log = json.loads((source / "training.json").read_text(encoding="utf-8"))
    if log["name"] != plan.name:
        raise ValueError(f"{source} holds {log['name']}, not {plan.name}")
    if json.loads((source / "tokenizer.json").read_text(encoding="utf-8")) != json.loads(pack.tokenizer_json):
        raise ValueError(f"{source} has another tokenizer than the packed text")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model, [stage for stage in log["stages"] if stage["stage"] == "text"]


def _run_stage(
    stage: str, model: PreTrainedModel, plan: Recipe, pack: Pack, minutes: float | None, used: str
) -> dict[str, Any]:
    """Train one stage; returns its part of the training log."""
    device = next(model.parameters()).device
    plan = recall_stage(plan) if stage == "recall" else plan
    sampler = Sampler(pack, device, plan.length, plan.seed)
    more: dict[str, Any] = {}
    label = f"{plan.name} {stage}"
    if stage == "recall":
        drawn = plan.steps * plan.batch  # no more windows than a short run could draw
        mix = RecallMix(pack, sampler, device, plan.length, plan.seed, min(WINDOWS, max(64, drawn)))
        print(f"{label}: {len(mix.ids)} dense windows", flush=True)
        budget = Budget(plan.steps, minutes)
        log = optimise(model, mix.batches(plan.batch, budget), plan, plan.rates[0], budget, label, mix.probe)
        more = {"windows": len(mix.ids), "dense_share": [dense_share(0), dense_share(1)], "asked_weight": ASKED_WEIGHT}
    else:
        budget = Budget(plan.steps, minutes)
        log = optimise(model, _text_batches(sampler, plan.batch), plan, plan.rates[0], budget, label)
    steps = int(log[-1]["step"])
    thin = max(1, len(log) // 200)
    kept = [entry for i, entry in enumerate(log[:-1]) if i % thin == 0 or "recall_easy" in entry]
    return {
        "stage": stage,
        **{key: describe(plan)[key] for key in ("batch", "length", "warmup", "weight_decay", "seed")},
        "rate": plan.rates[0],
        "steps": steps,
        "scan": used,
        "tokens_seen": steps * plan.batch * plan.length,
        "seconds": log[-1]["seconds"],
        "environment": environment(device),
        **more,
        "loss": [*kept, log[-1]],
    }


def _share(plan: Recipe, minutes: float | None, share: float) -> tuple[Recipe, float | None]:
    steps = max(1, round(share * plan.steps))
    return replace(plan, steps=steps), None if minutes is None else minutes * share


def train_english(
    plan: Recipe,
    pack: Pack,
    out: Path,
    device: torch.device,
    minutes: float | None,
    scan: str,
    stage: str = "both",
    start: Path | None = None,
) -> dict[str, Any]:
    """Train, save and measure an English model.

    Args:
        plan: the recipe.
        pack: the packed text.
        out: folder to write.
        device: where to train.
        minutes: wall-clock limit of the training loops together.
        scan: one of ssmlens.zoo.scans.KINDS.
        stage: one of STAGES.
        start: folder of the model that the recall stage alone starts from.

    Returns:
        the training log, also written as training.json.

    Raises:
        ValueError: when ``start`` and ``stage`` do not go together, or the folder does not fit the pack.
    """
    if (stage == "recall") != (start is not None):
        raise ValueError("the recall stage alone needs a folder to start from, and only it takes one")
    plan = replace(plan, config=plan.config | {"vocab_size": pack.meta["vocabulary"]})
    model, stages = _start(plan, pack, start)
    model = model.to(device).train()
    dtype = getattr(torch, plan.save_dtype)
    result: dict[str, Any] = {
        "name": plan.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": {key: describe(plan)[key] for key in ("family", "task", "config", "save_dtype")},
        "text": {k: pack.meta[k] for k in ("tokens", "bytes", "documents", "sha256", "held_out")},
        "stages": stages,
    }
    shares = {"both": (("text", 1 - RECALL_SHARE), ("recall", RECALL_SHARE))}.get(stage, ((stage, 1.0),))
    with training_scans(device, scan) as used:
        for name, share in shares:
            part, limit = _share(plan, minutes, share)
            stages.append(_run_stage(name, model, part, pack, limit, used))
        model.eval()
        torch.set_float32_matmul_precision("highest")  # the numbers of the card are those of plain float32
        round_weights(model, dtype)
        save_folder(model, pack.tokenizer, out, dtype)
        write_json(out / "training.json", result)  # what is measured below is added when it is there
        _measure(model, pack, result, out)
    result["samples"] = samples(model, pack.tokenizer)
    write_json(out / "training.json", result)
    return result


def _measure(model: PreTrainedModel, pack: Pack, result: dict[str, Any], out: Path) -> None:
    """Add the held-out numbers to the log, the cheap ones first, writing it after each."""
    tokenizer = pack.tokenizer
    narrative = next(h for h in pack.held_out if h.group == "Persuasion")
    text = tokenizer.decode(narrative.ids[1:].tolist(), skip_special_tokens=False)
    for key, measure in (
        ("snippet", lambda: snippet_score(model, tokenizer)),
        ("key_value", lambda: key_value_recall(model, tokenizer, text)),
        ("bits_per_byte", lambda: held_out_scores(model, pack.held_out)),
    ):
        start = time.monotonic()
        result[key] = measure()
        write_json(out / "training.json", result)
        shown = result[key] if isinstance(result[key], float) else result[key].get("accuracy", result[key].get("all"))
        print(f"{result['name']} {key} {shown:.4f} in {time.monotonic() - start:.1f} s", flush=True)
