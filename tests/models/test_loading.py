"""Loading: what is accepted keeps its precision; what is not is refused with its cause."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from folders import Bomb, hf, native, refused, setting, without
from safetensors.torch import load_file
from tiny import tiny_tokenizer

import ssmlens
from ssmlens.errors import SsmlensError, UnsupportedModelError

IDS = [3, 17, 0, 36, 5]


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(str(tmp_path / "none" / "such"), "no model at .* neither a folder, nor a Hub id")
    refused("no-such-model", "nor a shipped model")
    refused(str(tmp_path / "file"), "is a file: give the folder")
    refused(tmp_path, r"holds no config\.json")
    refused(None, "a source is a name, a folder or a model, got NoneType")
    refused(7, "got int")


def test_a_hub_id_without_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("owner/name", r"no such folder, and the Hub did not give it \(no route to host\); shipped models are")


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '{"model_type": "mamba"', "\0"])
def test_configs_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    folder = hf(tmp_path)
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json (cannot be read as JSON|holds no JSON object)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", r"neither a model_type .* nor d_model and n_layer .* choose MambaForCausalLM"),
        ('{"n_layer": 2, "n_embd": 8}', "neither a model_type"),
        ('{"model_type": "gpt2", "n_embd": 8}', "type 'gpt2' are not supported: choose MambaForCausalLM"),
        ('{"model_type": "llama"}', "FalconMambaForCausalLM .* Mamba2ForCausalLM .* state-spaces"),
        ('{"model_type": "jamba", "d_model": 12, "n_layer": 2}', "type 'jamba' are not supported"),
        ('{"model_type": ["mamba"]}', "are not supported"),
    ],
)
def test_configs_of_other_models(text: str, words: str, tmp_path: Path) -> None:
    folder = hf(tmp_path)
    (folder / "config.json").write_text(text)
    refused(folder, words, UnsupportedModelError)


D = "backbone.layers.0.mixer.D"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "wider": ({"config": setting(hidden_size=16)}, r"mismatched keys backbone\.embeddings\.weight"),
    "vocabulary": ({"config": setting(vocab_size=38)}, r"mismatched keys backbone\.embeddings\.weight"),
    "not a number": ({"config": setting(hidden_size="wide")}, "'hidden_size' expected int, got str"),
    "another family": ({"config": setting(model_type="mamba2")}, "as Mamba2ForCausalLM.*Inconsistent configuration"),
    "more layers": ({"config": setting(num_hidden_layers=3)}, r"missing keys backbone\.layers\.2\..* and 7 more"),
    "fewer layers": ({"config": setting(num_hidden_layers=1)}, r"unexpected keys backbone\.layers\.1\."),
    "no tie": ({"config": setting(tie_word_embeddings=False)}, r"missing keys lm_head\.weight"),
    "missing": ({"weights": without(D)}, f"missing keys {D}"),
    "unexpected": ({"weights": setting(**{"backbone.extra": torch.zeros(1)})}, "unexpected keys backbone.extra"),
    "shape": ({"weights": setting(**{D: torch.zeros(3)})}, f"mismatched keys {D}"),
    "NaN": ({"weights": setting(**{D: torch.full((24,), torch.nan)})}, f"NaN or infinite: {D}"),
    "infinite": ({"weights": setting(**{D: torch.full((24,), -torch.inf)})}, f"NaN or infinite: {D}"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit(name: str, tmp_path: Path) -> None:
    changes, words = MISFITS[name]
    refused(hf(tmp_path, **changes), words)


def test_one_bad_number_among_many_is_found(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.1.mixer.in_proj.weight"][17, 3] = torch.inf
        tensors["backbone.layers.1.mixer.in_proj.weight"][18, 3] = -torch.inf

    refused(hf(tmp_path, weights=spoil), r"NaN or infinite: backbone\.layers\.1\.mixer\.in_proj\.weight")


def test_numbers_that_a_narrow_dtype_cannot_hold(tmp_path: Path) -> None:
    folder = hf(tmp_path, weights=setting(**{D: torch.full((24,), 1e6, dtype=torch.float64)}))
    refused(folder, f"NaN or infinite: {D}", dtype="float16")
    assert ssmlens.load(folder).dtype == torch.float32


@pytest.mark.parametrize("limits", [[0.0], [0.0, 1.0, 2.0]])
def test_time_step_limit_is_a_pair(limits: list[float], tmp_path: Path) -> None:
    refused(hf(tmp_path, checkpoints.mamba2(), setting(time_step_limit=limits)), "time_step_limit is a pair")


@pytest.mark.parametrize("size", [0, 4, 100, -8])
def test_cut_safetensors(size: int, tmp_path: Path) -> None:
    path = hf(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(path.parent, "the weights in .* are damaged")


def test_safetensors_of_noise_and_none_at_all(tmp_path: Path) -> None:
    path = hf(tmp_path) / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 4)
    refused(path.parent, "the weights in .* are damaged")
    path.unlink()
    refused(path.parent, "model.safetensors")


def test_a_missing_shard(tmp_path: Path) -> None:
    checkpoints.mamba1().save_pretrained(tmp_path, max_shard_size="2KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert ssmlens.load(tmp_path).trace(IDS).check()
    shards[1].unlink()
    refused(tmp_path, shards[1].name)


def as_pickle(folder: Path, content: Any = None) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **(content or {})}, folder / "pytorch_model.bin")
    return folder


def test_a_transformers_folder_with_a_bin_file(tmp_path: Path) -> None:
    model = checkpoints.mamba1()
    lens = ssmlens.load(as_pickle(hf(tmp_path, model)), dtype=torch.float64)
    for name, x in model.state_dict().items():
        assert torch.equal(lens.model.state_dict()[name], x)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch's own about such a file
def test_a_pickle_bomb_is_not_unpickled(layout: str, raw: bool, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    assert bomb.works()
    folder = as_pickle(hf(tmp_path)) if layout == "transformers" else native(tmp_path)
    path = folder / "pytorch_model.bin"
    if raw:
        path.write_bytes(pickle.dumps({"x": bomb}))
    else:
        torch.save({**torch.load(path), D: bomb}, path)
    refused(folder, "holds more than plain tensors, and no pickle is executed")
    assert not (tmp_path / "exploded").exists()


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    folder = hf(tmp_path, config=setting(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    assert ssmlens.load(folder).trace(IDS).check()
    assert not (tmp_path / "exploded").exists()


def test_models_in_memory_that_cannot_be_read() -> None:
    refused(checkpoints.mamba1().backbone, "no language model head: give a MambaForCausalLM", UnsupportedModelError)
    refused(torch.nn.Linear(2, 2), "type 'Linear' are not supported: choose Mamba", UnsupportedModelError)
    spoiled = checkpoints.mamba1()
    spoiled.backbone.norm_f.weight.data[0] = torch.nan
    refused(spoiled, "MambaForCausalLM has weights that are NaN or infinite: backbone.norm_f.weight")


@pytest.mark.parametrize("dtype", ["int8", "torch.float32", "double", torch.int8, torch.complex64, float, 32, ""])
def test_unknown_dtypes(dtype: Any) -> None:
    refused(checkpoints.mamba1(), "choose one of float32, float64, bfloat16, float16, auto", SsmlensError, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", None, -1, "cuda:99"])
def test_unknown_devices(device: Any) -> None:
    refused(checkpoints.mamba1(), "device .*'cpu'", SsmlensError, device=device)


def test_dtype_of_folders(tmp_path: Path) -> None:
    folder = hf(tmp_path, checkpoints.mamba1().to(torch.bfloat16))
    for dtype, expected in {
        None: torch.float32,
        "auto": torch.bfloat16,
        "float64": torch.float64,
        torch.float16: torch.float16,
    }.items():
        lens = ssmlens.load(folder, dtype=dtype)
        assert {p.dtype for p in lens.model.parameters()} == {expected}
        assert lens.trace(IDS).settings["dtype"] == str(expected).removeprefix("torch.")
        assert not lens.model.training
    assert ssmlens.load(native(tmp_path / "n"), dtype="auto").dtype == torch.float64


def test_a_model_in_memory_is_used_as_it_is() -> None:
    model = checkpoints.mamba1().to(torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    mixer.A_log.data = mixer.A_log.data.float()
    model.train()
    for dtype in (None, "auto"):
        lens = ssmlens.load(model, dtype=dtype)
        assert lens.model is model
        assert lens.dtype == torch.bfloat16
        assert mixer.A_log.dtype == torch.float32
        assert model.training
        lens.trace(IDS).check()
    assert ssmlens.load(model, dtype="float64").model is model
    assert mixer.A_log.dtype == torch.float64


def test_tokenizers(tmp_path: Path) -> None:
    folder = hf(tmp_path, checkpoints.mamba1(vocab_size=258))
    assert ssmlens.load(folder).tokenizer is None
    given = tiny_tokenizer()
    assert ssmlens.load(folder, tokenizer=given).tokenizer is given
    given.save_pretrained(folder)
    lens = ssmlens.load(folder)
    text = "the cät sat"
    assert lens.trace(text).ids[0].tolist() == given.encode(text)
    assert "".join(lens.trace("the cat").tokens[0]) == "the cat"
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, r"is no tokenizer\.json")


OFFLINE = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        refuse()
socket.socket = NoSocket

import ssmlens
for folder in sys.argv[1:]:
    trace = ssmlens.load(folder).trace("the cat sat on the mat").check()
    trace[0].recurrence.attention.row(-1)
try:
    ssmlens.load("owner/name")
except ssmlens.errors.CheckpointError:
    print("done")
"""


def test_offline_loading_opens_no_socket(tmp_path: Path) -> None:
    folders = [hf(tmp_path / "a", checkpoints.mamba1(vocab_size=264)), native(tmp_path / "b")]
    model = checkpoints.mamba2(vocab_size=264, tie_word_embeddings=True)
    folders[1] = checkpoints.native_folder(model, tmp_path / "c", vocab_size=258)
    for folder in folders:
        tiny_tokenizer().save_pretrained(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, *map(str, folders)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done\n"
    assert ran.stderr == ""
