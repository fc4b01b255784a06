"""The inputs of one causal linear recurrence, as plain tensors, and their checks.

Every kernel of this folder computes, per batch row ``b`` and head ``h``::

    h[t] = exp(log_decay[t]) * h[t-1]                              state (p, n)
    h[t] = h[t] - outer(h[t] @ erase_read[t], erase_write[t])      only with a delta rule
    h[t] = h[t] + outer(value[t], dt[t] * write[t])                dt = 1 when absent
    y[t] = h[t] @ read[t]                                          output (p,)

The state after step t contains token t. Axes: ``b`` batch, ``t`` time, ``h`` head, ``g`` group
(heads ``i * h // g`` up to ``(i + 1) * h // g`` share group i), ``p`` channel in head, ``n`` state.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["ScanInputs", "compute_dtype", "expand_groups"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel computes in: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand_groups(x: Tensor, n_heads: int) -> Tensor:
    """Repeat the group axis to heads without copying: (b, t, g, n) -> (b, t, h, n)."""
    groups = x.shape[2]
    if groups == n_heads:
        return x
    if groups == 1:
        return x.expand(*x.shape[:2], n_heads, x.shape[3])
    return x.repeat_interleave(n_heads // groups, dim=2)


@dataclass(frozen=True)
class ScanInputs:
    """Inputs of the recurrence; pieces that a model shares or factorises stay so.

    The decay is either ``log_decay`` itself, or ``dt * A`` (then ``log_decay`` is None and the
    (b, t, h, n) tensor never exists). A ``dt`` also scales the write, as in Mamba.

    Args:
        value: (b, t, h, p) what is written.
        write: (b, t, g, n) write direction, before ``dt``.
        read: (b, t, g, n) read direction.
        log_decay: (b, t, h, 1) or (b, t, h, n) natural log of the decay, <= 0; -inf forgets.
        dt: (b, t, h) step size, >= 0.
        A: (h, 1) or (h, n) decay rate, <= 0; used with ``dt``.
        initial: (b, h, p, n) state before the first token; zero when None.
        reset: (b, t) bool; True forgets the state before this token is written (packed sequences).
        erase_read: (b, t, g, n) direction read out and removed before the write (delta rule).
        erase_write: (b, t, g, n) direction along which it is removed.

    Raises:
        ValueError: when shapes, dtypes or the choice of decay do not fit together.
    """

    value: Tensor
    write: Tensor
    read: Tensor
    log_decay: Tensor | None = None
    dt: Tensor | None = None
    A: Tensor | None = None
    initial: Tensor | None = None
    reset: Tensor | None = None
    erase_read: Tensor | None = None
    erase_write: Tensor | None = None

    def __post_init__(self) -> None:
        if self.value.ndim != 4:
            raise ValueError(f"value is (b, t, h, p), got {tuple(self.value.shape)}")
        b, t, h, p = self.value.shape
        n = self.write.shape[-1]
        for name in ("write", "read", "erase_read", "erase_write"):
            x = getattr(self, name)
            if x is None:
                continue
            if x.ndim != 4 or x.shape[:2] != (b, t) or x.shape[3] != n or x.shape[2] == 0 or h % x.shape[2]:
                raise ValueError(f"{name} is (b={b}, t={t}, g, n={n}) with g dividing h={h}, got {tuple(x.shape)}")
        if (self.log_decay is None) == (self.A is None):
            raise ValueError("give the decay once: either log_decay, or A together with dt")
        if self.A is not None:
            if self.dt is None:
                raise ValueError("A needs dt: the decay is dt * A")
            if self.A.shape not in ((h, 1), (h, n)):
                raise ValueError(f"A is (h={h}, 1) or (h={h}, n={n}), got {tuple(self.A.shape)}")
        if self.log_decay is not None and self.log_decay.shape not in ((b, t, h, 1), (b, t, h, n)):
            raise ValueError(f"log_decay is (b={b}, t={t}, h={h}, 1 or n={n}), got {tuple(self.log_decay.shape)}")
        if self.dt is not None and self.dt.shape != (b, t, h):
            raise ValueError(f"dt is (b={b}, t={t}, h={h}), got {tuple(self.dt.shape)}")
        if self.initial is not None and self.initial.shape != (b, h, p, n):
            raise ValueError(f"initial is (b={b}, h={h}, p={p}, n={n}), got {tuple(self.initial.shape)}")
        if self.reset is not None and (self.reset.shape != (b, t) or self.reset.dtype != torch.bool):
            raise ValueError(f"reset is a bool tensor (b={b}, t={t}), got {self.reset.dtype} {tuple(self.reset.shape)}")
        if (self.erase_read is None) != (self.erase_write is None):
            raise ValueError("erase_read and erase_write come together")

    @property
    def batch(self) -> int:
        return self.value.shape[0]

    @property
    def length(self) -> int:
        return self.value.shape[1]

    @property
    def n_heads(self) -> int:
        return self.value.shape[2]

    @property
    def head_dim(self) -> int:
        return self.value.shape[3]

    @property
    def d_state(self) -> int:
        return self.write.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype kernels compute and return: float64 for float64 inputs, else float32."""
        return compute_dtype(self.value.dtype)

    @property
    def has_erase(self) -> bool:
        return self.erase_read is not None

    def tensors(self) -> dict[str, Tensor]:
        """The pieces that are present, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def replace(self, **changes: Tensor | None) -> ScanInputs:
        """A copy with some pieces exchanged, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def cast(self, dtype: torch.dtype | None = None) -> ScanInputs:
        """Every floating piece in one dtype (default: the compute dtype)."""
        dtype = dtype or self.dtype
        return replace(self, **{k: x.to(dtype) for k, x in self.tensors().items() if x.is_floating_point()})

    def map(self, function: Callable[[Tensor], Tensor]) -> ScanInputs:
        """Every piece passed through ``function`` (detach, a move to a device, ...)."""
        return replace(self, **{k: function(x) for k, x in self.tensors().items()})

    def slice(self, start: int, stop: int) -> ScanInputs:
        """Tokens ``start`` to ``stop``; views. ``initial`` is dropped unless ``start`` is 0."""
        cut = {k: x[:, start:stop] for k, x in self.tensors().items() if k not in ("A", "initial")}
        return replace(self, **cut, initial=self.initial if start == 0 else None)

    def select_heads(self, heads: builtins.slice) -> ScanInputs:
        """A contiguous range of heads. Groups stay shared where the range is one or whole groups."""
        start, stop, step = heads.indices(self.n_heads)
        if step != 1 or stop <= start:
            raise ValueError(f"heads is a non-empty contiguous slice of {self.n_heads} heads, got {heads}")
        cut: dict[str, Tensor] = {}
        for name, x in self.tensors().items():
            if name in ("value", "dt", "log_decay"):
                cut[name] = x[:, :, start:stop]
            elif name == "A":
                cut[name] = x[start:stop]
            elif name == "initial":
                cut[name] = x[:, start:stop]
            elif name != "reset":
                per_group = self.n_heads // x.shape[2]
                first, last = start // per_group, (stop - 1) // per_group
                if first == last:
                    cut[name] = x[:, :, first : first + 1]
                elif start % per_group == 0 and stop % per_group == 0:
                    cut[name] = x[:, :, first : last + 1]
                else:
                    cut[name] = expand_groups(x, self.n_heads)[:, :, start:stop]
        return replace(self, **cut)

    def take_heads(self, heads: Sequence[int]) -> ScanInputs:
        """Any heads in any order, copied; groups are kept where all of them share one."""
        chosen = torch.tensor([int(i) for i in heads], dtype=torch.long, device=self.value.device)
        cut: dict[str, Tensor] = {}
        for name, x in self.tensors().items():
            if name in ("value", "dt", "log_decay"):
                cut[name] = x.index_select(2, chosen)
            elif name in ("A", "initial"):
                cut[name] = x.index_select(0 if name == "A" else 1, chosen)
            elif name != "reset":
                groups = sorted({int(i) * x.shape[2] // self.n_heads for i in heads})
                if len(groups) == 1:
                    cut[name] = x[:, :, groups[0] : groups[0] + 1]
                else:
                    cut[name] = x.index_select(2, chosen * x.shape[2] // self.n_heads)
        return replace(self, **cut)

    def full_log_decay(self) -> Tensor:
        """(b, t, h, 1) or (b, t, h, n) in the compute dtype, resets as -inf: small inputs only."""
        if self.log_decay is not None:
            decay = self.log_decay.to(self.dtype)
        else:
            assert self.dt is not None
            assert self.A is not None
            decay = self.dt.to(self.dtype)[..., None] * self.A.to(self.dtype)
        if self.reset is not None:
            decay = decay.masked_fill(self.reset[:, :, None, None], -torch.inf)
        return decay

    def full_write(self) -> Tensor:
        """(b, t, h, n) write direction with ``dt`` included, in the compute dtype."""
        write = expand_groups(self.write.to(self.dtype), self.n_heads)
        return write if self.dt is None else write * self.dt.to(self.dtype)[..., None]
