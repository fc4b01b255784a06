"""One forward pass with something changed in it.

The model runs its own code. What is changed goes in through hooks on its layers and mixers, and through
`ssmlens.tap.tapping` in place of its scans. Everything is put back on the way out, also after an exception, and a
change that never came into play is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.errors import LayerError, SsmlensError
from ssmlens.interventions._scan import Scan, Seen
from ssmlens.lens import AUTO_TOKENS, Lens
from ssmlens.prompt import Batch
from ssmlens.quiet import quiet_transformers
from ssmlens.recorder import Recorder
from ssmlens.tap import ScanCall, tapping
from ssmlens.trace import MixerTrace

__all__ = ["Changes", "Watch", "choose_layers", "forward", "run"]

TensorChange = Callable[[Tensor], Tensor]
ScanChange = Callable[[Scan], Any]


@dataclass(frozen=True)
class Changes:
    """What one forward does differently; each entry is a function from the model's tensor to the one that goes on.

    Args:
        scans: layer to a function of `Scan` that returns what the scan function returns.
        residuals: k to a function of the residual stream (b, t, d) entering layer k; the number of layers stands
            for the one after the last.
        outputs: layer to a function of the mixer's output (b, t, d).
        gated: layer to a function of a Mamba-2 mixer's scan output and gate, both (b, t, e), that returns the two
            that its norm gets (None for a gate that is in already).
        embeddings: a function of the token embeddings (b, t, d).
    """

    scans: Mapping[int, ScanChange] = field(default_factory=dict)
    residuals: Mapping[int, TensorChange] = field(default_factory=dict)
    outputs: Mapping[int, TensorChange] = field(default_factory=dict)
    gated: Mapping[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    embeddings: TensorChange | None = None


@dataclass(eq=False)
class Watch:
    """What one changed forward left behind, for whoever wants to see it.

    Args:
        seen: layer to what its changed scan did.
        mixers: layer to the trace of a mixer whose scan was the model's own.
        residuals: k to the residual stream (b, t, d) that entered layer k, changes included.
    """

    seen: dict[int, Seen] = field(default_factory=dict)
    mixers: dict[int, MixerTrace] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)

    def streams(self, changes: Changes, layers: int) -> Changes:
        """The same changes, which also keep every stream as it goes on."""

        def keeping(k: int) -> TensorChange:
            inner = changes.residuals.get(k)

            def keep(x: Tensor) -> Tensor:
                self.residuals[k] = x if inner is None else inner(x)
                return self.residuals[k]

            return keep

        return replace(changes, residuals={k: keeping(k) for k in range(layers + 1)})


def choose_layers(lens: Lens, layers: Any) -> list[int]:
    """The layers that an intervention is asked to touch; all with a recurrence by default.

    Raises:
        LayerError: when there are none, or one does not exist.
    """
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    chosen = lens._choose(layers)
    if not chosen:
        raise LayerError("layers is empty: an intervention without a layer would touch nothing")
    return chosen


def forward(lens: Lens, batch: Batch, changes: Changes, *, gradients: bool = False) -> Tensor:
    """Logits (b, t, v) of the changed model.

    Args:
        lens: the model.
        batch: the prompt; padding is on the right and reaches no real token.
        changes: what is different.
        gradients: differentiate with respect to what the changes bring in; all scans are then those of
            ssmlens.kernels, which keep little.

    Raises:
        SsmlensError: when a change never came into play.
    """
    return run(lens, batch, changes, gradients=gradients).logits


def run(
    lens: Lens,
    batch: Batch,
    changes: Changes,
    *,
    gradients: bool = False,
    cached: bool = False,
    watch: Watch | None = None,
) -> Any:
    """As `forward`, the model's whole output; ``cached`` also makes it hand out its cache, ``watch`` is filled."""
    fast = gradients or batch.ids.numel() > AUTO_TOKENS
    lengths = batch.lengths.to(lens.device) if batch.padded else None
    mixers = {k: m for k, m in lens._mixers.items() if fast or watch is not None or k in changes.scans}
    fired: set[str] = set()
    recorder = None if watch is None else Recorder("fast" if fast else "model", lengths)
    if watch is not None:
        changes = watch.streams(changes, len(lens._layer_list))

    def on_scan(call: ScanCall) -> Any:
        if recorder is not None and call.layer not in changes.scans:
            return recorder.on_scan(call)
        seen = None if watch is None else watch.seen.setdefault(call.layer, Seen())
        scan = Scan(call, lens._mixers[call.layer][1], tap.inputs[call.layer], lengths, fast, seen)
        result = changes.scans[call.layer](scan) if call.layer in changes.scans else scan.plain()
        if seen is not None and seen.recurrence is None:
            seen.recurrence = scan.lowered.recurrence
        return result

    extra = {"attention_mask": batch.mask.to(lens.device)} if batch.padded else {}
    with (
        tapping(mixers, on_scan) as tap,  # also without a scan to change: its lock keeps other passes out
        torch.enable_grad() if gradients else torch.no_grad(),
        quiet_transformers(),
        ExitStack() as stack,
    ):
        _eval_mode(lens.model, stack)
        for handle in _hooks(lens, changes, fired):
            stack.callback(handle.remove)
        output = lens.model(input_ids=batch.ids.to(lens.device), return_dict=True, use_cache=cached, **extra)
    silent = sorted(_names(changes) - fired)
    if silent:
        raise SsmlensError(f"the change of {', '.join(silent)} never came into play, so nothing was touched there")
    if watch is not None and recorder is not None:
        watch.mixers = recorder.finish({k: lens._mixers[k][1] for k in sorted(recorder.seen)}, tap)
    return output


