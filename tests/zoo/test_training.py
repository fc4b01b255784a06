"""A smoke run of each recipe writes a folder that transformers loads and a card made of its own numbers."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from ssmlens.zoo import recall_task
from ssmlens.zoo.data import HeldOut
from ssmlens.zoo.evaluate import bits_per_byte, held_out_scores, snippet_score
from ssmlens.zoo.folder import round_weights, save_folder
from ssmlens.zoo.loop import Budget, make_optimizer, scheduled_rate
from ssmlens.zoo.model_card import render, write_card
from ssmlens.zoo.recipes import RECIPES, make_model, recipe
from ssmlens.zoo.scans import training_scans
from ssmlens.zoo.train import main

CPU = torch.device("cpu")


ENGLISH = [name for name, plan in RECIPES.items() if plan.task == "english"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A smoke run of each recipe, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "model"
            assert main([name, "--smoke", "--out", str(out), "--device", "cpu"]) == 0
            made[name] = out
        return made[name]

    return get


@pytest.fixture(params=list(RECIPES))
def folder(request, trained):
    return trained(request.param)


@pytest.fixture(params=ENGLISH)
def english(request, trained):
    return trained(request.param)


def test_smoke_run_writes_a_loadable_folder(folder):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size
    ids = torch.tensor([tokenizer("a 3 b")["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()


def test_card_is_rendered_from_the_log(folder):
    log = json.loads((folder / "training.json").read_text())
    card = (folder / "README.md").read_text()
    assert log["name"] in card
    if log["recipe"]["task"] == "english":
        assert f"| all | {log['bits_per_byte']['all']:.3f} |" in card
        assert f"{100 * log['key_value']['accuracy']:.1f} %" in card
        assert "WordNet 3.0 Copyright 2006 by Princeton University" in card
        assert "Python Software Foundation;" in card
        log["bits_per_byte"]["all"] = 9.87654
        baseline = json.loads((folder / "baseline.json").read_text())
        assert "| all | 9.877 |" in render(log, baseline)
    else:
        row = log["accuracy"][0]
        assert f"| {row['length']} | {row['pairs']} | {100 * row['accuracy']:.1f} % |" in card
        assert all(f"| {r['rate']:g} |" in card for r in log["rates"])
        log["accuracy"][0]["accuracy"] = 0.4321
        assert "43.2 %" in render(log)


def test_numbers_of_the_log_are_those_of_the_stored_weights(english):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    log = json.loads((english / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(english).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(english).backend_tokenizer
    assert snippet_score(model, tokenizer) == pytest.approx(log["snippet"], rel=1e-4)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_weights_come_back_as_stored(family, tmp_path):
    from transformers import AutoModelForCausalLM

    plan = recipe(f"{family}-recall")
    torch.manual_seed(0)
    model = make_model(plan.family, plan.config)
    round_weights(model, torch.float16)
    save_folder(model, recall_task.tokenizer(), tmp_path, torch.float16)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded[name]), name


def test_weights_that_do_not_fit_are_refused():
    plan = recipe("mamba1-recall")
    model = make_model(plan.family, plan.config)
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = 1e6
    with pytest.raises(ValueError, match="norm_f"):
        round_weights(model, torch.float16)


def test_an_english_card_needs_its_baseline():
    with pytest.raises(ValueError, match=r"baseline\.json"):
        render({"name": "x", "recipe": {"task": "english"}})


def test_card_of_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        write_card(tmp_path)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_training_scans_change_neither_logits_nor_gradients(family):
    plan = recipe(f"{family}-english").smoke()
    torch.manual_seed(0)
    model = make_model(plan.family, plan.config | {"vocab_size": 50}).train()
    ids = torch.randint(50, (2, 37))

    def run():
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = run()
    with training_scans(CPU) as used:
        swapped = run()
    assert used == "chunked"
    for a, b in zip(plain, swapped, strict=True):
        assert (a - b).abs().max() <= 2e-5 * a.abs().max()
    after = run()
    assert torch.equal(after[0], plain[0])


def test_scans_are_put_back_after_an_exception():
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    names = [(modeling_mamba, "mamba_selective_scan"), (modeling_mamba2, "mamba2_chunk_scan")]
    before = [getattr(*name) for name in names]

    def interrupted():
        with training_scans(CPU):
            assert all(getattr(*name) is not original for name, original in zip(names, before))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [getattr(*name) for name in names] == before


def test_scan_kinds(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="auto, chunked, triton"), training_scans(CPU, "fast"):
        pass
    with pytest.raises(ValueError, match="CUDA"), training_scans(CPU, "triton"):
        pass


def test_only_matrices_decay():
    plan = recipe("mamba1-english").smoke()
    model = make_model(plan.family, plan.config)
    decays, rests = make_optimizer(model, 1e-3, 0.1).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {names[id(p)].split(".")[-2] for p in decays["params"]}
    assert kinds == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert rests["weight_decay"] == 0
    assert len(decays["params"]) + len(rests["params"]) == len(names)


def test_schedule_and_budget():
    assert scheduled_rate(1.0, 0, 10, 0.0) == pytest.approx(0.1)
    assert scheduled_rate(1.0, 50, 10, 0.5) == pytest.approx(0.51)
    assert scheduled_rate(1.0, 99, 10, 1.0) == pytest.approx(0.02)
    assert Budget(10, None).spent(5) == 0.5
    assert Budget(10**9, 1e-9).spent(1) > 1


@torch.no_grad()
def test_bits_per_byte_of_one_window_is_the_plain_loss(english):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(english).eval()
    ids = torch.randint(1, model.config.vocab_size, (300,))
    scores = held_out_scores(model, [HeldOut("g", "t", ids.numpy(), 100)], window=300)
    loss = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")
    assert scores["all"] == pytest.approx(float(loss) / math.log(2) / 100, rel=1e-5)


def test_bits_per_byte_scores_each_token_once():
    class Uniform(torch.nn.Module):
        """Every token costs log2 16 = 4 bits, so a score counts the tokens."""

        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, use_cache):
            contexts.append(ids.shape[1])
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 16))

    contexts: list[int] = []
    documents = [torch.randint(16, (n,)).numpy() for n in (2, 9, 10, 11, 37)]
    bits = bits_per_byte(Uniform(), documents, n_bytes=1, window=10, rows=3)
    assert bits == pytest.approx(4 * sum(len(d) - 1 for d in documents))
    assert max(contexts) == 9


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """The stages of an English model, run one at a time: the folders of the first and of the second.

    Between them a weight is moved further than eight steps could, to see whose weights the second starts from.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("staged")
    start = ["mamba2-english", "--smoke", "--device", "cpu"]
    assert main([*start, "--stage", "text", "--out", str(folder / "text")]) == 0
    weights = load_file(folder / "text" / "model.safetensors")
    weights["backbone.norm_f.weight"] += 0.5
    save_file(weights, folder / "text" / "model.safetensors", metadata={"format": "pt"})
    again = [*start, "--stage", "recall", "--from", str(folder / "text"), "--out", str(folder / "recall")]
    assert main(again) == 0
    return folder / "text", folder / "recall"


