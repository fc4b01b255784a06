"""The frozen decomposition against autograd through plain loops, its full form, and its identities."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import naive_lm
import pytest
import torch
from checkpoints import gap
from footprint import assert_same, fingerprint

import ssmlens
from ssmlens.attribution import _forward, decompose, residual_parts
from ssmlens.errors import MemoryLimitError, PromptError, ReconstructionError, UnsupportedModelError

IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
EXACT = 1e-12
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mamba1", {}),
    ("mamba1", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("mamba1", {"use_bias": True, "hidden_act": "relu"}),
    ("falcon", {"use_bias": True}),
    ("mamba2", {}),
    ("mamba2", {"use_bias": True, "n_groups": 1, "time_step_limit": (0.4, 1.1)}),
]


@pytest.mark.parametrize(("family", "config"), CASES)
def test_terms_are_those_of_autograd_through_loops(family: str, config: dict[str, Any]) -> None:
    model = getattr(checkpoints, family)(**config)
    for position, target in ((-1, None), (4, 7)):
        found = decompose(ssmlens.load(model), IDS, target, position)
        truth, bias, logit, chosen = naive_lm.terms(model, IDS, naive_lm.FROZEN, target, position)
        assert gap(found.scores[0], truth) <= EXACT
        assert found.bias.item() == pytest.approx(bias, abs=EXACT)
        assert found.logit.item() == pytest.approx(logit, abs=EXACT)
        assert found.target.item() == chosen
        assert found.completeness_error.item() <= EXACT
        assert found.settings["logit_error"] <= EXACT
        assert found.settings["layer_error"] <= EXACT
        assert found.settings["checked_tokens"] == "all"


@pytest.mark.parametrize(("family", "config"), CASES)
def test_every_residual_stream_and_logit_is_the_sum_of_its_parts(family: str, config: dict[str, Any]) -> None:
    model = getattr(checkpoints, family)(**config)
    lens = ssmlens.load(model)
    parts, trace = residual_parts(lens, IDS), lens.trace(IDS)
    for k in range(len(lens.layers) + 1):
        assert gap(parts.parts[k].sum(2) + parts.bias[k], trace.residual(k)) <= EXACT, k
        assert parts.error[k] <= EXACT
        assert not parts.parts[k].permute(0, 3, 1, 2).triu(1).any()
    for target in (None, 7):
        read = parts.logits(target)
        assert gap(read.scores.sum(2) + read.bias, read.logit) <= EXACT
        assert gap(read.logit, trace.logits.gather(2, read.target[..., None])[..., 0]) <= EXACT
        for position in (0, 4, len(IDS) - 1):
            back = decompose(lens, IDS, target, position)
            assert gap(read.scores[:, position], back.scores) <= EXACT
            assert gap(read.bias[:, position], back.bias) <= EXACT


def test_one_token_of_one_layer_by_hand() -> None:
    model = checkpoints.mamba1(num_hidden_layers=1)
    w = {k.removeprefix("backbone.layers.0.mixer."): v for k, v in model.state_dict().items()}
    x, eps = w["backbone.embeddings.weight"][5], model.config.layer_norm_epsilon
    hidden = x / (x.square().mean() + eps).sqrt() * w["backbone.layers.0.norm.weight"]
    before, z = (w["in_proj.weight"] @ hidden).chunk(2)
    own, bias = w["conv1d.weight"][:, 0, -1] * before, w["conv1d.bias"]
    sigmoid = torch.sigmoid(own + bias)
    low, B, C = (w["x_proj.weight"] @ (sigmoid * (own + bias))).split([3, 5, 5])
    dt = torch.nn.functional.softplus(w["dt_proj.weight"] @ low + w["dt_proj.bias"])
    through = (dt * (B @ C) + w["D"]) * z * torch.sigmoid(z) * sigmoid
    last = x + w["out_proj.weight"] @ (through * (own + bias))
    read = w["lm_head.weight"][9] * w["backbone.norm_f.weight"] / (last.square().mean() + eps).sqrt()
    found = decompose(ssmlens.load(model), [5], 9)
    assert found.scores.item() == pytest.approx(float(read @ (x + w["out_proj.weight"] @ (through * own))), abs=EXACT)
    assert found.bias.item() == pytest.approx(float(read @ (w["out_proj.weight"] @ (through * bias))), abs=EXACT)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_pieces_of_time_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    ids = torch.randint(37, (3, 75), generator=torch.Generator().manual_seed(1))
    whole = decompose(lens, ids, position=[-1, 15, 40])
    monkeypatch.setattr(_forward, "PIECE_BYTES", 1)  # 16 tokens at once, rows one by one
    cut = decompose(lens, ids, position=[-1, 15, 40])
    assert gap(cut.scores, whole.scores) <= EXACT
    assert gap(cut.bias, whole.bias) <= EXACT
    assert torch.equal(cut.target, whole.target)
    assert not cut.scores[1, 16:].any()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_padded_row_is_its_single_run(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    rows = [IDS, [11], [8, 2, 0, 0]]
    ids, mask = torch.full((3, 13), 9), torch.zeros(3, 13, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 13 - len(row) :] = torch.tensor(row)
        mask[i, 13 - len(row) :] = 1
    batch, full = decompose(lens, ids, attention_mask=mask), residual_parts(lens, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone, n = decompose(lens, row), len(row)
        assert gap(batch.scores[i, :n], alone.scores[0]) <= EXACT
        assert not batch.scores[i, n:].any()
        assert batch.tokens[i] == alone.tokens[0]
        assert gap(batch.logit[i], alone.logit[0]) <= EXACT
        assert gap(full.logits().scores[i, n - 1, :n], alone.scores[0]) <= EXACT
        assert not full.parts[-1][i, n:].any()
        assert not full.parts[-1][i, :, n:].any()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_state_spaces_checkpoints(family: str, tmp_path: Path) -> None:
    model = getattr(checkpoints, family)(vocab_size=40, tie_word_embeddings=True)
    folder = checkpoints.native_folder(model, tmp_path / "m", vocab_size=37)
    found = decompose(ssmlens.load(folder, dtype=torch.float64), IDS)
    truth = naive_lm.terms(model, IDS, naive_lm.FROZEN)
    assert gap(found.scores[0], truth[0]) <= 1e-6  # the file holds float32
    assert found.completeness_error.item() <= EXACT


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_narrow_models_conserve_in_float32(dtype: torch.dtype, limit: float) -> None:
    model = checkpoints.mamba2(use_bias=True)
    found = decompose(ssmlens.load(model, dtype=dtype), IDS)
    assert found.scores.dtype == torch.float32
    assert found.completeness_error.item() <= limit


def test_the_model_is_left_as_it_was() -> None:
    model = checkpoints.mamba1()
    model.train()
    before = fingerprint(model)
    lens = ssmlens.load(model)
    decompose(lens, IDS)
    residual_parts(lens, IDS)
    assert_same(before, fingerprint(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_differs_from_its_weights_is_refused() -> None:
    model = checkpoints.mamba1()
    lens = ssmlens.load(model)
    model.backbone.layers[1].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(ReconstructionError, match=r"layer 1 recomputed from the weights: .* away from the model"):
        decompose(lens, IDS)


def test_layers_without_a_recurrence_are_refused() -> None:
    model = checkpoints.mamba1()
    model.backbone.layers[1].mixer = torch.nn.Linear(12, 12).double()
    with pytest.raises(UnsupportedModelError, match=r"layer 1 is no Mamba mixer"):
        decompose(ssmlens.load(model), IDS)


def test_an_activation_that_is_not_zero_at_zero_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'sigmoid' .* is not 0 at 0"):
        decompose(ssmlens.load(checkpoints.mamba1(hidden_act="sigmoid")), IDS)


def test_parts_above_the_limit_are_refused() -> None:
    with pytest.raises(MemoryLimitError, match=r"take 0.0 GB, above the limit"):
        residual_parts(ssmlens.load(checkpoints.mamba1()), IDS, limit=1000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": 37}, "target 37 is outside the vocabulary: ids are 0 to 36"),
        ({"target": "a"}, "no tokenizer: give the target as a token id"),
        ({"target": [1, 2]}, "target has 2 entries for 1 prompts"),
        ({"target": 1.5}, "a target is a token id"),
        ({"position": 11}, "position 11 does not exist: prompt 0 has 11 tokens"),
        ({"position": -12}, "position -12 does not exist"),
        ({"position": "last"}, "position is an index"),
    ],
)
def test_bad_questions_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        decompose(ssmlens.load(checkpoints.mamba1()), IDS, **arguments)


LONG = """
import resource, torch, ssmlens
from transformers import MambaConfig, MambaForCausalLM
from ssmlens.attribution import _forward, decompose
_forward.PIECE_BYTES = 8 * 2**20
torch.manual_seed(0)
config = MambaConfig(vocab_size=50, hidden_size=128, num_hidden_layers=2, state_size=8)
lens = ssmlens.load(MambaForCausalLM(config).eval())
decompose(lens, torch.randint(50, (1, 600)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = decompose(lens, torch.randint(50, (1, 5_000)))
assert found.completeness_error.item() < 1e-4
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_long_prompts_do_not_keep_their_activations() -> None:
    # All at once the backward pass would keep 14 tensors of 5,000 x 256 numbers a layer, 140 MB.
    grown = int(subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True).stdout)
    assert grown < 70_000  # kB


PIECES = """
import torch, ssmlens
from transformers import MambaConfig, MambaForCausalLM
from ssmlens.attribution import _forward
from ssmlens.kernels.bench import peak_memory
_forward.PIECE_BYTES = 24 * 2**20
torch.manual_seed(0)
config = MambaConfig(vocab_size=50, hidden_size=256, num_hidden_layers=6, state_size=16)
network = _forward.Network(ssmlens.load(MambaForCausalLM(config).eval()))
x = network.embed(torch.randint(50, (1, 4_000)))
network.last_logits(x[:, :40], torch.tensor([39]))
starts = _forward._room(network.start(1), -(-4_000 // network.piece_length(1)))
with peak_memory("cpu") as peak:
    network._forward(x, torch.tensor([3_999]), _forward.FROZEN, starts)
print(len(starts), *peak)
"""


def test_what_pieces_hand_on_does_not_hold_their_memory() -> None:
    # 28 pieces hand on 6 MB. Made one by one among the pieces' own tensors they kept 100 MB from being used again.
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", PIECES], capture_output=True, text=True, check=True, env=given).stdout
    pieces, *peak = map(int, out.split())
    assert pieces > 20
    assert not peak or peak[0] < 60e6
