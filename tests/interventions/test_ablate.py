"""Every part and every way of ablation against a model that is stepped through by hand."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from footprint import assert_same, fingerprint
from stepper import Record, step_through
from torch import Tensor

import ssmlens
from ssmlens.errors import LayerError, SsmlensError
from ssmlens.interventions import ablate, logit_lens

FAMILIES = ["mamba1", "falcon", "mamba2"]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
OTHER = [1, 2, 3, 4, 5, 6, 7]
PLACE = {
    "block": "mixer", "ssm": "ssm", "skip": "skip", "head": "y", "channel": "y", "state": "parts", "conv": "past",
    "gate": "gate",
}  # fmt: skip
PARTS: list[Any] = ["block", "ssm", "skip", ("head", [1, 3]), ("channel", [0, 5]), ("state", [2, -1]), "conv", "gate"]


@pytest.fixture(scope="module", params=FAMILIES)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, request.param)(use_bias=request.param == "mamba2"), dtype=torch.float64)


def mask_of(part: Any, value: Tensor) -> Tensor:
    """True in the entries that a part names, in the stepper's shape for it."""
    name, indices = (part, None) if isinstance(part, str) else part
    mask = torch.zeros_like(value, dtype=torch.bool)
    if indices is None:
        mask[...] = True
    elif name == "head":
        mask[indices] = True
    elif name == "channel":
        mask.view(-1)[indices] = True
    else:
        mask[..., indices] = True
    return mask


def by_hand(lens: ssmlens.Lens, part: Any, layers: list[int], fill: Any, positions: range = range(11)) -> Tensor:
    """(t, v) with ``fill(layer, t, value)`` in place of the part; state dimensions count by their sum over them."""
    name = part if isinstance(part, str) else part[0]

    def put(seen: str, layer: int, t: int, value: Tensor) -> Tensor:
        if seen != PLACE[name] or layer not in layers or t not in positions:
            return value
        mask = mask_of(part, value)
        if name != "state":
            return torch.where(mask, fill(layer, t, value), value)
        # The sum over the chosen dimensions is what is replaced: put it all into one of them.
        out = torch.where(mask, torch.zeros_like(value), value)
        out[..., 0] += (fill(layer, t, value) * mask).sum(-1)
        return out

    return step_through(lens.model, IDS, put)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_each_part_is_what_its_definition_says(lens: ssmlens.Lens, part: Any) -> None:
    name = PLACE[part if isinstance(part, str) else part[0]]
    zero = ablate(lens, IDS, [1], [part], "zero")[0]
    assert gap(zero, by_hand(lens, part, [1], lambda layer, t, v: torch.zeros_like(v))) <= 1e-12
    assert gap(zero, lens.trace(IDS).logits[0]) > 1e-4
    for reference in (None, OTHER):
        record, ids = Record(), reference or IDS
        step_through(lens.model, ids, record)
        kept = {k: torch.stack([record[name, k, t] for t in range(len(ids))]) for k in range(2)}
        means = {k: x.mean(0) for k, x in kept.items()}
        ours = ablate(lens, IDS, parts=[part], how="mean", reference=reference)[0]
        assert gap(ours, by_hand(lens, part, [0, 1], lambda layer, t, v, m=means: m[layer])) <= 1e-12
        draw = torch.randint(len(ids), (1, 11), generator=torch.Generator().manual_seed(4))[0]
        ours = ablate(lens, IDS, parts=[part], how="resample", reference=reference, seed=4)[0]
        truth = by_hand(lens, part, [0, 1], lambda layer, t, v, kept=kept, draw=draw: kept[layer][draw[t]])
        assert gap(ours, truth) <= 1e-12
    at = ablate(lens, IDS, [0], [part], "zero", positions=[3, -4])[0]
    assert gap(at, by_hand(lens, part, [0], lambda layer, t, v: torch.zeros_like(v), (3, 7))) <= 1e-12  # type: ignore[arg-type]


def test_parts_together(lens: ssmlens.Lens) -> None:
    def put(seen: str, layer: int, t: int, value: Tensor) -> Tensor:
        return torch.full_like(value, 0.0) if seen in ("past", "skip") else value

    both = ablate(lens, IDS, parts=("conv", "skip"), how="zero")[0]
    assert gap(both, step_through(lens.model, IDS, put)) <= 1e-12
    assert torch.equal(both, ablate(lens, IDS, parts={"conv": None, "skip": None}, how="zero")[0])
    ungated = ablate(lens, IDS, parts="gate", how="one")[0]
    truth = step_through(lens.model, IDS, lambda n, k, t, v: torch.ones_like(v) if n == "gate" else v)
    assert gap(ungated, truth) <= 1e-12
    # Without the state and the skip nothing is left of the scan; without any mixer only the embedding.
    nothing = ablate(lens, IDS, parts=["ssm", "skip"], how="zero")
    empty = ablate(lens, IDS, parts={"head": range(lens._mixers[0][1].A_log.shape[0])}, how="zero")
    assert gap(nothing, empty) <= 1e-12
    assert gap(ablate(lens, IDS), ablate(lens, IDS, how="zero")) == 0  # a part is dropped unless told otherwise
    assert gap(ablate(lens, IDS, how="zero"), logit_lens(lens.trace(IDS), [0]).logits[0]) <= 1e-12


def test_a_batch_is_its_rows(lens: ssmlens.Lens) -> None:
    rows = torch.tensor([IDS, IDS[::-1]])
    for part in ("conv", ("state", [1])):
        together = ablate(lens, rows, parts=[part], how="mean", reference=OTHER)
        for i in range(2):
            alone = ablate(lens, rows[i], parts=[part], how="mean", reference=OTHER)[0]
            assert gap(together[i], alone) <= 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": "norm"}, "unknown part 'norm': choose from block, ssm"),
        ({"parts": []}, "parts is empty"),
        ({"parts": ["ssm", "ssm"]}, "names one part twice"),
        ({"parts": "head"}, "needs indices"),
        ({"parts": ("head", [])}, "needs indices"),
        ({"parts": ("ssm", [1])}, "takes no indices"),
        ({"parts": ("head", [99])}, "head 99 does not exist in layer 0: choose from 0 to"),
        ({"parts": ("state", [-99])}, "state -99 does not exist"),
        ({"how": "median"}, "unknown way 'median'"),
        ({"how": "one"}, "goes with parts='gate' alone"),
        ({"reference": OTHER}, "how='zero' reads no reference run"),
        ({"positions": []}, "positions is empty"),
        ({"parts": "conv", "positions": 0}, "touch nothing"),
        ({"layers": []}, "touch nothing"),
        ({"layers": [4]}, "layer 4 does not exist"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(lens: ssmlens.Lens, options: dict[str, Any], words: str) -> None:
    before = fingerprint(lens.model)
    with pytest.raises(SsmlensError, match=words) as caught:
        ablate(lens, IDS, **options)
    assert "\n" not in str(caught.value)
    assert_same(before, fingerprint(lens.model))


def test_errors_have_their_types(lens: ssmlens.Lens) -> None:
    with pytest.raises(LayerError):
        ablate(lens, IDS, layers=[9])
    with pytest.raises(SsmlensError, match="empty"):
        ablate(lens, IDS, how="mean", reference=[])
