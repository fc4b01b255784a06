"""Trains, saves and measures a recall model: a sweep of learning rates, of which the best is kept."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import recall_task
from .evaluate import LOADS, recall_table
from .folder import round_weights, save_folder, write_json
from .loop import Budget, describe, environment, optimise
from .pointing import measure
from .recipes import Recipe, make_model
from .scans import training_scans

__all__ = ["Pool", "train_recall"]

POOL = 65_536
VALIDATION_SEED = 5_000
TEST_SIZE = 500


class Pool:
    """Batches of the task: an equal share of each load, drawn from sequences made beforehand.

    Args:
        loads: numbers of pairs.
        length: tokens a sequence.
        size: sequences made for each load.
        device: where they live.
        seed: of the sequences and of the draws.
    """

    def __init__(self, loads: tuple[int, ...], length: int, size: int, device: torch.device, seed: int) -> None:
        made = [recall_task.batch(size, length, pairs, seed * 100 + i) for i, pairs in enumerate(loads)]
        self.ids = torch.stack([m.ids for m in made]).to(device)
        self.targets = torch.stack([m.targets for m in made]).to(device)
        self.random = torch.Generator(device).manual_seed(seed)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (ids, targets) of ``rows`` sequences; rows is a multiple of the number of loads."""
        n_loads, size = self.ids.shape[:2]
        load = torch.arange(n_loads, device=self.ids.device)[:, None]
        while True:
            row = torch.randint(size, (n_loads, rows // n_loads), generator=self.random, device=self.ids.device)
            yield self.ids[load, row].flatten(0, 1), self.targets[load, row].flatten(0, 1)


def _try_rate(
    plan: Recipe, rate: float, device_name: str, minutes: float | None, scan: str, pool: int, size: int
) -> dict[str, Any]:
    """Train once at one rate; the weights come back on the CPU, rounded as they are shipped."""
    device = torch.device(device_name)
    torch.manual_seed(plan.seed)
    model = make_model(plan.family, plan.config).to(device).train()
    batches = Pool(recall_task.TRAINING_PAIRS, plan.length, pool, device, plan.seed).batches(plan.batch)
    loads = tuple((plan.length, pairs) for pairs in recall_task.TRAINING_PAIRS)
    with training_scans(device, scan) as used:
        log = optimise(model, batches, plan, rate, Budget(plan.steps, minutes), f"{plan.name} rate {rate:g}")
        model.eval()
        round_weights(model, getattr(torch, plan.save_dtype))
        rows = recall_table(model, loads, size, VALIDATION_SEED)
    print(f"{plan.name} rate {rate:g}: {[round(r['accuracy'], 4) for r in rows]}", flush=True)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return {"rate": rate, "log": log, "accuracy": rows, "weights": weights, "scan": used}


def _sweep(
    plan: Recipe, device: torch.device, minutes: float | None, scan: str, pool: int, size: int, jobs: int
) -> list[dict[str, Any]]:
    """One run for each rate, ``jobs`` at a time, each in a process of its own when more than one."""
    tasks = [(plan, rate, str(device), minutes, scan, pool, size) for rate in plan.rates]
    if jobs == 1:
        return [_try_rate(*task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        return [f.result() for f in [workers.submit(_try_rate, *task) for task in tasks]]


def train_recall(
    plan: Recipe,
    out: Path,
    device: torch.device,
    minutes: float | None,
    scan: str,
    jobs: int = 1,
    pool: int = POOL,
    loads: tuple[tuple[int, int], ...] = LOADS,
    size: int = TEST_SIZE,
) -> dict[str, Any]:
    """Train a recall model at each rate, keep the best at the highest training load, save and measure it.

    Args:
        plan: the recipe.
        out: folder to write.
        device: where to train.
        minutes: wall-clock limit of each run.
        scan: one of ssmlens.zoo.scans.KINDS.
        jobs: runs at the same time.
        pool: sequences made for each training load.
        loads: (tokens, pairs) of the accuracy table.
        size: fresh sequences for each of its rows.

    Returns:
        the training log, also written as training.json.
    """
    torch.set_float32_matmul_precision("highest")
    runs = _sweep(plan, device, minutes, scan, pool, size, jobs)
    # Highest load first; runs that are level there are told apart by their last loss.
    best = max(runs, key=lambda r: (r["accuracy"][-1]["accuracy"], -r["log"][-1]["loss"]))
    model = make_model(plan.family, plan.config)
    model.load_state_dict(best["weights"])
    model = model.to(device).eval()
    save_folder(model, recall_task.tokenizer(), out, getattr(torch, plan.save_dtype))
    with training_scans(device, scan):
        table = recall_table(model, loads, size)
    log = best["log"]
    result = {
        "name": plan.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": describe(plan)
        | {"rate": best["rate"], "steps": int(log[-1]["step"]), "scan": best["scan"], "pool": pool},
        "training_pairs": list(recall_task.TRAINING_PAIRS),
        "sequences_seen": int(log[-1]["step"]) * plan.batch,
        "seconds": log[-1]["seconds"],
        "environment": environment(device),
        "rates": [
            {"rate": r["rate"], "steps": int(last["step"]), "loss": last["loss"], "accuracy": r["accuracy"]}
            for r in runs
            for last in r["log"][-1:]
        ],
        "accuracy": table,
        "test_size": size,
        "attention": measure(out, max(1, size // 5)),
        "loss": log[:: max(1, len(log) // 200)] + log[-1:],
    }
    write_json(out / "training.json", result)
    return result
