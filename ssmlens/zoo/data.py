"""Packs the training text into token files: ``python -m ssmlens.zoo.data --text DIR --out DIR``.

A pack is a folder with ``tokenizer.json``, one file of uint16 token ids for each part, ``heldout.bin`` and
``meta.json``. Documents start with the end-of-text token, which is the only context of a first token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .corpus import Document, hold_out, read_parts
from .keyvalue import generate, sentences

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END", "VOCABULARY", "HeldOut", "Pack", "build", "encode", "train_tokenizer"]

END = "<|endoftext|>"
VOCABULARY = 4096
KEY_VALUE_SEED = 1
KEY_VALUE_TOKENS = 3_000_000


def _pieces(documents: Iterable[str], size: int = 20_000) -> Iterator[str]:
    """Long documents in pieces cut between paragraphs, so that the trainer never holds one huge string."""
    for document in documents:
        start = 0
        while start < len(document):
            stop = document.find("\n\n", start + size)
            stop = len(document) if stop < 0 else stop
            yield document[start:stop]
            start = stop


def train_tokenizer(parts: dict[str, list[str]], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE trained on the training text; its first entry ends a text.

    Args:
        parts: training documents by part.
        vocabulary: number of entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(d for documents in parts.values() for d in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Documents as one uint16 array, each preceded by the end-of-text token."""
    ids = []
    for document in documents:
        pieces = tokenizer.encode_batch(list(_pieces([document])))
        ids.append(np.array([0, *(i for piece in pieces for i in piece.ids)], dtype=np.uint16))
    return np.concatenate(ids) if ids else np.zeros(0, dtype=np.uint16)


def _key_value_texts(parts: dict[str, list[str]], seed: int, count: int) -> list[str]:
    """Generated key-value texts with short paragraphs of the narrative in between."""
    rng = random.Random(seed)
    fillers = [line for d in parts["narrative"] for line in sentences(d)]
    return [generate(rng, fillers).text for _ in range(count)]


@dataclass(frozen=True)
class HeldOut:
    """One held-out document: its group and title, its tokens (the first ends a text) and its size in bytes."""

    group: str
    title: str
    ids: np.ndarray
    n_bytes: int


@dataclass(frozen=True)
class Pack:
    """A packed text: tokens by part, held-out documents, and the tokenizer's JSON."""

    parts: dict[str, np.ndarray]
    held_out: list[HeldOut]
    tokenizer_json: str
    meta: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)

    def save(self, directory: str | Path) -> Path:
        """Write the pack as a folder."""
        out = Path(directory)
        out.mkdir(parents=True, exist_ok=True)
        for name, ids in self.parts.items():
            ids.tofile(out / f"{name}.bin")
        np.concatenate([h.ids for h in self.held_out]).tofile(out / "heldout.bin")
        (out / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        (out / "meta.json").write_text(json.dumps(self.meta, indent=1), encoding="utf-8")
        return out

    @classmethod
    def load(cls, directory: str | Path) -> Pack:
        """Read a pack folder.

        Raises:
            FileNotFoundError: when the folder is no pack.
        """
        source = Path(directory)
        if not (source / "meta.json").is_file():
            raise FileNotFoundError(f"{source} is no pack: it has no meta.json")
        meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
        parts = {name: np.fromfile(source / f"{name}.bin", dtype=np.uint16) for name in meta["tokens"]}
        ids = np.fromfile(source / "heldout.bin", dtype=np.uint16)
        held, start = [], 0
        for d in meta["held_out"]:
            held.append(HeldOut(d["group"], d["title"], ids[start : start + d["tokens"]], d["bytes"]))
            start += d["tokens"]
        return cls(parts, held, (source / "tokenizer.json").read_text(encoding="utf-8"), meta)


def build(text: str | Path, vocabulary: int = VOCABULARY, key_value_tokens: int = KEY_VALUE_TOKENS) -> Pack:
    """Read, split, tokenize and pack a text; the same text gives the same pack.

    Args:
        text: directory of the text, see :func:`ssmlens.zoo.corpus.read_parts`.
        vocabulary: entries of the byte-level BPE.
        key_value_tokens: about how many tokens of generated key-value texts to add.

    Raises:
        FileNotFoundError: a text file is missing.
        ValueError: a document that is to be held out is not there.
    """
    parts, held = hold_out(read_parts(text))
    tokenizer = train_tokenizer(parts, vocabulary)
    packed = {name: encode(tokenizer, documents) for name, documents in parts.items()}
    probe = encode(tokenizer, _key_value_texts(parts, KEY_VALUE_SEED, 50))
    texts = max(1, round(50 * key_value_tokens / len(probe)))
    packed["keyvalue"] = encode(tokenizer, _key_value_texts(parts, KEY_VALUE_SEED, texts))
    held_out = [_held(tokenizer, document) for document in held]
    meta = {
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens": {name: len(ids) for name, ids in packed.items()},
        "bytes": {name: sum(len(d.encode()) for d in documents) for name, documents in parts.items()},
        "documents": {name: len(documents) for name, documents in parts.items()},
        "sha256": {
            name: hashlib.sha256("\n\n\n".join(documents).encode()).hexdigest() for name, documents in parts.items()
        },
        "key_value_seed": KEY_VALUE_SEED,
        "key_value_texts": texts,
        "held_out": [{"group": h.group, "title": h.title, "tokens": len(h.ids), "bytes": h.n_bytes} for h in held_out],
    }
    return Pack(packed, held_out, tokenizer.to_str(), meta)


def _held(tokenizer: Tokenizer, document: Document) -> HeldOut:
    ids = encode(tokenizer, [document.text])
    return HeldOut(document.group, document.title, ids, len(document.text.encode()))


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ssmlens.zoo.data", description="Pack the training text.")
    parser.add_argument("--text", required=True, help="directory with narrative, facts and technical .txt[.xz]")
    parser.add_argument("--out", required=True, help="folder to write the pack to")
    options = parser.parse_args(arguments)
    try:
        pack = build(options.text)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    pack.save(options.out)
    print(json.dumps(pack.meta["tokens"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
