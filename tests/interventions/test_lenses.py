"""Logit lens and tuned lens: identities, training, files, and what ships."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from footprint import assert_same, fingerprint
from safetensors.torch import save_file
from torch import Tensor

import ssmlens
from ssmlens import zoo
from ssmlens.errors import CheckpointError, LayerError, MemoryLimitError, PromptError, ReconstructionError, SsmlensError
from ssmlens.interventions import Translators, logit_lens, train_translators, tuned_lens

FAMILIES = ["mamba1", "falcon", "mamba2"]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
ENGLISH = ["mamba1-english", "mamba2-english"]


def make(family: str, dtype: torch.dtype = torch.float64) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, family)(), dtype=dtype)


def by_hand(lens: ssmlens.Lens, residual: Tensor) -> Tensor:
    """(t, v) RMSNorm and unembedding of (t, d)."""
    eps, model = lens.model.config.layer_norm_epsilon, lens.model
    normed = residual / torch.sqrt((residual * residual).mean(-1, keepdim=True) + eps)
    return normed * model.backbone.norm_f.weight @ model.lm_head.weight.T


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_is_the_end_of_the_model(family: str) -> None:
    lens = make(family)
    trace = lens.trace(IDS)
    found = logit_lens(trace)
    assert found.layers == (0, 1, 2)
    assert torch.equal(found.logits[-1], trace.logits)
    assert found.kl[-1].abs().max() == 0
    final = trace.logits.log_softmax(-1)
    for k in range(3):
        ours = by_hand(lens, trace.residual(k)[0])
        assert gap(found.logits[k, 0], ours) <= 1e-12
        divergence = (final[0].exp() * (final[0] - ours.log_softmax(-1))).sum(-1)
        assert torch.allclose(found.kl[k, 0], divergence, rtol=0, atol=1e-12)
    some = logit_lens(trace, [2, 0])
    assert some.layers == (2, 0)
    assert torch.equal(some.logits, found.logits[[2, 0]])
    assert torch.allclose(found.mean_kl, found.kl.mean((1, 2)))
    line = found.table().query("layer == 1 and position == 3").iloc[0]
    assert line.top == int(found.logits[1, 0, 3].argmax())
    assert line.token == "36"
    assert line.probability == pytest.approx(found.logits[1, 0, 3].softmax(-1).max().item())
    assert found.table(decode=lambda ids: f"<{ids[0]}>").top[0].startswith("<")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_give_their_own_logits_at_the_end(family: str, dtype: torch.dtype) -> None:
    trace = make(family, dtype).trace(IDS)
    assert torch.equal(logit_lens(trace).logits[-1], trace.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_translators_that_change_nothing_are_the_logit_lens(family: str) -> None:
    trace = make(family).trace(torch.tensor([IDS, IDS[::-1]]))
    plain = logit_lens(trace)
    for translators in (
        Translators.identity(2, 12),
        Translators(torch.zeros(2, 12, 3), torch.randn(2, 3, 12), torch.zeros(2, 12)),
    ):
        tuned = tuned_lens(trace, translators)
        assert torch.equal(tuned.logits, plain.logits)
        assert torch.equal(tuned.kl, plain.kl)
    assert (plain.name, tuned.name) == ("logit lens", "tuned lens")


def test_translators_are_affine_maps() -> None:
    lens = make("mamba2")
    trace = lens.trace(IDS)
    up, down, bias = torch.randn(2, 12, 3).double(), torch.randn(2, 3, 12).double(), torch.randn(2, 12).double()
    found = tuned_lens(trace, Translators(up, down, bias))
    for k in range(2):
        matrix = torch.eye(12).double() + up[k] @ down[k]
        assert gap(found.logits[k, 0], by_hand(lens, trace.residual(k)[0] @ matrix.T + bias[k])) <= 1e-12
    assert torch.equal(found.logits[2], trace.logits)
    full = tuned_lens(trace, Translators(up @ down, None, bias))
    assert gap(full.logits, found.logits) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [None, 3])
def test_training_never_gets_worse_on_its_data_and_helps(family: str, rank: int | None) -> None:
    lens = make(family)
    data = torch.randint(37, (6, 16), generator=torch.Generator().manual_seed(0))
    before = fingerprint(lens.model)
    found = train_translators(lens, data, rank=rank, steps=40, rows=6, rate=0.05, check_every=4, watched=6)
    assert_same(before, fingerprint(lens.model))
    curve = found.curve
    assert curve is not None
    assert curve.shape == (11, 2)
    assert (curve[1:] <= curve[:-1]).all()
    assert (curve[-1] < 0.7 * curve[0]).all()
    # The curve is what it says: the divergence on the watched windows, from the logit lens on.
    trace = lens.trace(data)
    assert torch.allclose(curve[0].double(), logit_lens(trace, [0, 1]).mean_kl, rtol=1e-4)
    assert torch.allclose(curve[-1].double(), tuned_lens(trace, found, [0, 1]).mean_kl, rtol=1e-4)
    again = train_translators(lens, data, rank=rank, steps=40, rows=6, rate=0.05, check_every=4, watched=6)
    assert torch.equal(again.up, found.up)
    assert found.settings["tokens"] == 40 * 6 * 16


def test_a_step_too_far_is_taken_back() -> None:
    lens = make("mamba1")
    data = torch.randint(37, (4, 16), generator=torch.Generator().manual_seed(0))
    found = train_translators(lens, data, steps=12, rows=4, rate=30.0, check_every=1)
    assert found.curve is not None
    assert (found.curve[1:] <= found.curve[:-1]).all()
    assert (found.curve[1:] == found.curve[:-1]).any()
    assert math.isfinite(float(found.up.abs().max()))


def test_a_text_is_cut_into_windows() -> None:
    lens = ssmlens.load("mamba1-recall")
    found = train_translators(lens, zoo.passage("mamba1-recall"), steps=2, length=4, rows=1, watched=1)
    assert found.settings["length"] == 4
    with pytest.raises(PromptError, match="fewer than two tokens"):
        train_translators(make("mamba1"), [3])
    for name in ("rank", "steps", "rows", "length", "watched"):
        with pytest.raises(SsmlensError, match=f"{name} is at least 1"):
            train_translators(make("mamba1"), IDS, **{name: 0})  # type: ignore[arg-type]


def test_translator_files(tmp_path: Path) -> None:
    lens = make("mamba1")
    for rank in (None, 2):
        made = train_translators(lens, IDS, rank=rank, steps=3, rows=1, watched=1)
        again = Translators.load(made.save(tmp_path / "t.safetensors"))
        for name in ("up", "down", "bias", "curve"):
            one, two = getattr(made, name), getattr(again, name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)
        assert dict(again.settings) == dict(made.settings)
        trace = lens.trace(IDS)
        assert torch.equal(tuned_lens(trace, tmp_path / "t.safetensors").logits, tuned_lens(trace, made).logits)
    with pytest.raises(CheckpointError, match="does not exist"):
        Translators.load(tmp_path / "none")
    save_file({"up": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no translators of format"):
        Translators.load(tmp_path / "other.safetensors")
    save_file({"up": torch.zeros(1)}, tmp_path / "part.safetensors", metadata={"format": "ssmlens.translators/1"})
    with pytest.raises(CheckpointError, match="holds no whole translators"):
        Translators.load(tmp_path / "part.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="holds no whole translators"):
        Translators.load(tmp_path / "junk.safetensors")


def test_a_saved_trace_can_be_read(tmp_path: Path) -> None:
    trace = make("mamba2").trace(IDS)
    trace.save(tmp_path / "a", weights=True)
    again = ssmlens.Trace.load(tmp_path / "a")
    assert gap(logit_lens(again).logits, logit_lens(trace).logits) <= 1e-12
    trace.save(tmp_path / "b")
    with pytest.raises(SsmlensError, match="weights=True"):
        logit_lens(ssmlens.Trace.load(tmp_path / "b"))


def test_padding_has_no_divergence() -> None:
    lens = make("mamba1")
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    trace = lens.trace(torch.tensor([IDS, IDS]), attention_mask=mask)
    found = logit_lens(trace)
    assert found.kl[:, 1, 6:].isnan().all()
    one = logit_lens(lens.trace(IDS[:6]))
    assert torch.allclose(found.kl[:, 1, :6], one.kl[:, 0], rtol=0, atol=1e-12)
    assert not found.mean_kl.isnan().any()
    assert len(found.table(row=1)) == 18


def test_what_cannot_be_read_is_refused_in_a_sentence() -> None:
    lens = make("mamba1")
    trace = lens.trace(IDS)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: logit_lens(trace, [3]), LayerError, "choose 0 to 2"),
        (lambda: logit_lens(trace, []), LayerError, "layers is empty"),
        (lambda: logit_lens(trace, limit=100), MemoryLimitError, "above the limit"),
        (lambda: tuned_lens(trace), CheckpointError, "no translators ship with 'MambaForCausalLM'"),
        (lambda: tuned_lens(trace, Translators.identity(3, 12)), SsmlensError, "for 3 layers of width 12"),
        (lambda: Translators(torch.zeros(2, 12, 3), None, torch.zeros(2, 12)), SsmlensError, "translators are up"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    wrong = {**trace.head, "norm.weight": trace.head["norm.weight"] * 1.01}
    with pytest.raises(ReconstructionError, match="would not speak for this model"):
        logit_lens(ssmlens.Trace(**{**vars(trace), "head": wrong}))


@pytest.mark.parametrize("name", ENGLISH)
def test_shipped_translators_do_better_than_the_logit_lens(name: str) -> None:
    lens = ssmlens.load(name)
    text = (zoo.path(name).parents[1] / "passages" / "persuasion.txt").read_text(encoding="utf-8")
    trace = lens.trace(lens.tokenizer.encode(text)[:192], layers=[])
    plain, tuned = logit_lens(trace).mean_kl, tuned_lens(trace).mean_kl
    assert (tuned[:-1] < 0.75 * plain[:-1]).all()
    assert tuned[-1] == plain[-1] == 0
    assert (zoo.path(name) / "tuned_lens.safetensors").stat().st_size <= 2e6
    assert "## Tuned lens" in zoo.card(name)
