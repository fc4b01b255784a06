"""The tap: swap the scan functions of a model's modeling modules for the length of one forward.

transformers' mixers look their scan function up by name in the globals of their modeling module. Exchanging that name
hands out the exact arguments of every scan, leaves the logits bitwise equal when the original is then called, and can
compute something else in its place. Hooks on ``conv1d`` and ``dt_proj`` never fire there, because their weights go
straight to functional calls.

Globals belong to the process: one lock lets one tap at a time in, and a wrapper that is called by another thread, or
for a mixer that is not tapped, calls the original.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ssmlens.errors import SsmlensError
from ssmlens.models import FAMILIES, Family

__all__ = ["ScanCall", "Tap", "find_mixers", "tapping"]

_LOCK = threading.RLock()

TAPPED = "_ssmlens_tapped"
"""Attribute of the functions that a tap puts in place of a scan."""


@dataclass(frozen=True)
class ScanCall:
    """One call of a scan function inside a tapped mixer.

    Args:
        layer: index of the mixer among the model's layers.
        family: the family of its scan function.
        arguments: the call's arguments by name, defaults filled in.
        original: the function that the model would have called.
    """

    layer: int
    family: Family
    arguments: Mapping[str, Any]
    original: Callable[..., Any]

    @property
    def is_models_own(self) -> bool:
        """Whether ``original`` is the model's own function, and not that of another tap around this one."""
        return not hasattr(self.original, TAPPED)

    def run(self, **changes: Any) -> Any:
        """What the model's own function returns for these arguments, with some exchanged."""
        return self.original(**{**self.arguments, **changes})


OnScan = Callable[[ScanCall], Any]


@dataclass
class Tap:
    """What one tapped forward has seen. Tensors are the model's own, by reference."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    fired: dict[int, int] = field(default_factory=dict)


def find_mixers(layers: list[nn.Module]) -> dict[int, tuple[str, nn.Module, Family]]:
    """The mixers whose forward calls a known scan function: layer index to (name in layer, module, family)."""
    found: dict[int, tuple[str, nn.Module, Family]] = {}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            names = _names(type(module).forward)
            family = next((f for scan, f in FAMILIES.items() if scan in names), None)
            if family is not None and hasattr(sys.modules[type(module).__module__], family.scan):
                found[index] = (name, module, family)
                break
    return found


def _names(function: Any) -> set[str]:
    """Global names that a function uses, or that the one it decorates does.

    Not every decorator sets ``__wrapped__`` (transformers' ``force_accelerate_hooks`` did not in 5.15), so functions
    in the closure count as well.
    """
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return set()
    names = set(function.__code__.co_names)
    for cell in function.__closure__ or ():
        try:
            names |= _names(cell.cell_contents) if inspect.isfunction(cell.cell_contents) else set()
        except ValueError:  # an empty cell
            continue
    return names


@contextmanager
def tapping(mixers: Mapping[int, tuple[str, nn.Module, Family]], on_scan: OnScan) -> Iterator[Tap]:
    """Call ``on_scan`` in place of every scan of these mixers; its result goes on into the model.

    Everything is put back on the way out, also after an exception.

    Raises:
        SsmlensError: when a mixer ran but its scan never passed the tap, so the caller would have seen nothing.
    """
    tap, owner = Tap(), threading.get_ident()
    inside: list[tuple[int, Family]] = []
    busy = False  # in on_scan: a model that it runs, even this one, is not this tap's

    def enter(layer: int, family: Family) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == owner and not busy:
                inside.append((layer, family))
                tap.inputs[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == owner and not busy and inside and inside[-1][0] == layer:
                inside.pop()
                tap.outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def wrap(original: Callable[..., Any], scan: str) -> Callable[..., Any]:
        # With the kernels package installed the global is a module whose own signature says nothing.
        signature = inspect.signature(original.forward if isinstance(original, nn.Module) else original)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if threading.get_ident() != owner or busy or not inside or inside[-1][1].scan != scan:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            arguments.update(arguments.pop("kwargs", {}))
            layer, family = inside[-1]
            busy = True
            try:
                result = on_scan(ScanCall(layer, family, arguments, original))
            finally:
                busy = False
            tap.fired[layer] = tap.fired.get(layer, 0) + 1
            return result

        setattr(wrapper, TAPPED, True)
        wrapper.__signature__ = signature  # type: ignore[attr-defined]  # a tap inside this one reads it
        return wrapper

    with _LOCK, ExitStack() as stack:
        for module, scan in {(type(m).__module__, f.scan) for _, m, f in mixers.values()}:
            namespace = sys.modules[module]
            original = getattr(namespace, scan)
            setattr(namespace, scan, wrap(original, scan))
            stack.callback(setattr, namespace, scan, original)
        for layer, (_, mixer, family) in mixers.items():
            stack.callback(mixer.register_forward_pre_hook(enter(layer, family), with_kwargs=True).remove)
            stack.callback(mixer.register_forward_hook(leave(layer), always_call=True).remove)
        yield tap
        silent = sorted(set(mixers) - set(tap.fired))
        if silent:
            raise SsmlensError(
                f"the scan of layer {', '.join(map(str, silent))} never passed the tap: the model took a path around "
                f"{', '.join(sorted({f.scan for _, _, f in mixers.values()}))}"
            )
