"""Knockout against its definition, the identity T3, and what leaks when less is blocked."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import checkpoints
import folders
import pytest
import torch
from checkpoints import gap
from footprint import assert_same, fingerprint
from knocked import knocked_logits

import ssmlens
from ssmlens import zoo
from ssmlens.errors import LayerError, ReconstructionError, SsmlensError
from ssmlens.interventions import knockout, knockout_leak

FAMILIES = ["mamba1", "falcon", "mamba2"]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
WAYS = list(product([("ssm",), ("conv",), ("ssm", "conv")], ["keep", "skip"]))


@pytest.fixture(scope="module", params=FAMILIES)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, request.param)(), dtype=torch.float64)


@pytest.mark.parametrize(("paths", "decay"), WAYS)
@pytest.mark.parametrize("layers", [None, [1]])
def test_a_product_of_positions_is_what_its_definition_says(
    lens: ssmlens.Lens, paths: Any, decay: str, layers: Any
) -> None:
    sources, targets = [2, 4], [3, 4, 7, 10]
    ours = knockout(lens, IDS, sources, targets, layers, paths, decay)
    truth = knocked_logits(lens.model, IDS, dict.fromkeys(targets, sources), layers or [0, 1], paths, decay)
    assert gap(ours[0], truth) <= 1e-12
    clean = lens.trace(IDS).logits
    assert torch.equal(ours[:, :3], clean[:, :3])
    assert gap(ours, clean) > 1e-3


@pytest.mark.parametrize(("paths", "decay"), WAYS)
def test_pairs_are_blocked_one_by_one(lens: ssmlens.Lens, paths: Any, decay: str) -> None:
    pairs = [(2, 3), (2, 7), (4, 7), (0, 9), (9, 10)]
    blocked = {3: [2], 7: [2, 4], 9: [0], 10: [9]}
    ours = knockout(lens, IDS, pairs=pairs, paths=paths, decay=decay)
    assert gap(ours[0], knocked_logits(lens.model, IDS, blocked, [0, 1], paths, decay)) <= 1e-12
    every = {i: [j for j in (2, 5) if j < i] for i in range(3, 11)}
    ours = knockout(lens, IDS, [2, 5], paths=paths, decay=decay)
    assert gap(ours[0], knocked_logits(lens.model, IDS, every, [0, 1], paths, decay)) <= 1e-12


@pytest.mark.parametrize("sources", [[2], [0], [3, 6]])
def test_a_blocked_token_has_no_influence(lens: ssmlens.Lens, sources: list[int]) -> None:
    """T3: with both paths and the decay skipped, another token in its place changes no later logit."""
    other = [(i + 5) % 37 if t in sources else i for t, i in enumerate(IDS)]
    rest = [t for t in range(len(IDS)) if t not in sources]

    def influence(**options: Any) -> float:
        a, b = (knockout(lens, ids, sources, **options)[:, rest] for ids in (IDS, other))
        return (a - b).abs().max().item()

    assert influence(decay="skip") <= 1e-15
    free = (lens.trace(IDS).logits - lens.trace(other).logits)[:, rest].abs().max().item()
    # Blocking less leaks: the convolution carries the token on, and its step size decays the state.
    assert influence(paths="ssm") > 0.2 * free
    assert influence(paths="conv") > 1e-3
    # Before the first token there is nothing to decay.
    assert (influence(decay="keep") <= 1e-14) == (sources == [0])
    assert influence(decay="keep") < influence(paths="ssm")


@pytest.mark.parametrize("name", zoo.names())
def test_a_blocked_token_has_no_influence_in_shipped_models(name: str) -> None:
    lens = ssmlens.load(name, dtype=torch.float64)
    ids = lens.trace(zoo.passage(name), layers=[]).ids[0, :40].tolist()
    other = [*ids[:6], next(i for i in ids if i != ids[6]), *ids[7:]]
    a, b = (knockout(lens, x, 6, range(7, len(ids)), decay="skip") for x in (ids, other))
    assert (a - b)[:, 7:].abs().max().item() <= 1e-15
    assert (a - b)[:, 6].abs().max().item() > 1e-3
    leaking = [knockout(lens, x, 6, range(7, len(ids)), paths="ssm") for x in (ids, other)]
    assert (leaking[0] - leaking[1])[:, 7:].abs().max().item() > 1e-2


def test_every_combination_blocks_something_of_its_own(lens: ssmlens.Lens) -> None:
    found = [knockout(lens, IDS, 2, paths=paths, decay=decay) for paths, decay in WAYS]
    assert min(gap(a, b) for i, a in enumerate(found) for b in found[:i]) > 1e-4
    # The first token has nothing to decay.
    with pytest.raises(SsmlensError, match="touch nothing"):
        knockout(lens, IDS, 0, 0, paths="conv", decay="skip")
    # A token as its own source: what stood in the state before it stays whole.
    assert gap(knockout(lens, IDS, 4, 4, paths="conv", decay="skip")[:, 4], lens.trace(IDS).logits[:, 4]) > 1e-6


def test_the_leak_is_measured(lens: ssmlens.Lens) -> None:
    found = knockout_leak(lens, IDS, [2, 4], replacement=7).set_index(["source", "paths", "decay"]).leak
    assert len(found) == 10
    other = [*IDS[:4], 7, *IDS[5:]]
    free = (lens.trace(IDS).logits - lens.trace(other).logits)[:, 5:].pow(2).mean().sqrt().item()
    blocked = [knockout(lens, x, 4, range(5, 11), paths="ssm") for x in (IDS, other)]
    left = (blocked[0] - blocked[1])[:, 5:].pow(2).mean().sqrt().item()
    assert found[4, "ssm", "keep"] == pytest.approx(left / free)
    for source in (2, 4):
        assert (
            found[source, "ssm+conv", "skip"]
            <= 1e-15
            < found[source, "ssm+conv", "keep"]
            < found[source, "ssm", "keep"]
        )
    for wrong in ({"sources": 10}, {"sources": 2, "replacement": IDS[2]}):
        with pytest.raises(SsmlensError, match="no later token or no other token"):
            knockout_leak(lens, IDS, **wrong)
    with pytest.raises(SsmlensError, match="on one prompt"):
        knockout_leak(lens, torch.tensor([IDS, IDS]), 2)


@pytest.mark.parametrize("name", zoo.names())
def test_blocking_the_scan_alone_leaves_nearly_everything(name: str) -> None:
    """What the documentation says of the shipped models."""
    lens = ssmlens.load(name)
    found = knockout_leak(lens, zoo.passage(name), [4, 8]).set_index(["paths", "decay"]).leak
    assert found["ssm"].min() > 0.85
    assert found["ssm+conv", "keep"].max() < 0.1
    assert found["ssm+conv", "skip"].max() == 0


def test_rows_of_a_padded_batch_are_their_single_runs(lens: ssmlens.Lens) -> None:
    class Characters:
        def encode(self, text: str) -> list[int]:
            return [ord(c) % 37 for c in text]

        def decode(self, ids: list[int]) -> str:
            return str(ids)

    reader, texts = ssmlens.Lens(lens.model, Characters(), "characters"), ["0123456789a", "345678"]
    together = knockout(reader, texts, [-4, 1], -1, decay="skip")
    for i, text in enumerate(texts):
        alone = knockout(reader, text, [-4, 1], -1, decay="skip")
        assert gap(together[i, : len(text)], alone[0]) <= 1e-12


def test_each_row_may_have_its_own_positions(lens: ssmlens.Lens) -> None:
    ids = torch.tensor([IDS, IDS[::-1]])
    together = knockout(lens, ids, [[2], [1, 5]], [[5], [8, 9]])
    for i, (source, target) in enumerate([([2], [5]), ([1, 5], [8, 9])]):
        assert gap(together[i], knockout(lens, ids[i], source, target)[0]) <= 1e-12
    source = torch.zeros(11, dtype=torch.bool)
    source[2] = True
    assert torch.equal(knockout(lens, IDS, source, slice(4, None)), knockout(lens, IDS, 2, range(4, 11)))


def test_kernels_give_what_the_models_own_scans_give(lens: ssmlens.Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = knockout(lens, IDS, 2, [6, 9], layers=[0])
    monkeypatch.setattr("ssmlens.interventions._forward.AUTO_TOKENS", 0)
    assert gap(knockout(lens, IDS, 2, [6, 9], layers=[0]), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_models(lens: ssmlens.Lens, dtype: torch.dtype) -> None:
    narrow = ssmlens.load(getattr(checkpoints, _family(lens))(), dtype=dtype)
    ours = knockout(narrow, IDS, 2, [6, 9], decay="skip")
    assert gap(ours, knockout(lens, IDS, 2, [6, 9], decay="skip")) <= (1e-4 if dtype == torch.float32 else 0.3)


def _family(lens: ssmlens.Lens) -> str:
    return {"mamba": "mamba1", "falcon_mamba": "falcon", "mamba2": "mamba2"}[lens.model.config.model_type]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_models_of_the_state_spaces_format(family: str, tmp_path: Path) -> None:
    lens = ssmlens.load(folders.native(tmp_path, family), dtype=torch.float64)
    ours = knockout(lens, IDS, [2, 4], [3, 7, 10], decay="skip")
    truth = knocked_logits(lens.model, IDS, dict.fromkeys((3, 7, 10), (2, 4)), [0, 1], ("ssm", "conv"), "skip")
    assert gap(ours[0], truth) <= 1e-12


@pytest.mark.parametrize("given", [{"sources": [7, 9]}, {"pairs": [(7, 99_999), (9, 50_000)]}])
def test_a_long_text_takes_memory_for_its_sources_only(given: dict[str, Any]) -> None:
    """What is blocked is kept for the columns of the sources, not for every pair of tokens."""
    from ssmlens.interventions._knockout import _blocked, _streams

    lengths = torch.tensor([100_000])
    columns, blocked = _blocked(lengths, given.get("sources"), None, given.get("pairs"))
    assert columns.tolist() == [7, 9]
    assert blocked.shape == (1, 100_000, 2)
    assert not blocked[0, :8].any()
    assert len(_streams(columns, blocked, blocked.any(2))) == 2


def test_what_blocks_nothing_is_refused(lens: ssmlens.Lens) -> None:
    for sources, targets, paths in (
        (5, 4, "ssm"),
        (5, 5, "conv"),
        ([], [3], "ssm"),
        (10, None, "ssm"),
        (3, [], "conv"),
    ):
        with pytest.raises(SsmlensError, match="touch nothing"):
            knockout(lens, IDS, sources, targets, paths=paths)
    with pytest.raises(SsmlensError, match="touch nothing"):
        knockout(lens, IDS, pairs=[])
    with pytest.raises(SsmlensError, match="touch nothing"):
        knockout(lens, [7], 0)
    with pytest.raises(LayerError, match="touch nothing"):
        knockout(lens, IDS, 2, 5, layers=[])
    assert gap(knockout(lens, [7], 0, 0), lens.trace([7]).logits) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"paths": ()}, "paths is empty: choose from ssm, conv"),
        ({"paths": ("ssm", "gate")}, "unknown path 'gate'"),
        ({"decay": "drop"}, "unknown decay 'drop': choose one of keep, skip"),
        ({"sources": 11}, r"sources holds position 11, but the row has 11 tokens \(0 to 10\)"),
        ({"targets": [-12]}, "targets holds position -12"),
        ({"targets": "all"}, "token positions"),
        ({"sources": [True]}, "sources holds position True"),
        ({"sources": [[1], [2]]}, "2 lists of positions for 1 prompts"),
        ({"sources": torch.ones(3, dtype=torch.bool)}, r"a mask of sources is \(11,\)"),
        ({"sources": None}, "sources is missing"),
        ({"pairs": [(1, 2)]}, "either pairs, or sources and targets"),
        ({"pairs": [1], "sources": None, "targets": None}, r"pairs holds \(source, target\)"),
        ({"layers": [2]}, "layer 2 does not exist"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(lens: ssmlens.Lens, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SsmlensError, match=words) as caught:
        knockout(lens, IDS, **{"sources": 2, "targets": 5, **options})
    assert "\n" not in str(caught.value)


def test_the_model_is_left_as_it_was(lens: ssmlens.Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(lens.model)
    knockout(lens, IDS, 2, 5)
    assert_same(before, fingerprint(lens.model))
    # A mixer whose route cannot be followed is refused, and the model comes back from that as well.
    monkeypatch.setattr("ssmlens.interventions._scan.conv_inputs", lambda family, mixer, hidden: hidden[..., :1] * 0)
    with pytest.raises((ReconstructionError, RuntimeError)):
        knockout(lens, IDS, 2, 5)
    assert_same(before, fingerprint(lens.model))


def test_another_route_to_the_scan_is_refused(lens: ssmlens.Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens.interventions import _scan

    right = _scan.conv_inputs
    monkeypatch.setattr(_scan, "conv_inputs", lambda family, mixer, hidden: right(family, mixer, hidden) * 1.001)
    with pytest.raises(ReconstructionError, match="cannot be changed faithfully"):
        knockout(lens, IDS, 2, 5)
    assert knockout(lens, IDS, 2, 5, paths="ssm").shape == (1, 11, 37)
