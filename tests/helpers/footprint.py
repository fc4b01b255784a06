"""What a tap could leave behind on a model, and comparisons of whole traces."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

import ssmlens

__all__ = ["IDS", "assert_same", "fingerprint", "plain_logits", "same_trace"]

IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of the model and of its modeling module that a tap could leave behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {k: dict(v) for k, v in vars(module).items() if "hook" in k and isinstance(v, dict)}
        found[name] = (hooks, module.training, sorted(vars(module)))
    modeling = importlib.import_module(type(model).__module__)
    found["globals"] = {k: id(v) for k, v in vars(modeling).items()}
    found["weights"] = {k: (v.dtype, v.requires_grad, v.clone()) for k, v in model.named_parameters()}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    first, second = dict(before), dict(after)
    weights, now = first.pop("weights"), second.pop("weights")
    assert first == second
    assert weights.keys() == now.keys()
    for name, (dtype, grad, x) in weights.items():
        assert now[name][:2] == (dtype, grad)
        assert torch.equal(now[name][2], x), name


def plain_logits(model: nn.Module, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def same_trace(trace: ssmlens.Trace, expected: ssmlens.Trace) -> None:
    assert torch.equal(trace.logits, expected.logits)
    for k in range(len(expected.residuals)):
        assert torch.equal(trace.residual(k), expected.residual(k))
    for mixer in expected:
        ours = trace[mixer.layer]
        assert torch.equal(ours.output, mixer.output)
        for name, x in mixer.recurrence.inputs.tensors().items():
            assert torch.equal(ours.recurrence.inputs.tensors()[name], x), name
