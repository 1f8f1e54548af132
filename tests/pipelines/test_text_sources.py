"""Every kind of source on real files: what is read, what is left out and counted, what is refused."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeql.pipelines.corpus import CorpusConfig, CorpusError, CorpusReader, Document, SourceConfig
from saeql.pipelines.text_sources import TOKENIZER_KEY
from saeql.sae.config import ConfigError

TEXTS = ["The river bank.", "blue house", "", "Paris runs quickly", "the  RIVER bank.", "seven stone"]
KEPT = ["The river bank.", "blue house", "Paris runs quickly", "seven stone"]


def lines(texts: list[str] = TEXTS, column: str = "text") -> bytes:
    return "".join(json.dumps({column: t}) + "\n" for t in texts).encode()


def zstd(path: Path, *frames: bytes) -> Path:
    data = b""
    for frame in frames:
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(frame)
        data += path.read_bytes()
    path.write_bytes(data)
    return path


def written(folder: Path, kind: str) -> Path:
    path = folder / f"data{kind}"
    if kind in (".jsonl", ".ndjson"):
        path.write_bytes(lines())
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines(TEXTS[:2])) + gzip.compress(lines(TEXTS[2:])))
    elif kind == ".jsonl.xz":
        path.write_bytes(lzma.compress(lines(TEXTS[:2])) + lzma.compress(lines(TEXTS[2:])))
    elif kind == ".jsonl.zst":
        zstd(path, lines(TEXTS[:2]), lines(TEXTS[2:]))
    elif kind == ".parquet":
        pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=2)
    elif kind == "saved":
        from datasets import Dataset

        Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))}).save_to_disk(str(path))
    elif kind == "saved dict":
        from datasets import Dataset, DatasetDict

        DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(path))
    else:  # a folder of all sorts
        (path / "below").mkdir(parents=True)
        (path / "a.txt").write_text(TEXTS[0])
        (path / "b.md.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
        (path / "below" / "c.jsonl").write_bytes(lines(TEXTS[2:4]))
        pq.write_table(pa.table({"text": TEXTS[4:]}), path / "d.parquet")
        (path / "picture.png").write_bytes(b"\x89PNG")
    return path


KINDS = [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet", "saved", "saved dict", "folder"]


def read(**options: Any) -> tuple[list[Document], CorpusReader]:
    reader = CorpusReader(CorpusConfig(**options))
    return list(reader), reader


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path, kind: str):
    found, reader = read(source=str(written(tmp_path, kind)))
    assert sorted(d.text for d in found) == sorted(KEPT if kind != "folder" else [*KEPT[1:], found[0].text])
    assert reader.report()[0] | {"source": ""} == {
        "source": "", "content": "text", "weight": 1.0, "num_rows": 6, "num_documents": 4, "num_tokens": 0,
        "num_cut": 0, "left_out": {"empty": 1, "not_utf8": 0, "duplicate": 1, "template_refused": 0},
    }  # fmt: skip
    by_text = {d.text: d.split for d in read(source=str(written(tmp_path, ".jsonl")))[0]}
    assert all(by_text[d.text] == d.split for d in found)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_from_its_state(tmp_path: Path, kind: str):
    path = str(written(tmp_path, kind))
    whole = read(source=path)[0]
    for stop in range(1, len(whole)):
        reader = CorpusReader(CorpusConfig(source=path))
        started = iter(reader)
        first = [next(started) for _ in range(stop)]
        state = json.loads(json.dumps(reader.state()))
        rest = CorpusReader(CorpusConfig(source=path), state=state)
        assert [*first, *rest] == whole
        assert rest.report()[0]["num_rows"] == 6


def test_what_is_not_utf8_is_left_out_and_counted(tmp_path: Path):
    bad = b'{"text": "caf\xe9"}\n'
    (tmp_path / "a.jsonl").write_bytes(bad + lines(["one"]) + rb'{"text": "half a pair \ud800"}' + b"\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    texts = pa.array([b"two", b"caf\xe9", b"three"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    found, reader = read(source=str(tmp_path))
    assert [d.text for d in found] == ["one", "two", "three"]
    assert reader.report()[0]["left_out"]["not_utf8"] == 4
    assert [d.index for d in found] == [1, 4, 6]


def test_duplicates_stay_where_asked_and_lie_on_one_side(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([f"text {n % 40}" for n in range(120)]))
    found, _ = read(source=str(path), drop_duplicates=False)
    assert len(found) == 120 and len({(d.text, d.split) for d in found}) == 40
    assert len(read(source=str(path))[0]) == 40


def test_pieces_of_one_document_stay_on_one_side(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"piece {n}", "book": n // 8}) + "\n" for n in range(400)))
    by_text, by_book = ({d.index: d.split for d in read(source=str(path), split_column=c)[0]} for c in ("", "book"))
    books = [{by_book[n] for n in range(b * 8, b * 8 + 8)} for b in range(50)]
    assert all(len(sides) == 1 for sides in books) and len(set.union(*books)) == 3
    assert any(len({by_text[n] for n in range(b * 8, b * 8 + 8)}) > 1 for b in range(50))


def mixture(folder: Path, **options: Any) -> CorpusConfig:
    sources = []
    for name, weight, count in (("a", 3.0, 300), ("b", 1.0, 300), ("c", 1.0, 3)):
        (folder / f"{name}.jsonl").write_bytes(lines([f"{name} {'word ' * (n % 7 + 1)}{n}" for n in range(count)]))
        sources.append(SourceConfig(source=str(folder / f"{name}.jsonl"), weight=weight))
    return CorpusConfig(mixture=tuple(sources), **options)


def credited(reader: CorpusReader, num: int | None = None) -> list[Document]:
    found = []
    for document in reader:
        reader.credit(document, len(document.text.split()))
        found.append(document)
        if len(found) == num:
            break
    return found


def test_a_mixture_follows_its_weights_in_tokens(tmp_path: Path):
    config = mixture(tmp_path)
    reader = CorpusReader(config)
    credited(reader, 200)
    tokens = [s["num_tokens"] for s in reader.report()]
    assert tokens[0] == pytest.approx(3 * tokens[1], abs=3 * 9)  # the longest document has 9 words
    assert reader.report()[2]["num_documents"] == 3  # used up; the others go on
    assert credited(CorpusReader(config)) == credited(CorpusReader(config))


def test_a_mixture_goes_on_from_its_state(tmp_path: Path):
    config = mixture(tmp_path)
    whole = credited(CorpusReader(config))
    assert len(whole) == 603 and [d.document_id for d in whole] == list(range(603))
    for stop in (1, 50, 333):
        reader = CorpusReader(config)
        first = credited(reader, stop)
        assert first + credited(CorpusReader(config, state=reader.state())) == whole


def test_sources_of_a_mixture_are_checked(tmp_path: Path):
    with pytest.raises(ConfigError, match="exclude each other"):
        CorpusConfig(source="a.txt", mixture=(SourceConfig(source="b.txt"),))
    with pytest.raises(ConfigError, match=r"weight of b.txt must be above 0, got 0"):
        SourceConfig(source="b.txt", weight=0)
    with pytest.raises(ConfigError, match='did you mean "tokens"'):
        CorpusConfig(content="token")
    (tmp_path / "empty.jsonl").write_bytes(lines([""]))
    config = CorpusConfig(mixture=(*mixture(tmp_path).mixture, SourceConfig(source=str(tmp_path / "empty.jsonl"))))
    with pytest.raises(CorpusError, match=r"empty.jsonl is empty: no document with text in it, 1 empty"):
        credited(CorpusReader(config))


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


def test_pretokenised_rows_need_their_tokenizer(tmp_path: Path, tokenizer: Any):
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    plain, named = tmp_path / "plain.parquet", tmp_path / "named.parquet"
    pq.write_table(pa.table({"input_ids": rows}), plain)
    pq.write_table(pa.table({"input_ids": rows}).replace_schema_metadata({TOKENIZER_KEY: "a" * 64}), named)

    def documents(path: Path, mine: str = "a" * 64, **options: Any) -> list[Document]:
        config = CorpusConfig(source=str(path), content="tokens", **options)
        return list(CorpusReader(config, tokenizer, tokenizer_sha256=mine))

    found = documents(named)
    assert [list(d.token_ids or ()) for d in found] == [rows[n] for n in (0, 1, 3, 5)]
    texts = {d.text: d.split for d in read(source=str(written(tmp_path, ".jsonl")))[0]}
    assert {d.text: d.split for d in found} == texts  # ids and text of one document are on one side
    assert [d.token_ids for d in documents(plain, tokenizer_sha256="a" * 64)] == [d.token_ids for d in found]
    with pytest.raises(CorpusError, match=r"do not say which tokenizer made them.*corpus.tokenizer_sha256 = \"aaaa"):
        documents(plain)
    with pytest.raises(CorpusError, match=r"named.parquet row 0: the ids were made by tokenizer aaaa.*model's is bbbb"):
        documents(named, "b" * 64)
    pq.write_table(pa.table({"input_ids": [[1, 99_999]]}), plain)
    with pytest.raises(CorpusError, match=r"row 0: token id 99999 is outside the vocabulary of \d+"):
        documents(plain, tokenizer_sha256="a" * 64)


CHATS = [
    [{"role": "user", "content": "The river"}, {"role": "assistant", "content": "bank"}],
    [{"role": "user", "content": "  "}],
    [{"role": "user", "content": "blue"}, {"role": "user", "content": "house"}],
    [],
]


def test_chats_go_through_the_models_template(tmp_path: Path, tokenizer: Any):
    import copy

    path = tmp_path / "chat.jsonl.zst"
    zstd(path, "".join(json.dumps({"messages": m}) + "\n" for m in CHATS).encode())
    config = CorpusConfig(source=str(path), content="chat")
    with pytest.raises(CorpusError, match=r"no chat template: .* line 1 needs content = \"text\""):
        list(CorpusReader(config, tokenizer))
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    reader = CorpusReader(config, strict)
    found = list(reader)
    assert [d.text for d in found] == ["<s>user: The river</s><s>assistant: bank</s>"]
    assert reader.report()[0]["left_out"] == {"empty": 2, "not_utf8": 0, "duplicate": 0, "template_refused": 1}
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    relaxed = list(CorpusReader(config, other))
    assert [d.text for d in relaxed] == ["[The river][bank]", "[blue][house]"]
    assert relaxed[0].sha256 == found[0].sha256  # the template does not move a conversation to another side


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"messages": 3}\n', r"a.jsonl line 1: messages are no list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r'line 1: a message lacks "role" or "content"'),
        ("a.jsonl", b'{"text": "x"}\n', r'line 1 has no chat field "messages" \(it has text\)'),
    ],
)
def test_unusable_chats_are_named(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str):
    import copy

    (tmp_path / name).write_bytes(content)
    template = copy.deepcopy(tokenizer)
    template.chat_template = "x"
    with pytest.raises(CorpusError, match=message):
        list(CorpusReader(CorpusConfig(source=str(tmp_path / name), content="chat"), template))


def test_damaged_files_are_named(tmp_path: Path):
    cut = zstd(tmp_path / "cut.jsonl.zst", lines())
    cut.write_bytes(cut.read_bytes()[:-8])
    whole = gzip.compress(lines())
    (tmp_path / "bad.jsonl.gz").write_bytes(whole[:20] + bytes([whole[20] ^ 255]) + whole[21:])
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(lines())[:-8])
    (tmp_path / "bad.jsonl.xz").write_bytes(lines())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "other.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    (tmp_path / "pictures").mkdir()
    for name, message in (
        ("cut.jsonl.zst", r"cut.jsonl.zst cannot be read: .*[Tt]runcated"),
        ("bad.jsonl.gz", r"bad.jsonl.gz cannot be read"),
        ("cut.jsonl.xz", r"cut.jsonl.xz cannot be read"),
        ("bad.jsonl.xz", r"bad.jsonl.xz cannot be read"),
        ("bad.parquet", r"bad.parquet cannot be read as Parquet"),
        ("other.parquet", r'other.parquet has no column "text", it has body'),
        ("broken", r"broken is not a whole dataset"),
        ("pictures", r"pictures holds no text that saeql reads"),
    ):
        with pytest.raises(CorpusError, match=message):
            read(source=str(tmp_path / name))


def test_a_hub_dataset_without_a_network_is_one_line():
    with pytest.raises(CorpusError, match=r"^cannot read dataset no/such-dataset: [^\n]+$"):
        read(source="hf:no/such-dataset:plain@main")


def test_a_mixture_in_toml_survives_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from saeql.pipelines import Run, load_config

    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).touch()
    file = tmp_path / "mixed.toml"
    file.write_text(
        '[corpus]\nbos = "document"\n[[corpus.mixture]]\nsource = "a.jsonl"\nweight = 3\n'
        '[[corpus.mixture]]\nsource = "b.parquet"\ncontent = "chat"\n'
    )
    config = load_config(file)
    assert [(s.source, s.weight, s.column) for s in config.corpus.sources] == [
        ("a.jsonl", 3.0, "text"),
        ("b.parquet", 1.0, "messages"),
    ]
    Run.create(tmp_path / "run", config)
    assert Run.open(tmp_path / "run").config == config
    file.write_text("[[corpus.mixture]]\nweight = 3\n")
    with pytest.raises(ConfigError, match="source"):
        load_config(file)
    file.write_text('[[corpus.mixture]]\nsource = "a"\nwieght = 3\n')
    with pytest.raises(ConfigError, match=r'unknown key "corpus.mixture.wieght".*did you mean "weight"'):
        load_config(file)


def test_text_beside_the_configured_corpus(tmp_path: Path):
    from saeql.pipelines.config import RunConfig, with_text

    first, second = written(tmp_path, ".jsonl"), tmp_path / "more.txt"
    second.write_text("a further document")
    config = RunConfig(corpus=CorpusConfig(source=str(first), text_column="text", max_tokens=0))
    both = with_text(config, [second])
    assert [s.source for s in both.corpus.sources] == [str(first), str(second)]
    assert with_text(both, [first]).corpus.mixture[:2] == both.corpus.mixture
    assert with_text(config, []) is config
    assert {d.text for d in CorpusReader(both.corpus)} >= {"a further document", *KEPT}
