"""BOS, separators and borders: what a window holds under each rule."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saeql.pipelines.corpus import CorpusConfig
from saeql.pipelines.windows import WindowPacker, WindowRules

BOS, EOS = 1, 2
MODEL = SimpleNamespace(bos_id=BOS, separator_id=EOS)
DOCUMENTS = [[10, 11, 12, 13, 14], [20], [30, 31, 32]]


def packed(documents: list[list[int]] = DOCUMENTS, **rules) -> tuple[list[list[int]], list[list[int]], WindowPacker]:
    packer = WindowPacker(4, WindowRules.of(CorpusConfig(**rules), MODEL))
    windows = [w for n, ids in enumerate(documents) for w in packer.add(ids, n)]
    return [w[0].tolist() for w in windows], [w[1].tolist() for w in windows], packer


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [[1, 10, 11, 12], [1, 13, 14, 2], [1, 20, 2, 30], [1, 31, 32, 2]]),
        ({"separator": "none"}, [[1, 10, 11, 12], [1, 13, 14, 20], [1, 30, 31, 32]]),
        ({"separator": "bos"}, [[1, 10, 11, 12], [1, 13, 14, 1], [1, 20, 1, 30], [1, 31, 32, 1]]),
        ({"bos": "document"}, [[1, 10, 11, 12], [13, 14, 2, 1], [20, 2, 1, 30]]),
        ({"bos": "document", "separator": "none"}, [[1, 10, 11, 12], [13, 14, 1, 20], [1, 30, 31, 32]]),
        ({"bos": "never"}, [[10, 11, 12, 13], [14, 2, 20, 2], [30, 31, 32, 2]]),
        ({"bos": "never", "separator": "none"}, [[10, 11, 12, 13], [14, 20, 30, 31]]),
        ({"pack": False}, [[1, 10, 11, 12], [1, 13, 14, 2], [1, 30, 31, 32]]),
        ({"pack": False, "bos": "document"}, [[1, 10, 11, 12], [1, 30, 31, 32]]),
    ],
    ids=str,
)
def test_windows_under_every_rule(rules: dict, expected: list[list[int]]):
    ids, owners, packer = packed(**rules)
    assert ids == expected
    for window, documents in zip(ids, owners, strict=True):  # every text token lies with its document
        assert all(d == token // 10 - 1 for token, d in zip(window, documents, strict=True) if token >= 10)
        assert rules.get("pack", True) or len(set(documents)) == 1
    fixed = sum(map(len, ids)) - len(ids) * (rules.get("bos", "window") == "window")
    bos = 3 * (rules.get("bos") == "document")
    separators = 3 * (rules.get("separator") != "none")
    assert fixed + packer.num_pending_tokens + packer.num_dropped_tokens == 9 + bos + separators


def test_no_token_is_doubled():
    chat = [[BOS, 10, 11, EOS], [BOS, 20, 21, 22, EOS]]
    assert packed(chat, bos="window")[0] == [[1, 10, 11, 2], [1, 20, 21, 22]]
    assert packed(chat, bos="document")[0] == [[1, 10, 11, 2], [1, 20, 21, 22]]


def test_the_rules_of_a_run_are_recorded_and_counted(tiny_config: Path, tmp_path: Path):
    from saeql.pipelines import Run, load_config
    from saeql.store.evidence import Evidence

    source = tmp_path / "text.jsonl"
    text = load_config(tiny_config).corpus.source
    source.write_bytes(b'{"text": "caf\xe9"}\n{"text": ""}\n' + Path(text).read_bytes())
    overrides = {"corpus.source": str(source), "corpus.bos": "document", "corpus.max_document_tokens": "50"}
    run = Run.create(tmp_path / "run", load_config(tiny_config, overrides))
    list(run.execute(("harvest",)))
    found = run.harvest_info.text
    assert found["rules"] == {"window_bos_id": None, "document_bos_id": 1, "separator_id": 2, "pack": True}
    counts = found["sources"][0]
    assert counts["left_out"] == {"empty": 1, "not_utf8": 1, "duplicate": 0, "template_refused": 0}
    assert counts["num_documents"] == 200 and counts["num_cut"] > 100
    ids = np.array(Evidence(tmp_path / "run" / "evidence").read("windows")["token_ids"].to_pylist())
    assert 0 < (ids[:, 0] == 1).mean() < 0.5  # BOS where a document begins, not where a window does
    assert (ids == 1).sum() > 100


def test_chats_of_the_embedded_model_begin_with_one_bos(tmp_path: Path):
    import json

    from transformers import AutoTokenizer

    from saeql.pipelines.corpus import CorpusReader
    from saeql.pipelines.models import ModelConfig, model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(ModelConfig()))
    file = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "What is a river?"}, {"role": "assistant", "content": "Water that runs."}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    (document,) = CorpusReader(CorpusConfig(source=str(file), content="chat"), tokenizer)
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    packer = WindowPacker(
        16, WindowRules.of(CorpusConfig(), SimpleNamespace(bos_id=tokenizer.bos_token_id, separator_id=2))
    )
    first = next(packer.add(ids, 0))[0]
    assert first.tolist() == ids[:16]
