"""A padded batch is its single runs: in logits, recurrences, states, maps and the residual stream."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from tiny import tiny_tokenizer

import ssmlens
from ssmlens.errors import PromptError

ROWS = [[3, 17, 0, 36, 5, 5, 21, 9, 30], [11], [8, 2, 0, 0], [30, 1, 7, 19, 4, 4, 12, 33, 6]]
LIMIT = 1e-12
CASES = [
    ("mamba1", {}),
    ("mamba1", {"use_bias": True, "num_hidden_layers": 3}),
    ("mamba1", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("falcon", {"use_bias": True}),
    ("mamba2", {}),
    ("mamba2", {"use_bias": True, "num_hidden_layers": 3}),
    ("mamba2", {"use_bias": True, "n_groups": 4, "time_step_limit": (0.4, 1.1), "chunk_size": 256}),
]


def table(side: str, rows: list[list[int]] = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded with token 9 on one side, or "both" with one more on either side."""
    width = max(map(len, rows)) + 2 * (side == "both")
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": 1}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


def assert_single_runs(lens: ssmlens.Lens, batch: ssmlens.Trace, rows: list[Any], limit: float, scan: str) -> None:
    assert batch.lengths.tolist() == [len(batch.tokens[i]) for i in range(len(rows))]
    for i, row in enumerate(rows):
        single = lens.trace(row, scan=scan)
        n = single.ids.shape[1]
        assert batch.ids[i, :n].tolist() == single.ids[0].tolist()
        assert batch.tokens[i] == single.tokens[0]
        assert gap(batch.logits[i, :n], single.logits[0]) <= limit
        for k in range(len(lens.layers) + 1):
            assert gap(batch.residual(k)[i, :n], single.residual(k)[0]) <= limit
        for mixer in single:
            gaps = row_gaps(batch[mixer.layer], mixer, i, n)
            assert not {name: e for name, e in gaps.items() if not e <= limit}, (i, mixer.layer, gaps)


def row_gaps(ours: ssmlens.MixerTrace, single: ssmlens.MixerTrace, i: int, n: int) -> dict[str, float]:
    rec, alone = ours.recurrence, single.recurrence
    assert rec.real_lengths[i] == n
    pairs = {name: (getattr(rec, name)[i, :n], getattr(alone, name)[0]) for name in TERMS}
    M, D = rec.attention.dense()[i], rec.attention.distance()[i]
    pairs |= {
        "input": (ours.input[i, :n], single.input[0]),
        "output": (ours.output[i, :n], single.output[0]),
        "gate": (ours.gate[i, :n], single.gate[0]),
        "y": (rec.run()[i, :n], alone.run()[0]),
        "states": (rec.states()[i, :n], alone.states()[0]),
        "final state": (rec.final_state()[i], alone.final_state()[0]),
        "last state": (rec.states(at=[-1])[i], alone.states(at=[-1])[0]),
        "M": (M[:, :n, :n], alone.attention.dense()[0]),
        "distance": (D[:, :n], alone.attention.distance()[0]),
        "mean_abs": (rec.attention.reduce("mean_abs")[i, :n, :n], alone.attention.reduce("mean_abs")[0]),
        "row": (rec.attention.row(n - 1)[i, :, :n], alone.attention.row(n - 1)[0]),
        "column": (rec.attention.column(0)[i, :, :n], alone.attention.column(0)[0]),
    }
    gaps = {name: gap(a, b) for name, (a, b) in pairs.items()}
    gaps["padding rows of M"] = float(M[:, n:].abs().sum())
    gaps["padding columns of M"] = float(M[:, :, n:].abs().sum())
    gaps["padding of y"] = float(rec.run()[i, n:].abs().sum())
    gaps["padding of the decay"] = float(rec.log_decay[i, n:].abs().sum())
    return gaps


TERMS = ("value", "write", "read", "skip", "log_decay", "dt")


@pytest.mark.parametrize(("family", "config"), CASES)
@pytest.mark.parametrize("scan", ["model", "fast"])
def test_masked_ids_equal_single_runs(family: str, config: dict[str, Any], scan: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(**config))
    for side in ("right", "left", "both"):
        ids, mask = table(side)
        batch = lens.trace(ids, attention_mask=mask, scan=scan).check()
        assert batch.lengths.tolist() == [9, 1, 4, 9]
        assert_single_runs(lens, batch, ROWS, LIMIT, scan)


