"""Truncated states against a model run token by token, known floors, and the shipped recall model."""

from __future__ import annotations

import pytest
import torch
from stepper import step_through
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer
from torch import Tensor

import ssmlens
from ssmlens.analyses import capacity
from ssmlens.analyses.capacity.checks import random_recurrence
from ssmlens.interventions import StateEdit, steer
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence
from ssmlens.zoo import recall_task

IDS = [3, 17, 250, 9, 88, 41, 5, 120, 77, 200, 13, 64]
CUT = 7


def truncated(state: Tensor, r: int, joint: bool) -> Tensor:
    """Top r singular directions of each head's (p, n), or of all channels stacked, by a plain SVD."""
    matrix = state.flatten(0, 1)[None] if joint else state
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s * (torch.arange(s.shape[-1]) < r)
    return (u * s[:, None] @ v).reshape(state.shape)


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
@pytest.mark.parametrize("r", [0, 1, 3])
def test_rerun_equals_the_model_token_by_token(make: object, r: int) -> None:
    model = make().double()  # type: ignore[operator]
    mamba1 = model.config.model_type == "mamba"

    def hook(name: str, layer: int, t: int, value: Tensor) -> Tensor:
        return truncated(value, r, mamba1) if (name, layer, t) == ("carried", 1, CUT - 1) else value

    exact = step_through(model, IDS, hook)
    seen = []
    lens = ssmlens.load(model)
    capacity.rank_floor(lens, IDS, 1, lambda x: (seen.append(x), 0.0)[1], [r], CUT, readings=["rerun"])
    torch.testing.assert_close(seen[0][0], exact, rtol=1e-9, atol=1e-9)


