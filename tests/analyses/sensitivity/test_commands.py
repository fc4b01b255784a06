"""``ssmlens sensitivity`` and its figures: numbers as the study gives them, files, refusals, and going on."""

from __future__ import annotations

import json

import pytest
from tiny import save_tiny

import ssmlens
from ssmlens import cli, plotting
from ssmlens.analyses import sensitivity
from ssmlens.plotting.studies import sensitivity as drawn

TEXT = "The red box is K7. The red box is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture
def run(folder, capsys):
    """Run a command on the tiny model: exit code, stdout, stderr."""

    def call(*arguments):
        code = cli.main(["sensitivity", *map(str, arguments), "--model", folder, "--text", TEXT])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_the_summary_is_that_of_the_study(run, folder) -> None:
    code, out, err = run("--part", "head", "--layers", "1-2", "--group", "4", "--targets=-1,-2", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    found = sensitivity.removal(ssmlens.load(folder), TEXT, "head", layers=[1, 2], group=4, targets=[-1, -2])
    assert [row["part"] for row in data["rows"]] == found.coords["part"] == [
        "layer 1 heads 0-3", "layer 1 heads 4-7", "layer 2 heads 0-3", "layer 2 heads 4-7",
    ]  # fmt: skip
    for i, row in enumerate(data["rows"]):
        assert row["loss"] == pytest.approx(found.value[i, 0].item(), abs=1e-9)
        assert row["mean kept"] == pytest.approx(found.control["mean_change"][i, 0].item(), abs=1e-9)
    code, out, _ = run("--no-control")
    assert code == 0
    assert "mean kept" not in out.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("greedy", "--steps", "2", "--orders", "1"), 3),
        (("tokens", "--keep", "0.5"), 7),
        (("layers",), 4),
        (("exits", "--thresholds", "0.01,0.5"), 6),
        (("outliers",), 45),
        (("hessian", "-k", "1", "--only", "dt_bias", "--most", "8", "--probes", "1"), 1),
    ],
)
def test_every_command_prints_writes_and_draws(run, tmp_path, arguments, count) -> None:
    code, out, err = run(*arguments, "--json", "--out", tmp_path / "found.json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert len(data["rows"]) == count
    assert data["about"]["assumes"]
    assert data["about"]["checked_by"]
    from ssmlens.analyses._result import Result

    result = Result.load(tmp_path / "found.json")
    figure = getattr(drawn, arguments[0])(result)
    assert plotting.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert figure.get_label()
    assert "tiny" in " ".join(axes.get_title() for axes in figure.axes)


def test_a_run_goes_on_from_its_file(run, tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    first = json.loads(run("--resume", file, "--json")[1])
    before = file.read_bytes()
    assert json.loads(run("--resume", file, "--json")[1])["rows"] == first["rows"]
    assert file.read_bytes() == before
    code, _, err = run("--resume", file, "--part", "ssm")
    assert code == 2
    assert "other settings (part)" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--part", "mlp"), "unknown part 'mlp'"),
        (("--layers", "9"), "--layers takes layers 0 to 2"),
        (("--targets", "1.5"), "--targets takes whole numbers"),
        (("--targets", "0"), "no row has a token to predict at [0]"),
        (("--part", "ssm", "greedy"), "--part stands before greedy: give options after it"),
        (("greedy", "--steps", "9"), "steps is from 1 to the 3 parts there are"),
        (("tokens", "--keep", "all"), "--keep takes numbers separated by commas"),
        (("exits", "--thresholds", "7"), "thresholds lie above 0 and up to 1"),
        (("hessian", "--only", "query"), "no trainable parameter is called"),
        (("hessian", "--most", "1"), "--most is at least 2 tokens"),
        (("outliers", "--out", "x.docx"), "choose a name that ends in"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
