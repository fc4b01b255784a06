"""Patching against a model that is stepped through by hand, its identities, and its result."""

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
from ssmlens.errors import LayerError, PromptError, SsmlensError
from ssmlens.interventions import Noise, Patching, Site, patch

FAMILIES = ["mamba1", "falcon", "mamba2"]
CLEAN = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
CORRUPT = [3, 17, 7, 36, 8, 5, 21, 9, 30, 2, 11]
AFTER = 5  # from here on both prompts hold the same tokens


@pytest.fixture(scope="module", params=FAMILIES)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, request.param)(), dtype=torch.float64)


def logits_of(lens: ssmlens.Lens, sites: Any, **options: Any) -> Tensor:
    """(site, t, v) the patched logits."""
    seen: list[Tensor] = []

    def keep(logits: Tensor) -> float:
        seen.append(logits[0])
        return 0.0

    patch(lens, CLEAN, CORRUPT, sites, keep, **options)
    return torch.stack(seen[:-2])  # the last two are both runs themselves


def by_hand(lens: ssmlens.Lens, kind: str, layers: list[int], positions: list[int], read: str = "now") -> Tensor:
    """(t, v) the same from the stepper: values of the clean run put in one after the other."""
    clean = Record()
    step_through(lens.model, CLEAN, clean)
    names = {
        "residual": ["residual"],
        "mixer": ["mixer"],
        "state": ["state" if read == "now" else "carried"],
        "conv": ["window"],
        "full_state": ["state" if read == "now" else "carried", "window"],
    }[kind]

    def put(name: str, layer: int, t: int, value: Tensor) -> Tensor:
        # What is carried on after token t is what the next one finds.
        at = t - 1 if name == "window" else t
        return clean[name, layer, t] if name in names and layer in layers and at in positions else value

    return step_through(lens.model, CORRUPT, put)


def test_the_stepper_is_the_model(lens: ssmlens.Lens) -> None:
    assert gap(step_through(lens.model, CLEAN), lens.trace(CLEAN).logits[0]) <= 1e-12


@pytest.mark.parametrize("kind", ["residual", "mixer", "state", "conv", "full_state"])
@pytest.mark.parametrize("read", ["now", "next"])
def test_every_kind_of_site_is_what_its_definition_says(lens: ssmlens.Lens, kind: str, read: str) -> None:
    sites = [(kind, 0, 4), (kind, 1, 4), (kind, 1, (2, 3, 4, 6)), (kind, 0, 9)]
    found = logits_of(lens, sites, read=read)
    for logits, (_, layer, where) in zip(found, sites, strict=True):
        positions = [where] if isinstance(where, int) else list(where)
        assert gap(logits, by_hand(lens, kind, [layer], positions, read)) <= 1e-12
    wide = logits_of(lens, [(kind, 0, 4)], read=read, window=2)
    assert gap(wide[0], by_hand(lens, kind, [0, 1], [4], read)) <= 1e-12
    whole = logits_of(lens, [(kind, 1, "all")], read=read)
    assert gap(whole[0], by_hand(lens, kind, [1], list(range(11)), read)) <= 1e-12


def test_progress_counts_the_sites_and_may_end_the_run(lens: ssmlens.Lens) -> None:
    told: list[tuple[int, int]] = []
    found = patch(lens, CLEAN, CORRUPT, ["residual", "mixer"], "kl", progress=lambda *steps: told.append(steps))
    counts = [done for done, _ in told]
    assert counts == sorted(set(counts))
    assert told[-1] == (len(found.sites), len(found.sites))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(lens, CLEAN, CORRUPT, "residual", "kl", progress=stop)


def test_t4_patching_everything_gives_the_clean_run(lens: ssmlens.Lens) -> None:
    clean = lens.trace(CLEAN).logits[0]
    for logits in logits_of(lens, [(k, "all") for k in range(3)]):
        assert gap(logits, clean) <= 1e-12
    last = logits_of(lens, [(2, -1)])[0]
    assert gap(last[-1], clean[-1]) <= 1e-12
    corrupt = lens.trace(CORRUPT).logits[0]
    assert gap(last[:-1], corrupt[:-1]) <= 1e-12
    assert gap(corrupt[-1], clean[-1]) > 1e-2


