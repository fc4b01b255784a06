"""What each shipped model is: its configuration, its data and its recipe, in one table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import recall_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RECALL_SHARE", "RECIPES", "Recipe", "make_model", "recall_stage", "recipe"]

RECALL_SHARE = 0.45  # of the budget of an English model, when one command runs both stages


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained.

    family: "mamba1" or "mamba2"; task: "english" or "recall"; config: arguments of the transformers
    configuration; rate: peak learning rate (English models); rates: those tried (recall models, the best
    is kept); batch: sequences a step; length: tokens a sequence; steps: the longest run; warmup: steps.
    """

    name: str
    family: str
    task: str
    config: dict[str, Any]
    batch: int
    length: int
    steps: int
    rates: tuple[float, ...]
    warmup: int
    weight_decay: float
    save_dtype: str
    seed: int = 0

    def smoke(self) -> Recipe:
        """The same recipe at a size that runs in seconds on a CPU."""
        small = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        if self.family == "mamba2":
            small |= {"num_heads": 4, "head_dim": 16, "chunk_size": 16}
        config = self.config | small
        length = 96 if self.task == "english" else 64  # a window of the recall stage tells and asks
        return replace(self, config=config, batch=4, length=length, steps=8, rates=self.rates[:2], warmup=2)


ENGLISH = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 10, "initializer_range": 0.02}
RECALL = {
    "vocab_size": recall_task.VALUES.stop, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.06,
}  # fmt: skip
HEADS = {"n_groups": 1, "chunk_size": 64}
COMMON = {
    "expand": 2, "conv_kernel": 4, "tie_word_embeddings": True, "rescale_prenorm_residual": True,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def _english(family: str, config: dict[str, Any]) -> Recipe:
    return Recipe(
        f"{family}-english", family, "english", COMMON | ENGLISH | config, batch=64, length=512, steps=40_000,
        rates=(3e-3,), warmup=200, weight_decay=0.1, save_dtype="float16",
    )  # fmt: skip


def _recall(family: str, config: dict[str, Any]) -> Recipe:
    return Recipe(
        f"{family}-recall", family, "recall", COMMON | RECALL | config, batch=256,
        length=recall_task.TRAINING_LENGTH, steps=8_000, rates=(1e-3, 3e-3, 5e-3, 1e-2), warmup=100,
        weight_decay=0.01, save_dtype="float32",
    )  # fmt: skip


RECIPES = {
    r.name: r
    for r in (
        _english("mamba1", {"state_size": 16}),
        _english("mamba2", HEADS | {"state_size": 64, "num_heads": 8, "head_dim": 64}),
        _recall("mamba1", {"state_size": 16}),
        _recall("mamba2", HEADS | {"state_size": 16, "num_heads": 4, "head_dim": 32}),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of a shipped model.

    Raises:
        KeyError: for a name that is none of them.
    """
    if name not in RECIPES:
        raise KeyError(f"no recipe {name!r}: the models are {', '.join(RECIPES)}")
    return RECIPES[name]


def recall_stage(plan: Recipe) -> Recipe:
    """The recipe of the second stage of an English model: half the learning rate, other draws."""
    return replace(
        plan, rates=tuple(rate / 2 for rate in plan.rates), warmup=(plan.warmup + 1) // 2, seed=plan.seed + 1_000
    )


def make_model(family: str, config: dict[str, Any]) -> PreTrainedModel:
    """An untrained transformers model; the caller seeds torch.

    Args:
        family: "mamba1" or "mamba2".
        config: arguments of MambaConfig or Mamba2Config.
    """
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    if family == "mamba1":
        return MambaForCausalLM(MambaConfig(**config))
    model = Mamba2ForCausalLM(Mamba2Config(**config))
    # transformers starts head i at A = -i; the published models draw A uniformly from [1, 16] (Dao & Gu 2024).
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.A_log.uniform_(1.0, 16.0).log_()
    return model