def test_the_recall_stage_goes_on_from_a_folder(staged):
    from safetensors.torch import load_file

    first, second = (json.loads((folder / "training.json").read_text())["stages"] for folder in staged)
    assert [stage["stage"] for stage in first] == ["text"]
    assert [stage["stage"] for stage in second] == ["text", "recall"]
    assert second[0] == first[0]
    assert second[1]["rate"] == first[0]["rate"] / 2
    assert {"recall_easy", "recall_hard"} <= set(second[1]["loss"][-1])
    before, after = (load_file(folder / "model.safetensors") for folder in staged)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    moved = max(float((before[k].float() - after[k].float()).abs().max()) for k in before)
    assert moved < 0.1
    card = (staged[1] / "README.md").read_text()
    assert "Stage 1, text:" in card
    assert "Stage 2, recall:" in card


def test_stages_that_do_not_go_together(staged, tmp_path, capsys):
    def refused(name, *arguments):
        assert main([name, "--smoke", "--device", "cpu", "--out", str(tmp_path / "out"), *arguments]) == 2
        return capsys.readouterr().err

    text = str(staged[0])
    assert "needs a folder to start from" in refused("mamba2-english", "--stage", "recall")
    assert "needs a folder to start from" in refused("mamba2-english", "--from", text)
    assert "holds mamba2-english, not mamba1-english" in refused("mamba1-english", "--stage", "recall", "--from", text)
    assert "no training.json" in refused("mamba2-english", "--stage", "recall", "--from", str(tmp_path))
    other = shutil.copytree(text, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer" in refused("mamba2-english", "--stage", "recall", "--from", str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mamba9-english"], "mamba1-english, mamba2-english"),
        (["mamba1-english"], "--text DIR or --pack DIR"),
        (["mamba1-english", "--pack", "nowhere"], "no pack"),
        (["mamba1-english", "--text", "nowhere"], "no narrative.txt"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
