"""Token scores against plain loops, and reduction against the model's own upper layers on fewer tokens."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2

import ssmlens
from ssmlens.analyses import sensitivity
from ssmlens.analyses.sensitivity import _tokens
from ssmlens.errors import LayerError, PromptError, SsmlensError
from ssmlens.exact import KeepFloat64
from ssmlens.kernels import naive

from .test_removal import IDS, MAKES, read, sharp


@pytest.mark.parametrize("make", MAKES)
def test_scores_equal_plain_loops(make) -> None:
    trace = sharp(make).trace(IDS)
    found = sensitivity.token_scores(trace)
    for j, mixer in enumerate(trace):
        rec = mixer.recurrence
        matrix, y = naive.attention(rec.inputs)[0], rec.run()[0]
        last = trace.residual(j + 1)[0, -1]
        for s in (0, 7, 39):
            x = trace.residual(j + 1)[0, s]
            state = [(rec.value[0, s, h].norm() * rec.write[0, s, h].norm()).item() for h in range(rec.n_heads)]
            plain = {
                "dt": rec.dt[0, s].mean().item(),
                "positive": sum(max(0.0, v) for v in y[s].flatten().tolist()) / y[s].numel(),
                "write": sum(state) / len(state),
                "mass": matrix[:, :, s].abs().sum().item() / rec.n_heads,
                "similar": (x @ last / (x.norm() * last.norm())).item(),
            }
            for i, name in enumerate(found.coords["score"]):
                assert found.value[i, j, 0, s].item() == pytest.approx(plain[name], rel=1e-9), name
    first = found.value[0, 0, 0].tolist()
    assert found.columns["rank"][0, 0, 0].tolist() == [sum(x < y for x in first) / 40 for y in first]


@pytest.mark.parametrize("make", MAKES)
def test_dropping_equals_the_models_own_layers_on_fewer_tokens(make) -> None:
    lens = sharp(make)
    trace = lens.trace(IDS)
    found = sensitivity.token_reduction(lens, IDS, layer=0, keep=(0.5, 0.2))
    scores = sensitivity.token_scores(trace)
    base = upper_loss(lens, trace, list(range(40)))
    for i, name in enumerate(found.coords["score"]):
        if name == "random":
            continue
        for j, count in enumerate((15, 6)):
            if name == "recent":
                kept = list(range(30 - count, 30))
            else:
                score = scores.value[scores.coords["score"].index(name), 0, 0, :30]
                kept = sorted(score.argsort(descending=True, stable=True)[:count].tolist())
            expected = upper_loss(lens, trace, kept + list(range(30, 40))) - base
            assert found.value[i, j].item() == pytest.approx(expected, abs=1e-9), name
    assert found.columns["kept"].tolist() == [15, 6]
    nothing = upper_loss(lens, trace, list(range(30, 40))) - base
    assert found.control["no_context"].item() == pytest.approx(nothing, abs=1e-9)
    assert found.settings["measured_tokens"] == 9


def upper_loss(lens, trace, kept: list[int]) -> float:
    """Mean loss on tokens 31 to 39 when the layers above the first see these tokens alone."""
    with KeepFloat64(), torch.no_grad():
        x = trace.residual(1)[:, kept]
        for block in lens.model.backbone.layers[1:]:
            x = block(x)
    laws = read(lens, x)[0].log_softmax(-1)
    return -sum(laws[kept.index(t), IDS[t + 1]].item() for t in range(30, 39)) / 9


def test_keeping_all_changes_nothing_and_random_is_its_own_control() -> None:
    found = sensitivity.token_reduction(sharp(tiny_mamba2), IDS, keep=(1.0, 0.5), seed=3)
    assert found.value[:, 0].abs().max() < 1e-12
    assert torch.equal(found.value[found.coords["score"].index("random")], found.control["random_change"])
    assert bool((found.columns["low"] <= found.value + 1e-12).all())
    again = sensitivity.token_reduction(sharp(tiny_mamba2), IDS, keep=(1.0, 0.5), seed=3, scores=["dt"])
    assert torch.equal(again.control["random_change"], found.control["random_change"])


def test_rows_have_contexts_of_their_own() -> None:
    lens, rows = sharp(tiny_mamba1), ["The red box is K7 and so", "Nothing at all"]
    both = sensitivity.token_reduction(lens, rows, keep=(0.5,), scores=["dt", "recent"])
    alone = [sensitivity.token_reduction(lens, row, keep=(0.5,), scores=["dt", "recent"]) for row in rows]
    counts = [x.settings["measured_tokens"] for x in alone]
    expected = sum(x.value * n for x, n in zip(alone, counts)) / sum(counts)
    assert torch.allclose(both.value, expected, atol=1e-12)
    assert both.settings["measured_tokens"] == sum(counts)


def test_killed_half_way_it_goes_on(tmp_path, monkeypatch) -> None:
    lens, file = sharp(tiny_mamba2), tmp_path / "run.jsonl"
    whole = sensitivity.token_reduction(lens, IDS)

    def stop(done: int, total: int) -> None:
        assert total == 7
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.token_reduction(lens, IDS, resume=file, progress=stop)
    runs, inner = [], _tokens._changes
    monkeypatch.setattr(_tokens, "_changes", lambda *given: runs.append(given[4]) or inner(*given))
    again = sensitivity.token_reduction(lens, IDS, resume=file)
    assert len(runs) == 2 * 3
    assert torch.equal(again.value, whole.value)


def test_padding_has_no_score() -> None:
    lens = sharp(tiny_mamba2)
    rows = ["The red box", "None"]
    found = sensitivity.token_scores(lens.trace(rows))
    alone = sensitivity.token_scores(lens.trace(rows[1]))
    assert bool(found.value[:, :, 1, 4:].isnan().all())
    assert torch.allclose(found.value[:, :, 1, :4], alone.value[:, :, 0], rtol=1e-9, atol=1e-12)
    assert torch.equal(found.columns["rank"][:, :, 1, :4], alone.columns["rank"][:, :, 0])


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_shipped_models(name: str) -> None:
    lens = ssmlens.load(name)
    found = sensitivity.token_reduction(lens, ssmlens.zoo.passage(name), keep=(0.5,))
    assert bool(found.value.isfinite().all())
    assert len(found.table()) == 7


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba1())
    with pytest.raises(SsmlensError, match="unknown score 'beauty': choose from dt, positive"):
        sensitivity.token_reduction(lens, IDS, scores=["beauty"])
    with pytest.raises(SsmlensError, match="unknown score 'recent'"):
        sensitivity.token_scores(lens.trace(IDS), ["recent"])
    with pytest.raises(SsmlensError, match="keep and context are shares"):
        sensitivity.token_reduction(lens, IDS, keep=(0.0,))
    with pytest.raises(LayerError, match="no layer lies above layer 2: choose from 0 to 1"):
        sensitivity.token_reduction(lens, IDS, layer=2)
    with pytest.raises(PromptError, match="too short for a context"):
        sensitivity.token_reduction(lens, [1, 2, 3])
