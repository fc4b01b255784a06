"""Both checkpoint formats, loaded and traced, against the float64 models of `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import reference
import torch
from against import IDS, compare, truth_of
from checkpoints import GROUPED_NORM, gap
from tolerances import RECONSTRUCTION

import ssmlens
from ssmlens.errors import UnsupportedModelError

EXACT = 1e-9

MAMBA1: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"use_bias": True},
    "no conv bias": {"use_conv_bias": False},
    "bias, no conv bias": {"use_bias": True, "use_conv_bias": False},
    "three taps, expand 1": {"conv_kernel": 3, "expand": 1},
    "one tap": {"conv_kernel": 1},
    "one layer, one state": {"num_hidden_layers": 1, "state_size": 1},
    "rank 1": {"time_step_rank": 1},
    "rank auto": {"time_step_rank": "auto", "hidden_size": 20},
    "relu": {"hidden_act": "relu"},
    "untied": {"tie_word_embeddings": False},
    "other eps": {"layer_norm_epsilon": 1e-2},
}
MAMBA2: dict[str, dict[str, Any]] = {
    "plain": {},
    "one group": {"n_groups": 1},
    "four groups": {"n_groups": 4},
    "bias": {"use_bias": True},
    "bias, no conv bias": {"use_bias": True, "use_conv_bias": False},
    "dt limits": {"time_step_limit": (0.4, 1.1)},
    "lower limit only": {"time_step_limit": (0.9, math.inf)},
    "three taps, expand 1": {"conv_kernel": 3, "expand": 1, "num_heads": 2},
    "one layer, one state, one long chunk": {"num_hidden_layers": 1, "state_size": 1, "chunk_size": 256},
    "head of one channel": {"num_heads": 24, "head_dim": 1},
    "chunks of one token": {"chunk_size": 1},
    "tied": {"tie_word_embeddings": True},
    "tanh": {"hidden_act": "tanh"},
    "other eps": {"layer_norm_epsilon": 1e-2},
}
CASES = (
    [pytest.param("mamba1", c, id=f"mamba1, {name}") for name, c in MAMBA1.items()]
    + [pytest.param("falcon", c, id=f"falcon, {name}") for name, c in MAMBA1.items()]
    + [pytest.param("mamba2", c, id=f"mamba2, {name}") for name, c in MAMBA2.items()]
)


def folder_of(family: str, config: dict[str, Any], path: Path) -> tuple[Any, Path]:
    model = getattr(checkpoints, family)(**config)
    return model, checkpoints.transformers_folder(model, path / "m")


@pytest.mark.parametrize(("family", "config"), CASES)
def test_transformers_folder_in_float64(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, folder = folder_of(family, config, tmp_path)
    truth = truth_of(model)
    lens = ssmlens.load(folder, dtype=torch.float64)
    for scan in ("model", "fast"):
        trace = lens.trace(IDS, scan=scan).check()
        assert trace.logits.dtype == torch.float64
        compare(trace, truth, EXACT)


def native_case(family: str, path: Path, multiple: int, head: bool, **config: Any) -> tuple[Any, Path]:
    """A state-spaces folder for a vocabulary of 29, the embedding padded up; the model whose weights it holds."""
    rows = math.ceil(29 / multiple) * multiple
    model = getattr(checkpoints, family)(vocab_size=rows, tie_word_embeddings=True, **config)
    return model, checkpoints.native_folder(model, path / "m", vocab_size=29, multiple=multiple, head=head)


NATIVE = [
    pytest.param("mamba1", {}, 8, True, id="mamba1"),
    pytest.param("mamba1", {}, 16, False, id="mamba1 without a stored head"),
    pytest.param("mamba1", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}, 1, True, id="mamba1 bias"),
    pytest.param("mamba1", {"expand": 1, "state_size": 3, "num_hidden_layers": 1}, 8, True, id="mamba1 expand 1"),
    pytest.param("mamba2", {"n_groups": 1}, 16, True, id="mamba2"),
    pytest.param("mamba2", {"n_groups": 4}, 8, False, id="mamba2 four groups without a stored head"),
    pytest.param("mamba2", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}, 8, True, id="mamba2 bias"),
    pytest.param("mamba2", {"time_step_limit": (0.4, 1.1)}, 8, True, id="mamba2 dt limits"),
    pytest.param("mamba2", {"expand": 1, "num_heads": 2, "num_hidden_layers": 1}, 1, True, id="mamba2 expand 1"),
]


@pytest.mark.parametrize(("family", "config", "multiple", "head"), NATIVE)
def test_state_spaces_folder_in_float64(
    family: str, config: dict[str, Any], multiple: int, head: bool, tmp_path: Path
) -> None:
    model, folder = native_case(family, tmp_path, multiple, head, **config)
    ids = [i % 29 for i in IDS]
    truth = truth_of(model, ids)
    if not GROUPED_NORM and getattr(model.config, "n_groups", 1) > 1:
        with pytest.raises(UnsupportedModelError, match=r"need transformers >= 5\.23"):
            ssmlens.load(str(folder))
        return
    lens = ssmlens.load(str(folder), dtype="float64")
    for scan in ("model", "fast"):
        compare(lens.trace(ids, scan=scan).check(), truth, EXACT)
    tied = lens.model.get_output_embeddings().weight is lens.model.get_input_embeddings().weight
    assert tied


def test_state_spaces_defaults(tmp_path: Path) -> None:
    """An empty ssm_cfg means 16 states, 4 taps, expand 2, rank d / 16; Mamba-2: 128 states and heads of 64."""
    ids = [3, 17, 0, 26, 5, 5, 21]
    model = checkpoints.mamba1(vocab_size=32, hidden_size=32, state_size=16, time_step_rank="auto")
    folder = checkpoints.native_folder(model, tmp_path / "one", vocab_size=27)
    strip_config(folder, {})
    compare(ssmlens.load(folder, dtype=torch.float64).trace(ids), truth_of(model, ids), EXACT)

    settings = {"hidden_size": 64, "state_size": 128, "num_heads": 2, "head_dim": 64, "n_groups": 1}
    model = checkpoints.mamba2(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=True, **settings)
    folder = checkpoints.native_folder(model, tmp_path / "two", vocab_size=27)
    strip_config(folder, {"layer": "Mamba2"})
    compare(ssmlens.load(folder, dtype=torch.float64).trace(ids), truth_of(model, ids), EXACT)


def strip_config(folder: Path, ssm: dict[str, Any]) -> None:
    import json

    path = folder / "config.json"
    kept = ("d_model", "n_layer", "vocab_size")
    config = {k: v for k, v in json.loads(path.read_text()).items() if k in kept}
    path.write_text(json.dumps(config | {"ssm_cfg": ssm}))


LIMITS: dict[str, tuple[Callable[[], Any], tuple[float, float]]] = {
    "tagged infinity": (lambda: [0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
    "bare Infinity": (lambda: [0.0, math.inf], (0.0, math.inf)),
    "floats": (lambda: [0.3, 0.8], (0.3, 0.8)),
    "tagged with a lower limit": (lambda: [0.7, {"__float__": "Infinity"}], (0.7, math.inf)),
}


@pytest.mark.parametrize("form", LIMITS)
def test_time_step_limit_forms(form: str, tmp_path: Path) -> None:
    written, meant = LIMITS[form]
    model = checkpoints.mamba2()
    folder = checkpoints.transformers_folder(model, tmp_path / "m", time_step_limit=written())
    truth = reference.mamba2(model.state_dict(), IDS, groups=2, dt_limit=meant)
    compare(ssmlens.load(folder, dtype=torch.float64).trace(IDS), truth, EXACT)


@pytest.mark.parametrize("stated", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_stored_precision_wins_over_the_stated_dtype(family: str, stated: str, tmp_path: Path) -> None:
    """float64 weights under a config.json that states another dtype are not rounded on the way to float64."""
    model = getattr(checkpoints, family)()
    folder = checkpoints.transformers_folder(model, tmp_path / "m", dtype=stated)
    compare(ssmlens.load(folder, dtype=torch.float64).trace(IDS), truth_of(model), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mamba1", "falcon", "mamba2"])
@pytest.mark.parametrize("scan", ["model", "fast"])
def test_narrower_dtypes(family: str, dtype: torch.dtype, scan: str, tmp_path: Path) -> None:
    """A float32 or bfloat16 model stays near the float64 truth, and rebuilds within its tolerance."""
    model, folder = folder_of(family, {"use_bias": True}, tmp_path)
    truth = truth_of(model.to(dtype))  # the same rounded weights
    trace = ssmlens.load(folder, dtype=dtype).trace(IDS, scan=scan).check()
    # Errors of the mixer's own rounding grow through the layers of the model: ten units for logits and states.
    limit = 10 * RECONSTRUCTION[dtype]
    assert gap(trace.logits[0], truth.logits) <= limit
    rec = trace[0].recurrence
    assert gap(rec.run()[0], truth.layers[0].y) <= limit
    assert gap(rec.states()[0], truth.layers[0].states) <= limit
    assert gap(rec.attention.dense()[0], truth.layers[0].M) <= limit
    assert trace.reconstruction_error[0] <= RECONSTRUCTION[dtype]


def test_the_reference_agrees_with_itself_and_with_transformers() -> None:
    """M x is the scan, and the plain float32 model of transformers computes the same logits."""
    for family in ("mamba1", "falcon", "mamba2"):
        model = getattr(checkpoints, family)()
        truth = truth_of(model)
        for layer in truth.layers:
            assert gap(torch.einsum("hts,shp->thp", layer.M, layer.x), layer.scan) <= 1e-12
            assert gap(torch.einsum("thpn,thn->thp", layer.states, layer.C), layer.scan) <= 1e-12
        with torch.no_grad():
            logits = model.float()(torch.tensor([IDS])).logits[0]
        assert gap(logits, truth.logits) <= 1e-5
