"""Organisms do what their cards say, load as they say, and can be trained on from where a run was stopped."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import ssmlens
from ssmlens import tasks, zoo
from ssmlens.errors import CheckpointError, SsmlensError, UnsupportedModelError
from ssmlens.kernels import naive
from ssmlens.zoo import organisms_measure as measures
from ssmlens.zoo import organisms_train as training
from ssmlens.zoo.organisms_card import render_organism, write_organism_card
from ssmlens.zoo.organisms_models import Forecaster, SignCounter
from ssmlens.zoo.organisms_recipes import ORGANISMS, Stage, organism

NAMES = zoo.organisms()
OWN = [name for name in NAMES if ORGANISMS[name].kind != "mamba2"]
RECALL = [name for name in NAMES if name.startswith("organism-recall-n")]
LIMIT = 500_000
SEED = 77_000


def log(name):
    return json.loads((zoo.path(name) / "training.json").read_text(encoding="utf-8"))


def model(name):
    return zoo.organism(name) if name in OWN else ssmlens.load(name).model.eval()


def test_organisms_are_listed_apart_and_each_has_a_recipe():
    assert NAMES
    assert not set(NAMES) & set(zoo.names())
    assert set(NAMES) == set(ORGANISMS)
    numbers = [int(re.findall(r"\d+", name)[0]) for name in RECALL]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_small_and_the_card_is_the_one_its_numbers_give(name):
    assert sum(f.stat().st_size for f in zoo.path(name).iterdir()) <= LIMIT
    assert zoo.card(name) == render_organism(log(name))
    plan, recipe = organism(name), log(name)["recipe"]
    assert recipe["config"] == json.loads(json.dumps(plan.config))
    assert [(s["rows"], s["steps"]) for s in recipe["stages"]] == [(s.rows, s.steps) for s in plan.stages]
    assert (recipe["rate"], recipe["seed"], recipe["start"]) == (plan.rate, plan.seed, plan.start)


@pytest.mark.parametrize("name", NAMES)
def test_loads(name):
    found = model(name)
    assert sum(p.numel() for p in found.parameters()) == log(name)["parameters"]
    if name in OWN:
        with pytest.raises(UnsupportedModelError, match=r"ssmlens\.zoo\.organism"):
            ssmlens.load(name)
        assert {p.dtype for p in zoo.organism(name, torch.float64).parameters()} == {torch.float64}
        return
    with pytest.raises(CheckpointError, match=r"use ssmlens\.load"):
        zoo.organism(name)
    lens = ssmlens.load(name)
    batch = ORGANISMS[name].task.batch(2, SEED)
    trace = lens.trace(batch.ids)
    assert max(trace.reconstruction_error.values()) < trace.tolerance
    text = " ".join(ORGANISMS[name].task.words()[i] for i in batch.ids[0])
    assert torch.equal(lens.trace(text, layers=()).ids, batch.ids[:1])


def test_unknown_organisms_are_refused():
    with pytest.raises(KeyError, match="organism-copy"):
        zoo.organism("organism-poetry")
    with pytest.raises(KeyError, match="organism-copy"):
        organism("organism-poetry")


@pytest.mark.parametrize("name", RECALL)
def test_recall_on_fresh_rows_is_that_of_the_card(name):
    for row in log(name)["measured"]["trained"]:
        fresh = measures.accuracy(model(name), tasks.MQAR(row["length"], row["pairs"]), 100, SEED)
        assert fresh["accuracy"] == pytest.approx(row["accuracy"], abs=2 * (row["margin"] + fresh["margin"]) + 0.005)


def test_a_larger_state_recalls_more():
    heavy = [log(name)["measured"]["loads"][-1]["accuracy"] for name in RECALL]
    assert heavy == sorted(heavy)


def test_recall_stays_above_the_load_law_of_random_keys():
    for name in RECALL:
        for row in log(name)["measured"]["loads"]:
            assert row["accuracy"] > row["law"] - 2 * row["margin"] - 0.01


def test_the_learning_rate_window_is_shown():
    rates = {r["rate"]: r["measured"]["trained"][-1]["accuracy"] for r in log("organism-recall-base")["rates"]}
    assert list(rates) == [1e-3, 5e-3, 2e-2]
    assert rates[1e-3] < 0.2 < 0.9 < rates[5e-3]
    assert log("organism-recall-base")["measured"]["trained"][-1]["accuracy"] == rates[5e-3]


def passkey(name, length, rows=64):
    return measures.accuracy(model(name), tasks.Passkey(length), rows, SEED)["accuracy"]


def test_passkey_trained_short_falls_apart_where_trained_long_holds():
    short, long = "organism-passkey-short", "organism-passkey-long"
    assert passkey(short, 48) > 0.98
    assert passkey(long, 1024, 24) > 0.97
    assert passkey(short, 1024, 24) < 0.9


def test_copy_on_fresh_strings():
    found = log("organism-copy")["measured"]
    for row in found["counts"][:8]:
        fresh = measures.accuracy(model("organism-copy"), tasks.Copy(row["count"]), 100, SEED)
        assert fresh["accuracy"] == pytest.approx(row["accuracy"], abs=2 * (row["margin"] + fresh["margin"]) + 0.005)


def test_parity_needs_negative_decays():
    batch = tasks.Parity(length=3_000).batch(8, SEED)
    signed, positive = zoo.organism("organism-parity-signed"), zoo.organism("organism-parity-positive")
    assert torch.equal(signed(batch.ids).argmax(-1), batch.targets)
    assert bool((positive.decays() >= 0).all())
    late = (positive(batch.ids).argmax(-1) == batch.targets)[:, 100:].double().mean()
    assert float(late) == pytest.approx(0.5, abs=0.02)
    short = tasks.Parity(length=8).batch(200, SEED)
    assert float((positive(short.ids).argmax(-1) == short.targets).double().mean()) > 0.95
    # The counter that was found: a channel that keeps its size at both bits, and turns its sign at ones alone.
    keeps = (signed.decays()[0] == 1) & (signed.decays()[1] == -1)
    turns = (signed.decays()[0] == -1) & (signed.decays()[1] == 1)
    assert bool((keeps | turns).any())


@torch.no_grad()
def test_counter_runs_on_the_scan_as_it_steps():
    torch.manual_seed(0)
    counter = SignCounter(tokens=3, channels=5).double()
    counter.b.data.normal_()
    ids = torch.randint(0, 3, (2, 40))
    scanned = counter(ids)
    plain = counter.read(naive.run(counter.scan_inputs(ids))[0][..., 0])
    state, stepped = counter.start.expand(2, -1), []
    for t in range(40):
        state, logits = counter.step(state, ids[:, t])
        stepped.append(logits)
    assert torch.allclose(scanned, torch.stack(stepped, 1), atol=1e-12)
    assert torch.allclose(scanned, plain, atol=1e-12)
    with pytest.raises(SsmlensError, match="-1 or 0"):
        SignCounter(low=0.5)


@torch.no_grad()
def test_forecaster_steps_as_it_scans():
    torch.manual_seed(0)
    forecaster = Forecaster(d=8, channels=6, n=3).double()
    series = torch.randn(1, 25, 3, dtype=torch.float64)
    ahead = forecaster(series)[0]
    state = torch.zeros(forecaster.n_state, dtype=torch.float64)
    for t in range(25):
        state = forecaster.step(torch.cat([series[0, t], state[3:]]))
        assert torch.allclose(state[:3], ahead[t], atol=1e-12)
    assert torch.allclose(forecaster.warm(series[0]), state, atol=1e-12)
    batch = torch.stack([state, 2 * state])
    assert torch.allclose(forecaster.step(batch)[0], forecaster.step(state), atol=1e-12)


def test_forecaster_knows_the_lorenz_flow():
    from ssmlens.analyses import lyapunov

    found, flow = log("organism-lorenz")["measured"], tasks.Lorenz(length=64)
    forecaster = zoo.organism("organism-lorenz", torch.float64)
    batch = flow.batch(20, SEED)
    assert flow.score(forecaster(batch.ids), batch) < 10 * found["error"] < 1e-4
    # The volume that the three coordinates lose in a step is the flow's: mean log determinant, -(41/3) a unit of time.
    start = forecaster.warm(batch.ids[0])
    spectrum = lyapunov.spectrum(forecaster.step, start, 150, 3, discard=10, every=5, dt=flow.interval, control=False)
    assert float(spectrum.value.sum()) == pytest.approx(-41 / 3, rel=0.05)
    exponents = found["spectrum"]["exponents"]
    assert exponents[0] == pytest.approx(0.906, abs=3 * found["spectrum"]["standard_error"][0])
    assert found["spectrum"]["dimension"] == pytest.approx(2.062, abs=0.02)


def tiny(kind):
    plan = next(p for p in ORGANISMS.values() if p.kind == kind)
    return replace(plan.smoke(), stages=(Stage(plan.stages[0].tasks, 2, 6),), warmup=1)


@pytest.mark.parametrize("kind", ["mamba2", "sign-counter", "forecaster"])
def test_a_stopped_run_goes_on_to_the_same_weights(kind, tmp_path, monkeypatch):
    plan = tiny(kind)
    whole = training.train(plan, tmp_path, label="whole")
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    loss, seen = training._loss, []

    def stop(plan, model, step):
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss(plan, model, step)

    monkeypatch.setattr(training, "_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(plan, tmp_path, label="parts")
    parts = training.train(plan, tmp_path, label="parts")
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]
    for a, b in zip(whole["model"].state_dict().values(), parts["model"].state_dict().values()):
        assert torch.equal(a, b)


@torch.no_grad()
def test_narrowing_drops_states_that_do_nothing():
    wide, narrow = organism("organism-recall-n16"), organism("organism-recall-n4")
    model = training.build(wide)
    inner, dead = 128, torch.tensor([i for i in range(16) if i not in (1, 6, 7, 14)])
    for block in model.backbone.layers:
        mixer = block.mixer
        mixer.conv1d.bias.normal_()
        for start in (inner, inner + 16):  # write and read rows; the projection has the gate before them
            mixer.in_proj.weight[inner + start + dead] = 0
            mixer.conv1d.weight[start + dead] = 0
            mixer.conv1d.bias[start + dead] = 0
    small = training.build(narrow)
    small.load_state_dict(training.narrowed(model.state_dict(), wide.config, narrow.config))
    ids = wide.task.batch(2, SEED).ids
    expected = model(ids, use_cache=False).logits
    assert torch.allclose(small(ids, use_cache=False).logits, expected, atol=1e-5)
    assert training.narrowed(model.state_dict(), wide.config, wide.config).keys() == model.state_dict().keys()


def test_an_organism_that_goes_on_needs_the_other(tmp_path):
    with pytest.raises(ValueError, match="train that first"):
        training.run(organism("organism-passkey-long"), tmp_path, tmp_path / "out", measures.measure)


def test_command_trains_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measures, "PARITY_LENGTHS", (4, 8))
    monkeypatch.setattr(measures, "ROWS", 4)
    work, out = str(tmp_path / "work"), tmp_path / "out"
    arguments = ["organism-parity-signed", "--smoke", "--work", work, "--out", str(out)]
    assert training.main(arguments) == 0
    card = (out / "organism-parity-signed" / "README.md").read_text()
    assert "| 4 |" in card
    again = write_organism_card(out / "organism-parity-signed").read_text()
    assert again == card
    assert training.main(["organism-poetry"]) == 2
    assert "organism-copy" in capsys.readouterr().err


def test_crossings_are_found_between_loads():
    table = [{"pairs": k, "accuracy": a} for k, a in ((2, 1.0), (4, 0.75), (8, 0.25))]
    assert measures._crossing(table) == 6.0
    assert measures._crossing(table[:2]) == float("inf")