@pytest.mark.parametrize("read", ["now", "next"])
def test_the_full_state_of_all_layers_is_all_that_goes_on(lens: ssmlens.Lens, read: str) -> None:
    clean = lens.trace(CLEAN).logits[0, AFTER:]
    whole = logits_of(lens, [("full_state", 0, AFTER - 1)], read=read, window=9)[0]
    assert gap(whole[AFTER:], clean) <= 1e-12
    # h alone is not all: the convolution carries the last tokens past it.
    for kind in ("state", "conv"):
        assert gap(logits_of(lens, [(kind, 0, AFTER - 1)], read=read, window=9)[0, AFTER:], clean) > 1e-2


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall", "mamba1-english", "mamba2-english"])
def test_identities_on_shipped_models(name: str) -> None:
    lens = ssmlens.load(name, dtype=torch.float64)
    clean = lens.trace(ssmlens.zoo.passage(name), layers=[]).ids[0, -24:].tolist()
    corrupt = [*clean[:5], clean[9], clean[2], *clean[7:]]
    count, seen = len(lens.layers), []

    def keep(logits: Tensor) -> float:
        seen.append(logits[0])
        return 0.0

    sites = [*((k, "all") for k in (0, count // 2, count)), (count, -1), ("full_state", count // 2, 6)]
    patch(lens, clean, corrupt, sites[:4], keep)
    patch(lens, clean, corrupt, sites[4:], keep, window=2 * count + 1)
    truth = lens.trace(clean).logits[0]
    for logits in seen[:3]:
        assert gap(logits, truth) <= 1e-10
    assert gap(seen[3][-1], truth[-1]) <= 1e-10
    assert gap(seen[6][7:], truth[7:]) <= 1e-10
    assert gap(seen[5], truth) > 1e-3


def test_named_metrics(lens: ssmlens.Lens) -> None:
    clean, corrupt = (lens.trace(ids).logits[0, -1] for ids in (CLEAN, CORRUPT))
    top = int(clean.argmax())
    sites = [("state", 0, 4), (1, "all")]

    def run(metric: Any, **options: Any) -> Patching:
        return patch(lens, CLEAN, CORRUPT, sites, metric, **options)

    logit = run("logit")
    assert logit.target is not None
    assert logit.target.tolist() == [top]
    assert torch.allclose(logit.clean, clean[top])
    assert torch.allclose(logit.corrupt, corrupt[top])
    assert torch.allclose(logit.value[1], clean[top])
    assert torch.allclose(run("probability", target=4).value[1], clean.softmax(-1)[4])
    two = run("logit_difference", target=(4, [6]))
    assert torch.allclose(two.corrupt, corrupt[4] - corrupt[6])
    kl = run("kl")
    p, q = clean.log_softmax(-1), corrupt.log_softmax(-1)
    assert torch.allclose(kl.corrupt, (p.exp() * (p - q)).sum())
    assert kl.value[1].abs().max() <= 1e-12
    assert torch.allclose(kl.recovered[1], torch.ones(1).double())
    third = run("logit", target=4, position=3)
    assert torch.allclose(third.clean, lens.trace(CLEAN).logits[0, 3, 4])
    own = run(lambda logits: logits[:, -1, 4])
    assert torch.equal(own.value, run("logit", target=4).value)


def test_a_batch_is_its_rows(lens: ssmlens.Lens) -> None:
    clean, corrupt = torch.tensor([CLEAN, CORRUPT]), torch.tensor([CORRUPT, [1, *CORRUPT[1:]]])
    sites = [("full_state", 0, 4), ("residual", 1, [2, 3]), ("mixer", 1, -1)]
    both = patch(lens, clean, corrupt, sites, "logit", target=[4, 5])
    for i in range(2):
        one = patch(lens, clean[i], corrupt[i], sites, "logit", target=4 + i)
        assert torch.allclose(both.value[:, i], one.value[:, 0], rtol=0, atol=1e-12)
        assert torch.allclose(both.clean[i], one.clean[0], rtol=0, atol=1e-12)


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 37 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "|".join(map(str, ids))


def test_padded_rows_are_their_single_runs(lens: ssmlens.Lens) -> None:
    reader = ssmlens.Lens(lens.model, Characters(), "characters")
    clean, corrupt = ["0123456789a", "345678"], ["0723456789a", "375678"]
    sites = [("full_state", 0, -2), ("conv", 1, 2), ("residual", 2, -1), ("state", 1, "all")]
    both = patch(reader, clean, corrupt, sites, "logit", target=4)
    for i in range(2):
        one = patch(reader, clean[i], corrupt[i], sites, "logit", target=4)
        assert torch.allclose(both.value[:, i], one.value[:, 0], rtol=0, atol=1e-12)
    assert both.table().query("row == 1 and kind == 'full_state'").position.item() == 4
    with pytest.raises(SsmlensError, match="the row has 6 tokens"):
        patch(reader, clean, corrupt, [("state", 0, 8)], "logit", target=4)


def test_noise_corrupts_the_embeddings(lens: ssmlens.Lens) -> None:
    noise = Noise([2, 3], scale=0.7, seed=3)
    clean = lens.trace(CLEAN).logits[0]
    found = patch(lens, CLEAN, noise, [(0, "all"), (0, (2, 3)), (0, 2), ("state", 0, 6)], "kl")
    assert found.corrupt.item() > 1e-4
    assert found.value[:2].abs().max() <= 1e-12
    assert found.value[2:].min() > 1e-6
    drawn = torch.randn(1, 11, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0] * 0.7

    def add(name: str, layer: int, t: int, value: Tensor) -> Tensor:
        return value + drawn[t] if (name, layer) == ("residual", 0) and t in (2, 3) else value

    assert gap(found.corrupt_logits[0], step_through(lens.model, CLEAN, add)) <= 1e-12
    assert gap(found.clean_logits[0], clean) <= 1e-12
    again = patch(lens, CLEAN, noise, ("state", 0, 6), "kl")
    assert torch.equal(again.corrupt, found.corrupt)
    for wrong in (Noise([]), Noise([2], scale=0.0)):
        with pytest.raises(SsmlensError, match="would be the clean one"):
            patch(lens, CLEAN, wrong, "state", "kl")


def test_the_table_and_the_grid(lens: ssmlens.Lens) -> None:
    found = patch(lens, CLEAN, CORRUPT, "residual", "logit", target=4)
    assert len(found.sites) == 33
    table = found.table()
    assert list(table.columns) == [
        "kind", "layer", "position", "row", "clean_token", "corrupt_token", "value", "effect", "recovered", "clean",
        "corrupt",
    ]  # fmt: skip
    line = table.query("layer == 1 and position == 4").iloc[0]
    assert (line.clean_token, line.corrupt_token) == ("5", "8")
    assert line.effect == pytest.approx(line.value - line.corrupt)
    assert line.recovered == pytest.approx(line.effect / (line.clean - line.corrupt))
    grid = found.grid()
    assert grid.shape == (3, 11)
    assert grid[1, 4] == line.value
    assert torch.equal(found.grid(values=found.effect), grid - found.corrupt)
    # Tokens before the first difference are the same in both runs.
    assert found.effect[:2].abs().max() <= 1e-12
    some = patch(lens, CLEAN, CORRUPT, [("state", 1, 2), ("conv", 0, (2, 3))], "logit", target=4)
    assert some.table().position.tolist() == [2, "2,3"]
    assert some.grid("state").isnan().sum() == 21
    with pytest.raises(SsmlensError, match="choose one of conv, state"):
        some.grid()
    assert len(patch(lens, CLEAN, CORRUPT, "conv", "kl").sites) == 20


def test_sites_may_be_written_in_several_ways(lens: ssmlens.Lens) -> None:
    ways: list[Any] = [
        ("residual", 1, 4), (1, 4), Site("residual", 1, 4), {"layer": 1, "position": 4}, [("residual", 1, (4,))],
        [[1, -7]], {"kind": "residual", "layer": 1, "position": [4]},
    ]  # fmt: skip
    values = [patch(lens, CLEAN, CORRUPT, sites, "logit", target=4).value for sites in ways]
    assert all(torch.equal(v, values[0]) for v in values)
    every = patch(lens, CLEAN, CORRUPT, ("mixer_output", 1), "logit", target=4)
    assert every.sites == (Site("mixer", 1),)
    kinds = patch(lens, CLEAN, CORRUPT, ["mixer output", "conv state", Site("state", 0, 2)], "logit", target=4)
    alone = [patch(lens, CLEAN, CORRUPT, kind, "logit", target=4) for kind in ("mixer", "conv")]
    assert kinds.sites == (*alone[0].sites, *alone[1].sites, Site("state", 0, 2))
    assert torch.allclose(kinds.value[:-1], torch.cat([x.value for x in alone]), rtol=0, atol=1e-12)


def test_many_sites_run_in_several_groups(lens: ssmlens.Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = patch(lens, CLEAN, CORRUPT, "full_state", "kl").value
    monkeypatch.setattr("ssmlens.interventions._patch.LOGIT_BYTES", 3 * 11 * 37 * 8)
    monkeypatch.setattr("ssmlens.interventions._forward.AUTO_TOKENS", 0)
    assert torch.allclose(patch(lens, CLEAN, CORRUPT, "full_state", "kl").value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": []}, "sites is empty"),
        ({"sites": "gate"}, "unknown kind of site 'gate': choose one of residual, mixer"),
        ({"sites": [("state", 0, 11)]}, "a site holds position 11"),
        ({"sites": [("state", 0, [])]}, "has no position"),
        ({"sites": [("conv", 0, 10)]}, "at the last token, after which nothing reads it"),
        ({"sites": [("state", 0, -1)], "read": "next"}, "at the last token"),
        ({"sites": 3}, "a list of sites"),
        ({"sites": [("state",)]}, "a site is"),
        ({"sites": [{"kind": "state", "time": 3}]}, "a mapping of kind, layer and position"),
        ({"sites": [(3, 0)]}, "residual 3 does not exist: choose 0 to 2"),
        ({"sites": [("state", 2, 0)]}, "layer 2 does not exist"),
        ({"corrupt": CORRUPT[:-1]}, "same length"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
        ({"metric": "logit", "target": 37}, "a target is a token id from 0 to 36"),
        ({"metric": "logit", "target": [1, 2]}, "target has 2 entries for 1 prompts"),
        ({"metric": "logit", "target": "a"}, "no tokenizer"),
        ({"metric": "logit_difference", "target": 3}, "a pair"),
        ({"metric": "logit_difference", "target": (3, 3)}, "are the same"),
        ({"metric": "kl", "target": 3}, "leave target out"),
        ({"metric": lambda x: x[0, -1]}, "a metric returns"),
        ({"read": "later"}, "unknown read 'later'"),
        ({"window": 0}, "at least 1"),
        ({"position": 11}, "position 11"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(lens: ssmlens.Lens, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SsmlensError, match=words) as caught:
        patch(lens, **{"clean": CLEAN, "corrupt": CORRUPT, "sites": "state", "metric": "kl", **options})
    assert "\n" not in str(caught.value)


def test_errors_have_their_types(lens: ssmlens.Lens) -> None:
    with pytest.raises(LayerError):
        patch(lens, CLEAN, CORRUPT, [("mixer", 5, 0)], "kl")
    with pytest.raises(PromptError):
        patch(lens, CLEAN, [], "state", "kl")
    with pytest.raises(PromptError):
        patch(lens, CLEAN, CORRUPT[:3], "state", "kl")


def test_the_model_is_left_as_it_was(lens: ssmlens.Lens) -> None:
    before = fingerprint(lens.model)
    patch(lens, CLEAN, Noise(2), [("full_state", 0, 3), (1, 2), ("mixer", 0, 1)], "kl")

    def fail(logits: Tensor) -> float:
        raise RuntimeError("the metric failed")

    with pytest.raises(RuntimeError, match="the metric failed"):
        patch(lens, CLEAN, CORRUPT, "state", fail)
    assert_same(before, fingerprint(lens.model))
