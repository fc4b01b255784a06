"""``ssmlens precision`` and its figures: numbers as the study gives them, files, refusals, and going on."""

from __future__ import annotations

import json

import pytest
from tiny import save_tiny, tiny_mamba1

import ssmlens
from ssmlens import cli
from ssmlens.analyses import precision
from ssmlens.plotting.studies import precision as drawn

TEXT = "The red box is K7. The red box is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture
def run(folder, capsys):
    """Run a command on the tiny model: exit code, stdout, stderr."""

    def call(*arguments, model=folder, text=TEXT):
        extra = [] if model is None else ["--model", str(model), "--text", text]
        code = cli.main(["precision", *map(str, arguments), *extra])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_the_summary_is_that_of_the_study(run, folder) -> None:
    code, out, err = run("--state-dtype", "fp8", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    found = precision.horizon(ssmlens.load(folder).trace(TEXT), "fp8")
    assert [row["layer"] for row in data["rows"]] == [0, 1, 2]
    for i, row in enumerate(data["rows"]):
        assert row["stalled"] == pytest.approx(found.value[i].mean().item(), abs=1e-12)
        assert row["worst error"] == pytest.approx(found.columns["error"][i].max().item(), rel=1e-5)
    assert data["about"]["settings"]["dtype_of_state"] == "float8_e4m3fn"
    code, out, _ = run("--state-dtype", "fp8")
    assert code == 0
    assert "decays with 1 - a below 0.0312 are lost to rounding (32 tokens)" in out
    assert "assumes: The state is rounded to float8_e4m3fn" in out


def test_stall_needs_no_model(run) -> None:
    code, out, _ = run("stall", "--decays", "0.99,0.997", "--json", model=None)
    assert code == 0
    assert [row["half_life"] for row in json.loads(out)["rows"]] == [73, "inf"]
    code, out, _ = run("stall", "--decays", "0.997", model=None)
    assert "bfloat16: a state stops at once where 1 - a < 0.00195, soon where < 0.00391" in out
    assert out.splitlines()[2].split()[:2] == ["0.997", "inf"]


def test_divergence_goes_on_from_a_file(run, tmp_path) -> None:
    file, table = tmp_path / "run.jsonl", tmp_path / "kl.parquet"
    code, out, err = run("divergence", "--state-dtypes", "fp8,bf16", "--resume", file, "--out", table, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["rows"]
    assert [(row["state"], row["rounded"]) for row in rows[:2]] == [("float8_e4m3fn", "all"), ("float8_e4m3fn", "slow")]
    assert rows[0]["KL"] > rows[5]["KL"] > 0
    assert rows[0]["low"] <= rows[0]["KL"] <= rows[0]["high"]
    assert table.stat().st_size > 0
    before = file.read_bytes()
    assert run("divergence", "--state-dtypes", "bf16,fp8", "--resume", file, "--json")[0] == 0
    assert file.read_bytes() == before
    code, out, err = run("divergence", "--share", "0.3", "--resume", file)
    assert (code, out) == (2, "")
    assert "holds a run with other settings (share)" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--state-dtype", "int8"), "unknown number format 'int8'"),
        (("--out", "x.docx"), "choose a name that ends in"),
        (("--state-dtype", "bf16", "divergence"), "--state-dtype stands before divergence: give options after it"),
        (("divergence", "--share", "2"), "share lies between 0 and 1"),
        (("divergence", "--state-dtypes", ","), "variants are"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_decays_that_are_no_numbers(run) -> None:
    for wrong in ("half", ","):
        code, _, err = run("stall", "--decays", wrong, model=None)
        assert code == 2
        assert "--decays takes numbers separated by commas" in err
    assert "decays are numbers between 0 and 1" in run("stall", "--decays", "1.5", model=None)[2]


def test_every_command_draws(run, tmp_path) -> None:
    for name, suffix in (("", ".png"), ("stall", ".svg"), ("divergence", ".png")):
        path = tmp_path / f"figure{name}{suffix}"
        arguments = [name] * bool(name) + ["--out", path] + ["--state-dtypes", "fp8"] * (name == "divergence")
        code, out, _ = run(*arguments, model=None) if name == "stall" else run(*arguments)
        assert code == 0
        assert f"wrote {path}" in out
        assert path.stat().st_size > 5000


def test_figures_say_what_they_show() -> None:
    lens = ssmlens.load(tiny_mamba1())
    ids = list(range(30))
    kl = drawn.divergence(precision.divergence(lens, ids, ["bf16", "fp8"]))
    panels = [axes for axes in kl.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["bfloat16", "float8_e4m3fn"]
    assert "10% of heads" in kl.get_label()
    labels = {line.get_label() for line in panels[0].lines}
    assert {"every head", "slow heads alone", "control: float32 itself"} <= labels
    heads = drawn.horizon(precision.horizon(lens.trace(ids)))
    assert len(heads.axes[0].collections[0].get_offsets()) == 3 * 64 * 8
    assert "one point per head and state" in heads.get_label()
    with pytest.raises(ValueError, match="not measured"):
        drawn.horizon(precision.horizon(lens.trace(ids), measure=False))
    law = drawn.stall(precision.stall([0.9, 0.998]))
    assert "nothing is written" in law.get_label()
