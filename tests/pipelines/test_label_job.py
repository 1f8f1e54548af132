"""Choosing between executable labels and words; the label stage: what it writes, what it keeps, what it refuses."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeql.pipelines.cli import main
from saeql.pipelines.explainers.base import Candidate
from saeql.pipelines.explainers.predicates import PredicateExplainer
from saeql.pipelines.explainers.registry import EXPLAINERS, explainers
from saeql.pipelines.label import label_rows, labels_of
from saeql.pipelines.label_choice import choose
from saeql.pipelines.label_config import LabelConfig
from saeql.pipelines.label_job import LabelError, LabelOptions, label_run
from saeql.pipelines.predicates import Both, Neighbour, Token, TokenSet
from saeql.pipelines.receipts.control import ReceiptError
from saeql.pipelines.receipts.held_out import HeldOut
from saeql.pipelines.receipts.label_scorer import LabelScorer
from saeql.pipelines.receipts.registry import scorers
from saeql.pipelines.receipts.sampler import SampleConfig
from saeql.pipelines.receipts.statistics import auroc
from saeql.pipelines.receipts.thresholds import THRESHOLDS
from saeql.pipelines.run import Run
from saeql.pipelines.split_rows import FeatureRows, read_feature_rows

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_evidence as synthetic

CONFIG = LabelConfig()


@pytest.fixture
def copied(planted: Run, tmp_path: Path) -> Run:
    shutil.copytree(planted.path, tmp_path / "run")
    return Run(tmp_path / "run", planted.config)


@pytest.fixture(scope="module")
def rows(planted: Run) -> FeatureRows:
    return read_feature_rows(planted.evidence, planted.spec.name, active_fraction=CONFIG.active_fraction)


def receipts_of(run: Run) -> list[dict]:
    return run.evidence.read("receipts").to_pylist()


# --- choosing --------------------------------------------------------------------------------------------------------


class Words:
    """Scores a label in words by whether the row's token is one of its words; counts what it was asked."""

    name: ClassVar[str] = "words"

    def __init__(self):
        self.asked: list[str] = []

    def score(self, labels, rows, split):
        self.asked += [label.label for label in labels]
        texts, tokens = split.windows.vocabulary.texts, split.windows.tokens.ravel()
        return [
            np.array([texts[tokens[r]].strip() in label.label.split() for r in own], float)
            for label, own in zip(labels, rows, strict=True)
        ]


def choice(rows: FeatureRows, candidates: dict[int, list[Candidate]], config: LabelConfig = CONFIG) -> dict[int, Any]:
    held_out = HeldOut(rows, SampleConfig())
    return choose(rows, candidates, config, held_out=held_out, scorer=LabelScorer(Words))


def word(text: str) -> Candidate:
    return Candidate(text, "semantic", "test")


def test_the_best_words_on_calibration_become_the_label(rows):
    feature = synthetic.feature("set")  # " man", " year", ";", " day"
    found = choice(rows, {feature: [word("man"), word("man year ; day"), word("river bank")]})
    assert found[feature].candidate.label == "man year ; day"
    assert found[feature].auroc > 0.95 and found[feature].f1 is None


def test_words_that_name_the_token_lose_to_a_context_that_tells_its_rows_apart(rows):
    feature = synthetic.feature("comma after number")
    some = Neighbour(-1, TokenSet(("3", "7", "12", "40", "99", "250")))
    context = Both(Token(","), some)  # six of the ten numbers that there are
    made = Candidate(context.describe(), context.kind, "test", context)
    found = choice(rows, {feature: [made, word(",")]}, replace(CONFIG, executable_margin=0.0))
    assert found[feature].candidate == made
    alone = choice(rows, {feature: [word(",")]})[feature]
    assert alone.auroc > found[feature].auroc  # against matched negatives the comma itself is better


def test_an_executable_label_is_taken_within_the_margin_and_beaten_beyond(rows):
    feature = synthetic.feature("set")
    one = Candidate('token " man"', "lexical", "predicates", Token(" man"))
    config = replace(CONFIG, min_f1=0.1)
    assert choice(rows, {feature: [one, word("man year ; day")]}, config)[feature].candidate.label == "man year ; day"
    generous = replace(config, executable_margin=0.5)
    assert choice(rows, {feature: [one, word("man year ; day")]}, generous)[feature].candidate == one
    token = synthetic.feature("token")
    same = Candidate('token " river"', "lexical", "predicates", Token(" river"))
    assert choice(rows, {token: [word("river"), same]})[token].candidate == same


