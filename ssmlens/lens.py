"""`Lens`: a model that can be looked into. `Lens.trace` runs it once and hands out every mixer's recurrence."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.errors import LayerError
from ssmlens.exact import keep_float64
from ssmlens.models.family import Family
from ssmlens.prompt import Batch, prepare
from ssmlens.quiet import quiet_transformers
from ssmlens.recorder import CHECKED_PREFIX, Recorder
from ssmlens.tap import Tap, find_mixers, tapping
from ssmlens.trace import LayerInfo, Trace

__all__ = ["SCANS", "Lens"]

SCANS = ("auto", "model", "fast")
"""Who computes the scans of a traced forward, see `Lens.trace`."""

AUTO_TOKENS = 512
"""Up to this many tokens (rows x length) ``scan="auto"`` runs the model's own scans: they cost little there."""


@dataclass(frozen=True, eq=False)
class Lens:
    """A causal language model with state space mixers, and its tokenizer.

    Use `ssmlens.load` to make one.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer, or None: then prompts are token ids.
        name: how figures call the model.
    """

    model: nn.Module
    tokenizer: Any
    name: str

    def __post_init__(self) -> None:
        if self.dtype == torch.float64:
            keep_float64(self.model)

    @functools.cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """One descriptor per model layer."""
        prefix = next(name for name, m in self.model.named_modules() if m is self._layer_list)
        described = []
        for index in range(len(self._layer_list)):
            found = self._mixers.get(index)
            path = f"{prefix}.{index}" + (f".{found[0]}" if found and found[0] else "")
            described.append(LayerInfo(index, "ssm" if found else "other", found[2].name if found else None, path))
        return tuple(described)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding rows included."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @functools.cached_property
    def has_head(self) -> bool:
        """True where the final norm and the unembedding are known, which lenses on the residual stream need."""
        return bool(_head(self.model))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the configuration, the dtype or the weights."""
        digest = hashlib.sha256(json.dumps(self.model.config.to_dict(), sort_keys=True, default=str).encode())  # type: ignore[union-attr, operator]
        for name, x in self.model.state_dict().items():
            flat = x.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)].double().cpu()
            digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _layer_list(self) -> nn.ModuleList:
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=lambda m: len(find_mixers(list(m))))

    @functools.cached_property
    def _mixers(self) -> dict[int, tuple[str, nn.Module, Family]]:
        return find_mixers(list(self._layer_list))

    def trace(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Tensor,
        layers: Iterable[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        scan: str = "auto",
    ) -> Trace:
        """Run the model once and record every mixer's recurrence.

        Rows of different length are padded on the right, and padding is silent: row i of the trace equals the trace
        of prompt i alone. Rows that come padded on the left are moved to the right.

        Args:
            prompt: a text, several texts, token ids, or a LongTensor (t,) or (b, t).
            layers: the layers to record; all with a recurrence by default.
            attention_mask: (b, t) of 0 and 1 for a (b, t) prompt with padding, the real tokens of a row contiguous.
            scan: "model" runs the model's own scans: the logits are bitwise those of the untapped model, and
                ``reconstruction_error`` compares the whole pass. "fast" computes the scans with ssmlens.kernels
                instead and compares the first 32 tokens of every layer with the model's own scan; the logits then
                differ from the model's by rounding. "auto" is "model" up to 512 tokens and "fast" beyond.

        Returns:
            The trace. ``reconstruction_error`` of a layer is the largest relative error of three comparisons with the
            model's own numbers: the mixer output, the scan output, and the scan's value recomputed from the mixer's
            input and weights.

        Raises:
            PromptError: when the prompt is empty, outside the vocabulary, or text without a tokenizer.
            LayerError: when a layer does not exist or has no recurrence.
        """
        if scan not in SCANS:
            raise ValueError(f"unknown scan {scan!r}: choose one of {', '.join(SCANS)}")
        chosen = self._choose(layers)
        batch = prepare(prompt, self.tokenizer, self.vocab_size, attention_mask)
        how = scan if scan != "auto" else "model" if batch.ids.numel() <= AUTO_TOKENS else "fast"
        recorder = Recorder(how, batch.lengths.to(self.device) if batch.padded else None)
        residuals, logits, tap = self._forward(batch, recorder, chosen if how == "model" else None)
        mixers = recorder.finish({k: self._mixers[k][1] for k in chosen}, tap)
        return Trace(
            ids=batch.ids,
            tokens=batch.tokens,
            logits=logits,
            lengths=batch.lengths,
            layers=self.layers,
            mixers=mixers,
            residuals=residuals,
            settings=self._settings(how),
            head=_head(self.model),
        )

    def verify(self, prompt: str | Sequence[str] | Sequence[int] | Tensor) -> dict[int, float]:
        """Layer to reconstruction error against the model's own scans over the whole prompt."""
        return self.trace(prompt, scan="model").reconstruction_error

    def _choose(self, layers: Iterable[int] | None) -> list[int]:
        if layers is None:
            return sorted(self._mixers)
        try:
            chosen = sorted({operator.index(k) for k in layers})
        except TypeError as error:
            raise LayerError(f"layers is a list of layer indices, got {layers!r}") from error
        for k in chosen:
            if k not in self._mixers:
                what = "does not exist" if not 0 <= k < len(self.layers) else "has no recurrence"
                raise LayerError(f"layer {k} {what}: choose from layers {_ranges(sorted(self._mixers))}")
        return chosen

    def _forward(
        self, batch: Batch, recorder: Recorder, only: list[int] | None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tap]:
        """One tapped forward without gradients: residual stream per layer, logits, tap."""
        residuals: dict[int, Tensor] = {}
        mixers = {k: m for k, m in self._mixers.items() if only is None or k in only}
        # The untapped call has no mask when nothing is padded, so this one has none either.
        extra = {"attention_mask": batch.mask.to(self.device)} if batch.padded else {}
        owner = threading.get_ident()
        handles = []

        # Another thread may run the same model at the same time: what it computes is not this trace's.
        def keep(k: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if threading.get_ident() == owner:
                    residuals[k] = args[0] if args else kwargs["hidden_states"]

            return hook

        def keep_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == owner:
                residuals[len(self._layer_list)] = output[0] if isinstance(output, tuple) else output

        with tapping(mixers, recorder.on_scan) as tap, torch.no_grad(), quiet_transformers():
            # Read under the tap's lock: before it, another trace may hold the model in eval.
            modes = {m: m.training for m in self.model.modules()}
            try:
                self.model.eval()
                for k, layer in enumerate(self._layer_list):
                    handles.append(layer.register_forward_pre_hook(keep(k), with_kwargs=True))
                if len(self._layer_list):
                    handles.append(self._layer_list[-1].register_forward_hook(keep_last))
                logits = self.model(input_ids=batch.ids.to(self.device), return_dict=True, **extra).logits
            finally:
                for handle in handles:
                    handle.remove()
                for module, training in modes.items():
                    module.training = training
        return tuple(residuals[k] for k in range(len(self._layer_list) + 1)), logits, tap

    def _settings(self, how: str) -> dict[str, Any]:
        import transformers

        from ssmlens import __version__

        config = self.model.config
        return {
            "model": self.name,
            "model_type": getattr(config, "model_type", type(self.model).__name__),
            "fingerprint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "scan": how,
            "checked_tokens": "all" if how == "model" else CHECKED_PREFIX,
            "versions": {
                "ssmlens": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def __repr__(self) -> str:
        kinds = sorted({layer.family for layer in self.layers if layer.family})
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Lens({self.name!r}, {len(self.layers)} layers of {', '.join(kinds)}, {dtype} on {self.device})"


def _head(model: Any) -> dict[str, Tensor]:
    """The final norm and the unembedding, by reference; empty for a model that keeps them elsewhere."""
    norm, unembedding = getattr(model.base_model, "norm_f", None), model.get_output_embeddings()
    if norm is None or unembedding is None or not hasattr(norm, "variance_epsilon"):
        return {}
    head = {"norm.weight": norm.weight.detach(), "unembedding.weight": unembedding.weight.detach()}
    head["norm.eps"] = torch.tensor(norm.variance_epsilon, dtype=torch.float64)
    if unembedding.bias is not None:
        head["unembedding.bias"] = unembedding.bias.detach()
    return head


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for k in numbers:
        if parts and parts[-1][-1] == k - 1:
            parts[-1].append(k)
        else:
            parts.append([k])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
