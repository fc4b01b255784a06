"""What `bench` compares with: other implementations of the same work, and a model's own forward.

Everything here is imported when it is called; a peer that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .inputs import ScanInputs

__all__ = ["stored", "times", "traces"]

Timed = Callable[[Callable[[], object], str, int], list[float]]

# The exact vectorised matrix holds (h, t, s, n) at once: beyond this many bytes it is left out.
_PEER_LIMIT = 8e9


def times(op: str, x: ScanInputs, repeats: int, timed: Timed) -> dict[str, float]:
    """Median milliseconds of every peer of one op that is available here, on the same inputs."""
    found = stored(op, x)
    device = str(x.value.device)
    for name, call in _peers(op, x).items():
        with torch.no_grad():
            call()
            found[name] = statistics.median(timed(call, device, max(1, min(3, repeats))))
    return found


def _peers(op: str, x: ScanInputs) -> dict[str, Callable[[], object]]:
    if op == "dense":
        b, t, h, n = x.batch, x.length, x.n_heads, x.d_state
        return {"vectorised": lambda: vectorised(x)} if 4 * b * h * t * t * n < _PEER_LIMIT else {}
    if op.endswith("states"):
        from . import naive

        return {"loop over t": lambda: naive.states(x)}
    if op in ("mamba1", "mamba2") and not x.value.is_cuda and importlib.util.find_spec("transformers"):
        return {"transformers": transformers_scan(x)}
    if op.startswith("mamba2") and op.removeprefix("mamba2") in ("", "-bfloat16") and x.value.is_cuda:
        found = {}
        if importlib.util.find_spec("fla"):
            found["fla simple_gla"] = simple_gla(x)
        if importlib.util.find_spec("mamba_ssm"):
            found["mamba_ssm Triton"] = mamba_ssm_scan(x)
        return found
    return {}


def stored(op: str, x: ScanInputs) -> dict[str, float]:
    """Milliseconds of mamba_ssm's CUDA selective scan, once measured on an H100, for the rows it was measured at.

    It needs a compiled extension, so it seldom stands beside this code in one run.
    """
    sizes = (x.batch, x.length, x.n_heads, x.head_dim, x.d_state)
    forward = {
        (1, 2048, 5120, 1, 16): 0.365,
        (1, 16384, 5120, 1, 16): 3.09,
        (1, 65536, 5120, 1, 16): 12.3,
        (8, 2048, 1536, 1, 16): 0.827,
    }
    known = {"mamba1": forward, "mamba1-backward": {(1, 2048, 5120, 1, 16): 0.980}}.get(op, {})
    return {"mamba_ssm CUDA, stored": known[sizes]} if x.value.is_cuda and sizes in known else {}


def simple_gla(x: ScanInputs) -> Callable[[], object]:
    """flash-linear-attention's chunked kernel for one decay per head, which takes the decay and k, q of every head."""
    from fla.ops.simple_gla import chunk_simple_gla

    from .inputs import expand_groups

    assert x.dt is not None
    assert x.A is not None
    decay = x.dt.float() * x.A[:, 0].float()
    key = (expand_groups(x.write, x.n_heads) * x.dt[..., None]).contiguous()
    query = expand_groups(x.read, x.n_heads).contiguous()
    return lambda: chunk_simple_gla(query, key, x.value, g=decay, scale=1.0, output_final_state=True)


def mamba_ssm_scan(x: ScanInputs) -> Callable[[], object]:
    """mamba_ssm's own Triton kernels."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    assert x.A is not None
    A = x.A[:, 0].float().contiguous()
    return lambda: mamba_chunk_scan_combined(
        x.value, x.dt, A, x.write, x.read, chunk_size=256, return_final_states=True
    )


def vectorised(x: ScanInputs) -> Tensor:
    """The attention of a Mamba-1 layer as users compute it: every decay of every pair at once."""
    assert x.dt is not None
    assert x.A is not None
    clock = x.dt.cumsum(1).transpose(1, 2)  # (b, h, t)
    steps = (clock[..., :, None] - clock[..., None, :]).tril()
    decay = (steps[..., None] * x.A[:, None, None]).exp()  # (b, h, t, s, n)
    write = x.dt.transpose(1, 2)[..., None] * x.write.transpose(1, 2)  # (b, h, s, n)
    return torch.einsum("bgtn,bhtsn,bhsn->bhts", x.read.transpose(1, 2), decay, write).tril()


def transformers_scan(x: ScanInputs) -> Callable[[], object]:
    """transformers' PyTorch scan on the same inputs, in the layout it takes."""
    assert x.dt is not None
    assert x.A is not None
    dt, A = x.dt, x.A
    if x.head_dim == 1:
        from transformers.models.mamba import modeling_mamba

        args = [x.value[..., 0], dt, x.write[:, :, 0], x.read[:, :, 0]]
        value, step, B, C = (z.transpose(1, 2).contiguous() for z in args)
        return lambda: modeling_mamba.mamba_selective_scan(value, step, A, B, C)
    from transformers.models.mamba2 import modeling_mamba2

    return lambda: modeling_mamba2.mamba2_chunk_scan(x.value, dt, A[:, 0], x.write, x.read, chunk_size=256)


def traces(small: bool, repeats: int, timed: Timed, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Time `ssmlens.load(model).trace(ids)` against the model's own forward, for Mamba-1 and Mamba-2.

    The models have the shape of the released 130M ones and random weights; ``small`` makes them tiny. On a GPU the
    prompt has 2048 tokens instead of 1024.

    Raises:
        ValueError: a reconstruction error above 1e-5: a wrong trace is not timed.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    from ssmlens.loading import load

    width, depth, words, tokens = (32, 2, 97, 40) if small else (768, 24, 50280, 2048 if device != "cpu" else 1024)
    torch.manual_seed(0)
    common = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": depth}
    heads = {"head_dim": width // 12, "num_heads": 24} if not small else {"head_dim": 8, "num_heads": 8}
    models: dict[str, Callable[[], torch.nn.Module]] = {
        "mamba1": lambda: MambaForCausalLM(MambaConfig(**common, state_size=16)),
        "mamba2": lambda: Mamba2ForCausalLM(
            Mamba2Config(**common, state_size=128 if not small else 16, n_groups=1, **heads)
        ),
    }
    ids = torch.randint(words, (1, tokens)).to(device)
    for name, make in models.items():
        model = make().eval().to(device)
        lens = load(model, device=device)
        yield _trace_row(name, model, lens, ids, repeats, timed)
        del model, lens


def _trace_row(name: str, model: torch.nn.Module, lens: Any, ids: Tensor, repeats: int, timed: Timed) -> dict[str, Any]:
    device = str(ids.device)

    def forward() -> object:
        with torch.no_grad():
            return model(input_ids=ids)

    error = max(lens.trace(ids).reconstruction_error.values())
    if not error <= 1e-5:
        raise ValueError(f"the trace of {name} is wrong: reconstruction error {error:.1e}")
    forward()
    # Taken in turns, so that a busy moment of the machine touches both.
    pairs = [(timed(lambda: lens.trace(ids), device, 1)[0], timed(forward, device, 1)[0]) for _ in range(repeats)]
    ours, own = (statistics.median(column) for column in zip(*pairs, strict=True))
    config: Any = model.config
    return {
        "op": f"trace-{name}",
        "shape": f"{config.num_hidden_layers} layers, width {config.hidden_size}, {ids.shape[1]} tokens",
        "what": "whole model",
        "dtype": str(lens.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "error": error,
        "trace_ms": ours,
        "forward_ms": own,
        "ratio": ours / own,
        "repeats": len(pairs),
    }
