"""Documents and their splits."""

import json
from pathlib import Path

import pytest

from saeql.pipelines.corpus import CorpusConfig, CorpusError, CorpusReader, documents, normalise, split_of


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def test_a_document_never_changes_side(tmp_path: Path):
    texts = [f"document number {n}" for n in range(400)]
    first = {d.text: d.split for d in documents(CorpusConfig(source=str(write(tmp_path / "a.jsonl", texts))))}
    turned = [*reversed(texts), "another one"]
    second = {d.text: d.split for d in documents(CorpusConfig(source=str(write(tmp_path / "b.jsonl", turned))))}
    assert all(second[text] == split for text, split in first.items())


def test_shares_are_those_asked_for(tmp_path: Path):
    texts = [f"document number {n}" for n in range(4000)]
    splits = [d.split for d in documents(CorpusConfig(source=str(write(tmp_path / "a.jsonl", texts))))]
    assert splits.count("train") / 4000 == pytest.approx(0.7, abs=0.03)
    assert splits.count("calibration") / 4000 == pytest.approx(0.15, abs=0.03)


def test_documents_that_differ_only_in_form_are_one(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", ["The  River\nbank", "the river bank", "", "   ", "the ﬁve rivers"])
    found = list(documents(CorpusConfig(source=str(file))))
    assert [d.document_id for d in found] == [0, 1]
    assert normalise("The ﬁve\tRivers ") == "the five rivers"


def test_splits_at_the_borders():
    shares = {"train": 0.5, "calibration": 0.25, "test": 0.25}
    assert split_of("0" * 64, shares) == "train"
    assert split_of("7" + "f" * 63, shares) == "train"
    assert split_of("8" + "0" * 63, shares) == "calibration"
    assert split_of("f" * 64, shares) == "test"


def test_a_folder_of_text_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "c.png").write_bytes(b"\x89")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 and more")
    reader = CorpusReader(CorpusConfig(source=str(tmp_path)))
    assert {d.title: d.text for d in reader} == {"a.txt": "one", "b.md": "two"}
    assert reader.report()[0]["left_out"]["not_utf8"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("{}\n", 'no text field "text"'),
        ("[1]\n", "no text field"),
        ("x\n", "line 1"),
    ],
)
def test_unusable_text_is_named(tmp_path: Path, content: str, message: str):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(documents(CorpusConfig(source=str(file))))


def test_missing_sources():
    with pytest.raises(CorpusError, match="no corpus at"):
        list(documents(CorpusConfig(source="/nowhere")))
    with pytest.raises(CorpusError, match='did you mean "embedded:wikipedia"'):
        list(documents(CorpusConfig(source="embedded:wikipedi")))


def test_the_embedded_wikipedia_is_real_text():
    found = list(documents(CorpusConfig()))
    assert len(found) > 90
    assert {"train", "calibration", "test"} == {d.split for d in found}
    text = next(d.text for d in found if d.title == "Anarchism")
    assert "political philosophy" in text and "'''" not in text and "==" not in text
