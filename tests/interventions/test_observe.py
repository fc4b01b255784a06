"""What a changed run is said to have read is what its outputs are made of."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from torch import Tensor

import ssmlens
from ssmlens.attribution import gradient_x_input
from ssmlens.errors import LayerError, SsmlensError
from ssmlens.interventions import Knockout, Observed, Patch, StateEdit, knockout, logit_lens, observe, patch, steer
from ssmlens.trace import MixerTrace

IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
OTHER = [3, 17, 8, 36, 5, 5, 21, 9, 30, 2, 11]
EXACT = 1e-12


@pytest.fixture(scope="module", params=["mamba1", "falcon", "mamba2"])
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, request.param)(), dtype=torch.float64)


def mixer_output(lens: ssmlens.Lens, found: Observed, layer: int, extra: Tensor | float = 0.0) -> Tensor:
    """The output of a changed mixer from what `Observed` says that it read, and from the weights around the scan."""
    plain: MixerTrace = found.before[layer]
    heads = range(plain.recurrence.n_heads)
    read = torch.stack([found.attention(layer, h).after for h in heads], dim=1)
    y = torch.einsum("bhts,bshp->bthp", read, plain.recurrence.value) + plain.recurrence.skip + extra
    return plain.rebuild(y)


def own_output(lens: ssmlens.Lens, layer: int, run: Any) -> Tensor:
    """What the mixer itself gave back while ``run()`` ran the changed model."""
    kept: list[Tensor] = []
    hook = lens._mixers[layer][1].register_forward_hook(lambda module, args, output: kept.append(output))
    run()
    hook.remove()
    return kept[-1].detach()


def test_a_change_that_changes_nothing_gives_the_trace(lens: ssmlens.Lens) -> None:
    found = observe(lens, IDS, StateEdit(1, 4, scale=1.0))
    assert found.layers == sorted(found.before.mixers)
    assert 1 not in found.after.mixers
    assert gap(found.after.logits, found.before.logits) <= EXACT
    for layer in found.layers:
        for how in ("mean", "mean_abs", "max_abs", "norm", 0):
            sides = found.attention(layer, how)
            attention = found.before[layer].recurrence.attention
            expected = attention.reduce(how) if isinstance(how, str) else attention.dense([how])[:, 0]
            assert torch.equal(sides.before, expected)
            assert gap(sides.after, expected) <= EXACT
        norms = found.state_norm(layer)
        states = found.before[layer].recurrence.states()
        assert gap(norms.before, states.flatten(2).norm(dim=-1)) <= EXACT
        assert gap(norms.after, norms.before) <= EXACT
        assert gap(found.state_norm(layer, 1).before, states[:, :, 1].flatten(2).norm(dim=-1)) <= EXACT
    scores = found.attribution()
    assert gap(scores.before, gradient_x_input(lens, IDS).scores.cpu()) <= 1e-9
    assert gap(scores.after, scores.before) <= EXACT
    chances = found.lens()
    assert gap(chances.after, chances.before) <= EXACT


@pytest.mark.parametrize("decay", ["keep", "skip"])
@pytest.mark.parametrize("targets", [None, [6, 10]])
def test_the_map_of_a_knockout_makes_the_output(lens: ssmlens.Lens, decay: str, targets: list[int] | None) -> None:
    change = Knockout([2, 5], targets, [0], "ssm", decay)
    found = observe(lens, IDS, change)
    arguments = (lens, IDS, [2, 5], targets, [0], "ssm", decay)
    assert torch.equal(found.after.logits, knockout(*arguments))
    assert gap(mixer_output(lens, found, 0), own_output(lens, 0, lambda: knockout(*arguments))) <= EXACT
    sides = found.attention(0)
    readers = [t for t in range(11) if t > 5] if targets is None else targets
    assert not sides.after[0, readers][:, [2, 5]].any()
    assert sides.before[0, readers][:, [2, 5]].abs().min() > 0
    assert torch.equal(sides.after[0, :2], sides.before[0, :2])
    # The state that row 6 reads holds neither source; with its own decay it is a run without their writes.
    rec = found.before[0].recurrence
    write = rec.inputs.write.clone()
    write[:, [2, 5]] = 0
    if decay == "keep":
        blocked = rec.inputs.replace(write=write)
        from ssmlens.kernels import scan

        assert gap(found.state_norm(0).after[:, 6], scan.states(blocked, [6]).flatten(2).norm(dim=-1)[:, 0]) <= EXACT


@pytest.mark.parametrize("read", ["now", "next"])
def test_the_map_behind_edited_states_makes_the_output(lens: ssmlens.Lens, read: str) -> None:
    edits = [StateEdit(0, 3, scale=-0.5), StateEdit(0, 6, scale=3.0, heads=[1]), StateEdit(0, 8, set=0.0, heads=[0, 1])]
    found = observe(lens, IDS, edits, read=read)
    assert torch.equal(found.after.logits, steer(lens, IDS, edits, read=read).logits)
    own = own_output(lens, 0, lambda: steer(lens, IDS, edits, read=read))
    assert gap(mixer_output(lens, found, 0), own) <= EXACT
    heads = torch.stack([found.attention(0, h).after for h in range(found.before[0].recurrence.n_heads)], dim=1)
    assert gap(found.attention(0, "mean").after, heads.mean(1)) <= EXACT
    assert gap(found.attention(0, "mean_abs").after, heads.abs().mean(1)) <= EXACT
    assert gap(found.attention(0, "max_abs").after, heads.abs().amax(1)) <= EXACT
    assert gap(found.attention(0, "norm").after, heads.norm(dim=1)) <= EXACT
    norms = found.state_norm(0, 0)
    assert norms.after[0, 8] == 0
    assert gap(norms.after[:, 3], norms.before[:, 3] * 0.5) <= EXACT
    assert torch.equal(norms.after[:, :3], norms.before[:, :3])


def test_a_patched_state_is_read_by_later_tokens_and_hides_earlier_ones(lens: ssmlens.Lens) -> None:
    found = observe(lens, OTHER, Patch(IDS, ("state", 0, 4)))
    logits = patch(lens, IDS, OTHER, ("state", 0, 4), lambda x: x[:, -1, 7])
    assert found.after.logits[0, -1, 7] == pytest.approx(float(logits.value[0, 0]), rel=1e-12)
    sides = found.attention(0)
    assert not sides.after[0, 4:, :5].any()
    assert torch.equal(sides.after[0, 5:, 5:], sides.before[0, 5:, 5:])
    clean = lens.trace(IDS)[0].recurrence
    assert gap(found.state_norm(0).after[0, 4], clean.states([4]).norm()) <= EXACT
    # The state put in, carried on and read, is all that the map leaves out.
    rec = found.before[0].recurrence
    state = clean.states([4])[:, 0]
    y = torch.zeros_like(rec.run())
    decay = rec.log_decay.exp()
    for t in range(4, len(IDS)):
        state = state if t == 4 else state * decay[:, t, :, None]
        y[:, t] = torch.einsum("bhpn,bhn->bhp", state, rec.read[:, t])
    own = own_output(lens, 0, lambda: patch(lens, IDS, OTHER, ("state", 0, 4), "kl"))
    assert gap(mixer_output(lens, found, 0, y)[0], own[-1]) <= EXACT


def test_later_layers_and_the_stream_are_those_of_the_changed_run(lens: ssmlens.Lens) -> None:
    found = observe(lens, OTHER, Patch(IDS, ("residual", 1, 2)))
    clean = lens.trace(IDS)
    assert gap(found.after.residual(1)[0, 2], clean.residual(1)[0, 2]) == 0
    assert gap(found.after.residual(1)[0, 3:], found.before.residual(1)[0, 3:]) == 0
    assert sorted(found.after.mixers) == found.layers
    found.after.check()
    whole = observe(lens, OTHER, Patch(IDS, ("residual", 0)))
    assert gap(whole.after.logits, clean.logits) <= EXACT
    for layer in whole.layers:
        assert gap(whole.attention(layer).after, clean[layer].recurrence.attention.reduce("mean")) <= EXACT
    chances = whole.lens(7, 4)
    expected = logit_lens(clean).logits[:, 0, 4].double().log_softmax(-1)[:, 7]
    assert gap(chances.after[:, 0], expected) <= EXACT
    assert gap(chances.difference, chances.after - chances.before) == 0
    # Nothing is attributed to embeddings that a patch has replaced.
    assert not whole.attribution().after.any()


def test_the_attribution_is_the_slope_of_the_changed_run(lens: ssmlens.Lens) -> None:
    change = Knockout(2, None, None)
    scores = observe(lens, IDS, change).attribution(7, -2).after[0]
    weight = lens.model.get_input_embeddings().weight
    old, step = weight.detach().clone(), 1e-6
    for t in (0, 2, 6):
        logits = []
        for sign in (1, -1):

            def scaled(module: Any, args: Any, out: Tensor, sign: int = sign, t: int = t) -> Tensor:
                out = out.clone()
                out[:, t] *= 1 + sign * step
                return out

            hook = lens.model.get_input_embeddings().register_forward_hook(scaled)
            logits.append(float(knockout(lens, IDS, 2)[0, -2, 7]))
            hook.remove()
        slope = (logits[0] - logits[1]) / (2 * step)
        assert float(scores[t]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert torch.equal(weight, old)


def test_padded_rows_are_those_of_single_runs(lens: ssmlens.Lens) -> None:
    ids = torch.tensor([IDS, [*IDS[:7], 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    both = observe(lens, ids, Knockout(1, None, [0]), attention_mask=mask)
    for row, alone in enumerate((IDS, IDS[:7])):
        one = observe(lens, alone, Knockout(1, None, [0]))
        n = len(alone)
        assert gap(both.attention(0).after[row, :n, :n], one.attention(0).after[0]) <= EXACT
        assert gap(both.state_norm(1).after[row, :n], one.state_norm(1).after[0]) <= EXACT
        assert gap(both.attribution().after[row, :n], one.attribution().after[0]) <= 1e-10
        assert gap(both.lens().after[:, row], one.lens().after[:, 0]) <= EXACT
    assert bool(both.state_norm(0).after[1, 7:].isnan().all())


def test_what_cannot_be_asked_is_refused_in_words(lens: ssmlens.Lens) -> None:
    found = observe(lens, IDS, StateEdit(0, 4, function=torch.tanh))
    with pytest.raises(SsmlensError, match="function"):
        found.attention(0)
    assert found.attention(1).after.shape == (1, 11, 11)
    with pytest.raises(LayerError, match="layer 9"):
        found.attention(9)
    with pytest.raises(LayerError, match="head 99"):
        found.state_norm(0, 99)
    for head in (99, 0.5):
        with pytest.raises(LayerError, match=f"head {head}"):
            found.attention(1, head)  # type: ignore[arg-type]
    with pytest.raises(SsmlensError, match="vocabulary"):
        found.lens(1.5)  # type: ignore[arg-type]
    with pytest.raises(SsmlensError, match="unknown read 'then': choose one of now, next"):
        observe(lens, IDS, Knockout(1), read="then")
    with pytest.raises(SsmlensError, match="position"):
        found.attribution(position=11)
    with pytest.raises(SsmlensError, match="vocabulary"):
        found.lens(10**6)
    with pytest.raises(SsmlensError, match="Knockout"):
        observe(lens, IDS, "ssm")  # type: ignore[arg-type]
    with pytest.raises(SsmlensError, match="one site"):
        observe(lens, OTHER, Patch(IDS, "state"))
