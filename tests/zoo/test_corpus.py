"""The held-out documents are found, are whole, and leave no trace in the training text."""

import pytest

from ssmlens.zoo.corpus import FILES, WEIGHTS, hold_out, read_parts, synthetic_text
from ssmlens.zoo.data import END, Pack, build


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return synthetic_text(tmp_path_factory.mktemp("text"))


def test_weights_are_a_distribution():
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_holds_out_what_it_says(text):
    kept, held = hold_out(read_parts(text))
    groups = [d.group for d in held]
    assert {g: groups.count(g) for g in groups} == {"Persuasion": 1, "Macbeth": 1, "addresses": 10, "countries": 20}
    everything = "\n".join(d for documents in kept.values() for d in documents)
    for document in held:
        assert document.text not in everything
        if document.group == "countries":
            assert f" {document.title}?" not in everything
    questions = kept["questions"][0].split("\n\n")
    assert sum(q.startswith("Question: What is the capital of ") for q in questions) == 2  # 20 of 22 are gone


def test_split_is_deterministic_and_complete(text):
    parts = read_parts(text)
    first, second = hold_out(parts), hold_out(read_parts(text))
    assert first == second
    kept, held = first
    for name in ("narrative", "facts", "technical"):
        whole = kept[name] + [d.text for d in held if d.text in parts[name]]
        assert sorted(whole) == sorted(parts[name])


@pytest.mark.parametrize("title", ["Persuasion", "MACBETH", "CHAPTER 1. Loomings"])
def test_a_missing_document_is_an_error(text, title):
    parts = read_parts(text)
    parts["narrative"] = [d for d in parts["narrative"] if not d.startswith(title)]
    with pytest.raises(ValueError, match=r"held out|Moby-Dick"):
        hold_out(parts)


def test_a_missing_file_is_named(text, tmp_path):
    for name in FILES[:-1]:
        (tmp_path / f"{name}.txt").write_text((text / f"{name}.txt").read_text())
    with pytest.raises(FileNotFoundError, match=r"technical\.txt"):
        read_parts(tmp_path)


def test_pack_survives_saving_and_decodes_to_the_text(text, tmp_path):
    pack = build(text, 320, key_value_tokens=500)
    again = Pack.load(pack.save(tmp_path / "pack"))
    assert again.meta == pack.meta
    for name, ids in pack.parts.items():
        assert (again.parts[name] == ids).all()
        assert ids[0] == 0
        assert ids.max() < pack.meta["vocabulary"]
    kept, held = hold_out(read_parts(text))
    decoded = again.tokenizer.decode(again.parts["narrative"].tolist(), skip_special_tokens=False)
    assert decoded.split(END)[1:] == kept["narrative"]
    assert [(h.title, h.n_bytes) for h in again.held_out] == [(d.title, len(d.text.encode())) for d in held]
    assert again.tokenizer.decode(again.held_out[0].ids[1:].tolist()) == held[0].text


def test_no_pack(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pack"):
        Pack.load(tmp_path)