def _eval_mode(model: nn.Module, stack: ExitStack) -> None:
    modes = {m: m.training for m in model.modules()}

    def restore() -> None:
        for module, training in modes.items():
            module.training = training

    stack.callback(restore)
    model.eval()


def _names(changes: Changes) -> set[str]:
    """One name for each hook that has to fire; silent scans are refused by the tap itself."""
    names = {f"residual {k}" for k in changes.residuals} | {f"mixer {k}" for k in changes.outputs}
    names |= {f"gate {k}" for k in changes.gated}
    return names | ({"embeddings"} if changes.embeddings else set())


def _hooks(lens: Lens, changes: Changes, fired: set[str]) -> list[Any]:
    """Handles of all hooks of these changes. Another thread may run the same model: its pass stays as it is."""
    owner, handles = threading.get_ident(), []
    layers = lens._layer_list

    def on_input(name: str, change: TensorChange) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != owner:
                return None
            fired.add(name)
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return hook

    def on_output(name: str, change: TensorChange) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if threading.get_ident() != owner:
                return None
            fired.add(name)
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return hook

    def on_norm(name: str, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if threading.get_ident() != owner:
                return None
            fired.add(name)
            return change(*args)

        return hook

    for k, change in changes.residuals.items():
        if k < len(layers):
            handles.append(layers[k].register_forward_pre_hook(on_input(f"residual {k}", change), with_kwargs=True))
        else:
            handles.append(layers[-1].register_forward_hook(on_output(f"residual {k}", change)))
    for k, change in changes.outputs.items():
        handles.append(lens._mixers[k][1].register_forward_hook(on_output(f"mixer {k}", change)))
    for k, gated in changes.gated.items():
        norm = lens._mixers[k][1].norm
        handles.append(norm.register_forward_pre_hook(on_norm(f"gate {k}", gated)))  # type: ignore[union-attr]
    if changes.embeddings is not None:
        embedding = lens.model.get_input_embeddings()  # type: ignore[operator]
        handles.append(embedding.register_forward_hook(on_output("embeddings", changes.embeddings)))
    return handles
