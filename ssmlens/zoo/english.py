"""Trains, saves and measures an English model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .corpus import WEIGHTS
from .data import Pack
from .evaluate import held_out_scores, key_value_recall, samples, snippet_score
from .folder import round_weights, save_folder, write_json
from .loop import Budget, describe, environment, optimise
from .recipes import Recipe, make_model
from .scans import training_scans

__all__ = ["KEY_VALUE_WEIGHT", "Sampler", "train_english"]

KEY_VALUE_WEIGHT = 0.07


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


def _english_batches(sampler: Sampler, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        ids = sampler.draw(rows)
        yield ids[:, :-1], ids[:, 1:]


def train_english(
    plan: Recipe, pack: Pack, out: Path, device: torch.device, minutes: float | None, scan: str
) -> dict[str, Any]:
    """Train, save and measure an English model.

    Args:
        plan: the recipe.
        pack: the packed text.
        out: folder to write.
        device: where to train.
        minutes: wall-clock limit of the training loop.
        scan: one of ssmlens.zoo.scans.KINDS.

    Returns:
        the training log, also written as training.json.
    """
    plan = replace(plan, config=plan.config | {"vocab_size": pack.meta["vocabulary"]})
    torch.manual_seed(plan.seed)
    model = make_model(plan.family, plan.config).to(device).train()
    sampler = Sampler(pack, device, plan.length, plan.seed)
    dtype = getattr(torch, plan.save_dtype)
    with training_scans(device, scan) as used:
        budget = Budget(plan.steps, minutes)
        log = optimise(model, _english_batches(sampler, plan.batch), plan, plan.rates[0], budget, plan.name)
        model.eval()
        torch.set_float32_matmul_precision("highest")  # the numbers of the card are those of plain float32
        round_weights(model, dtype)
        save_folder(model, pack.tokenizer, out, dtype)
        steps = int(log[-1]["step"])
        result = {
            "name": plan.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "recipe": describe(plan) | {"rate": plan.rates[0], "steps": steps, "scan": used},
            "tokens_seen": steps * plan.batch * plan.length,
            "seconds": log[-1]["seconds"],
            "environment": environment(device),
            "text": {k: pack.meta[k] for k in ("tokens", "bytes", "documents", "sha256", "held_out")},
            "loss": log[:: max(1, len(log) // 200)] + log[-1:],
        }
        write_json(out / "training.json", result)  # what is measured below is added when it is there
        print(f"{plan.name}: {steps} steps, measuring", flush=True)
        result["bits_per_byte"] = held_out_scores(model, pack.held_out)
        narrative = next(h for h in pack.held_out if h.group == "Persuasion")
        text = pack.tokenizer.decode(narrative.ids[1:].tolist(), skip_special_tokens=False)
        result["snippet"] = snippet_score(model, pack.tokenizer)
        result["key_value"] = key_value_recall(model, pack.tokenizer, text)
        write_json(out / "training.json", result)
    result["samples"] = samples(model, pack.tokenizer)
    write_json(out / "training.json", result)
    return result
