"""Unified maps, rows of the hidden attention, rollout and Mamba-Attribution against matrices written out in full."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from footprint import IDS
from tolerances import EXACT, RECONSTRUCTION

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import hidden_row, mamba_attribution, rollout, unified
from ssmlens.errors import LayerError, MemoryLimitError, SsmlensError
from ssmlens.trace import MixerTrace, Trace

FAMILIES = ("mamba1", "mamba2", "falcon")
PROMPT = [5, 1, 17, 9, 9, 30, 2, 11, 5, 4, 36, 3]


def trace_of(family: str, ids: Any = IDS, **config: Any) -> Trace:
    return ssmlens.load(getattr(checkpoints, family)(**config)).trace(ids)


def written_out(mixer: MixerTrace, skip: bool = True) -> torch.Tensor:
    """U by its definition, (b, e, t, s): four matrices multiplied for every channel, in float64."""
    rec, weights = mixer.recurrence, mixer.parameters
    inner, length = rec.n_heads * rec.head_dim, rec.length
    first = inner if mixer.family == "mamba2" else 0
    x = F.linear(mixer.input, weights["in_proj.weight"], weights.get("in_proj.bias"))[..., first : first + inner]
    kernel, bias = weights["conv1d.weight"][:inner, 0], weights.get("conv1d.bias")
    conv = torch.zeros(inner, length, length, dtype=x.dtype)
    for t in range(length):
        for k in range(min(kernel.shape[1], t + 1)):
            conv[:, t, t - k] = kernel[:, kernel.shape[1] - 1 - k]
    c = torch.einsum("ets,bse->bte", conv, x) + (0 if bias is None else bias[:inner])
    gate = F.silu(mixer.gate)
    if mixer.family == "mamba2":
        gated = (rec.run().flatten(2) * gate).unflatten(-1, (-1, mixer.config["norm_group"]))
        scale = (gated.square().mean(-1, keepdim=True) + mixer.config["norm_eps"]).rsqrt()
        gate = (gate.view_as(gated) * scale).flatten(2) * weights["norm.weight"]
    matrix = rec.attention.dense().repeat_interleave(rec.head_dim, 1)
    if skip:
        matrix = matrix + torch.diag_embed(
            rec.D.view(rec.n_heads, -1).expand(-1, rec.head_dim).reshape(1, inner, 1).expand(1, -1, length)
        )
    return torch.einsum("bte,betr,bre,ers->bets", gate, matrix, torch.sigmoid(c), conv)


@pytest.mark.parametrize("config", [{}, {"use_conv_bias": False, "use_bias": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_unified_is_its_definition_and_gives_the_gated_output(family: str, config: dict[str, bool]) -> None:
    for mixer in trace_of(family, **config):
        found, true = unified(mixer), written_out(mixer)
        assert (found.dense() - true).abs().max() < 1e-10
        assert not found.dense().triu(1).any()
        whole = torch.einsum("bets,bse->bte", found.dense(), found.value) + found.bias
        assert (whole - found.output).abs().max() < 1e-10
        assert (found.apply(found.value) + found.bias - found.output).abs().max() < 1e-10
        assert found.error < 1e-10
        # The output projection of the gated output is the mixer's own output.
        out = F.linear(found.output, mixer.parameters["out_proj.weight"], mixer.parameters.get("out_proj.bias"))
        assert (out - mixer.output).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_views_of_the_unified_map(family: str) -> None:
    mixer = trace_of(family)[1]
    found = unified(mixer)
    full = found.dense()
    for row in (0, 3, -1):
        assert (found.row(row) - full[:, :, row]).abs().max() < EXACT
    assert (found.dense([4, 0, -1]) - full[:, [4, 0, -1]]).abs().max() < EXACT
    assert (found.dense(slice(2, 9)) - full[:, 2:9]).abs().max() < EXACT
    assert (found.dense(3) - full[:, 3:4]).abs().max() < EXACT
    reduced = {"mean": full.mean(1), "mean_abs": full.abs().mean(1), "max_abs": full.abs().amax(1)}
    reduced["norm"] = full.square().sum(1).sqrt()
    for how, true in reduced.items():
        assert (found.reduce(how) - true).abs().max() < EXACT
    with pytest.raises(MemoryLimitError, match="channels="):
        found.dense(limit=100)
    with pytest.raises(IndexError, match="channel 999 does not exist"):
        found.dense([999])
    with pytest.raises(IndexError, match="row 999"):
        found.row(999)
    with pytest.raises(SsmlensError, match="mean, mean_abs, max_abs, norm"):
        found.reduce("sum")


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_parts_left_out(family: str) -> None:
    mixer = trace_of(family)[0]
    paper = unified(mixer, parts=("conv", "activation", "gate"))
    assert (paper.dense() - written_out(mixer, skip=False)).abs().max() < 1e-10
    assert paper.error > 1e-3
    alone = unified(mixer, parts=())
    attention = mixer.recurrence.attention.dense().repeat_interleave(mixer.recurrence.head_dim, 1)
    assert (alone.dense() - attention).abs().max() < EXACT
    with pytest.raises(SsmlensError, match="unknown part 'norm': choose from conv, activation, skip, gate"):
        unified(mixer, parts=("norm",))


@pytest.mark.parametrize("name", zoo.names())
def test_unified_on_shipped_models(name: str) -> None:
    for mixer in ssmlens.load(name).trace(PROMPT):
        assert unified(mixer).error < RECONSTRUCTION[torch.float32]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_padding_changes_nothing(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)())
    ids = torch.tensor([PROMPT, PROMPT[:5] + [0] * 7])
    mask = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
    both, short = lens.trace(ids, attention_mask=mask), lens.trace(PROMPT[:5])
    padded, alone = unified(both[1]), unified(short[1])
    assert (padded.dense()[1, :, :5, :5] - alone.dense()[0]).abs().max() < 1e-10
    assert not padded.dense()[1, :, 5:].any()
    assert padded.error < 1e-10
    for source in ("mean_positive", "mean_abs", "alti"):
        assert (rollout(both, source)[1, :5, :5] - rollout(short, source)[0]).abs().max() < 1e-10
    one, other = (mamba_attribution(lens, p, target=3, attention_mask=m) for p, m in ((ids, mask), (PROMPT[:5], None)))
    assert (one.scores[1, :5] - other.scores[0]).abs().max() < 1e-10
    assert not one.scores[1, 5:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_is_the_product_of_normalised_maps(family: str) -> None:
    trace = trace_of(family)
    maps = {"mean_positive": lambda m: m.clamp(min=0).mean(1), "mean_abs": lambda m: m.abs().mean(1)}
    eye = torch.eye(trace.ids.shape[1], dtype=torch.float64)
    for source, map_of in maps.items():
        true = eye
        for mixer in trace:
            layer = map_of(mixer.recurrence.attention.dense()) + eye
            true = layer / layer.sum(-1, keepdim=True) @ true
        found = rollout(trace, source)
        assert (found - true).abs().max() < EXACT
    for source in (*maps, "alti"):
        found = rollout(trace, source)
        assert (found.sum(-1) - 1).abs().max() < EXACT
        assert not found.triu(1).any()
        assert found.min() >= 0
    printed = eye
    for mixer in trace:
        printed = (mixer.recurrence.attention.dense().mean(1) + eye) @ printed
    assert (rollout(trace, compat="paper") - printed).abs().max() < EXACT * printed.abs().max()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_rollout_of_alti_counts_the_residual_stream(family: str) -> None:
    """Written out from the vectors: the residual is part of what a token contributes to itself."""
    from ssmlens.attribution import contributions

    trace = trace_of(family)
    true = torch.eye(trace.ids.shape[1], dtype=torch.float64)
    for mixer in trace:
        parts = contributions(mixer).vectors().clone()
        length = parts.shape[1]
        parts[:, range(length), range(length)] += trace.residual(mixer.layer)
        goal = trace.residual(mixer.layer + 1)[:, :, None]
        nearer = (goal.abs().sum(-1) - (goal - parts).abs().sum(-1)).clamp(min=0)
        true = nearer / nearer.sum(-1, keepdim=True) @ true
    assert (rollout(trace, "alti") - true).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_released_row_lacks_a_decay_and_itself(family: str) -> None:
    mixer = trace_of(family)[1]
    x = mixer.recurrence.inputs
    full = mixer.recurrence.attention.dense()
    for row in (0, 4, -1):
        assert (hidden_row(mixer, row) - full[:, :, row]).abs().max() < EXACT
        t = row % x.length
        states = torch.zeros(x.batch, x.n_heads, x.length, x.d_state, dtype=torch.float64)
        for s in range(t):
            state = x.full_write()[:, s]
            for r in range(s + 1, t):  # the step at t itself is missing
                state = state * x.full_log_decay()[:, r].exp()
            states[:, :, s] = state
        read = x.read.repeat_interleave(x.n_heads // x.read.shape[2], 2)[:, t]
        true = torch.einsum("bhsn,bhn->bhs", states, read)
        assert (hidden_row(mixer, row, "code") - true).abs().max() < EXACT


def test_mamba_attribution_weighs_maps_with_a_gradient() -> None:
    """Eq. 24 written out with the gradient by finite differences of the real model."""
    lens = ssmlens.load(checkpoints.mamba1())
    trace, target = lens.trace(PROMPT), 7
    found = {c: mamba_attribution(lens, PROMPT, target=target, compat=c) for c in (None, "paper")}
    eye = torch.eye(len(PROMPT), dtype=torch.float64)
    product, divided = eye, eye
    for k, mixer in enumerate(trace):
        gradient = _gradient_by_output(lens, k, target)
        g = (gradient @ mixer.parameters["out_proj.weight"]).mean(-1)
        layer = eye + (g[:, None] * mixer.recurrence.attention.dense()[0].mean(0)).clamp(min=0)
        product, divided = layer @ product, layer / layer.sum(-1, keepdim=True) @ divided
    assert (found["paper"].scores[0] - product[-1]).abs().max() < 1e-6
    assert (found[None].scores[0] - divided[-1]).abs().max() < 1e-6
    assert found[None].completeness_error.isnan().all()
    assert abs(float(found[None].logit[0]) - float(trace.logits[0, -1, target])) < 1e-10
    code = mamba_attribution(lens, PROMPT, target=target, compat="code").scores
    assert abs(float(code.sum()) - 1) < EXACT


def _gradient_by_output(lens: ssmlens.Lens, layer: int, target: int) -> torch.Tensor:
    """Of the last logit by the output of one mixer, (t, d): by central differences through the model itself."""
    module = lens.model.get_submodule(lens.layers[layer].path)
    length, width, step = len(PROMPT), lens.model.config.hidden_size, 1e-6
    shift = torch.zeros(1)

    def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + shift

    hook = module.register_forward_hook(add)
    try:
        out = torch.empty(length, width, dtype=torch.float64)
        for t in range(length):
            for sign in (1, -1):
                shift = torch.zeros(width, length, width, dtype=torch.float64)
                shift[:, t] = sign * step * torch.eye(width, dtype=torch.float64)
                with torch.no_grad():
                    ids = torch.tensor([PROMPT]).expand(width, -1)
                    logit = lens.model(input_ids=ids).logits[:, -1, target].double()
                out[t] = logit if sign == 1 else (out[t] - logit) / (2 * step)
        return out
    finally:
        hook.remove()


def test_refusals() -> None:
    trace = trace_of("mamba1")
    with pytest.raises(SsmlensError, match="mean_positive, mean_abs, alti"):
        rollout(trace, "mean")
    with pytest.raises(SsmlensError, match="compat is None, 'paper' or 'code'"):
        rollout(trace, compat="hma")
    with pytest.raises(SsmlensError, match="its own map"):
        rollout(trace, "alti", compat="paper")
    lens = ssmlens.load(checkpoints.mamba1())
    with pytest.raises(LayerError, match="holds none of layer 0"):
        rollout(lens.trace(PROMPT, layers=[1]))
    with pytest.raises(IndexError, match="row 50"):
        hidden_row(trace[0], 50)


def test_one_token() -> None:
    for family in ("mamba1", "mamba2"):
        trace = trace_of(family, [3])
        assert unified(trace[0]).error < 1e-10
        assert torch.equal(rollout(trace), torch.ones(1, 1, 1, dtype=torch.float64))
