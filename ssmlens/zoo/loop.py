"""The training loop that every recipe shares: schedule, optimiser, budget and log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipes import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Batch", "Budget", "describe", "environment", "make_optimizer", "optimise", "scheduled_rate"]

FINAL_RATE = 0.02
LOG_EVERY = 20
PROBE_EVERY = 100

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]  # ids, targets and, when they differ, weights


class Budget:
    """How far a run is, from 0 to 1: the larger of its share of steps and of minutes."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.minutes = steps, minutes
        self.start = time.monotonic()

    def spent(self, step: int) -> float:
        time_share = 0.0 if self.minutes is None else (time.monotonic() - self.start) / (60 * self.minutes)
        return max(step / self.steps, time_share)


def scheduled_rate(peak: float, step: int, warmup: int, spent: float) -> float:
    """Linear warm-up, then a cosine from the peak to 2 % of it over the share of the budget that is spent."""
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))
    return peak * cosine * min(1.0, (step + 1) / max(warmup, 1))


def make_optimizer(model: PreTrainedModel, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW(.9, .95); only the projection matrices decay, neither embeddings, convolutions, A_log, D nor biases."""
    decays: list[Tensor] = []
    rests: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embeddings" not in name and "A_log" not in name
        (decays if matrix else rests).append(parameter)
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rests, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and device, for the training log."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def _loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats, weighted when the batch says so."""
    ids, targets, *weights = batch
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids, use_cache=False).logits
    if not weights:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").float()
    weight = weights[0].flatten()
    return (each * weight).sum() / weight.sum()


def optimise(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    plan: Recipe,
    rate: float,
    budget: Budget,
    label: str,
    probe: Callable[[PreTrainedModel], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Train until the budget is spent.

    Args:
        model: in train mode, on its device; scans already swapped.
        batches: endless (ids, targets), -100 where nothing is to be predicted, or (ids, targets, weights).
        plan: warm-up and weight decay.
        rate: peak learning rate.
        budget: what may be spent.
        label: starts each line of progress.
        probe: measures more for the log every 100 steps and at the end.

    Returns:
        one entry each few steps: step, seconds, loss in nats, rate, and what the probe found.

    Raises:
        RuntimeError: when the loss is no number any more.
    """
    optimizer = make_optimizer(model, rate, plan.weight_decay)
    device = next(model.parameters()).device
    log: list[dict[str, float]] = []
    step, shown, mean = 0, 0.0, torch.zeros((), device=device)
    spent = budget.spent(0)
    while spent < 1.0:
        now = scheduled_rate(rate, step, plan.warmup, spent)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = _loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean += loss.detach()
        step += 1
        spent = budget.spent(step)
        if step % LOG_EVERY == 0 or spent >= 1.0:
            since = step - (int(log[-1]["step"]) if log else 0)
            value = float(mean) / since
            mean.zero_()
            if not math.isfinite(value):
                raise RuntimeError(f"{label}: the loss is {value} at step {step}")
            seconds = time.monotonic() - budget.start
            log.append({"step": step, "seconds": round(seconds, 2), "loss": round(value, 5), "rate": now})
            if probe and (step % PROBE_EVERY == 0 or spent >= 1.0):
                log[-1] |= probe(model)
            if seconds - shown > 10 or step == LOG_EVERY or len(log[-1]) > 4:
                shown = seconds
                more = "".join(f" {key} {x:.3f}" for key, x in log[-1].items() if key.startswith("recall"))
                print(f"{label} step {step} {seconds:.0f} s loss {value:.4f} spent {spent:.2f}{more}", flush=True)
    return log


def describe(plan: Recipe) -> dict[str, Any]:
    """The recipe as the training log records it."""
    return {
        "family": plan.family, "task": plan.task, "config": plan.config, "batch": plan.batch, "length": plan.length,
        "warmup": plan.warmup, "weight_decay": plan.weight_decay, "save_dtype": plan.save_dtype, "seed": plan.seed,
    }  # fmt: skip