def test_fewer_words_are_taken_within_the_margin(rows):
    feature = synthetic.feature("token")
    found = choice(rows, {feature: [word("river of no return"), word("river")]}, replace(CONFIG, executable_margin=0.1))
    assert found[feature].candidate.label == "river"


def test_words_that_do_not_reach_the_minimum_are_no_label(rows):
    feature = synthetic.feature("set")
    assert choice(rows, {feature: [word("river")]}) == {}


def test_without_words_nothing_is_sampled_and_nothing_asked(rows):
    feature = synthetic.feature("token")
    same = Candidate('token " river"', "lexical", "predicates", Token(" river"))
    held_out = HeldOut(rows, SampleConfig())
    scorer = LabelScorer(lambda: pytest.fail("no words, no scorer of words"))
    found = choose(rows, {feature: [same]}, CONFIG, held_out=held_out, scorer=scorer)
    assert (found[feature].f1 or 0) > 0.9 and found[feature].auroc is None
    assert held_out._samplers == {}


def test_words_are_scored_on_test_against_matched_negatives(rows):
    feature = synthetic.feature("set")

    class Explainer:
        name: ClassVar[str] = "given"

        def propose(self, rows, features, on_progress):
            return {f: [word("man year ; day")] for f in features if f == feature}

    held_out, scorer = HeldOut(rows, SampleConfig()), LabelScorer(Words)
    table = label_rows(rows, CONFIG, explainers=[Explainer()], scorer=scorer, held_out=held_out)
    row = table.to_pylist()[feature]
    assert (row["label"], row["kind"], row["predicate"]) == ("man year ; day", "semantic", None)
    e = held_out.sample("test", [feature])[feature]
    (scores,) = scorer.score([word("man year ; day")], [np.concatenate([e.active, e.negatives["N1"]])], rows.test)
    assert row["auroc"] == pytest.approx(auroc(scores[: len(e.active)], scores[len(e.active) :]))
    assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
    assert row["n_inactive"] == len(e.negatives["N1"])
    assert row["precision"] is None and row["f1"] is None and row["calibration_f1"] is None
    assert {r["label"] for r in table.to_pylist()} == {"man year ; day", "unexplained"}
    assert labels_of(table) == {feature: Candidate("man year ; day", "semantic", "test")}


def test_the_predicate_explainer_reads_train_alone(rows):
    config, features = CONFIG, range(rows.num_features)
    poisoned = replace(rows, calibration=rows.train, test=rows.train)
    explainer = PredicateExplainer(config)
    first, second = (explainer.propose(r, features, lambda done, total: None) for r in (rows, poisoned))
    assert first == second
    assert len(first) >= len(synthetic.PLANTS)
    assert explainer.propose(rows, [2], lambda done, total: None).keys() == {2}


# --- the stage -------------------------------------------------------------------------------------------------------


def test_the_stage_writes_labels_and_receipts(planted: Run):
    run = planted
    labels, receipts = run.evidence.read("labels").to_pylist(), receipts_of(run)
    assert [row["feature"] for row in labels] == list(range(synthetic.NUM_FEATURES))
    assert labels[synthetic.feature("token")]["label"] == 'token " river"'
    first = receipts[0]
    assert (first["control"], first["feature"]) == ("thresholds", None)
    assert json.loads(first["detail"])["sha256"] == THRESHOLDS.sha256
    named = {r["control"] for r in receipts}
    assert {c.split()[0] for c in named} >= {"C0", "C1", "C3", "C4", "C5", "C14", "C15"}
    assert {r["verdict"] for r in receipts} <= {"passed", "failed", "reported"}
    assert {r["dictionary"] for r in receipts} == {run.spec.name}
    labelled = {row["feature"] for row in labels if row["kind"] != "none"}
    assert {r["feature"] for r in receipts if r["control"] == "C4 negative ladder N1"} == labelled
    headline = {r["feature"]: r["value"] for r in receipts if r["control"] == "C4 negative ladder N1"}
    assert headline[synthetic.feature("token")] > 0.95


def test_two_stages_write_the_same(planted, copied):
    label_run(copied)
    assert copied.evidence.read("labels").equals(planted.evidence.read("labels"))
    assert copied.evidence.read("receipts").equals(planted.evidence.read("receipts"))


