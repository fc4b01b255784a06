"""Single rows of maps and contributions: those of the whole, in stretches of time and little memory (T8 and T15)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import checkpoints
import pytest
import torch
from checkpoints import gap
from footprint import IDS

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import RULES, _front, _rows, contributions, hidden_row, unified

FAMILIES = ("mamba1", "mamba2", "falcon")


@pytest.fixture(params=[1, 3, 4, 100])
def stretch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a stretch of a row of 24 channels."""
    monkeypatch.setattr(_front, "_STRETCH", request.param * 24)
    monkeypatch.setattr(_rows, "_LINES", 2 * 24 * len(IDS) * 8)
    return int(request.param)


@pytest.mark.parametrize("config", [{}, {"use_conv_bias": False, "use_bias": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_the_whole(family: str, config: dict[str, bool], stretch: int) -> None:
    rows = [10, 0, 4, -2, 3]
    for mixer in ssmlens.load(getattr(checkpoints, family)(**config), dtype=torch.float64).trace(IDS):
        assert mixer.parameters["out_proj.weight"].shape[1] == 24
        for rule in RULES:
            found = contributions(mixer, rule)
            assert gap(found.vectors(rows), found.vectors()[:, rows]) <= 1e-12
        for parts in (("conv", "activation", "skip", "gate"), ("conv", "gate"), ("activation", "skip"), ()):
            map_ = unified(mixer, parts)
            for row in rows:
                assert gap(map_.row(row), map_.dense()[:, :, row]) <= 1e-12
                assert not map_.row(row)[..., row % len(IDS) + 1 :].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_padded_batches_and_of_a_first_state(family: str, stretch: int) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(), dtype=torch.float64)
    ids = torch.tensor([IDS, IDS[:6] + [0] * 5])
    mixer = lens.trace(ids, attention_mask=torch.arange(11) < torch.tensor([[11], [6]]))[1]
    assert gap(contributions(mixer).vectors([5, 9]), contributions(mixer).vectors()[:, [5, 9]]) <= 1e-12
    assert not contributions(mixer).vectors([9])[1].any()
    assert not unified(mixer).row(9)[1].any()
    assert gap(unified(mixer).row(5)[1:, :, :6], unified(lens.trace(IDS[:6])[1]).row(5)) <= 1e-12
    rec = mixer.recurrence
    first = torch.randn(rec.batch, rec.n_heads, rec.head_dim, rec.d_state, dtype=torch.float64)
    begun = replace(mixer, recurrence=replace(rec, inputs=rec.inputs.replace(initial=first)))
    assert gap(contributions(begun).vectors([5]), contributions(begun).vectors()[:, [5]]) <= 1e-12


@pytest.mark.parametrize("name", zoo.names())
def test_rows_of_shipped_models_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = ssmlens.load(name, dtype=torch.float64)
    trace = lens.trace(zoo.passage(name)[:60])
    monkeypatch.setattr(_front, "_STRETCH", 7 * trace[0].parameters["out_proj.weight"].shape[1])
    for mixer in trace:
        matrix = mixer.recurrence.attention.dense()[:, :, -1]
        assert gap(mixer.recurrence.attention.row(-1), matrix) <= 1e-10
        assert gap(hidden_row(mixer), matrix) <= 1e-10
        assert gap(unified(mixer).row(-1), unified(mixer).dense()[:, :, -1]) <= 1e-10
        assert gap(contributions(mixer).vectors([-1]), contributions(mixer).vectors()[:, -1:]) <= 1e-10


LONG = """
import json, torch, ssmlens
from ssmlens.attribution import RULES, contributions, hidden_row, unified
from ssmlens.kernels.bench import peak_memory
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=256, num_hidden_layers=1, state_size=16))
mixer = ssmlens.load(model.eval()).trace(torch.randint(16, (8_000,)))[0]
calls = {
    "attention": lambda: mixer.recurrence.attention.row(-1),
    "hidden": lambda: hidden_row(mixer),
    "unified": lambda: unified(mixer).row(-1),
    **{rule: lambda rule=rule: contributions(mixer, rule).vectors([-1]) for rule in RULES},
}
found = {}
for name, call in calls.items():
    with peak_memory("cpu") as peak:
        call()
    found[name] = peak
print(json.dumps(found))
"""


def test_the_last_row_of_a_long_prompt_takes_little() -> None:
    # What is freed goes back at once, so that the resident memory is what is in use.
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "8000000", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True, env=given).stdout
    each = 8_000 * 512 * 4  # bytes of one tensor of the inner width; decays of every state would be 16 of them
    peaks = {name: peak[0] for name, peak in json.loads(out).items() if peak}
    assert max(peaks.values(), default=0) <= 4 * each, peaks
    # The gauge works: a system that takes back pages of files meanwhile hides some of one call, not of all.
    assert max(peaks.values(), default=each) >= 0.9 * each, peaks
