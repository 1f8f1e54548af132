"""The card of a feature and the headline of a dictionary say what the receipts hold, and no more."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saeql.pipelines import Run
from saeql.pipelines.evaluation_page import EVALUATION_FILE, write_evaluation
from saeql.pipelines.output import print_feature
from saeql.pipelines.receipts.card import card_lines
from saeql.pipelines.receipts.headline import headline
from saeql.pipelines.receipts.receipt import FAILED, PASSED, REPORTED, Receipt, judged, receipts_table

NAME = "topk"
OF_FEATURE = [
    Receipt(control="C14 activation range", feature=3, value=0.2, threshold=0.15, n=50, verdict=FAILED,
            detail={"valid_from": 2.5, "valid_to": 9.0}),
    Receipt(control="C4 negative ladder N1", feature=3, value=0.91, threshold=0.5, n=40, low=0.85, high=0.96,
            verdict=PASSED),
    Receipt(control="C4 negative ladder N3", feature=3, value=None, verdict=REPORTED,
            detail={"missing": "no embedder"}),
    Receipt(control="C3 label permutation", feature=3, value=0.005, threshold=0.05, n=199, verdict=PASSED),
    Receipt(control="C13 token identifiability masked token", feature=3, value=0.1, threshold=0.5, n=8, verdict=FAILED,
            detail={"card": "position, not token"}),
    Receipt(control="X9 something new", feature=3, value=1.0, verdict=REPORTED),
]  # fmt: skip


def rows(receipts: list[Receipt]) -> list[dict[str, Any]]:
    return receipts_table(NAME, receipts).to_pylist()


def whole(control: str, value: float | None, verdict: str) -> Receipt:
    return Receipt(control=control, value=value, verdict=verdict, threshold=0.05, n=500, low=0.01, high=0.2)


def test_a_card_has_every_receipt_in_its_order():
    lines = card_lines(rows(OF_FEATURE))
    assert [line.title for line in lines] == [
        "AUROC, matched negatives", "AUROC, near in meaning", "permuted labels, p", "fits the strongest only",
        "lost when the token is masked", "X9 something new",
    ]  # fmt: skip
    by_title = {line.title: line for line in lines}
    assert by_title["AUROC, matched negatives"].text == "0.91 (0.85 to 0.96), asked 0.5, n 40"
    assert by_title["AUROC, near in meaning"].text == "not measured: no embedder"
    assert by_title["fits the strongest only"].text.endswith("holds for activations 2.5 to 9")
    assert by_title["lost when the token is masked"].text.endswith("position, not token")


@pytest.mark.parametrize(
    ("receipts", "expected"),
    [
        ([], "no control has run"),
        ([whole("C0 split hygiene", 1, FAILED), whole("C6 random dictionary", 0.1, PASSED)], "no number of this run"),
        ([whole("C0 split hygiene", 0, PASSED)], "whether these features beat random is not known"),
        ([whole("C6 random dictionary", 0.1, PASSED)], "^labels fit better than those of a random dictionary$"),
        ([whole("C6 random dictionary", None, FAILED)], "is not known"),
        ([whole("C6 random dictionary", 0.01, FAILED)], r"^no evidence these features beat random \(C6"),
        (
            [whole("C6 random dictionary", 0.1, PASSED), whole("C8 randomised model", 0.0, FAILED)],
            r"^no evidence these features beat random \(C8",
        ),
    ],
)
def test_the_headline_goes_no_further_than_the_controls(receipts: list[Receipt], expected: str):
    assert re.search(expected, headline(rows(receipts)).text)


def test_receipts_of_features_are_not_the_dictionarys():
    assert headline(rows(OF_FEATURE)).text.startswith("no control has run")


def test_what_could_not_be_measured_has_not_passed():
    assert judged(None, 0.5) == judged(float("nan"), 0.5) == FAILED
    assert judged(0.5, 0.5) == PASSED and judged(0.5, 0.4, at_least=False) == FAILED


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Run:
    shutil.copytree(tiny_run, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_the_store_has_cards(run: Run, capsys: pytest.CaptureFixture[str]):
    made = [*OF_FEATURE, whole("C0 split hygiene", 0, PASSED)]
    run.evidence.write("receipts", receipts_table(run.spec.name, made))
    assert run.build_store() == ["receipts"]
    with run.store() as store:
        (card,) = store.sql("SELECT * FROM cards WHERE feature = 3").to_pylist()
        assert card["auroc_n1"] == 0.91 and card["auroc_n1_low"] == 0.85 and card["n"] == 40
        assert card["is_labelled"] and card["is_top_only"] and not card["is_contextual"]
        assert card["masked_effect"] == 0.1 and card["num_failed"] == 2 and card["auroc_n3"] is None
        assert [r["control"] for r in store.receipts(None)] == ["C0 split hygiene"]
        found = {r["control"]: json.loads(r["detail"] or "{}") for r in store.receipts(3)}
        assert len(found) == len(OF_FEATURE)
        assert found["C13 token identifiability masked token"] == {"card": "position, not token"}
        print_feature(store, 3)
    shown = capsys.readouterr().out
    assert "position, not token, so none stands out" in shown and "AUROC, matched negatives" in shown


def test_the_page_of_a_run(run: Run):
    of_all = [replace(r, feature=feature) for feature in range(96) for r in OF_FEATURE]
    made = [*of_all, whole("C6 random dictionary", 0.01, FAILED)]
    run.evidence.write("receipts", receipts_table(run.spec.name, made))
    page = write_evaluation(run).read_text()
    assert "no evidence these features beat random" in page and "data:image/png" in page and "fvu" in page
    assert (run.path / EVALUATION_FILE).exists()
    assert "<script" not in page
    run.build_store()
    run.report()
    report = (run.path / "report.html").read_text()
    assert "no evidence these features beat random" in report and "position, not token" in report
