"""The command line: what it prints and writes, and that bad input is one sentence and exit code 2."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_mamba1, tiny_mamba2

import ssmlens
from ssmlens import cli

TEXT = "The red box is K7. The red box is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mamba-2 with three layers of 8 heads and a byte tokenizer."""
    return str(save_tiny(tmp_path_factory.mktemp("cli") / "tiny", tiny_mamba2()))


@pytest.fixture(scope="module")
def trace(folder):
    return ssmlens.load(folder).trace(TEXT)


@pytest.fixture
def run(folder, capsys):
    """Run one command on the tiny model: exit code, stdout, stderr."""

    def call(*arguments, model=folder, text=TEXT):
        extra = [] if model is None else ["--model", str(model)]
        extra += [] if text is None else ["--text", text]
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments] + extra)
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_trace_prints_every_layer_with_its_error(run, trace):
    code, out, err = run("trace")
    assert (code, err) == (0, "")
    for layer, error in trace.reconstruction_error.items():
        assert any(line.split()[0] == str(layer) and f"{error:.2e}" in line for line in out.splitlines()[2:5])


def test_trace_json_is_the_trace(run, trace):
    code, out, _ = run("trace", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["tokens"] == trace.tokens[0]
    assert data["ids"] == trace.ids[0].tolist()
    assert [x["reconstruction_error"] for x in data["layers"]] == list(trace.reconstruction_error.values())
    best = trace.logits[0, -1].double().softmax(-1).max()
    assert data["next"][0]["probability"] == pytest.approx(float(best), abs=1e-12)


def test_trace_saves_what_it_traced(run, trace, tmp_path):
    code, _, _ = run("trace", "--out", tmp_path / "t.safetensors", "--layer", 1)
    assert code == 0
    saved = ssmlens.Trace.load(tmp_path / "t.safetensors")
    assert list(saved.mixers) == [1]
    assert torch.equal(saved.logits, trace.logits)


def test_attend_row_is_the_row_of_the_map(run, trace):
    attention = trace[1].recurrence.attention
    for how in ("mean", "mean_abs", "max_abs", "norm"):
        _, out, _ = run("attend", "--json", "--layer", 1, "--row", 9, "--reduction", how, "--heads", "0,2-4")
        data = json.loads(out)
        expected = attention.reduce(how, heads=[0, 2, 3, 4])[0, 9].double()
        assert torch.allclose(torch.tensor(data["values"], dtype=torch.float64), expected, rtol=1e-5, atol=1e-7)
        assert data["reconstruction_error"] == trace.reconstruction_error[1]


def test_attend_map_as_json_and_as_csv(run, trace, tmp_path):
    _, out, _ = run("attend", "--json", "--layer", 0, "--out", tmp_path / "map.csv")
    expected = trace[0].recurrence.attention.reduce("mean")[0]
    assert torch.allclose(torch.tensor(json.loads(out)["values"]), expected, rtol=1e-6)
    with (tmp_path / "map.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    length = len(trace.tokens[0])
    assert len(rows) == length * (length + 1) // 2
    for row in rows[:: length // 3]:
        assert float(row["value"]) == pytest.approx(float(expected[int(row["t"]), int(row["s"])]), rel=1e-6)
        assert row["s_token"] == trace.tokens[0][int(row["s"])]


def test_attend_keeps_heads_apart(run, trace, tmp_path):
    code, _, _ = run("attend", "--layer", 2, "--reduction", "none", "--heads", "1,5", "--out", tmp_path / "a.csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text(encoding="utf-8"))))
    assert {row["heads"] for row in rows} == {"1", "5"}
    dense = trace[2].recurrence.attention.dense(heads=[1, 5])[0]
    last = rows[-1]
    assert float(last["value"]) == pytest.approx(float(dense[1, int(last["t"]), int(last["s"])]), rel=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
@pytest.mark.parametrize("row", [[], ["--row", "-1"]])
def test_attend_draws_maps_and_rows(run, tmp_path, suffix, row):
    path = tmp_path / f"map{suffix}"
    assert run("attend", "--out", path, *row) == (0, f"wrote {path}\n", "")
    start = path.read_bytes()[:200].lstrip()
    assert start.startswith(
        {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!doctype html>"}[suffix]
    )


def test_attend_prints_the_strongest_reads(run, trace):
    _, out, _ = run("attend", "--layer", 1)
    row = trace[1].recurrence.attention.reduce("mean")[0, -1]
    strongest = int(row.abs().argmax())
    first = next(line for line in out.splitlines() if line.strip().startswith(f"{strongest} "))
    assert f"{float(row[strongest]):.3g}" in first
    assert "reconstruction error" in out
    assert "mean over heads (signed)" in out


def test_memory_table_json_and_files(run, trace, tmp_path):
    from ssmlens.analyses import memory

    expected = memory.summary(trace)
    _, out, _ = run("memory", "--json", "--out", tmp_path / "m.csv")
    data = json.loads(out)
    assert [x["half_life"] for x in data["layers"]] == expected.value[:, 0].tolist()
    assert (tmp_path / "m.csv").read_text(encoding="utf-8").startswith("layer")
    code, out, _ = run("memory", "--out", tmp_path / "m.png", "--train-length", 64)
    assert code == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "half-life" in out
    assert "assumes" in out


def test_verify_passes_and_fails_by_exit_code(run, trace):
    code, out, _ = run("verify")
    assert code == 0
    assert "every layer within the tolerance 1e-05" in out
    code, out, err = run("verify", "--tolerance", "1e-12", "--json")
    data = json.loads(out)
    assert (code, data["passed"], data["settings"]["scan"], err) == (1, False, "model", "")
    code, out, _ = run("verify", "--dtype", "float64", "--json")
    assert code == 0
    assert max(x["reconstruction_error"] for x in json.loads(out)["layers"]) <= 1e-10


def test_report_writes_one_page(run, trace, tmp_path):
    code, out, err = run("report", "--out", tmp_path / "r.html")
    assert (code, out) == (0, f"wrote {tmp_path / 'r.html'}\n")
    assert "layer 2" in err, "progress goes to stderr"
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    for error in trace.reconstruction_error.values():
        assert f"{error:.2e}" in html
    code, out, err = run("report", "--out", tmp_path / "s.html", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["verified"] is True
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["r.html", "s.html"]


def test_texts_come_from_files_and_standard_input(run, trace, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    _, out, _ = run("trace", "--json", "--file", tmp_path / "t.txt", text=None)
    assert json.loads(out)["tokens"] == trace.tokens[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    _, out, _ = run("trace", "--json", "--file", "-", text=None)
    assert json.loads(out)["tokens"] == trace.tokens[0]
    _, out, _ = run("trace", "--json", "--ids", "5, 6,7", text=None)
    assert json.loads(out)["ids"] == [5, 6, 7]


def test_models_lists_the_shipped_ones(run):
    from ssmlens import zoo

    code, out, _ = run("models", "--json", model=None, text=None)
    assert code == 0
    assert [x["name"] for x in json.loads(out)] == zoo.names()
    assert all(x["about"] for x in json.loads(out))
    code, out, _ = run("models", model=None, text=None)
    assert [line.split()[0] for line in out.splitlines()[1:]] == zoo.names()


def test_app_starts_the_page_on_localhost_only(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cli.pages, "_serve", lambda command: calls.append(command) or 0)
    assert cli.main(["app", "--port", "8700", "--headless", "--models", str(tmp_path), "--max-tokens", "64"]) == 0
    (command,) = calls
    page = Path(command[command.index("run") + 1])
    assert page.is_file()
    assert page.name == "dashboard.py"
    assert "--server.address=127.0.0.1" in command
    assert "--server.port=8700" in command
    assert command[command.index("--") :] == ["--", "--models", str(tmp_path.resolve()), "--max-tokens", "64"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_command_ends_the_server_of_the_page(number):
    server = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    serve = f"import sys; from ssmlens.cli import pages; sys.exit(pages._serve([sys.executable, '-c', {server!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", serve], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as command:
        pid = int(command.stdout.readline())
        command.send_signal(number)
        # Python ends by the signal itself when nothing catches a KeyboardInterrupt, as main does.
        assert command.wait(20) == (-number if number == signal.SIGINT else 128 + number)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def broken(folder, where, change):
    """A copy of the tiny model with one file changed."""
    copy = Path(shutil.copytree(folder, where / "broken"))
    change(copy)
    return copy


def corrupt(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def poison(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})


def rename_family(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (corrupt, "damaged"),
        (poison, "NaN"),
        (rename_family, "'llama'"),
        (lambda copy: (copy / "config.json").write_text("{"), "config.json"),
        (lambda copy: (copy / "model.safetensors").unlink(), "safetensors"),
        (lambda copy: (copy / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    ],
)
def test_broken_models_are_refused_in_a_sentence(run, folder, tmp_path, change, words):
    refused(run("trace", model=broken(folder, tmp_path, change)), words)


def refused(result, words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert words.lower() in err.lower()


@pytest.mark.parametrize("command", ["trace", "attend", "memory", "verify", "report"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", ""], "empty"),
        (["--file", "no/such/file.txt"], "no/such/file.txt"),
        (["--file", "."], "directory"),
        (["--ids", "1,x"], "whole numbers"),
        (["--ids", ""], "empty"),
        (["--ids", "100000"], "outside the vocabulary"),
        (["--text", "a", "--ids", "1"], "choose one"),
        (["--text", "a", "--dtype", "int3"], "float32"),
        (["--text", "a", "--device", "toaster"], "cpu"),
        (["--text", "a", "--device", "cuda:99"], "cuda"),
        (["--text", "a", "--model", "no-such-model"], "no-such-model"),
        (["--text", "a", "--model", ""], "model"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(run, tmp_path, monkeypatch, command, arguments, words):
    monkeypatch.chdir(tmp_path)
    own_model = [] if "--model" in arguments else None
    result = run(command, *arguments, text=None, **({} if own_model is None else {"model": None}))
    refused(result, words)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attend", "--layer", "99"], "0, 1, 2"),
        (["attend", "--layer", "-1"], "0, 1, 2"),
        (["attend", "--layer", "x"], "integer"),
        (["trace", "--layer", "99"], "layer 99"),
        (["attend", "--reduction", "median"], "mean, mean_abs, max_abs, norm"),
        (["attend", "--heads", "7-9"], "0 to 7"),
        (["attend", "--heads", "a"], "ranges such as"),
        (["attend", "--row", "999"], "tokens 0 to"),
        (["attend", "--out", "map.bmp"], ".png"),
        (["attend", "--out", "map"], ".png"),
        (["attend", "--reduction", "none", "--out", "map.png"], "one head"),
        (["attend", "--reduction", "none", "--out", "m.csv", "--max-memory", "1e-6"], "fewer --heads"),
        (["attend", "--out", "map.png", "--max-memory", "1e-6"], "needs"),
        (["attend", "--max-memory", "nan"], "above 0"),
        (["attend", "--max-memory", "0"], "above 0"),
        (["memory", "--out", "m.bmp"], ".csv"),
        (["memory", "--train-length", "0"], "at least 1"),
        (["verify", "--tolerance", "-1"], "0 or more"),
        (["trace", "--out", "t.pt"], ".safetensors"),
        (["report", "--out", "r.pdf"], ".html"),
        (["report", "--out", "missing/r.html"], "does not exist"),
        (["attend", "--out", "missing/r.png"], "does not exist"),
        (["trace", "--out", "missing/t.safetensors"], "does not exist"),
        (["memory", "--out", "folder.csv"], "folder"),
        (["memory", "--out", "/proc/m.safetensors"], "cannot write /proc/m.safetensors"),
        (["report", "--out", "/proc/r.html"], "cannot write /proc/r.html"),
    ],
)
def test_bad_choices_are_one_sentence_and_exit_code_two(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    refused(run(*arguments), words)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.csv"], "nothing was written"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["app", "--port", "0"], "1 to 65535"),
        (["app", "--max-tokens", "0"], "at least 1"),
        (["app", "--models", "no/such/folder"], "existing folder"),
        (["fly"], "fly"),
        (["models", "extra"], "extra"),
    ],
)
def test_bad_commands_are_one_sentence_and_exit_code_two(run, arguments, words):
    refused(run(*arguments, model=None, text=None), words)


def test_text_that_is_not_utf8_is_refused(run, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"abc\xff")
    refused(run("trace", "--file", tmp_path / "t.txt", text=None), "not UTF-8")


def test_an_argument_that_is_not_utf8_is_refused(run):
    refused(run("trace", "--text", "ab\udcff", text=None), "not UTF-8")


def test_a_model_without_tokenizer_asks_for_ids(run, tmp_path):
    tiny_mamba1().save_pretrained(tmp_path / "bare")
    refused(run("trace", model=tmp_path / "bare"), "no tokenizer")
    assert run("trace", "--ids", "1,2", model=tmp_path / "bare", text=None)[0] == 0


def test_figures_of_a_trace_beyond_its_tolerance_are_refused(run, monkeypatch, tmp_path):
    monkeypatch.setitem(ssmlens.trace.TOLERANCE, torch.float32, 1e-15)
    refused(run("attend", "--out", tmp_path / "map.png"), "above the tolerance")
    refused(run("memory"), "above the tolerance")
    assert run("verify")[0] == 1
    code, out, _ = run("report", "--out", tmp_path / "r.html")
    assert code == 0
    assert "above the tolerance" in out
    assert "✗ not verified" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_an_internal_bug_is_not_hidden(run, monkeypatch):
    def bug(*arguments, **options):
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(ssmlens.lens.Lens, "trace", bug)
    with pytest.raises(ZeroDivisionError):
        run("trace")


def shell(*arguments, **extra):
    environment = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ssmlens", *map(str, arguments)],
        capture_output=True,
        env=environment,
        timeout=120,
        **extra,
    )


def test_exit_codes_and_streams_of_the_real_process(folder, tmp_path):
    bad = shell("trace", "--model", folder, "--text", "")
    assert (bad.returncode, bad.stdout) == (2, b"")
    assert bad.stderr == b"error: the prompt is empty: give at least one token\n"
    good = shell("verify", "--model", folder, "--file", "-", "--json", input="é\n".encode())
    assert (good.returncode, good.stderr) == (0, b"")
    assert json.loads(good.stdout)["passed"] is True


def test_a_reader_that_leaves_early_causes_no_noise():
    process = subprocess.Popen(
        [sys.executable, "-m", "ssmlens", "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 1


def test_help_is_quick_and_imports_nothing_heavy():
    # Processor time: a wall clock would measure what else the machine is doing.
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shell("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.4
    heavy = ["torch", "transformers", "matplotlib", "plotly", "streamlit", "pandas", "numpy"]
    code = f"import sys, ssmlens.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("command", ["trace", "attend", "memory", "verify", "report", "models", "app"])
def test_every_command_explains_itself(run, command):
    code, out, _ = run(command, "--help", model=None, text=None)
    assert code == 0
    assert "Usage: ssmlens" in out.replace("\x1b[1m", "").replace("\x1b[0m", "")
