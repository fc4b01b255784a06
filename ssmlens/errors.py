"""What a caller can get wrong. Each message is one sentence that says what was found and what is valid."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "LayerError",
    "MemoryLimitError",
    "PromptError",
    "ReconstructionError",
    "SsmlensError",
    "UnsupportedModelError",
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