def rms(x: Tensor, eps: float | Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def frozen_reference(lens: ssmlens.Lens, r: int) -> Tensor:
    """Layer 0 truncated, the scans above with dt, B and C of the untouched run, mixers rebuilt one by one."""
    trace = lens.trace(IDS)
    head, residual = trace.head, trace.residual(0)
    for k in range(len(lens.layers)):
        mixer, rec = trace[k], trace[k].recurrence
        block = lens.model.get_submodule(lens.layers[k].path.rpartition(".")[0])
        hidden = rms(residual, 1e-5) * block.norm.weight
        value, gate = mixer._family.front(hidden, mixer.parameters, mixer.config)
        changed = Recurrence(rec.inputs.replace(value=value), D=rec.D)
        y = changed.run()
        if k == 0:
            state = truncated(changed.states([CUT - 1])[0, 0], r, False)[None]
            later = Recurrence(changed.inputs.slice(CUT, len(IDS)).replace(initial=state), D=rec.D)
            y = torch.cat([y[:, :CUT], later.run()], dim=1)
        residual = residual + mixer._family.rebuild(y, gate, mixer.parameters, mixer.config)
    return (rms(residual, head["norm.eps"]) * head["norm.weight"]) @ head["unembedding.weight"].mT


@pytest.mark.parametrize("r", [0, 2])
def test_frozen_keeps_the_gates_above(r: int) -> None:
    lens = ssmlens.load(tiny_mamba2().double())
    seen: list[Tensor] = []
    capacity.rank_floor(lens, IDS, 0, lambda x: (seen.append(x), 0.0)[1], [r], CUT, readings=["frozen"])
    with torch.no_grad():
        exact = frozen_reference(lens, r)
    # Before the cut nothing changes, above all not the gates.
    torch.testing.assert_close(seen[0][:, :CUT], lens.trace(IDS).logits[:, :CUT], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen[0], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_the_full_rank_is_the_untouched_model(make: object) -> None:
    lens = ssmlens.load(make())  # type: ignore[operator]
    found = capacity.rank_floor(lens, torch.tensor([IDS, IDS[::-1]]), None, "kl")
    assert found.dims == ("layer", "reading", "rank")
    assert found.columns["logit_difference"][..., -1].max() < 1e-4
    assert found.value[..., -1].abs().max() < 1e-6
    # The state of the last layer matters here, and above it no gates are left to freeze.
    assert found.columns["logit_difference"][-1, 0, 0] > 1e-4
    torch.testing.assert_close(found.value[-1, 0], found.value[-1, 1], rtol=0, atol=0)


def test_padding_is_silent() -> None:
    lens = ssmlens.load(tiny_mamba2(), tokenizer=tiny_tokenizer())
    texts = ["a model of time", "of states"]
    both = capacity.rank_floor(lens, texts, 1, "loss", [0, 2], 5)
    alone = [capacity.rank_floor(lens, x, 1, "loss", [0, 2], 5).value for x in texts]
    # Nine positions of the first row and three of the second have a next token behind the cut.
    mean = (alone[0] * 9 + alone[1] * 3) / 12
    torch.testing.assert_close(both.value, mean, rtol=1e-5, atol=1e-5)


def test_layers_together() -> None:
    lens = ssmlens.load(tiny_mamba2())
    found = capacity.rank_floor(lens, IDS, [0, 2], "kl", [0, 8], CUT, together=True)
    assert found.coords["layer"] == ["0+2"]
    apart = capacity.rank_floor(lens, IDS, [0, 2], "kl", [0, 8], CUT)
    assert found.value[0, 0, 0] not in apart.value[:, 0, 0]


def test_the_shipped_recall_model_has_its_floor_in_the_last_layer() -> None:
    lens = ssmlens.load("mamba2-recall")
    batch = recall_task.batch(100, 64, 8, seed=11)
    found = capacity.rank_floor(lens, batch.ids, None, "accuracy", [0, 1, 2, 4, 8, 16], 16, targets=batch.targets)
    assert found.control["untruncated"] > 0.99
    first, last = found.value[0, 0], found.value[1, 0]
    assert (first > 0.99).all()  # layer 0 holds nothing that the answers need
    assert last[0] == pytest.approx(1 / 8, abs=0.02)  # without the state one of the told values is named
    assert (last.diff() >= 0).all()
    assert last[1] < 0.35
    assert last[4] > 0.98
    assert found.columns["floor"][:, 0, 0].tolist() == [0, 8]
    # The energy says nothing of it.
    assert found.columns["kept_energy"][1, 0, 1] > 0.9


def test_pairs_need_a_rank_each() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    value, key = (x[None, :, None] for x in (torch.cat([eye, 0 * eye]), torch.cat([eye, eye])))
    write = torch.cat([key[:, :6], 0 * key[:, 6:]], dim=1)
    rec = Recurrence(ScanInputs(value=value, write=write, read=key, log_decay=torch.zeros(1, 12, 1, 1).double()))

    def recalled(y: Tensor) -> Tensor:
        return (y[0, 6:, 0].diagonal() > 0.5).double().mean()

    # Equal singular values: any r of the directions, so r / 6 of the energy and never all of the pairs.
    found = capacity.rank_floor(rec, metric=recalled, r_grid=range(7), token_cut=6)
    assert found.columns["floor"].item() == 6
    torch.testing.assert_close(found.columns["kept_energy"], torch.arange(7).double() / 6)


def test_centred_keeps_the_mean_over_rows() -> None:
    lens = ssmlens.load("mamba2-recall")
    batch = recall_task.batch(40, 32, 4, seed=3)
    seen: list[Tensor] = []
    capacity.rank_floor(lens, batch.ids, 1, lambda x: (seen.append(x), 0.0)[1], [0], 8, centred=True)
    # Without a rank of its own every row goes on from the same state.
    state = lens.trace(batch.ids)[1].recurrence.states([7])[:, 0].mean(0, keepdim=True)
    later = StateEdit(1, step=7, set=state)
    exact = steer(lens, batch.ids, later, read="next").logits
    torch.testing.assert_close(seen[0], exact, rtol=1e-4, atol=1e-4)


def test_metrics_by_hand() -> None:
    lens = ssmlens.load(tiny_mamba2())
    trace = lens.trace(IDS)
    law = trace.logits[0].double().log_softmax(-1)
    full = capacity.rank_floor(lens, IDS, 2, "loss", [8], CUT)
    exact = -sum(law[t, IDS[t + 1]] for t in range(CUT, len(IDS) - 1)) / (len(IDS) - 1 - CUT)
    assert full.value.flatten()[0].item() == pytest.approx(exact.item(), rel=1e-5)
    assert full.units == "nats"
    agreement = capacity.rank_floor(lens, IDS, 2, "agreement", [8], CUT)
    assert (agreement.value == 1).all()
    targets = torch.full((1, len(IDS)), -100)
    targets[0, 9] = int(law[9].argmax())
    targets[0, 2] = 5  # before the cut: does not count
    found = capacity.rank_floor(lens, IDS, 2, "accuracy", [8], CUT, targets=targets)
    assert (found.value == 1).all()


def test_progress_and_table() -> None:
    seen: list[tuple[int, int]] = []
    lens = ssmlens.load(tiny_mamba2())
    found = capacity.rank_floor(
        lens, IDS, None, "loss", [0, 4], progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (12, 12)
    assert set(found.table()["reading"]) == {"rerun", "frozen"}


def test_a_metric_that_is_nan_has_no_floor() -> None:
    rec = random_recurrence("scalar", length=12)
    found = capacity.rank_floor(rec, metric=lambda y: y.sum() * torch.nan, token_cut=5, r_grid=2)
    assert found.coords["rank"] == [2]
    assert found.columns["floor"].isnan().all()


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba2())
    with pytest.raises(ValueError, match="choose one of loss, accuracy, kl, agreement"):
        capacity.rank_floor(lens, IDS, 0, "bleu")
    with pytest.raises(ValueError, match="cuts 1 to 11"):
        capacity.rank_floor(lens, IDS, 0, "loss", None, 12)
    with pytest.raises(KeyError):
        capacity.rank_floor(lens, IDS, 9)
    with pytest.raises(ValueError, match="give a prompt"):
        capacity.rank_floor(lens)
    with pytest.raises(ValueError, match="ranks from 0"):
        capacity.rank_floor(lens, IDS, 0, "loss", [-1])
    with pytest.raises(ValueError, match="readings are some of"):
        capacity.rank_floor(lens, IDS, 0, readings=["thawed"])
    with pytest.raises(ValueError, match="one number, or one for each"):
        capacity.rank_floor(lens, IDS, 0, lambda x: x)
    with pytest.raises(ValueError, match="no target stands"):
        capacity.rank_floor(lens, IDS, 0, "loss", targets=torch.full((1, len(IDS)), -100))
    with pytest.raises(ValueError, match="give a function of its outputs"):
        capacity.rank_floor(lens.trace(IDS)[0].recurrence)
