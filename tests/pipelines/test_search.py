"""Searching a finished run with its model and dictionary, in Python and on the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.search import search_direction, search_prompt
from saeql.pipelines.steering.vectors import SteeringVector
from saeql.sae.config import ConfigError
from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence
from saeql.store.parquet_store import write_parquet

TEXT = " the river bank and the blue house"


def test_prompt_is_what_the_dictionary_says(tiny_run: Path) -> None:
    run = Run.open(tiny_run)
    lm, dictionary = run.language_model, run.dictionary()
    with run.store() as store:
        found = search_prompt(run, store, TEXT, limit=1000)
        largest = dict(tuple(r.values()) for r in store.sql("SELECT feature, max_activation FROM features").to_pylist())
    ids = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    acts = []
    layers = lm.model.base_model.layers
    handle = layers[1].register_forward_hook(lambda m, i, o: acts.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        lm.model(torch.tensor([[lm.bos_id, *ids]]))
    handle.remove()
    latents = dictionary.encode(acts[0].reshape(-1, acts[0].shape[-1])[1:].float())
    wanted: dict[int, float] = {}
    for values, features in zip(latents.values.tolist(), latents.indices.tolist(), strict=True):
        for value, feature in zip(values, features, strict=True):
            if value > 0 and largest[feature] > 0:
                wanted[feature] = max(wanted.get(feature, 0), value / largest[feature])
    assert len(wanted) > 3 and len(found.tokens) == len(found.by_token) == len(ids)
    assert {h.feature: h.score for h in found.hits} == pytest.approx(wanted, rel=1e-4)
    assert [h.score for h in found.hits] == sorted((h.score for h in found.hits), reverse=True)
    assert max(h.score for own in found.by_token for h in own) == pytest.approx(found.hits[0].score)


def test_direction_is_cosine(tiny_run: Path) -> None:
    run = Run.open(tiny_run)
    rows = torch.nn.functional.normalize(run.dictionary().W_dec.detach(), dim=1).numpy()
    cosines = rows @ rows[7]
    order = [int(i) for i in np.argsort(-cosines) if i != 7][:5]
    with run.store() as store:
        hits = search_direction(run, store, 7, limit=5)
        assert [h.feature for h in hits] == order
        assert [h.score for h in hits] == pytest.approx(cosines[order], abs=1e-5)
        assert search_direction(run, store, rows[7] * 3, limit=1)[0].feature == 7
        itself = search_direction(run, store, 7, among=run.spec.name, limit=1)[0]
        assert itself.feature == 7 and itself.score == pytest.approx(1, abs=1e-5)
        kinds = {h.kind for h in search_direction(run, store, 7, where="kind = 'none'")}
        assert kinds <= {"none"}
        with pytest.raises(ConfigError, match="0 to 95"):
            search_direction(run, store, 96)
        with pytest.raises(StoreError, match="needs 32 numbers"):
            search_direction(run, store, np.ones(31))


def test_nearest_to_the_vector_of_a_file(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run.open(tiny_run)
    place, row = run.spec.writes[0], run.dictionary().W_dec.detach()[7] * 3
    file, elsewhere = (SteeringVector("v", {p: row}, {p: 1.0}) for p in (place, "resid_post.99"))
    file.save(tmp_path / "v.safetensors")
    elsewhere.save(tmp_path / "w.safetensors")
    main(["search", str(tiny_run), "--like", str(tmp_path / "v.safetensors"), "--limit", "2", "--json"])
    first = json.loads(capsys.readouterr().out)[0]
    assert first["feature"] == 7 and first["score"] == pytest.approx(1, abs=1e-5)
    for name, told in (("w", f"writes at {place}"), ("none", "no steering vector at")):
        with pytest.raises(SystemExit) as caught:
            main(["search", str(tiny_run), "--like", str(tmp_path / f"{name}.safetensors")])
        assert caught.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["river"], ["--token", "river"], ["--effect", "river"], ["--prompt", TEXT], ["--like", "3"],
     ["--like", "3", "--where", "density > 0"]],
)  # fmt: skip
def test_command_line(tiny_run: Path, capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    main(["search", str(tiny_run), *arguments, "--limit", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    hits = found["features"] if isinstance(found, dict) else found
    assert 0 < len(hits) <= 3 and {"feature", "score", "label", "matched"} <= hits[0].keys()
    main(["search", str(tiny_run), *arguments])
    assert str(hits[0]["feature"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "search for one thing"),
        (["river", "--token", "river"], "search for one thing"),
        (["river", "--among", "x"], "--among goes with --like"),
        (["--prompt", ""], "no tokens"),
        (["--token", "nosuchtoken"], "as one token"),
    ],
)
def test_command_line_refuses(
    tiny_run: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["search", str(tiny_run), *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_store_without_a_run_is_asked_alike(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    write_parquet(tiny_run / "features.duckdb", tmp_path / "parquet")
    main(["export", str(tiny_run), str(tmp_path / "shared"), "--format", "parquet"])
    main(["import", str(tmp_path / "shared"), str(tmp_path / "imported"), "--format", "parquet"])
    capsys.readouterr()
    questions = [
        ("search", ["river", "--json"]), ("search", ["--token", "river", "--json"]), ("show", ["7", "--json"]),
        ("search", ["--meaning", "a river", "--json"]), ("sql", ["SELECT feature, label FROM features", "--csv"]),
    ]  # fmt: skip
    stores = (tmp_path / "parquet", tmp_path / "imported", tmp_path / "imported" / "features.duckdb")
    for command, asked in questions:
        wanted = said(command, tiny_run, *asked)
        for store in stores:
            assert said(command, store, *asked) == wanted, (command, asked, store)
    for store in stores:
        for option in (["--prompt", TEXT], ["--like", "3"]):
            with pytest.raises(SystemExit) as caught:
                main(["search", str(store), *option])
            told = capsys.readouterr().err
            assert caught.value.code == 2 and "is a store alone" in told and told.count("\n") == 1
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (tmp_path / "text.duckdb").write_text("no store" * 1000)
    for command, rest in (("search", ["river"]), ("show", ["1"]), ("sql", ["SELECT 1"])):
        for path, message in ((nothing, "no run and no store in"), (tmp_path / "text.duckdb", "cannot open")):
            with pytest.raises(SystemExit) as caught:
                main([command, str(path), *rest])
            told = capsys.readouterr().err
            assert caught.value.code == 2 and message in told and told.count("\n") == 1, told


def test_a_store_is_added_to_and_rebuilt(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        shutil.copytree(tiny_run, folder)
    with Run.open(run).store() as store:
        row = store.sql("SELECT * FROM runs").to_pylist()[0]
        assert row["run"] == tiny_run.name and json.loads(row["config"])["dictionary"]["d_sae"] == 96
        assert row["dataset_fingerprint"] == store.sql("SELECT * FROM corpora").to_pylist()[0]["dataset_fingerprint"]
        wanted = store.sql("SELECT * FROM examples ORDER BY ALL").to_pylist()
    main(["store", str(run), "--parquet", str(tmp_path / "shared")])
    main(["store", str(run), "--add", str(other)])  # the same text and dictionary: nothing comes in
    assert json.loads((run / "store.json").read_text()) == {"add": ["../other/evidence"]}
    damaged = bytearray((run / "features.duckdb").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 4096] = bytes(4096)
    (run / "features.duckdb").write_bytes(damaged)
    main(["index", str(run), "--rebuild"])
    with Run.open(run).store() as store:
        assert store.sql("SELECT * FROM examples ORDER BY ALL").to_pylist() == wanted
    with pytest.raises(SystemExit):
        main(["store", str(run), "--add", str(tmp_path / "nothing")])
    assert "has no evidence" in capsys.readouterr().err


def test_another_seed_of_the_same_name_has_a_name_of_its_own(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        shutil.copytree(tiny_run, folder)
    evidence = Evidence(other / "evidence")
    rows = evidence.read("neighbours")
    turned = pa.array([(n + 1) % 96 for n in rows["neighbour"].to_pylist()], pa.int32())
    evidence.write("neighbours", rows.set_column(rows.column_names.index("neighbour"), "neighbour", turned))
    labels = evidence.read("labels")
    renamed = pa.array([f"other {text}" for text in labels["label"].to_pylist()])
    evidence.write("labels", labels.set_column(labels.column_names.index("label"), "label", renamed))
    query = "SELECT * EXCLUDE (dictionary) FROM {} WHERE dictionary = $name ORDER BY ALL"

    def read(table: str, name: str) -> list[dict]:
        with Run.open(run).store() as store:
            return store.trusted_sql(query.format(table), {"name": name}).to_pylist()

    wanted = {table: read(table, "topk_96_k4") for table in ("neighbours", "labels", "examples", "runs")}
    for refused in (["--as", "seed two"], ["--as", "topk_96_k4"]):
        with pytest.raises(SystemExit) as caught:
            main(["store", str(run), "--add", str(other), *refused])
        assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
        assert not (run / "store.json").exists()
    main(["store", str(run), "--add", str(other)])
    assert "is called topk_96_k4@other in this store" in capsys.readouterr().err
    assert {table: read(table, "topk_96_k4") for table in wanted} == wanted
    assert read("examples", "topk_96_k4@other") == wanted["examples"] and read("runs", "topk_96_k4@other")
    assert all(row["label"].startswith("other ") for row in read("labels", "topk_96_k4@other"))
    neighbours = {(row["feature"], row["neighbour"]) for row in read("neighbours", "topk_96_k4@other")}
    assert neighbours == set(zip(rows["feature"].to_pylist(), turned.to_pylist(), strict=True))
    assert main(["store", str(run)]) is None and read("labels", "topk_96_k4@other")  # remembered
    main(["show", str(run), "3", "--dictionary", "topk_96_k4@other"])
    assert "other " in capsys.readouterr().out
    word = next(text for text in labels["label"].to_pylist() if text != "unexplained").split()[0]
    main(["search", str(run), f"other {word}", "--dictionary", "topk_96_k4@other", "--json"])
    assert {hit["dictionary"] for hit in json.loads(capsys.readouterr().out)} == {"topk_96_k4@other"}
    for argv in (["show", "3"], ["search", "--like", "3"], ["search", "--token", "the"]):
        with pytest.raises(SystemExit) as caught:
            main([argv[0], str(run), *argv[1:], "--dictionary", "none"])
        assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    main(["store", str(run), "--add", str(other), "--as", "second"])
    assert json.loads((run / "store.json").read_text())["names"] == {"../other/evidence": {"topk_96_k4": "second"}}
    assert read("labels", "second") and not read("labels", "topk_96_k4@other")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["search", "river", "--limit", "-3"], "at least 1 features, not -3"),
        (["search", "--meaning", " "], "nothing to search for"),
        (["show", "3", "--split", "dev"], "no split 'dev': there are train, calibration, test"),
        (["show", "3", "--examples", "-1"], "at least 0 examples"),
        (["store", "--as", "mine"], "say --add RUN2 too"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    tiny_run: Path, argv: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([argv[0], str(tiny_run), *argv[1:]])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and told in lines[0]
