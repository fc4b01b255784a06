"""What the shipped tokenizers do with words they do not know."""

from __future__ import annotations

import pytest

import ssmlens
from ssmlens.errors import PromptError


def test_unknown_words_are_refused_not_replaced() -> None:
    lens = ssmlens.load("mamba1-recall")
    with pytest.raises(PromptError, match="has no 'é', '100'"):
        lens.trace("é c 7 100 a")
    assert lens.trace("c 7 . c").tokens == [["c", "7", ".", "c"]]