def test_only_some_are_labelled_anew_and_the_others_keep_what_they_have(copied):
    labels = copied.evidence.read("labels").to_pylist()
    kept, redone = synthetic.feature("token"), synthetic.feature("number")
    for row in labels:
        if row["feature"] in (kept, redone):
            row.update(label="by hand", predicate=Token(" bank").to_json(), kind="lexical")
    copied.evidence.write("labels", pa.Table.from_pylist(labels, schema=copied.evidence.read("labels").schema))
    before = [r for r in receipts_of(copied) if r["feature"] == kept]
    label_run(copied, LabelOptions(only=str(redone)))
    after = copied.evidence.read("labels").to_pylist()
    assert after[redone]["label"] == "a number"
    assert [a for a in after if a["feature"] != redone] == [b for b in labels if b["feature"] != redone]
    receipts = receipts_of(copied)
    assert [r for r in receipts if r["feature"] == kept] == before
    assert len([r for r in receipts if r["control"] == "thresholds"]) == 1
    assert len([r for r in receipts if (r["control"], r["feature"]) == ("C4 negative ladder N1", redone)]) == 1
    label_run(copied, LabelOptions(only="unexplained"))
    assert copied.evidence.read("labels").to_pylist() == after


def test_every_control_writes_receipts_at_its_tier_and_none_writes_none(copied):
    tokens = replace(copied.config.token_identity, train_tokens=300, test_tokens=200, features=2)
    run = Run(copied.path, replace(copied.config, token_identity=tokens))
    label_run(run, LabelOptions(receipts="paper"))
    receipts = receipts_of(run)
    controls = {r["control"] for r in receipts}
    assert {"C2 true null mean", "C2 true null labelled share", "C2 true null significant"} <= controls
    codes = {
        control.split()[0] for control in controls
    }  # C11 and C12 are written by C10, which has no activations here
    assert codes >= {f"C{i}" for i in range(18) if i not in (11, 12)} | {"C14b", "L1", "I1"}
    missing = {r["control"].split()[0] for r in receipts if '"missing"' in (r["detail"] or "") and r["feature"] is None}
    assert missing >= {"C6", "C7", "C8", "C9", "C10", "C14b"}  # and their receipts say what makes them
    label_run(run, LabelOptions(receipts="none"))
    assert not run.evidence.has("receipts")


def test_a_failing_control_leaves_the_evidence_as_it_was(copied):
    labels, receipts = copied.evidence.read("labels"), copied.evidence.read("receipts")
    documents = copied.evidence.read("documents").to_pylist()
    documents[-1] |= {"document_id": 0}
    copied.evidence.write(
        "documents", type(labels).from_pylist(documents, schema=copied.evidence.read("documents").schema)
    )
    with pytest.raises(ReceiptError, match="C0 split hygiene: document 0"):
        label_run(copied)
    assert copied.evidence.read("labels").equals(labels)
    assert copied.evidence.read("receipts").equals(receipts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LabelOptions(only="some"), "--only takes 'unexplained' or features such as 3,17, not 'some'"),
        (LabelOptions(only="3,900"), "--only 900: .* has the features 0 to 29"),
        (LabelOptions(only="-1"), "--only -1"),
        (LabelOptions(receipts="quick"), "label.receipts must be none, fast, full, paper, not 'quick'"),
        (LabelOptions(explainers=("predicate",)), "no explainer 'predicate': there is .*did you mean \"predicates\""),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(planted, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        label_run(planted, options)
    assert type(refused.value) is not ValueError  # the command says it in one line


def test_only_needs_labels_that_are_there(copied):
    copied.evidence.path("labels").unlink()
    with pytest.raises(LabelError, match="has no labels yet"):
        label_run(copied, LabelOptions(only="unexplained"))


def test_registered_classes_are_what_they_say():
    names = [made.name for made in explainers(list(EXPLAINERS))]
    assert names == list(EXPLAINERS)
    with pytest.raises(ValueError, match=r"no scorer 'predicate': there is .*did you mean \"predicates\""):
        scorers(["predicate"])


def test_the_command_labels_a_real_run_again(tiny_run, tmp_path, capsys):
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run, symlinks=True)
    main(["label", str(run), "--only", "unexplained", "--receipts", "fast", "--explainer", "predicates"])
    told = capsys.readouterr().err
    assert "label" in told and f"`saeql evaluate {run}` and `saeql store {run}` bring it up to date" in " ".join(
        told.split()
    )
    table = pq.read_table(run / "evidence" / "receipts.parquet")
    assert "C1 metric self-tests" in table["control"].to_pylist()
    main(["evaluate", str(run)])
    main(["store", str(run)])
    main(["sql", str(run), "SELECT verdict FROM receipts WHERE control = 'C0 split hygiene'"])
    assert "passed" in capsys.readouterr().out
    main(["label", str(run), "--receipts", "none"])
    assert not (run / "evidence" / "receipts.parquet").exists()
    main(["verify", str(run)])
    assert "all whole" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["label", str(run), "--only", "x"])
    assert "--only takes 'unexplained'" in capsys.readouterr().err
