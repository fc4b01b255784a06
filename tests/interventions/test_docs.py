"""The page on interventions runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "interventions.md"


def test_the_page_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code) == 9
    space: dict[str, Any] = {}
    for block in code:
        exec(compile(block, PAGE.name, "exec"), space)
    assert space["found"].method == "cache"
    assert float(space["norms"].difference.abs().max()) > 0.01
    assert space["maps"].after.shape == (1, 11, 11)
    assert space["patched"].contrast.kl[0, -1] > 0.1
    assert space["tuned"].mean_kl[0] < space["plain"].mean_kl[0]
    assert space["edit"].probability[1] > 5 * space["edit"].probability[0]
    # The prompt of the page is one that the model answers as the page says.
    lens = space["lens"]
    assert lens.tokenizer.decode([int(lens.trace(space["prompt"]).logits[0, -1].argmax())]) == "7"
    assert torch.isfinite(space["logits"]).all()