@pytest.mark.parametrize("family", ["mamba1", "falcon", "mamba2"])
def test_texts_of_mixed_length_equal_single_runs(family: str) -> None:
    model = getattr(checkpoints, family)(vocab_size=258, use_bias=True)
    lens = ssmlens.load(model, tokenizer=tiny_tokenizer())
    texts = ["the cat sat", "a", "on the mat.", "é"]
    batch = lens.trace(texts).check()
    assert batch.lengths.tolist() == [11, 1, 11, 2]
    assert_single_runs(lens, batch, texts, LIMIT, "auto")


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_equal_single_runs(family: str, dtype: torch.dtype, limit: float) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True), dtype=dtype)
    ids, mask = table("left")
    batch = lens.trace(ids, attention_mask=mask).check()
    for i, row in enumerate(ROWS):
        single = lens.trace(row)
        n = len(row)
        assert gap(batch.logits[i, :n], single.logits[0]) <= limit
        for k in (0, 1):
            rec, alone = batch[k].recurrence, single[k].recurrence
            assert gap(rec.final_state()[i], alone.final_state()[0]) <= limit
            assert float(rec.attention.dense()[i][:, n:].abs().sum()) == 0


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_full_mask_is_no_padding(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    ids = torch.tensor([ROWS[0], ROWS[3]])
    with_mask = lens.trace(ids, attention_mask=torch.ones_like(ids))
    without = lens.trace(ids)
    assert torch.equal(with_mask.logits, without.logits)
    assert with_mask[0].recurrence.lengths is None
    assert_single_runs(lens, without, [ROWS[0], ROWS[3]], LIMIT, "auto")


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_padding_token_ids_do_not_matter(family: str) -> None:
    """Not even ids outside the vocabulary, such as -100, where the mask is zero."""
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    ids, mask = table("right")
    first = lens.trace(ids, attention_mask=mask)
    second = lens.trace(ids.masked_fill(mask == 0, -100), attention_mask=mask.bool())
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.ids, second.ids)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_stretch_of_a_padded_batch(family: str) -> None:
    """Cut inside the padding of some rows: states and lengths stay those of the single runs."""
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    ids, mask = table("right")
    rec = lens.trace(ids, attention_mask=mask)[1].recurrence
    for start, stop in [(0, 3), (2, 6), (5, 9), (8, 9)]:
        part = rec[:, start:stop]
        assert part.real_lengths.tolist() == [min(max(len(r) - start, 0), stop - start) for r in ROWS]
        assert gap(part.run(), rec.run()[:, start:stop]) <= LIMIT
        assert gap(part.final_state(), rec.states(at=[stop - 1])[:, 0]) <= LIMIT
        assert gap(part.attention.dense(), rec.attention.dense()[:, :, start:stop, start:stop]) <= LIMIT
    assert gap(rec[1:3].run(), rec.run()[1:3]) <= LIMIT
    assert rec[1:3].real_lengths.tolist() == [1, 4]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_errors_of_padded_rows_count_real_tokens_only(family: str) -> None:
    """The reconstruction error of the batch is that of its rows: garbage at padding neither hides nor makes one."""
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    ids, mask = table("right")
    for scan in ("model", "fast"):
        errors = lens.trace(ids, attention_mask=mask, scan=scan).reconstruction_error
        assert 0 < max(errors.values()) <= 1e-14


BAD_MASKS = {
    "gap": ([[1, 0, 1, 1]], "gap"),
    "two": ([[1, 2, 1, 1]], "0 and 1"),
    "nothing real": ([[0, 0, 0, 0]], "empty"),
    "shape": ([[1, 1, 1]], "same shape"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_masks_that_mean_nothing_are_refused(name: str) -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    mask, words = BAD_MASKS[name]
    with pytest.raises(PromptError, match=words):
        lens.trace(torch.tensor([[1, 2, 3, 4]]), attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("prompt", [[1, 2], torch.tensor([1, 2]), "ab"])
def test_a_mask_needs_a_table_of_ids(prompt: Any) -> None:
    lens = ssmlens.load(checkpoints.mamba1(vocab_size=258), tokenizer=tiny_tokenizer())
    with pytest.raises(PromptError, match="attention_mask"):
        lens.trace(prompt, attention_mask=torch.ones(1, 2))


def test_the_emptiest_row_of_a_batch_is_named() -> None:
    lens = ssmlens.load(checkpoints.mamba1(vocab_size=258), tokenizer=tiny_tokenizer())
    with pytest.raises(PromptError, match="prompt 1 of 3 is empty"):
        lens.trace(["a", "", "b"])
