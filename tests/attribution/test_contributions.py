"""Contributions on real mixers: they add up to the output, and every rule does what its docstring says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checkpoints
import pytest
import torch
from footprint import IDS
from tolerances import RECONSTRUCTION

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import RULES, Contributions, contributions
from ssmlens.errors import MemoryLimitError, SsmlensError, UnsupportedModelError

EXACT = ("gate", "tangent", "none")
FAMILIES = ("mamba1", "mamba2", "falcon")
BIASES = ({}, {"use_bias": True}, {"use_conv_bias": False}, {"use_bias": True, "use_conv_bias": False})


def trace_of(family: str, ids: Any = IDS, **config: Any) -> ssmlens.Trace:
    return ssmlens.load(getattr(checkpoints, family)(**config)).trace(ids)


def residual(found: Contributions) -> float:
    """What the vectors and the bias leave of the output, relative to it."""
    whole = found.vectors().sum(2) + found.bias
    return float((whole - found.output).norm() / found.output.norm())


@pytest.mark.parametrize("config", BIASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_bias_sum_to_the_output(family: str, config: dict[str, bool]) -> None:
    for mixer in trace_of(family, **config):
        assert mixer.output.dtype == torch.float64
        for rule in EXACT:
            found = contributions(mixer, rule)
            assert residual(found) <= 1e-10
            assert found.error <= 1e-10
        silu = contributions(mixer, "silu")
        assert silu.error > 1e-3
        assert abs(residual(silu) - silu.error) <= 1e-10 * silu.error


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_other_activations_add_up(activation: str) -> None:
    for family in FAMILIES[:2]:
        mixer = trace_of(family, hidden_act=activation)[1]
        assert max(contributions(mixer, rule).error for rule in EXACT) <= 1e-10


def test_an_activation_that_is_not_zero_at_zero_is_refused() -> None:
    mixer = trace_of("mamba1", hidden_act="sigmoid")[1]
    with pytest.raises(UnsupportedModelError, match="'sigmoid' of the convolution is not 0 at 0"):
        contributions(mixer, "gate")
    with pytest.raises(UnsupportedModelError, match="'sigmoid' of the convolution is not 0 at 0"):
        contributions(mixer, "silu")
    assert max(contributions(mixer, rule).error for rule in ("tangent", "none")) <= 1e-10


@pytest.mark.parametrize("name", zoo.names())
def test_shipped_models_add_up(name: str) -> None:
    trace = ssmlens.load(name).trace([5, 1, 17, 9, 9, 30, 2, 11, 5, 4, 40, 3])
    for mixer in trace:
        for rule in EXACT:
            found = contributions(mixer, rule)
            assert max(residual(found), found.error) <= RECONSTRUCTION[torch.float32]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_by_the_definition(family: str, rule: str) -> None:
    """Tap by tap from the weights, with the matrix of the recurrence."""
    mixer = trace_of(family, use_bias=True)[1]
    w, rec = mixer.parameters, mixer.recurrence
    t, e = rec.length, rec.n_heads * rec.head_dim
    first = 0 if family != "mamba2" else e
    x = mixer.input[0] @ w["in_proj.weight"][first : first + e].T + w["in_proj.bias"][first : first + e]
    taps, b = w["conv1d.weight"][:e, 0], w["conv1d.bias"][:e]
    K = taps.shape[1]
    c = torch.stack([sum(taps[:, K - 1 - k] * x[r - k] for k in range(min(K, r + 1))) + b for r in range(t)])
    sigmoid = torch.sigmoid(c)
    M = rec.attention.dense()[0].repeat_interleave(rec.head_dim, 0)
    D = rec.D.repeat_interleave(rec.head_dim)
    M = M + D[:, None, None] * torch.eye(t, dtype=torch.float64)
    gate = torch.nn.functional.silu(mixer.gate[0])
    if family == "mamba2":
        groups = (rec.run()[0].flatten(1) * gate).unflatten(1, (-1, mixer.config["norm_group"]))
        rms = (groups.square().mean(2, keepdim=True) + mixer.config["norm_eps"]).sqrt()
        gate = gate / rms.expand_as(groups).flatten(1) * w["norm.weight"]

    def given(s: int, k: int) -> torch.Tensor:
        part = taps[:, K - 1 - k] * x[s]
        if rule == "silu":
            return torch.nn.functional.silu(part)
        if rule == "none":
            return c[s] * sigmoid[s] if k == 0 else torch.zeros_like(part)
        slope = sigmoid if rule == "gate" else sigmoid * (1 + c * (1 - sigmoid))
        return slope[s + k] * part

    found = contributions(mixer, rule).vectors()[0]
    for row in range(t):
        for s in range(t):
            v = sum((M[:, row, s + k] * given(s, k) for k in range(min(K, row - s + 1))), torch.zeros(e))
            assert torch.allclose(found[row, s], (gate[row] * v) @ w["out_proj.weight"].T, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_follow_from_the_vectors(family: str, rule: str) -> None:
    found = contributions(trace_of(family)[0], rule)
    T, o = found.vectors(), found.output
    assert torch.allclose(found.norm(), T.norm(dim=-1), atol=1e-12)
    assert torch.allclose(found.norm(p=1), T.abs().sum(-1), atol=1e-12)
    nearer = (o.abs().sum(-1)[..., None] - (o[:, :, None] - T).abs().sum(-1)).clamp(min=0)
    sums = nearer.sum(-1, keepdim=True)
    assert torch.allclose(found.alti(), torch.where(sums > 0, nearer / sums, 0), atol=1e-10)
    assert torch.allclose(found.vectors([-1, 2]), T[:, [-1, 2]], atol=1e-12)
    for later in (T.norm(dim=-1), found.norm(), found.alti()):
        assert not later.triu(1).any()


@pytest.mark.parametrize("rule", RULES)
def test_linear_in_the_output_projection(rule: str) -> None:
    for family in FAMILIES[:2]:
        mixer = trace_of(family)[1]
        other = torch.randn(mixer.parameters["out_proj.weight"].shape, dtype=torch.float64)
        both = mixer.parameters["out_proj.weight"] * 2 - 3 * other

        def vectors(weight: torch.Tensor, mixer: ssmlens.MixerTrace = mixer) -> torch.Tensor:
            changed = replace(mixer, parameters={**mixer.parameters, "out_proj.weight": weight})
            return contributions(changed, rule).vectors()

        expected = 2 * vectors(mixer.parameters["out_proj.weight"]) - 3 * vectors(other)
        assert torch.allclose(vectors(both), expected, atol=1e-12)


@pytest.mark.parametrize("rule", ["gate", "silu"])
def test_a_zero_token_contributes_nothing(rule: str) -> None:
    for family in FAMILIES:
        mixer = trace_of(family)[1]
        hidden = mixer.input.clone()
        hidden[:, 4] = 0
        found = contributions(replace(mixer, input=hidden), rule)
        for column in (found.vectors()[:, :, 4], found.norm()[:, :, 4], found.alti()[:, :, 4]):
            assert not column.any()
        assert found.norm()[:, 5:, 3].all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, rule: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    mask = torch.ones(2, len(IDS))
    mask[1, 4:] = 0
    both = contributions(lens.trace(torch.tensor([IDS, IDS]), attention_mask=mask)[1], rule)
    for row, length in ((0, len(IDS)), (1, 4)):
        alone = contributions(lens.trace(IDS[:length])[1], rule)
        assert torch.allclose(both.vectors()[row, :length, :length], alone.vectors()[0], atol=1e-11)
        assert torch.allclose(both.bias[row, :length], alone.bias[0], atol=1e-11)
        assert torch.allclose(both.norm()[row, :length, :length], alone.norm()[0], atol=1e-11)
        assert torch.allclose(both.alti()[row, :length, :length], alone.alti()[0], atol=1e-9)
    for padded in (both.vectors()[1, 4:], both.bias[1, 4:], both.norm()[1, 4:], both.norm()[1, :, 4:]):
        assert not padded.any()
    assert both.error <= 1e-10 if rule != "silu" else both.error > 1e-3


def test_one_token_and_fewer_than_taps() -> None:
    for family in FAMILIES:
        for length in (1, 2, 3):
            mixer = trace_of(family, IDS[:length])[0]
            for rule in EXACT:
                found = contributions(mixer, rule)
                assert found.vectors().shape == (1, length, length, 12)
                assert max(found.error, residual(found)) <= 1e-10


def test_bias_is_zero_where_nothing_is_additive() -> None:
    for family in FAMILIES[:2]:
        bare = trace_of(family, use_conv_bias=False)[0]
        assert not contributions(bare, "gate").bias.any()
        assert not contributions(bare, "none").bias.any()
        assert contributions(bare, "tangent").bias.any()
        assert contributions(trace_of(family)[0], "gate").bias.any()
        assert not contributions(trace_of(family)[0], "none").bias.any()


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_bfloat16_is_read_in_float32(family: str) -> None:
    model = getattr(checkpoints, family)()
    mixer = ssmlens.load(model.bfloat16()).trace(IDS)[1]
    for rule in EXACT:
        found = contributions(mixer, rule)
        assert {found.vectors().dtype, found.bias.dtype, found.norm().dtype, found.alti().dtype} == {torch.float32}
        assert 1e-6 < found.error <= RECONSTRUCTION[torch.bfloat16]
        assert abs(residual(found) - found.error) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_native_checkpoints_and_saved_traces(family: str, tmp_path: Any) -> None:
    model = getattr(checkpoints, family)(vocab_size=40, tie_word_embeddings=True)
    folder = checkpoints.native_folder(model, tmp_path / "native", vocab_size=37)
    trace = ssmlens.load(str(folder), dtype=torch.float64).trace(IDS)
    found = contributions(trace[1])
    assert found.error <= 1e-10
    trace.save(tmp_path / "with.st", weights=True)
    again = contributions(ssmlens.Trace.load(tmp_path / "with.st")[1])
    assert torch.allclose(again.norm(), found.norm(), rtol=1e-12)  # read back in other strides: sums in another order
    trace.save(tmp_path / "without.st")
    with pytest.raises(SsmlensError, match="has no weights: save it with"):
        contributions(ssmlens.Trace.load(tmp_path / "without.st")[1])


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_and_gradients_change_nothing(inside: bool) -> None:
    expected = contributions(trace_of("mamba1")[0], "tangent").norm()
    with torch.inference_mode(inside):
        found = contributions(trace_of("mamba1")[0], "tangent")
        assert torch.equal(found.norm(), expected)
        assert not found.bias.requires_grad


def test_what_is_refused() -> None:
    mixer = trace_of("mamba2")[0]
    with pytest.raises(SsmlensError, match="unknown rule 'half': choose one of gate, silu, tangent, none"):
        contributions(mixer, "half")
    with pytest.raises(UnsupportedModelError, match="need a mixer of mamba1 or mamba2, not 'gla'"):
        contributions(replace(mixer, family="gla"))
    found = contributions(mixer)
    with pytest.raises(MemoryLimitError, match=r"vectors\(\) of 1 x 11 x 11 x 12 float64 needs 0\.0 GB"):
        found.vectors(limit=11_000)
    assert found.vectors([3], limit=11_000).shape == (1, 1, 11, 12)
    for call in (found.norm, found.alti):
        with pytest.raises(MemoryLimitError, match=r"use vectors\(rows="):
            call(limit=100)
    with pytest.raises(IndexError, match="row 11 is outside the 11 tokens"):
        found.vectors([11])
    with pytest.raises(SsmlensError, match=r"at least 1, got 0\.5"):
        found.norm(p=0.5)
    assert repr(found) == "Contributions(layer=0, rule='gate', batch=1, 11 x 11 tokens, width 12)"
