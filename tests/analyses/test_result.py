"""Result: axes and labels that fit, tables, files and back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssmlens.analyses._result import LOADABLE, SUFFIXES, Result


def example() -> Result:
    value = torch.tensor([[1.5, math.inf, math.nan], [0.1, -math.inf, 2.0]], dtype=torch.float64)
    return Result(
        name="half_life",
        value=value,
        dims=("layer", "head"),
        units="tokens",
        coords={"layer": [2, 5], "family": ["mamba1"]},
        columns={"spread": value + 1},
        control={"observed": torch.tensor([[7.0]])},
        settings={"dtype": torch.float32, "path": Path("a"), "rows": (1, 2), "limit": math.inf},
        assumes=("The text is long.",),
        checked_by="a closed form",
    )


def test_the_table_has_one_row_per_entry() -> None:
    table = example().table()
    assert list(table) == ["family", "layer", "head", "half_life", "spread", "observed"]
    assert table["layer"].tolist() == [2, 2, 2, 5, 5, 5]
    assert table["head"].tolist() == [0, 1, 2, 0, 1, 2]
    assert set(table["family"]) == {"mamba1"}
    np.testing.assert_array_equal(table["half_life"], example().value.flatten())
    assert (table["observed"] == 7).all()
    assert table.attrs["units"] == "tokens"


def test_a_number_without_axes_is_a_table_of_one_row() -> None:
    table = Result(name="x", value=torch.tensor(3.0), dims=(), units="1").table()
    assert table.to_dict("records") == [{"x": 3.0}]


def test_to_xarray_labels_every_axis() -> None:
    array = example().to_xarray()
    assert array.name == "half_life"
    assert array.dims == ("layer", "head")
    assert array.sel(layer=5, head=2).item() == 2.0
    assert array["spread"].sel(layer=5, head=2).item() == 3.0
    assert array["family"].item() == "mamba1"
    assert array.attrs["units"] == "tokens"
    assert json.loads(array.attrs["settings"])["limit"] == "inf"


@pytest.mark.parametrize("suffix", LOADABLE)
def test_save_and_load_keep_everything(suffix: str, tmp_path: Path) -> None:
    path = example().save(tmp_path / f"result{suffix}")
    loaded = Result.load(path)
    for field in dataclasses.fields(Result):
        before, after = getattr(example(), field.name), getattr(loaded, field.name)
        if field.name in ("value", "columns", "control"):
            before, after = ({"": x} if isinstance(x, torch.Tensor) else x for x in (before, after))
            assert before.keys() == after.keys()
            for name, x in before.items():
                torch.testing.assert_close(after[name], x, rtol=0, atol=0, equal_nan=True)
        elif field.name == "settings":
            assert after == {"dtype": "float32", "path": "a", "rows": [1, 2], "limit": "inf"}
        else:
            assert after == before


def test_json_is_strict() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    fields = json.loads(example().to_json(), parse_constant=refuse)
    assert fields["value"] == [[1.5, "inf", "nan"], [0.1, "-inf", 2.0]]


def test_tables_in_files(tmp_path: Path) -> None:
    table = example().table()
    parquet = pd.read_parquet(example().save(tmp_path / "a.parquet"))
    pd.testing.assert_frame_equal(parquet, table)
    assert parquet.attrs["assumes"] == ["The text is long."]
    csv = pd.read_csv(example().save(tmp_path / "a.csv"))
    pd.testing.assert_frame_equal(csv, table, check_dtype=False)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in .json, .csv, .parquet, .safetensors"):
        example().save(tmp_path / "a.xlsx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        example().save(tmp_path / "nowhere" / "a.json")
    with pytest.raises(ValueError, match=r"only .json and .safetensors hold a whole result"):
        Result.load(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Result.load(tmp_path / "a.json")
    for suffix, content in ((".json", "{}"), (".json", "[1"), (".json", "[1]"), (".safetensors", "no")):
        path = tmp_path / f"broken{suffix}"
        path.write_text(content)
        with pytest.raises(ValueError, match=f"broken{suffix} does not hold a result"):
            Result.load(path)
    assert len(SUFFIXES) == 4


def test_a_safetensors_file_of_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not hold a result"):
        Result.load(tmp_path / "a.safetensors")


def test_axes_that_do_not_fit() -> None:
    value = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"value has shape \(2, 3\) but the axes are head"):
        Result(name="x", value=value, dims=("head",), units="1")
    with pytest.raises(ValueError, match="axis head has 3 entries but 2 labels"):
        Result(name="x", value=value, dims=("layer", "head"), units="1", coords={"head": [0, 1]})
    with pytest.raises(ValueError, match="row is no axis of layer, head"):
        Result(name="x", value=value, dims=("layer", "head"), units="1", coords={"row": [0, 1]})
    with pytest.raises(ValueError, match=r"wide is \(4,\), which does not broadcast"):
        Result(name="x", value=value, dims=("layer", "head"), units="1", columns={"wide": torch.zeros(4)})


def test_frozen_and_float64() -> None:
    result = Result(name="x", value=np.ones(2, dtype=np.float32), dims=("head",), units="1")
    assert result.value.dtype == torch.float64
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.name = "y"


def test_the_repr_says_what_it_is() -> None:
    text = repr(example())
    assert text.startswith("Result half_life [tokens] (layer=2, head=3, family mamba1)")
    assert "2 of 6 infinite, 1 of 6 NaN" in text
    assert "assumes: The text is long." in text
