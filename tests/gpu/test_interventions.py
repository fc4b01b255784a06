"""Interventions on a CUDA device give what they give on the CPU."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap

import ssmlens
from ssmlens.interventions import (
    Knockout,
    Noise,
    StateEdit,
    ablate,
    knockout,
    logit_lens,
    observe,
    patch,
    rome,
    steer,
    train_translators,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
OTHER = [3, 17, 7, 36, 8, 5, 21, 9, 30, 2, 11]
TEXT = torch.randint(37, (24, 16), generator=torch.Generator().manual_seed(0))
RUNS: dict[str, Any] = {
    "knockout": lambda lens: knockout(lens, IDS, [2, 4], None, decay="skip"),
    "observe": lambda lens: observe(lens, IDS, Knockout([2, 4])).attention(1).after,
    "patch": lambda lens: patch(lens, IDS, OTHER, [("full_state", 0, 4), ("mixer", 1, 2), (1, "all")], "kl").value,
    "noise": lambda lens: patch(lens, IDS, Noise([2, 3]), ("state", 1, 4), "logit", target=4).value,
    "mean": lambda lens: ablate(lens, IDS, parts=["conv", ("state", [1]), "gate"], how="mean"),
    "resample": lambda lens: ablate(lens, IDS, parts=("head", [0]), how="resample"),
    "steer": lambda lens: steer(lens, IDS, StateEdit(0, 3, scale=0.5), new_tokens=3).logits,
    "lens": lambda lens: logit_lens(lens.trace(IDS)).logits,
    "tuned": lambda lens: train_translators(lens, TEXT, steps=3, rank=2).up,
    "rome": lambda lens: rome(lens, 0, IDS, 7, 4, text=TEXT, steps=3).update,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_device_gives_what_the_cpu_gives(family: str, name: str) -> None:
    model = getattr(checkpoints, family)
    there, here = (RUNS[name](ssmlens.load(model(), device, torch.float64)) for device in ("cuda", "cpu"))
    assert gap(there.cpu(), here) <= (1e-4 if name == "tuned" else 1e-9)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_blocked_token_has_no_influence(family: str, dtype: torch.dtype) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(), "cuda", dtype)
    a, b = (knockout(lens, [*IDS[:2], i, *IDS[3:]], 2, decay="skip")[:, 3:] for i in (0, 7))
    assert (a - b).abs().max().item() <= (1e-15 if dtype == torch.float64 else 1e-6)
