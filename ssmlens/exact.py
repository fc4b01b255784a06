"""float64 models that really compute in float64.

transformers' state space models cast to float32 in several places whatever the model's dtype: A_log, the scan's
inputs, both norms, the residual and the logits. A float64 model is therefore only good to 1e-7. Inside
`KeepFloat64` such casts of float64 tensors do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["KeepFloat64", "keep_float64"]


class KeepFloat64(TorchFunctionMode):
    """While active in this thread, a float64 tensor is never cast to float32 by ``float()`` or ``to(float32)``."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.float, Tensor.to) and args and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = (args[0], *(torch.float64 if a is torch.float32 else a for a in args[1:]))
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def keep_float64(model: nn.Module) -> None:
    """Make every forward of a float64 model run inside `KeepFloat64`.

    The model's class is exchanged for a subclass of the same name, so copies, pickles, hooks, saving and
    ``isinstance`` go on as before. Doing it twice does nothing more.
    """
    if not getattr(type(model), "_keeps_float64", False):
        model.__class__ = _keeping(type(model))


_KEEPING: dict[type[nn.Module], type[nn.Module]] = {}


def _keeping(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward keeps float64, the same one every time."""
    if cls not in _KEEPING:
        _KEEPING[cls] = _subclass(cls)
    return _KEEPING[cls]


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if next(self.parameters()).dtype != torch.float64:
            return original(self, *args, **kwargs)
        with KeepFloat64():
            return original(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, which is that of the original.
        return (_empty, (cls,), *cls.__reduce_ex__(self, protocol)[2:])

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_keeps_float64": True,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), body)


def _empty(cls: type[nn.Module]) -> nn.Module:
    """An object whose state pickle or copy fills in."""
    kept = _keeping(cls)
    model: nn.Module = kept.__new__(kept)
    return model
