"""Single removal: against ablation inside the model's own forward, splits against loops, and runs that go on."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import sensitivity
from ssmlens.analyses.sensitivity import _removal
from ssmlens.analyses.sensitivity._text import Text
from ssmlens.analyses.sensitivity._units import Unit, units_of
from ssmlens.errors import LayerError, PromptError, SsmlensError
from ssmlens.exact import KeepFloat64
from ssmlens.interventions import ablate

IDS = [(5 * k * k + 2 * k) % 17 for k in range(40)]
MAKES = [tiny_mamba1, tiny_mamba2]


def sharp(make):
    """A tiny model in float64 whose layers matter: embeddings and output projections made larger."""
    model = make().double()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(6)
    return ssmlens.load(model, tokenizer=tiny_tokenizer())


def read(lens, residual):
    """Logits of a residual stream through the model's own final norm and head."""
    with KeepFloat64(), torch.no_grad():
        return lens.model.lm_head(lens.model.backbone.norm_f(residual))


def mean_loss(logits, ids) -> float:
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), torch.tensor(ids[1:])).item()


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("kind", ["block", "ssm", "head"])
@pytest.mark.parametrize("make", MAKES)
def test_equals_ablation_in_the_models_own_forward(make, kind: str, how: str) -> None:
    lens = sharp(make)
    group = 16 if make is tiny_mamba1 and kind == "head" else None
    found = sensitivity.removal(lens, IDS, kind, group=group)
    base = mean_loss(lens.trace(IDS).logits, IDS)
    units = units_of(lens, kind, group=group)
    assert found.coords["part"] == [unit.label for unit in units]
    for i in (0, len(units) // 2, len(units) - 1):
        unit = units[i]
        parts = ("head", list(unit.heads)) if kind == "head" else kind
        expected = mean_loss(ablate(lens, IDS, unit.layer, parts, how), IDS) - base
        ours = found.value[i, 0] if how == "zero" else found.control["mean_change"][i, 0]
        assert ours.item() == pytest.approx(expected, abs=1e-10)
        assert abs(expected) > 1e-6
        assert found.columns["layer"][i, 0] == unit.layer
    assert found.columns["loss"][0].item() == pytest.approx(base, abs=1e-12)


@pytest.mark.parametrize("make", MAKES)
def test_a_part_without_weights_changes_nothing(make) -> None:
    lens = sharp(make)
    with torch.no_grad():
        lens.model.backbone.layers[1].mixer.out_proj.weight.zero_()
    found = sensitivity.removal(lens, IDS, "block")
    assert torch.equal(found.value[1], torch.zeros(6, dtype=torch.float64))
    assert bool((found.value[[0, 2], 0] != 0).all())


def test_splits_equal_plain_loops() -> None:
    lens = sharp(tiny_mamba2)
    rows = ["abcabcabdabe, abcabc.", "xyzxyzx"]
    text = Text.of(lens, rows)
    expected = {name: [] for name in sensitivity.SPLITS}
    logits = lens.trace(rows).logits
    for row, string in enumerate(rows):
        ids = lens.tokenizer.encode(string)
        laws = logits[row].log_softmax(-1)
        seen = set()
        for t in range(len(ids) - 1):
            loss = -laws[t, ids[t + 1]].item()
            names = ["all", ("first third", "middle third", "last third")[3 * t // (len(ids) - 1)]]
            names.append("recall" if (ids[t], ids[t + 1]) in seen else "other")
            seen.add((ids[t], ids[t + 1]))
            for name in names:
                expected[name].append(loss)
    mean, low, high = text.means(text.losses(logits))
    for i, name in enumerate(sensitivity.SPLITS):
        assert mean[i].item() == pytest.approx(sum(expected[name]) / len(expected[name]), rel=1e-12), name
        assert text.masks[i].sum() == len(expected[name])
        assert low[i] <= mean[i] <= high[i]


def test_recall_excess_is_the_difference_of_its_splits_in_bits() -> None:
    found = sensitivity.removal(sharp(tiny_mamba2), IDS, "ssm", control=False)
    expected = (found.value[:, 4] - found.value[:, 5]) / math.log(2)
    excess = found.columns["recall_excess"][:, 0]
    assert torch.allclose(excess, expected, atol=1e-12)
    assert bool((found.columns["excess_low"][:, 0] <= excess).all())
    assert bool((found.columns["excess_high"][:, 0] >= excess).all())


def test_rows_count_by_their_tokens_and_padding_not_at_all() -> None:
    lens = sharp(tiny_mamba1)
    rows = ["The red box is K7.", "Nothing."]
    both = sensitivity.removal(lens, rows, "ssm", control=False)
    alone = [sensitivity.removal(lens, row, "ssm", control=False) for row in rows]
    counts = [len(row) - 1 for row in rows]
    expected = sum(x.value[:, 0] * n for x, n in zip(alone, counts)) / sum(counts)
    assert torch.allclose(both.value[:, 0], expected, atol=1e-12)
    assert both.columns["targets"][0] == sum(counts)
    assert "mean_change" not in both.control


def test_a_text_without_repeated_pairs_has_no_recall() -> None:
    found = sensitivity.removal(sharp(tiny_mamba2), [1, 2, 3, 4, 5], "block", control=False)
    assert bool(found.value[:, 4].isnan().all())
    assert torch.equal(found.value[:, 5], found.value[:, 0])


def test_groups_of_heads() -> None:
    one, many = ssmlens.load(tiny_mamba2()), ssmlens.load(tiny_mamba1(hidden_size=64))
    assert [u.heads for u in units_of(one, "head", [1])] == [(h,) for h in range(8)]
    assert [u.label for u in units_of(one, "head", [1], 3)] == [
        "layer 1 heads 0-2", "layer 1 heads 3-5", "layer 1 heads 6-7",
    ]  # fmt: skip
    assert len(units_of(many, "head")) == 3 * 16  # 128 channels a layer
    assert Unit("block", 2).label == "layer 2"


def test_killed_half_way_it_goes_on(tmp_path, monkeypatch) -> None:
    lens, file = sharp(tiny_mamba2), tmp_path / "run.jsonl"
    whole = sensitivity.removal(lens, IDS)

    def stop(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.removal(lens, IDS, resume=file, progress=stop)
    done, inner = [], _removal._one
    monkeypatch.setattr(
        _removal, "_one", lambda model, unit, *rest: done.append(unit.layer) or inner(model, unit, *rest)
    )
    again = sensitivity.removal(lens, IDS, resume=file)
    assert done == [2]
    assert torch.equal(again.value, whole.value)
    assert torch.equal(again.control["mean_change"], whole.control["mean_change"])
    with pytest.raises(SsmlensError, match=r"other settings \(part\)"):
        sensitivity.removal(lens, IDS, "ssm", resume=file)
    with pytest.raises(SsmlensError, match=r"other settings \(.*tokens\)"):
        sensitivity.removal(lens, IDS[:-1], resume=file)


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_a_recall_model_needs_the_scan_that_recalls(name: str) -> None:
    lens = ssmlens.load(name)
    found = sensitivity.removal(lens, ssmlens.zoo.passage(name) + " 24", "ssm", targets=[-1])
    assert found.columns["loss"][0] < 0.01
    assert found.value[:, 0].max() > 1
    assert found.columns["targets"][0] == 1
    assert bool(found.columns["low"].isnan().all())  # one target has no interval


def test_chosen_targets_are_those_of_the_plain_loss() -> None:
    lens = sharp(tiny_mamba2)
    found = sensitivity.removal(lens, IDS, targets=[-1, 3, 200], control=False)
    laws = lens.trace(IDS).logits[0].log_softmax(-1)
    expected = -(laws[38, IDS[39]] + laws[2, IDS[3]]).item() / 2
    assert found.columns["loss"][0].item() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(PromptError, match=r"no row has a token to predict at \[0\]"):
        sensitivity.removal(lens, IDS, targets=[0])


def test_refusals() -> None:
    lens = sharp(tiny_mamba2)
    with pytest.raises(SsmlensError, match="unknown part 'mlp': choose one of block, ssm, head"):
        sensitivity.removal(lens, IDS, "mlp")
    with pytest.raises(SsmlensError, match="group is a number of heads"):
        sensitivity.removal(lens, IDS, "head", group=0)
    with pytest.raises(SsmlensError, match="group is a number of heads"):
        sensitivity.removal(lens, IDS, "block", group=2)
    with pytest.raises(LayerError, match="layer 7 has no mixer: choose from 0, 1, 2"):
        sensitivity.removal(lens, IDS, layers=[7])
    with pytest.raises(LayerError, match="no layer was chosen"):
        sensitivity.removal(lens, IDS, layers=[])
    with pytest.raises(PromptError, match="a loss needs a next token"):
        sensitivity.removal(lens, [3])
