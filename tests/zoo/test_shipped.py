"""The shipped models are there, small, loadable, and reach what their cards say."""

import json

import pytest
import torch

from ssmlens import zoo
from ssmlens.zoo import recall_task
from ssmlens.zoo.evaluate import recall_accuracy, snippet_score
from ssmlens.zoo.model_card import render

ENGLISH = ("mamba1-english", "mamba2-english")
RECALL = ("mamba1-recall", "mamba2-recall")
LIMIT = {"english": 12_000_000, "recall": 1_000_000}


def log(name):
    return json.loads((zoo.path(name) / "training.json").read_text(encoding="utf-8"))


def test_names():
    assert zoo.names() == [*ENGLISH, *RECALL]


def test_an_unknown_name_lists_the_models():
    for function in (zoo.path, zoo.card):
        with pytest.raises(KeyError, match="mamba1-english, mamba2-english, mamba1-recall, mamba2-recall"):
            function("mamba3")


@pytest.mark.parametrize("name", [*ENGLISH, *RECALL])
def test_folder_is_small_and_loads(name, shipped):
    folder = zoo.path(name)
    assert sum(f.stat().st_size for f in folder.iterdir()) <= LIMIT[name.split("-")[1]]
    model, tokenizer = shipped(name)
    assert model.dtype == torch.float32
    assert model.config.model_type == {"mamba1": "mamba", "mamba2": "mamba2"}[name.split("-")[0]]
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    assert sum(p.numel() for p in model.parameters()) == log(name)["parameters"]
    if name in ENGLISH:
        assert 2e6 <= log(name)["parameters"] <= 6e6


@pytest.mark.parametrize("name", [*ENGLISH, *RECALL])
def test_card_is_the_one_its_numbers_give(name):
    baseline = zoo.path(name) / "baseline.json"
    scores = json.loads(baseline.read_text(encoding="utf-8")) if baseline.is_file() else None
    assert zoo.card(name) == render(log(name), scores)


@pytest.mark.parametrize("name", ENGLISH)
def test_english_models_beat_the_baseline_clearly(name):
    baseline = json.loads((zoo.path(name) / "baseline.json").read_text(encoding="utf-8"))["bits_per_byte"]
    scores = log(name)["bits_per_byte"]
    assert set(scores) == set(baseline)
    assert scores["all"] < 0.95 * baseline["all"]


@pytest.mark.parametrize("name", ENGLISH)
def test_bits_per_byte_of_the_shipped_pages_is_that_of_the_card(name, shipped):
    # A GPU summed the logged figure in another order: 5e-4 is a hundred times that and a tenth of a real loss.
    assert snippet_score(*shipped(name)) == pytest.approx(log(name)["snippet"], rel=5e-4)


@pytest.mark.parametrize("name", ENGLISH)
@torch.no_grad()
def test_english_models_name_the_code_that_the_passage_asks_for(name, shipped):
    model, tokenizer = shipped(name)
    passage = zoo.passage(name)
    assert passage.endswith("What is the code of the red box? Answer:")
    # The same question, other questions, and other told values: the answer follows what the passage tells.
    for key, value in (("red box", "K7"), ("old door", "M42"), ("green boat", "T15")):
        for told in (value, "R81"):
            text = passage.replace("What is the code of the red box", f"What is the code of the {key}")
            text = text.replace(value, told)
            asked, answer = tokenizer.encode(text).ids, tokenizer.encode(f" {told}").ids
            assert tokenizer.encode(f"{text} {told}").ids == asked + answer
            logits = model(torch.tensor([asked + answer]), use_cache=False).logits[0, len(asked) - 1 : -1]
            assert logits.argmax(-1).tolist() == answer
            assert logits.softmax(-1)[range(len(answer)), answer].min() > 0.5


@pytest.mark.parametrize("name", RECALL)
@pytest.mark.parametrize("pairs", recall_task.TRAINING_PAIRS)
def test_recall_models_solve_their_task_on_fresh_sequences(name, pairs, shipped):
    model, _ = shipped(name)
    made = recall_task.batch(300, recall_task.TRAINING_LENGTH, pairs, seed=77_000 + pairs)
    assert recall_accuracy(model, made.ids, made.targets) >= 0.99


@pytest.mark.parametrize("name", RECALL)
@torch.no_grad()
def test_recall_models_answer_typed_text(name, shipped):
    model, tokenizer = shipped(name)
    text = zoo.passage(name)
    assert text.split()[-1] == "r"
    value = text.split()[text.split().index("r") + 1]
    logits = model(torch.tensor([tokenizer.encode(text).ids]), use_cache=False).logits
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == value


def test_passage_needs_no_model():
    assert "The code of the red box is K7." in zoo.passage()
    assert zoo.passage("mamba2-recall").endswith("r")
