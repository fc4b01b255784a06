"""Identities of maps, contributions and curves on every shipped model and on random ones, in float64.

Sums over sources, rows that add up, causality, padding, and curves from the model's own answers. Those of knockout,
patching and the decompositions through all layers are beside their functions.
"""

from __future__ import annotations

from itertools import pairwise

import checkpoints
import pytest
import torch
from checkpoints import gap

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import contributions, decompose, faithfulness, hidden_row, relevance, rollout, unified
from ssmlens.exact import KeepFloat64

EXACT = 1e-10
MODELS = ("mamba1", "mamba2", *zoo.names())


@pytest.fixture(scope="module", params=MODELS)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    if request.param in zoo.names():
        return ssmlens.load(request.param, dtype=torch.float64)
    return ssmlens.load(getattr(checkpoints, request.param)(), dtype=torch.float64)


@pytest.fixture(scope="module")
def trace(lens: ssmlens.Lens) -> ssmlens.Trace:
    return lens.trace(ids_of(lens, 19))


def ids_of(lens: ssmlens.Lens, count: int) -> list[int]:
    if lens.tokenizer is None:
        return [(7 * k * k + 3) % 37 for k in range(count)]
    return lens.trace(zoo.passage(lens.name), layers=[]).ids[0, :count].tolist()


def test_the_matrix_gives_what_the_scan_reads(trace: ssmlens.Trace) -> None:
    for mixer in trace:
        rec = mixer.recurrence
        matrix = rec.attention.dense()
        assert gap(torch.einsum("bhts,bshp->bthp", matrix, rec.value) + rec.skip, rec.run()) <= EXACT
        assert gap(rec.attention.apply(rec.value) + rec.skip, rec.run()) <= EXACT
        assert not matrix.triu(1).any()


def test_the_unified_map_gives_the_gated_output(trace: ssmlens.Trace) -> None:
    for mixer in trace:
        found = unified(mixer)
        full = found.dense()
        assert gap(torch.einsum("bets,bse->bte", full, found.value) + found.bias, found.output) <= EXACT
        assert not full.triu(1).any()
        weights = mixer.parameters
        out = torch.nn.functional.linear(found.output, weights["out_proj.weight"], weights.get("out_proj.bias"))
        assert gap(out, mixer.output) <= EXACT


def test_contributions_add_up(trace: ssmlens.Trace) -> None:
    for mixer in trace:
        for rule in ("gate", "tangent", "none"):
            found = contributions(mixer, rule)
            vectors = found.vectors()
            assert gap(vectors.sum(2) + found.bias, mixer.output) <= EXACT
            assert found.error <= EXACT
            assert not vectors.permute(0, 3, 1, 2).triu(1).any()
        silu = contributions(mixer, "silu")
        missing = (mixer.output - silu.vectors().sum(2) - silu.bias).norm() / mixer.output.norm()
        assert silu.error == pytest.approx(float(missing), rel=1e-9)


def test_rows_of_a_rollout_sum_to_one(trace: ssmlens.Trace) -> None:
    for source in ("mean_positive", "mean_abs", "alti"):
        found = rollout(trace, source)
        assert (found.sum(-1) - 1).abs().max() <= 1e-12
        assert not found.triu(1).any()


def test_the_released_row_lacks_a_decay_and_itself(trace: ssmlens.Trace) -> None:
    for mixer in trace:
        x, row = mixer.recurrence.inputs, 11
        decays = x.full_log_decay()[0]
        read, write = x.read.repeat_interleave(x.n_heads // x.read.shape[2], 2), x.full_write()
        true = torch.zeros(x.n_heads, x.length, dtype=torch.float64)
        for s in range(row):
            true[:, s] = (read[0, row] * decays[s + 1 : row].sum(0).exp() * write[0, s]).sum(-1)
        assert gap(hidden_row(mixer, row, "code")[0], true) <= EXACT


def test_mean_distance_of_every_head(trace: ssmlens.Trace) -> None:
    for mixer in trace:
        weight = mixer.recurrence.attention.dense().abs()
        steps = torch.arange(19)
        away = (steps[:, None] - steps).clamp(min=0)
        assert gap(mixer.recurrence.attention.distance(), (away * weight).sum(-1) / weight.sum(-1)) <= EXACT


def test_curves_are_areas_under_the_models_own_answers(lens: ssmlens.Lens) -> None:
    ids = ids_of(lens, 7)
    found = decompose(lens, ids)
    order = found.scores[0].argsort(descending=True, stable=True).tolist()
    embeddings = lens.model.get_input_embeddings().weight[torch.tensor(ids)].detach()

    def answer(kept: list[int]) -> float:
        x = torch.zeros_like(embeddings)
        x[kept] = embeddings[kept]
        with torch.no_grad(), KeepFloat64():
            logits = lens.model(inputs_embeds=x[None]).logits[0, -1]
        return float(logits.double().softmax(-1)[found.target[0]])

    without, alone = ([answer(part(order, k)) for k in range(8)] for part in (lambda o, k: o[k:], lambda o, k: o[:k]))
    sizes = [max(1, round(share * 7)) for share in (0.01, 0.05, 0.1, 0.2, 0.5)]
    true = {
        "deletion": sum((a + b) / 14 for a, b in pairwise(without)),
        "insertion": sum((a + b) / 14 for a, b in pairwise(alone)),
        "comprehensiveness": sum(without[0] - without[k] for k in sizes) / 5,
        "sufficiency": sum(without[0] - alone[k] for k in sizes) / 5,
    }
    ours = faithfulness(lens, found, random_orders=1).value
    assert {name: float(x) for name, x in ours.items()} == pytest.approx(true, abs=EXACT)


def test_padding_on_the_left_changes_nothing(lens: ssmlens.Lens) -> None:
    long, short = ids_of(lens, 9), ids_of(lens, 12)[7:]
    ids = torch.tensor([long, [0] * 4 + short])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    for method in (decompose, relevance):
        both, alone = method(lens, ids, attention_mask=mask), method(lens, short)
        assert gap(both.scores[1, :5], alone.scores[0]) <= EXACT
        assert not both.scores[1, 5:].any()
    both, alone = lens.trace(ids, attention_mask=mask), lens.trace(short)
    for mixer, single in zip(both, alone):
        assert gap(unified(mixer).dense()[1, :, :5, :5], unified(single).dense()[0]) <= EXACT
        assert gap(contributions(mixer).vectors()[1, :5, :5], contributions(single).vectors()[0]) <= EXACT
