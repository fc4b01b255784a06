"""What a card says of a model: held-out bits per byte, recall from context, recall by load, samples."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import recall_task
from .data import END, HeldOut
from .keyvalue import generate, sentences

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

__all__ = [
    "LOADS", "bits_per_byte", "held_out_scores", "key_value_recall", "recall_table", "samples", "snippet_score",
]  # fmt: skip

# (tokens, pairs) of the accuracy table; training uses 64 tokens and 2, 4, 8 or 16 pairs.
LOADS = (
    (32, 4), (32, 8), (64, 4), (64, 8), (64, 16), (128, 8), (128, 16), (128, 26), (256, 8), (256, 16),
    (256, 26), (512, 8), (512, 16), (1024, 8), (1024, 16),
)  # fmt: skip
RECALL_SEED = 10_000
KEY_VALUE_SEED = 2
PROMPTS = (
    "The captain walked slowly toward the window, and",
    "It was a truth which",
    "Question: What is the capital of France? Answer:",
    "The function returns",
)


def _windows(ids: np.ndarray, window: int) -> list[tuple[np.ndarray, int]]:
    """Windows of a document and how many of their first predictions are context only.

    Every window but the first starts half a window before the tokens it scores.
    """
    half = window // 2
    found, scored = [], 1
    while scored < len(ids):
        start = 0 if scored == 1 else scored - half
        stop = min(start + window, len(ids))
        found.append((ids[start:stop], scored - start - 1))
        scored = stop
    return found


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, documents: Sequence[np.ndarray], n_bytes: int, window: int = 1024, rows: int = 16
) -> float:
    """Bits that a model needs for a byte of the documents.

    Args:
        model: a causal language model in eval mode.
        documents: token ids; the first token of each is context only.
        n_bytes: size of their text in bytes.
        window: tokens that the model sees at once; a token is scored with at least half a window before it,
            or all the document has.
        rows: windows run together.
    """
    device = next(model.parameters()).device
    cut = sorted((w for ids in documents for w in _windows(ids, window)), key=lambda w: -len(w[0]))
    total = 0.0
    for i in range(0, len(cut), rows):
        group = cut[i : i + rows]
        length = len(group[0][0])
        ids = torch.zeros(len(group), length, dtype=torch.long)
        scored = torch.zeros(len(group), length - 1, dtype=torch.bool)
        for j, (tokens, skip) in enumerate(group):
            ids[j, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            scored[j, skip : len(tokens) - 1] = True
        ids, scored = ids.to(device), scored.to(device)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total += float(loss[scored.flatten()].double().sum())
    return total / math.log(2) / n_bytes


def held_out_scores(model: PreTrainedModel, held_out: Sequence[HeldOut], window: int = 1024) -> dict[str, float]:
    """Bits per byte by group of held-out documents, and over all of them.

    Args:
        model: a causal language model in eval mode.
        held_out: the documents of a pack.
        window: tokens that the model sees at once.
    """
    scores: dict[str, float] = {}
    bits, size = 0.0, 0
    for group in dict.fromkeys(h.group for h in held_out):
        chosen = [h for h in held_out if h.group == group]
        n_bytes = sum(h.n_bytes for h in chosen)
        scores[group] = bits_per_byte(model, [h.ids for h in chosen], n_bytes, window)
        bits, size = bits + scores[group] * n_bytes, size + n_bytes
    return scores | {"all": bits / size}


def snippet_score(model: PreTrainedModel, tokenizer: Tokenizer) -> float:
    """Bits per byte of the shipped pages of Persuasion, which anyone can measure again.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
    """
    text = (Path(__file__).parent / "passages" / "persuasion.txt").read_text(encoding="utf-8").rstrip("\n")
    return bits_per_byte(model, [np.array([0, *tokenizer.encode(text).ids])], len(text.encode()))


@torch.no_grad()
def key_value_recall(
    model: PreTrainedModel, tokenizer: Tokenizer, narrative: str, texts: int = 200, seed: int = KEY_VALUE_SEED
) -> dict[str, Any]:
    """How often the whole value is the model's first choice when a key is asked for the first time.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        narrative: held-out text whose short paragraphs stand between the lines and the questions.
        texts: generated texts.
        seed: of the generator; the training text used another.

    Returns:
        accuracy in [0, 1], the number of questions, ``chance`` (mean of 1 / pairs: a value of the text named
        at random) and accuracy by number of pairs.
    """
    device = next(model.parameters()).device
    rng = random.Random(seed)
    fillers = sentences(narrative)
    by_pairs: dict[int, list[bool]] = {}
    for _ in range(texts):
        made = generate(rng, fillers)
        encoding = tokenizer.encode(made.text)
        ids = torch.tensor([[0, *encoding.ids]], device=device)
        best = model(ids[:, :-1], use_cache=False).logits[0].argmax(-1)  # best[i] predicts token i of the text
        right = (best == ids[0, 1:]).tolist()
        seen: set[int] = set()
        for answer in made.answers:
            if answer.pair in seen:
                continue
            seen.add(answer.pair)
            places = [i for i, (a, b) in enumerate(encoding.offsets) if b > answer.start and a < answer.stop]
            by_pairs.setdefault(len(made.pairs), []).append(all(right[i] for i in places))
    everything = [hit for hits in by_pairs.values() for hit in hits]
    return {
        "accuracy": sum(everything) / len(everything),
        "questions": len(everything),
        "chance": sum(len(hits) / pairs for pairs, hits in by_pairs.items()) / len(everything),
        "by_pairs": {str(k): sum(hits) / len(hits) for k, hits in sorted(by_pairs.items())},
        "seed": seed,
    }


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, ids: Tensor, targets: Tensor, tokens: int = 2**15) -> float:
    """Accuracy on a batch of the recall task, run in slices of at most ``tokens`` tokens."""
    device = next(model.parameters()).device
    rows = max(1, tokens // ids.shape[1])
    hits = asked = 0
    for i in range(0, len(ids), rows):
        some = targets[i : i + rows].to(device)
        best = model(ids[i : i + rows].to(device), use_cache=False).logits.argmax(-1)
        hits += int((best == some)[some >= 0].sum())
        asked += int((some >= 0).sum())
    return hits / asked


def recall_table(
    model: PreTrainedModel, loads: Sequence[tuple[int, int]] = LOADS, size: int = 500, seed: int = RECALL_SEED
) -> list[dict[str, float]]:
    """Accuracy against length and load.

    Args:
        model: a recall model in eval mode.
        loads: pairs of (tokens, key-value pairs).
        size: sequences for each load.
        seed: of the first load; later ones count up. Training used seeds below it.
    """
    rows = []
    for i, (length, pairs) in enumerate(loads):
        drawn = recall_task.batch(size, length, pairs, seed + i)
        rows.append({"length": length, "pairs": pairs, "accuracy": recall_accuracy(model, drawn.ids, drawn.targets)})
    return rows


@torch.no_grad()
def samples(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str] = PROMPTS, tokens: int = 80, seed: int = 0
) -> list[dict[str, str]]:
    """Continuations drawn at temperature 0.8 from the 40 likeliest tokens, with the seed set before each.

    Args:
        model: a causal language model in eval mode, with transformers' own scans in place.
        tokenizer: its tokenizer.
        prompts: texts to continue.
        tokens: most tokens to add.
        seed: of torch.
    """
    device = next(model.parameters()).device
    found = []
    for prompt in prompts:
        torch.manual_seed(seed)
        ids = torch.tensor([[0, *tokenizer.encode(prompt).ids]], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=40
        )
        text = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=False)
        found.append({"prompt": prompt, "continuation": text.split(END)[0]})
    return found
