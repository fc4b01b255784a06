"""Tiny random models for tests: untrained, fast, deterministic, and saved as real transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 258  # the 256 byte symbols, <|end|> and <|pad|>


def tiny_mamba1(seed: int = 0, **config: Any) -> Any:
    """A random Mamba-1 of three layers: 64 channels with 8 states each; ``config`` overrides a setting."""
    from transformers import MambaConfig, MambaForCausalLM

    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
    torch.manual_seed(seed)
    return MambaForCausalLM(MambaConfig(**{**settings, **_special_tokens(), **config})).eval()


def tiny_mamba2(seed: int = 0, **config: Any) -> Any:
    """A random Mamba-2 of three layers: 8 heads of 8 channels, 16 states, 2 groups; ``config`` overrides."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
    }
    torch.manual_seed(seed)
    return Mamba2ForCausalLM(Mamba2Config(**{**settings, **_special_tokens(), **config})).eval()


def tiny_tokenizer() -> Any:
    """A byte tokenizer: every byte of the UTF-8 text is one token, so any text has a known length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<|end|>", "<|pad|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def save_tiny(folder: Path | str, model: Any = None) -> Path:
    """Save a tiny model (default: Mamba-2) and its tokenizer as a transformers folder; returns the folder."""
    folder = Path(folder)
    (tiny_mamba2() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _special_tokens() -> dict[str, int]:
    end, pad = VOCABULARY - 2, VOCABULARY - 1
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
