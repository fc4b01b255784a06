"""What a caller can get wrong. Each message is one sentence that says what was found and what is valid."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "LayerError",
    "MemoryLimitError",
    "PromptError",
    "ReconstructionError",
    "SsmlensError",
    "UnsupportedModelError",
    "brief",
    "few",
]


class SsmlensError(ValueError):
    """Base of every error that a caller can mend. The command line prints it and exits with 2."""


class PromptError(SsmlensError):
    """The prompt is empty, outside the vocabulary or of no known type."""


class CheckpointError(SsmlensError):
    """A checkpoint is missing, damaged, incomplete or not numeric."""


class UnsupportedModelError(SsmlensError):
    """No lowering is registered for this model."""


class MemoryLimitError(SsmlensError):
    """A result would be larger than the limit; raised before anything is allocated."""


class ReconstructionError(SsmlensError):
    """The rebuilt mixer output differs from the model's own by more than the tolerance."""


class LayerError(SsmlensError, KeyError):
    """The layer does not exist or holds no recurrence."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message.
        return str(self.args[0])


def brief(error: Exception, most: int = 300) -> str:
    """What a library's error says, on one line and cut to ``most`` characters."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text recommends to load without weights_only, which would run the file's code.
        return "the file is damaged or holds more than plain tensors, and no pickle is executed"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
