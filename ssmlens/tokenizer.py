"""A tokenizer.json read by the tokenizers library alone: a fraction of the import time of transformers' classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmlens.errors import CheckpointError, PromptError, few

__all__ = ["FastTokenizer"]


class FastTokenizer:
    """Text to ids and back.

    Special tokens that the file's post-processor adds are part of the ids, as transformers adds them.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._pieces = backend.get_vocab_size()

    @classmethod
    def from_file(cls, path: Path) -> FastTokenizer:
        """Read a tokenizer.json.

        Raises:
            CheckpointError: when the file is damaged.
        """
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} is no tokenizer.json: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            PromptError: naming the words that the vocabulary lacks; taking them for the unknown token would read
                another text than was given.
        """
        encoded = self.backend.encode(text)
        unknown = getattr(self.backend.model, "unk_token", None)
        if unknown is not None:
            spans = (text[a:b] for a, b in encoded.offsets)
            words = [w for token, w in zip(encoded.tokens, spans, strict=True) if token == unknown and w != unknown]
            if words:
                raise PromptError(f"the vocabulary of this model has no {few([repr(w) for w in words])}")
        return list(encoded.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some token ids; special tokens included, partial UTF-8 as U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def __len__(self) -> int:
        return int(self._pieces)
