"""Early exit: each layer's reading against the model's modules, and leaving tokens against a plain loop."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import sensitivity
from ssmlens.analyses.sensitivity import _early_exit
from ssmlens.errors import SsmlensError
from ssmlens.stepping import LayerState, State, Stepper

from .test_removal import IDS, MAKES, read, sharp


@pytest.mark.parametrize("make", MAKES)
def test_layers_read_as_the_models_head_reads_them(make) -> None:
    lens = sharp(make)
    trace = lens.trace(IDS)
    found = sensitivity.layer_confidence(trace)
    final = trace.logits[0].log_softmax(-1)
    for k in range(4):
        law = read(lens, trace.residual(k))[0].log_softmax(-1)
        assert torch.allclose(found.value[k, 0], law.exp().amax(-1), rtol=1e-9)
        assert torch.allclose(found.columns["entropy"][k, 0], -(law.exp() * law).sum(-1), rtol=1e-9)
        assert torch.equal(found.columns["agreement"][k, 0].bool(), law.argmax(-1) == final.argmax(-1))
        assert torch.equal(found.columns["repeats"][k, 0].bool(), law.argmax(-1) == torch.tensor(IDS))
        kl = (final.exp() * (final - law)).sum(-1)
        assert torch.allclose(found.columns["kl"][k, 0], kl, atol=1e-12)
    assert bool((found.columns["agreement"][3] == 1).all())
    assert found.columns["kl"][3].max() < 1e-12
    first = final.argmax(-1)
    assert found.control["unigram_agreement"].item() == pytest.approx(
        (first == first.mode().values).double().mean().item()
    )
    assert bool((found.columns["low"] <= found.columns["mean_agreement"]).all())


def plain_exit(lens, ids, threshold: float, keep_states: str, earliest: int, repeats: bool) -> tuple[list, list]:
    """One token and one layer at a time: losses and depths."""
    net = Stepper(lens)
    state, losses, depths = net.initial(1), [], []
    with torch.no_grad():
        for t in range(len(ids) - 1):
            x, carried, gone = net.embed(torch.tensor([ids[t]]))[:, None], [], None
            for k, layer in enumerate(net.layers):
                p = net.logits(x[:, 0]).softmax(-1)[0]
                if gone is None and k >= earliest and p.max() > threshold and (repeats or int(p.argmax()) != ids[t]):
                    gone = k
                read = LayerState(state.layers[k].h, state.layers[k].conv)
                after, left, _ = layer(x, read, lambda inputs: one_step(inputs))
                if gone is None:
                    x = after
                carried.append(read if gone is not None and keep_states == "freeze" else left)
            state = State(tuple(carried))
            losses.append(-net.logits(x[:, 0]).log_softmax(-1)[0, ids[t + 1]].item())
            depths.append(len(net.layers) if gone is None else gone)
    return losses, depths


def one_step(inputs):
    h = inputs.initial * inputs.full_log_decay()[:, 0, :, None].exp()
    write = inputs.full_write()[:, 0]
    h = h + inputs.value[:, 0, :, :, None] * write[:, :, None]
    read = inputs.read[:, 0].repeat_interleave(h.shape[1] // inputs.read.shape[2], 1)
    return (h * read[:, :, None]).sum(-1)[:, None], h


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("make", MAKES)
def test_leaving_equals_a_plain_loop(make, repeats: bool) -> None:
    lens, ids = sharp(make), IDS[:24]
    levels = (0.02, 0.1)
    found = sensitivity.early_exit(lens, ids, levels, repeats=repeats)
    whole, _ = plain_exit(lens, ids, 1.0, "propagate", 1, repeats)
    base = sum(whole) / len(whole)
    assert found.settings["loss"] == pytest.approx(base, abs=1e-10)
    for i, states in enumerate(("propagate", "freeze"), start=1):
        for j, threshold in enumerate(levels):
            losses, depths = plain_exit(lens, ids, threshold, states, 1, repeats)
            assert found.value[i, j].item() == pytest.approx(sum(losses) / len(losses) - base, abs=1e-10)
            assert found.columns["depth"][i, j].item() == pytest.approx(sum(depths) / len(depths) / 3)
    # The untrained Mamba-1 repeats every token in every layer, so that none leaves unless it may.
    assert (found.columns["depth"].min() < 1) == (repeats or make is tiny_mamba2)


@pytest.mark.parametrize("make", MAKES)
def test_full_states_are_the_layers_own_readings(make) -> None:
    lens, ids = sharp(make), IDS[:24]
    trace = lens.trace(ids)
    laws = [read(lens, trace.residual(k))[0].log_softmax(-1) for k in range(4)]
    found = sensitivity.early_exit(lens, ids, [0.05], states=["full"], earliest=0, repeats=True)
    losses = []
    for t in range(23):
        at = next((k for k in range(3) if laws[k][t].exp().max() > 0.05), 3)
        losses.append((laws[3][t, ids[t + 1]] - laws[at][t, ids[t + 1]]).item())
    assert found.value.item() == pytest.approx(sum(losses) / 23, abs=1e-10)


def test_who_never_leaves_is_the_whole_model() -> None:
    found = sensitivity.early_exit(sharp(tiny_mamba2), IDS[:20], [1.0])
    assert found.value.abs().max() < 1e-12
    assert bool((found.columns["depth"] == 1).all())
    assert bool((found.columns["agreement"] == 1).all())
    assert found.control["random_change"].abs().max() < 1e-12


def test_rows_count_by_their_tokens() -> None:
    lens, rows = sharp(tiny_mamba2), ["abcabcabd", "xyzx"]
    both = sensitivity.early_exit(lens, rows, [0.05])
    parts = [sensitivity.early_exit(lens, row, [0.05]) for row in rows]
    expected = (8 * parts[0].value + 3 * parts[1].value) / 11
    assert torch.allclose(both.value, expected, atol=1e-12)


def test_killed_half_way_it_goes_on(tmp_path, monkeypatch) -> None:
    lens, file = sharp(tiny_mamba2), tmp_path / "run.jsonl"
    whole = sensitivity.early_exit(lens, IDS[:12], (0.02, 0.1))

    def stop(done: int, total: int) -> None:
        assert total == 36
        if done > 26:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.early_exit(lens, IDS[:12], (0.02, 0.1), resume=file, progress=stop)
    runs, inner = [], _early_exit._leave
    monkeypatch.setattr(
        _early_exit, "_leave", lambda n, x, level, *more: runs.append(level) or inner(n, x, level, *more)
    )
    monkeypatch.setattr(_early_exit, "_whole", lambda *given: pytest.fail("computed again"))
    again = sensitivity.early_exit(lens, IDS[:12], (0.02, 0.1), resume=file)
    assert runs == [0.1]
    assert torch.equal(again.value, whole.value)


def test_early_layers_of_a_model_with_tied_embeddings_repeat_the_token() -> None:
    lens = ssmlens.load("mamba1-english")
    found = sensitivity.layer_confidence(lens.trace(ssmlens.zoo.passage()))
    repeats, agreement = (found.columns[name].mean((1, 2)) for name in ("repeats", "agreement"))
    assert repeats[0] > 0.95
    assert repeats[0] > repeats[5] > repeats[10]
    assert agreement[10] == 1


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba1(), tokenizer=tiny_tokenizer())
    for wrong in ([], [0.0], [1.5]):
        with pytest.raises(SsmlensError, match="thresholds lie above 0 and up to 1"):
            sensitivity.early_exit(lens, IDS, wrong)
    with pytest.raises(SsmlensError, match="states are full, propagate, freeze"):
        sensitivity.early_exit(lens, IDS, states=["copy"])
    with pytest.raises(SsmlensError, match="earliest is from 0 to the 3 layers, got 4"):
        sensitivity.early_exit(lens, IDS, earliest=4)
