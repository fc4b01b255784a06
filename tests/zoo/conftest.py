"""One small packed text and the shipped models, each made once for all tests of the zoo."""

from __future__ import annotations

import functools

import pytest

from ssmlens import zoo
from ssmlens.zoo.corpus import synthetic_text
from ssmlens.zoo.data import build


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A made-up text, packed with a tokenizer of 320 entries."""
    return build(synthetic_text(tmp_path_factory.mktemp("text")), 320, key_value_tokens=2_000)


@pytest.fixture(scope="session")
def narrative(pack):
    """The text of the held-out novel of the pack."""
    held = next(h for h in pack.held_out if h.group == "Persuasion")
    return pack.tokenizer.decode(held.ids[1:].tolist())


@pytest.fixture(scope="session")
def shipped():
    """A function from a name to a shipped model in eval mode and its tokenizer."""

    @functools.cache
    def load(name):
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        model = AutoModelForCausalLM.from_pretrained(zoo.path(name)).eval()
        return model, PreTrainedTokenizerFast.from_pretrained(zoo.path(name)).backend_tokenizer

    return load
