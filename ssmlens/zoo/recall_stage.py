"""The second stage of the English models: text as before, mixed with windows full of questions.

In plain text and in short key-value texts a model of this size and budget learns the frequency of values,
not to look them up. The plateau before recall ends after some 10^6 supervised recalls
(:mod:`ssmlens.zoo.recall_task`); windows of :mod:`ssmlens.zoo.dense` hold about 25 each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data import END, Pack
from .dense import Windows, make_windows
from .keyvalue import sentences
from .loop import Batch, Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .english import Sampler

__all__ = ["ASKED_WEIGHT", "WINDOWS", "RecallMix", "dense_share", "reachable_share", "windows_of_pack"]

# Half of a dense window's tokens are keys and numbers drawn at random: a loss that cannot fall, and noise. The
# asked values are a sixth of them; at weight 4 they are near half of a window's loss before recall is learnt, and
# weigh nothing once it is.
ASKED_WEIGHT = 4.0
WINDOWS = 20_000
PROBE_WINDOWS = 32
PROBE_SEED = 900
NARRATIVE_TOKENS = 3_000_000


def dense_share(spent: float) -> float:
    """Share of a batch that is dense windows: 0.6 at first, from 80 % of the stage on 0.15."""
    return 0.6 + (0.15 - 0.6) * min(1.0, max(0.0, spent) / 0.8)


def reachable_share(spent: float) -> float:
    """Share of the ordered windows that are drawn from: the easiest tenth at first, all from 40 % of the stage on."""
    return 0.1 + 0.9 * min(1.0, max(0.0, spent) / 0.4)


def windows_of_pack(pack: Pack, count: int, length: int, seed: int) -> Windows:
    """Dense windows whose prose is that of the training text.

    Args:
        pack: the packed text.
        count: windows.
        length: tokens of a window, not counting the one to predict.
        seed: of the generator.
    """
    text = pack.tokenizer.decode(pack.parts["narrative"][:NARRATIVE_TOKENS].tolist(), skip_special_tokens=False)
    fillers = [line for document in text.split(END) for line in sentences(document)]
    jobs = 1 if count < 1000 else max(1, min(8, (os.cpu_count() or 1) // 2))
    return make_windows(pack.tokenizer_json, fillers, count, length, seed, jobs)


class RecallMix:
    """Batches of the recall stage, and a look at how far recall is.

    Args:
        pack: the packed text.
        text: the sampler of the first stage.
        device: where the tokens live.
        length: tokens of a window.
        seed: of the windows and of the draws.
        windows: how many dense windows.
    """

    def __init__(self, pack: Pack, text: Sampler, device: torch.device, length: int, seed: int, windows: int) -> None:
        self.text = text
        made = windows_of_pack(pack, windows + PROBE_WINDOWS, length, seed)
        # every k-th window is kept from training, so that the probe spans all difficulties
        kept = torch.zeros(len(made.ids), dtype=torch.bool)
        kept[torch.linspace(0, len(kept) - 1, PROBE_WINDOWS).long()] = True
        ids, asked = torch.from_numpy(made.ids.astype("int32")), torch.from_numpy(made.asked)
        self.ids, self.asked = ids[~kept].to(device), asked[~kept].to(device)
        self.probe_ids, self.probe_asked = ids[kept].to(device).long(), asked[kept].to(device)
        self.random = torch.Generator(device).manual_seed(seed)

    def draw(self, rows: int, share: float) -> tuple[Tensor, Tensor]:
        """ids (rows, length + 1) and asked, from the first ``share`` of the windows."""
        reach = max(1, round(share * len(self.ids)))
        chosen = torch.randint(reach, (rows,), generator=self.random, device=self.ids.device)
        return self.ids[chosen].long(), self.asked[chosen]

    def batches(self, rows: int, budget: Budget) -> Iterator[Batch]:
        """Endless (ids, targets, weights), the mix following how much of the budget is spent."""
        step = 0
        while True:
            spent = budget.spent(step)
            dense = max(1, round(dense_share(spent) * rows))
            ids, asked = self.draw(dense, reachable_share(spent))
            weights = 1 + (ASKED_WEIGHT - 1) * asked.float()
            if dense < rows:
                text = self.text.draw(rows - dense)
                ids, weights = torch.cat([ids, text]), torch.cat([weights, torch.ones_like(text).float()])
            yield ids[:, :-1], ids[:, 1:], weights[:, 1:]
            step += 1

    @torch.no_grad()
    def probe(self, model: PreTrainedModel) -> dict[str, float]:
        """Share of the asked tokens that are the first choice, in the easier and the harder half of kept windows."""
        best = model(self.probe_ids[:, :-1], use_cache=False).logits.argmax(-1)
        asked, half = self.probe_asked[:, 1:], len(self.probe_ids) // 2
        right = (best == self.probe_ids[:, 1:]) & asked
        easy, hard = (float(right[s].sum() / asked[s].sum().clamp(min=1)) for s in (slice(half), slice(half, None)))
        return {"recall_easy": round(easy, 4), "recall_hard": round(hard, 4)}
