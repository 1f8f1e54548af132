"""Pages of features in the formats of Neuronpedia and SAEDashboard; `golden/` holds the keys that these read."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.cli import main

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, list[str]]:
    return json.loads((GOLDEN / f"{name}_keys.json").read_text())


@pytest.fixture(scope="module")
def neuronpedia(tiny_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("neuronpedia")
    main(["export", str(tiny_run), str(out), "--format", "neuronpedia", "--creator", "me", "--release", "tiny"])
    return next(path.parent for path in out.rglob("release.jsonl"))


@pytest.fixture(scope="module")
def saedashboard(tiny_run, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("saedashboard")
    main(["export", str(tiny_run), str(out), "--format", "saedashboard"])
    assert [p.name for p in out.iterdir()] == ["batch-0.json"]
    return json.loads((out / "batch-0.json").read_text())


def rows(file: Path) -> list[dict]:
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_neuronpedia_has_its_files_and_keys(neuronpedia):
    for name, keys in golden("neuronpedia").items():
        file = neuronpedia / name / "batch-0.jsonl.gz"
        found = rows(file if file.exists() else neuronpedia / f"{name}.jsonl")
        assert found, name
        assert all(sorted(row) == keys for row in found), name


def test_saedashboard_has_its_keys(saedashboard):
    keys = golden("saedashboard")
    assert sorted(saedashboard) == keys["batch"] and len(saedashboard["features"]) == 96
    for feature in saedashboard["features"]:
        assert sorted(feature) == keys["feature"]
        assert all(sorted(a) == keys["activation"] for a in feature["activations"])


def test_pages_say_what_the_store_says(neuronpedia, saedashboard, tiny_run):
    run = Run.open(tiny_run)
    features = {int(row["index"]): row for row in rows(neuronpedia / "features" / "batch-0.jsonl.gz")}
    activations = rows(neuronpedia / "activations" / "batch-0.jsonl.gz")
    with run.store() as store:
        facts = {row["feature"]: row for row in store.sql("SELECT * FROM features").to_pylist()}
        firing = max(facts, key=lambda f: facts[f]["density"])
        values = store.sql("SELECT activation FROM activations WHERE feature = $f AND split = 'train'", {"f": firing})[
            "activation"
        ].to_numpy()
        top = store.examples(firing, limit=20)
    assert len(features) == 96
    page, twin = features[firing], saedashboard["features"][firing]
    assert page["frac_nonzero"] == twin["frac_nonzero"] == pytest.approx(facts[firing]["density"])
    assert page["pos_str"] == facts[firing]["promotes"]
    counts, _ = np.histogram(values, 50, (0, facts[firing]["max_activation"]))
    assert sum(page["freq_hist_data_bar_heights"]) == len(values)
    # a value on an edge may fall to either side of it in float32
    assert np.abs(np.array(page["freq_hist_data_bar_heights"]) - counts).sum() <= 4
    assert sum(page["logits_hist_data_bar_heights"]) == run.language_model.model.get_output_embeddings().weight.shape[0]
    torch.testing.assert_close(torch.tensor(page["vector"]), run.dictionary().W_dec[firing].detach())
    mine = [a for a in activations if a["index"] == str(firing)]
    assert [a["tokens"] for a in mine if a["binMin"] == -1] == [e.tokens for e in top]
    assert mine[0]["values"][mine[0]["qualifyingTokenIndex"]] == pytest.approx(top[0].activation, abs=1e-5)
    assert mine[0]["maxValueTokenIndex"] == np.argmax(mine[0]["values"])
    deciles = [a for a in mine if a["binContains"] == 0.1]
    assert deciles
    for a in deciles:
        peak = a["values"][a["qualifyingTokenIndex"]]
        assert a["binMin"] - 1e-5 <= peak <= a["binMax"] + 1e-5


def test_explanations_are_the_labels_that_passed(neuronpedia, tiny_run):
    with Run.open(tiny_run).store() as store:
        expected = {
            str(r["feature"]): r["label"]
            for r in store.sql("SELECT feature, label FROM features WHERE kind <> 'none'").to_pylist()
        }
    found = rows(neuronpedia / "explanations" / "batch-0.jsonl.gz")
    assert {row["index"]: row["description"] for row in found} == expected
    assert all(json.loads(row["notes"])["n_active"] >= 0 for row in found)


def test_the_same_run_gives_the_same_files(neuronpedia, tiny_run, tmp_path):
    main(["export", str(tiny_run), str(tmp_path), "--format", "neuronpedia", "--creator", "me", "--release", "tiny"])
    for file in neuronpedia.rglob("*.gz"):
        again = next(tmp_path.rglob(f"{file.parent.name}/{file.name}"))
        assert again.read_bytes() == file.read_bytes()
