"""Tasks from files and from a run's own text, and `saeql probe` from end to end."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.corpus import document_sha256, split_of
from saeql.pipelines.probing.activations import ModelRows, StoredRows
from saeql.pipelines.probing.labelled_windows import labelled_tasks
from saeql.pipelines.probing.task_files import read_labelled
from saeql.pipelines.probing.tasks import OUT, YES, draw
from saeql.pipelines.probing.text import run_text
from saeql.store.records import SPLITS

WORDS = ["river", "bank", "music", "walking", "seven", "and", "blue", "house", "stone", "water"]


#: Receipts of probes among all.
OURS = "feature IS NULL AND regexp_matches(control, '^C1[012] ')"


def documents(num: int, seed: int = 0) -> list[tuple[list[str], str]]:
    """Word lists; those of class "wet" have water in them."""
    rng = random.Random(seed)
    made = []
    for n in range(num):
        words = [rng.choice(WORDS[:-1]) for _ in range(20)]
        if n % 2:
            for place in rng.sample(range(1, 20), 3):
                words[place] = "water"
        made.append((words, "wet" if n % 2 else "dry"))
    return made


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return Run.open(tiny_run)


def made_tasks(run: Run, path: Path, level: str):
    shares = run.config.corpus.split_shares()
    found = read_labelled(path, level=level)
    return labelled_tasks(path, found, run.language_model, shares, context_tokens=32, has_bos=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_documents_are_split_as_everywhere(run: Run, tmp_path: Path, suffix: str):
    path = write(tmp_path / f"t{suffix}", [{"text": " ".join(w), "label": c} for w, c in documents(60)])
    text, (task,) = made_tasks(run, path, "document")
    assert task.name == "t" and task.level == "document"
    assert sum(p.num_documents for p in text.splits.values()) == 60
    shares = run.config.corpus.split_shares()
    expected: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for words, label in documents(60):
        expected[split_of(document_sha256(" ".join(words)), shares)] += label == "wet"
    assert {s: int((labels == YES).sum()) for s, labels in task.labels.items()} == expected
    rows, groups = text.splits["train"].rows_of(np.array([3, 1]))
    assert (text.splits["train"].documents[rows] == np.array([3, 1])[groups]).all() and len(rows) == 40
    assert (rows % text.splits["train"].token_ids.shape[1] > 0).all()


def test_words_and_spans_are_the_same_task(run: Run, tmp_path: Path):
    made = documents(40)
    words = [{"tokens": w, "labels": [int(x == "water") for x in w]} for w, _ in made]
    spans = []
    for w, _ in made:
        starts = np.cumsum([0, *(len(x) + 1 for x in w)]).tolist()
        places = [{"start": starts[n], "end": starts[n] + 5} for n, x in enumerate(w) if x == "water"]
        spans.append({"text": " ".join(w), "spans": places})
    found = {}
    for kind, rows in (("words", words), ("spans", spans)):
        text, (task,) = made_tasks(run, write(tmp_path / f"{kind}.jsonl", rows), "token")
        part, labels = text.splits["train"], task.labels["train"]
        asked = labels != OUT
        said = [text.vocabulary.texts[t].strip() == "water" for t in part.windows.tokens.ravel()[asked]]
        assert (np.array(said) == (labels[asked] == YES)).all() and sum(said) > 20
        assert not asked[~part.eligible].any()
        found[kind] = labels
    assert (found["words"] == found["spans"]).all()


def test_three_classes_are_three_tasks(run: Run, tmp_path: Path):
    rows = [{"text": " ".join(w), "label": n % 3} for n, (w, _) in enumerate(documents(60))]
    text, tasks = made_tasks(run, write(tmp_path / "three.jsonl", rows), "document")
    assert [t.name for t in tasks] == ["three: 0", "three: 1", "three: 2"]
    assert (np.sum([t.labels["train"] == YES for t in tasks], axis=0) == 1).all()
    assert text.name == "three.jsonl"


def test_stored_rows_are_what_the_model_gives(run: Run):
    text = run_text(run.evidence, "tiny")
    stored = StoredRows(run.activations, run.harvest_info, ("resid_post.1",), text)
    rows = {s: np.random.default_rng(0).choice(np.flatnonzero(p.eligible), 40) for s, p in text.splits.items()}
    computed = ModelRows(run.language_model, ("resid_post.1",), text, rows)
    for split in SPLITS:
        np.testing.assert_allclose(stored.acts(split, rows[split]), computed.acts(split, rows[split]), atol=1e-4)


def test_drawn_splits_share_no_document(run: Run, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"text": " ".join(w), "label": c} for w, c in documents(200)] * 2)
    text, (task,) = made_tasks(run, path, "document")
    drawn = draw(task, max_cases=100, seed=0)
    texts: dict[str, set[tuple[int, ...]]] = {}
    for split in SPLITS:
        part, cases = text.splits[split], drawn.of(split).cases
        texts[split] = {tuple(part.token_ids.ravel()[part.rows_of(np.array([c]))[0]].tolist()) for c in cases}
    assert not texts["train"] & texts["test"] and not texts["calibration"] & texts["test"]
    assert len(texts["train"]) == len(drawn.train)  # the repeats were left out


def test_probe_from_end_to_end(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = (folder / "dictionaries").stat().st_mtime

    def said(*argv: object) -> str:
        main(["probe", str(folder), *map(str, argv)])
        return capsys.readouterr().out

    printed = said("--task", "planted", "--max-cases", "200")
    assert "years" in printed and "not measured: task days: 0 positive tokens" in printed
    assert "median AUROC of 1 latent on" in printed and "~~" in printed
    with Run.open(folder).store() as store:
        rows = store.sql(f"SELECT control, value, verdict, n, detail FROM receipts WHERE {OURS}").to_pylist()
    details = {r["control"]: json.loads(r["detail"]) for r in rows}
    assert {"C10 selectivity", "C11 permuted twin", "C12 latents against dense", "C12 one latent on planted tasks"} <= (
        set(details)
    )
    assert details["C10 selectivity"]["task"] and all(r["n"] > 0 for r in rows)
    assert {r["verdict"] for r in rows if r["control"] == "C10 selectivity"} <= {"passed", "failed"}
    years = len([r for r in rows if json.loads(r["detail"]).get("task") == "years"])
    assert said("--task", "years", "--max-cases", "200")
    with Run.open(folder).store() as store:  # taken again, not twice
        again = store.sql(f"SELECT detail FROM receipts WHERE {OURS}").to_pylist()
    assert len([r for r in again if json.loads(r["detail"]).get("task") == "years"]) == years

    path = write(tmp_path / "wet.jsonl", [{"text": " ".join(w), "label": c} for w, c in documents(200)])
    (result,) = json.loads(said("--task", path, "--randomised", "--no-save", "--json"))
    assert result["unit"] == "document" and result["num_documents"] == sum(result["num_cases"]["test"])
    by_name = {p["probe"]: p for p in result["probes"]}
    assert {"randomised model", "1 random latent", "token embeddings", "majority"} <= set(by_name)
    assert by_name["token table"]["auroc"]["value"] > 0.95 and not by_name["token table"]["struck_out"]
    assert by_name["majority"]["struck_out"] and len(by_name["16 latents"]["columns"]) == 16
    words = write(
        tmp_path / "w.csv", [{"tokens": w, "labels": [int(x == "water") for x in w]} for w, _ in documents(99)]
    )
    printed = said("--task", words, "--level", "token", "--hook-point", "resid_post.0", "--no-save")
    assert "w at resid_post.0" in printed and "latent" not in printed.split("PCA")[1].split("token")[0]
    with Run.open(folder).store() as store:
        assert len(store.sql(f"SELECT detail FROM receipts WHERE {OURS}").to_pylist()) == len(again)
    assert (folder / "dictionaries").stat().st_mtime == before
    main(["verify", str(folder)])


def rows(num: int, **more) -> list[dict]:
    return [{"text": f"river {n}", **{k: v(n) if callable(v) else v for k, v in more.items()}} for n in range(num)]


def some(num: int) -> list[dict]:
    return [{"text": " ".join(w), "label": c} for w, c in documents(num)]


_TOKEN = ["--level", "token"]
#: What it is -> file name and rows (or its text), or a task's name; options; what the line says.
BAD: dict[str, tuple[str, list[dict] | str | None, list[str], str]] = {
    "no file": ("none.jsonl", None, [], "is neither a file nor a task"),
    "no task": ("monts", None, [], "did you mean"),
    "no label": ("t.jsonl", [{"text": "a", "y": 1}], [], 'line 1 has no column "label"'),
    "no text": ("t.csv", [{"words": "a", "label": 1}], [], 'has no column "text"; it has words'),
    "one class": ("t.jsonl", rows(40, label=1), [], "all labels are '1'"),
    "NaN": ("t.parquet", [{"text": "a", "label": float("nan")}], [], "row 0: the label is missing"),
    "null": ("t.jsonl", [{"text": "a", "label": None}], [], "line 1: the label is missing"),
    "numbers": ("t.jsonl", rows(40, label=lambda n: n / 7), [], "40 classes"),
    "few": ("t.jsonl", some(8), [], "give more"),
    "lengths": ("t.jsonl", [{"tokens": ["a", "b"], "labels": [1]}], _TOKEN, "2 tokens but 1 labels"),
    "span": ("t.jsonl", [{"text": "a", "spans": [{"start": 0, "end": 9}]}], _TOKEN, "is not inside a text"),
    "no spans": ("t.jsonl", [{"text": "a", "label": 1}], _TOKEN, 'has neither columns "tokens" and "labels" nor'),
    "level": ("years", None, ["--level", "word"], "level must be one of token, document"),
    "hook point": ("years", None, ["--hook-point", "resid_post.77"], 'no hook point "resid_post.77"'),
    "cases": ("years", None, ["--max-cases", "3"], "max_cases must be at least 40"),
    "absent": ("law", None, [], "task law: 0 positive tokens in 0 documents of the train split"),
    "not JSON": ("t.jsonl", "{", [], "cannot be read"),
    "suffix": ("t.txt", "x", [], "is a .jsonl, .csv or .parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task, content, options, message = BAD[name]
    path = tmp_path / task
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        write(path, content)
    asked = path if content is not None or path.suffix else task
    with pytest.raises(SystemExit) as caught:
        main(["probe", str(tiny_run), "--task", str(asked), *options, "--no-save"])
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("saeql: ")]
    assert caught.value.code == 2 and len(lines) == 1 and message in lines[0], output.err


def test_stored_activations_need_no_model(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    config = (folder / "config.toml").read_text()
    name = next(line for line in config.splitlines() if line.startswith("name = "))
    (folder / "config.toml").write_text(config.replace(name, 'name = "nobody/nothing"'))
    options = ["--max-cases", "100", "--no-save", "--json"]
    main(["probe", str(folder), "--task", "years", *options])
    output = capsys.readouterr()
    (result,) = json.loads(output.out)
    assert "saeql: no token embeddings: no model 'nobody/nothing'" in output.err
    assert {"logistic regression", "1 latent"} < {p["probe"] for p in result["probes"]}
    with pytest.raises(SystemExit):
        main(["probe", str(folder), "--task", "years", "--hook-point", "resid_post.0", *options])
    assert "saeql: no model 'nobody/nothing'" in capsys.readouterr().err
