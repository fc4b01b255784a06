"""Organisms that no transformers class describes: a selective forecaster of a series, and a counter of signs.

Both run on this library's own scan, can be stepped as a pure map with an explicit state, and are stored as a folder
with ``config.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlens.errors import CheckpointError, SsmlensError
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs

__all__ = ["Forecaster", "SignCounter", "load_organism"]


class _Selective(nn.Module):
    """A selective SSM block without convolution: u + W_out (y * silu(z)), y the scan of Mamba-1 with a skip.

    The step is ``slowest / |A|`` at least, so that no state keeps more than exp(-slowest) of itself over a token.
    """

    def __init__(self, d: int, channels: int, n: int, slowest: float) -> None:
        super().__init__()
        self.slowest = slowest
        self.enter = nn.Linear(d, 2 * channels)
        self.select = nn.Linear(channels, channels + 2 * n)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.leave = nn.Linear(channels, d)

    def scan_inputs(self, u: Tensor, initial: Tensor | None = None) -> tuple[ScanInputs, Tensor]:
        """The recurrence of (b, t, d) and the gate (b, t, channels)."""
        n = self.A_log.shape[1]
        x, gate = self.enter(u).chunk(2, -1)
        x = F.silu(x)
        step, write, read = self.select(x).split([x.shape[-1], n, n], -1)
        A = -torch.exp(self.A_log)
        least = self.slowest / torch.exp(self.A_log).amin(1)
        inputs = ScanInputs(
            value=x[..., None], write=write[:, :, None], read=read[:, :, None], dt=F.softplus(step) + least, A=A,
            initial=initial,
        )  # fmt: skip
        return inputs, gate

    def forward(self, u: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(b, t, d) and the state (b, channels, 1, n) before it, to the same after it."""
        inputs, gate = self.scan_inputs(u, initial)
        y, final = scan.run(inputs)
        return self._out(u, y[..., 0], inputs.value[..., 0], gate), final

    def step(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One token (b, d), state (b, channels, n): the same by hand, in operations that torch.func differentiates."""
        inputs, gate = self.scan_inputs(u[:, None])
        assert inputs.dt is not None
        assert inputs.A is not None
        dt, x = inputs.dt[:, 0, :, None], inputs.value[:, 0]
        h = torch.exp(dt * inputs.A) * h + x * dt * inputs.write[:, 0]
        return self._out(u, (h * inputs.read[:, 0]).sum(-1), x[..., 0], gate[:, 0]), h

    def _out(self, u: Tensor, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return u + self.leave((y + self.D * x) * F.silu(gate))


class Forecaster(nn.Module):
    """A stack of selective SSM blocks that forecasts the next value of a series.

    Args:
        series: channels of the series.
        d: residual width.
        layers: blocks.
        channels: of a block.
        n: states of a channel.
        slowest: least decay, nats a step: no state keeps more than exp(-slowest) of itself. In closed loop each state
            adds an exponent; one slower than the series' own contraction would raise the Kaplan-Yorke dimension of the
            loop above that of the series (Badii et al. 1988 on filters).
    """

    kind = "ssmlens-forecaster"

    def __init__(
        self, series: int = 3, d: int = 32, layers: int = 2, channels: int = 32, n: int = 4, slowest: float = 0.0
    ) -> None:
        super().__init__()
        self.config = {
            "series": series, "d": d, "layers": layers, "channels": channels, "n": n, "slowest": slowest,
        }  # fmt: skip
        self.enter = nn.Linear(series, d)
        self.blocks = nn.ModuleList(_Selective(d, channels, n, slowest) for _ in range(layers))
        self.leave = nn.Linear(d, series)

    @property
    def n_state(self) -> int:
        """Numbers that the closed loop carries: the value it feeds back and every state."""
        sizes = self.config
        return int(sizes["series"] + sizes["layers"] * sizes["channels"] * sizes["n"])

    def forward(self, series: Tensor) -> Tensor:
        """(b, t, series) -> (b, t, series): the forecast of what follows each value, from this and earlier ones."""
        u = self.enter(series)
        for block in self.blocks:
            u, _ = block(u)
        return series + self.leave(u)

    def warm(self, series: Tensor) -> Tensor:
        """Closed-loop state after reading a series: (t, series) -> (n_state,)."""
        u, states = self.enter(series[None]), []
        for block in self.blocks:
            u, final = block(u)
            states.append(final.flatten())
        return torch.cat([(series[None] + self.leave(u))[0, -1], *states])

    def step(self, state: Tensor) -> Tensor:
        """The closed loop as a pure map (..., n_state) -> (..., n_state): the forecast becomes the next value.

        Differentiable, also by torch.func; what ``ssmlens.analyses.lyapunov.spectrum`` takes.
        """
        lead, size, channels = state.shape[:-1], int(self.config["series"]), int(self.config["channels"])
        flat = state.reshape(-1, state.shape[-1])
        x, rest = flat[:, :size], flat[:, size:]
        u, states = self.enter(x), []
        for block, h in zip(self.blocks, rest.chunk(len(self.blocks), 1)):
            u, h = cast("_Selective", block).step(u, h.reshape(len(h), channels, -1))
            states.append(h.flatten(1))
        return torch.cat([x + self.leave(u), *states], 1).reshape(*lead, -1)


class SignCounter(nn.Module):
    """A diagonal recurrence h = a(x) h + b(x) on tokens, its decays in [low, 1], with a small network that reads it.

    With ``low = -1`` decays may be negative, and a(x) = 1 - 2 x counts ones by its sign; with ``low = 0`` they are
    those of Mamba. Nothing else differs. Source: Grazzi et al. 2024 (arXiv:2411.12537).

    Args:
        tokens: size of the vocabulary, and of the answers.
        channels: of the state.
        low: -1 or 0.
        hidden: width of the reader.
    """

    kind = "ssmlens-sign-counter"

    def __init__(self, tokens: int = 2, channels: int = 8, low: float = -1.0, hidden: int = 32) -> None:
        super().__init__()
        if low not in (-1.0, 0.0):
            raise SsmlensError(f"decays start at -1 or 0, got {low}")
        self.config = {"tokens": tokens, "channels": channels, "low": low, "hidden": hidden}
        # Drawn from twice the range and clamped: half of the decays start at an end of it.
        self.a = nn.Parameter(low + (1 - low) * (2 * torch.rand(tokens, channels) - 0.5))
        self.b = nn.Parameter(torch.zeros(tokens, channels))
        self.start = nn.Parameter(torch.ones(channels))
        self.read = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, tokens))

    def decays(self) -> Tensor:
        """(tokens, channels) decays, within [low, 1]."""
        return self.a.clamp(self.config["low"], 1.0)

    def scan_inputs(self, ids: Tensor) -> ScanInputs:
        """The recurrence of tokens (b, t), one head a channel. A decay a is the erasure of the share 1 - a, so that
        it may be negative: h - (1 - a) h + b."""
        a, b = self.decays()[ids], self.b[ids]
        ones = torch.ones_like(a)[..., None]
        initial = self.start.reshape(1, -1, 1, 1).expand(len(ids), -1, 1, 1)
        return ScanInputs(
            value=b[..., None], write=ones, read=ones, log_decay=torch.zeros_like(ones), erase_read=ones,
            erase_write=1 - a[..., None], initial=initial,
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """(b, t) tokens -> (b, t, tokens) logits."""
        return self.read(scan.run(self.scan_inputs(ids))[0][..., 0])

    def step(self, state: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One token: state (b, channels), ids (b,) -> the state after it and logits (b, tokens)."""
        state = self.decays()[ids] * state + self.b[ids]
        return state, self.read(state)


KINDS: dict[str, type[Forecaster] | type[SignCounter]] = {m.kind: m for m in (Forecaster, SignCounter)}


def save_organism(model: Forecaster | SignCounter, out: Path) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model.kind, **model.config}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file({k: v.detach().float().contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors")


def load_organism(folder: str | Path, dtype: torch.dtype = torch.float32) -> Forecaster | SignCounter:
    """A forecaster or sign counter from its folder, in eval mode.

    Args:
        folder: with config.json and model.safetensors.
        dtype: to compute in; float64 for Lyapunov spectra.

    Raises:
        CheckpointError: the folder holds another kind of model; transformers ones are read by `ssmlens.load`.
    """
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kind = config.pop("model_type", None)
    if kind not in KINDS:
        raise CheckpointError(f"{folder} holds a model of type {kind}, not {' or '.join(KINDS)}: use ssmlens.load")
    model = KINDS[kind](**config)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.to(dtype).eval().requires_grad_(False)
