"""The state-spaces format: what it may not hold, and what its weights must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import gap
from folders import native, refused, setting, without

import ssmlens
from ssmlens.errors import UnsupportedModelError

IDS = [3, 17, 0, 36, 5]
D = "backbone.layers.0.mixer.D"


def ssm(**values: Any) -> Any:
    return lambda table: table["ssm_cfg"].update(values)


UNSUPPORTED: dict[str, tuple[str, Any, str]] = {
    "attention": ("mamba2", setting(attn_layer_idx=[1]), "attn_layer_idx"),
    "mlp": ("mamba2", setting(d_intermediate=64), "d_intermediate"),
    "layer norm": ("mamba1", setting(rms_norm=False), "rms_norm false"),
    "another layer": ("mamba1", setting(ssm_cfg={"layer": "Mamba3"}), "choose 'Mamba1' or 'Mamba2'"),
    "unknown keys": ("mamba1", ssm(foo=1, bar=2), "ssm_cfg holds bar, foo"),
    "keys of Mamba-1": ("mamba2", ssm(dt_rank=3), "ssm_cfg holds dt_rank, which Mamba2"),
    "keys of Mamba-2": ("mamba1", ssm(ngroups=1), "ssm_cfg holds ngroups, which Mamba1"),
    "D per channel": ("mamba2", ssm(D_has_hdim=True), "D_has_hdim"),
    "no norm": ("mamba2", ssm(rmsnorm=False), "rmsnorm false"),
    "norm first": ("mamba2", ssm(norm_before_gate=True), "norm_before_gate"),
    "partial": ("mamba2", ssm(d_ssm=12), "d_ssm"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_options_without_a_counterpart(name: str, tmp_path: Path) -> None:
    family, config, words = UNSUPPORTED[name]
    refused(native(tmp_path, family, config), words, UnsupportedModelError)


BAD_CONFIGS: dict[str, tuple[str, Any, str]] = {
    "no vocabulary": ("mamba1", without("vocab_size"), "vocab_size is a whole number above 0, got None"),
    "vocabulary": ("mamba1", setting(vocab_size=41), r"weight is \(40, 12\), but config\.json says \(48, 12\)"),
    "padding": ("mamba1", setting(pad_vocab_size_multiple=16), r"says \(48, 12\) after padding the vocabulary"),
    "no padding": ("mamba1", setting(pad_vocab_size_multiple=0), "pad_vocab_size_multiple is a whole number"),
    "width": ("mamba1", setting(d_model=16), r"is \(40, 12\), but config\.json says \(40, 16\)"),
    "a text": ("mamba1", setting(d_model="12"), "d_model is a whole number above 0, got '12'"),
    "a fraction": ("mamba1", ssm(d_state=4.5), "d_state is a whole number above 0, got 4.5"),
    "true": ("mamba1", ssm(d_conv=True), "d_conv is a whole number above 0, got True"),
    "no layers": ("mamba1", setting(n_layer=0), "n_layer is a whole number above 0, got 0"),
    "more layers": ("mamba1", setting(n_layer=3), r"missing backbone\.layers\.2\..* and 7 more"),
    "fewer layers": ("mamba1", setting(n_layer=1), r"unexpected backbone\.layers\.1\."),
    "a list": ("mamba1", setting(ssm_cfg=[1]), r"ssm_cfg is an object, got \[1\]"),
    "states": ("mamba1", ssm(d_state=6), r"A_log is \(24, 5\) instead of \(24, 6\)"),
    "taps": ("mamba2", ssm(d_conv=3), r"conv1d\.weight is \(52, 1, 4\) instead of \(52, 1, 3\)"),
    "groups": ("mamba2", ssm(ngroups=1), "wrong shape"),
    "no groups": ("mamba2", ssm(ngroups=0), "ngroups is a whole number"),
    "heads": ("mamba2", ssm(headdim=7), "headdim 7 does not divide the inner width 24"),
    "head of nothing": ("mamba2", ssm(headdim=0), "headdim is a whole number"),
    "one limit": ("mamba2", ssm(dt_limit=[0.1]), r"dt_limit is a pair of numbers, got \[0.1\]"),
    "no limit": ("mamba2", ssm(dt_limit=None), "dt_limit is a pair of numbers"),
    "bias": ("mamba2", ssm(bias=True), r"missing backbone\.layers\.0\.mixer\.in_proj\.bias"),
    "no conv bias": ("mamba2", ssm(conv_bias=False), r"unexpected backbone\.layers\.0\.mixer\.conv1d\.bias"),
    "rank": ("mamba1", ssm(dt_rank="some"), "describes no Mamba model"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_do_not_fit(name: str, tmp_path: Path) -> None:
    family, config, words = BAD_CONFIGS[name]
    refused(native(tmp_path, family, config), words)


BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "missing": (without(D), f"missing {D}"),
    "unexpected": (setting(extra=torch.zeros(1)), "unexpected extra"),
    "shape": (setting(**{D: torch.zeros(3)}), r"D is \(3,\) instead of \(24,\)"),
    "integers": (setting(**{D: torch.zeros(24, dtype=torch.long)}), f"not floating point: {D}"),
    "NaN": (setting(**{D: torch.full((24,), torch.nan)}), f"NaN or infinite: {D}"),
    "no embedding": (without("backbone.embedding.weight"), r"no backbone\.embedding\.weight"),
    "another head": (setting(**{"lm_head.weight": torch.ones(40, 12)}), "lm_head.weight differs from the embedding"),
    "no tensor": (setting(step=7), "no state dict of tensors"),
    "a nested table": (lambda w: w.update(model=dict(w)), "no state dict of tensors"),
    "a key that is no name": (lambda w: w.update({5: torch.zeros(1)}), "no state dict of tensors"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit(name: str, tmp_path: Path) -> None:
    weights, words = BAD_WEIGHTS[name]
    refused(native(tmp_path, weights=weights), words)


@pytest.mark.parametrize("size", [0, 10, 2000, -30])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch's own about such a file
def test_cut_files(size: int, tmp_path: Path) -> None:
    path = native(tmp_path) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:size])
    refused(path.parent, "pytorch_model.bin cannot be read: ")


def test_no_weights(tmp_path: Path) -> None:
    path = native(tmp_path) / "pytorch_model.bin"
    path.unlink()
    refused(path.parent, r"holds neither pytorch_model\.bin nor model\.safetensors")


def test_untied_heads(tmp_path: Path) -> None:
    """tie_embeddings false keeps the stored head; without one there is none."""
    head = torch.randn(40, 12, dtype=torch.float64)
    folder = native(tmp_path / "a", config=setting(tie_embeddings=False), weights=setting(**{"lm_head.weight": head}))
    lens = ssmlens.load(folder, dtype=torch.float64)
    assert torch.equal(lens.model.lm_head.weight, head)
    assert gap(lens.trace(IDS).logits[0], reference.mamba1(lens.model.state_dict(), IDS).logits) <= 1e-9
    folder = native(tmp_path / "b", config=setting(tie_embeddings=False), weights=without("lm_head.weight"))
    refused(folder, r"no lm_head\.weight, and tie_embeddings is false")
