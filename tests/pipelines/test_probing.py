"""Probing: what is there is found, what is not there is struck out, and what merely memorises is exposed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from saeql.pipelines.probing.code_length import compression
from saeql.pipelines.probing.controls import bernoulli_twin, control_labels, permuted_twin
from saeql.pipelines.probing.plans import PERMUTED, ProbeSettings, plan_task
from saeql.pipelines.probing.probes import (
    BestColumns,
    DifferenceOfMeans,
    LogisticRegression,
    Majority,
    PrincipalComponents,
    TokenTable,
    choose,
    column_auroc,
    log_loss,
)
from saeql.pipelines.probing.representations import ACTS, LATENTS, TOKENS, Representations, token_rows
from saeql.pipelines.probing.scores import TestDocuments, interval
from saeql.pipelines.probing.suite import DENSE, TABLE, TaskResult, probe_task
from saeql.pipelines.probing.table import print_task, result_dict
from saeql.pipelines.probing.tasks import NO, OUT, YES, TaskError, draw, token_task
from saeql.pipelines.probing.text import ProbedText, split_of_windows
from saeql.pipelines.receipts.statistics import auroc, auroc_interval
from saeql.pipelines.token_classes import Vocabulary
from saeql.store.records import SPLITS

D, TYPES, LATENT, NUM_LATENTS = 24, 60, 7, 40
SETTINGS = ProbeSettings(max_cases=400, num_controls=2, num_twins=1, num_bootstrap=200)


@pytest.fixture(scope="module")
def text() -> ProbedText:
    """Windows of 60 random word types, a document a window."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(range(TYPES), [f" word{n}" for n in range(TYPES)])
    splits = {}
    for split, windows in (("train", 40), ("calibration", 20), ("test", 30)):
        documents = np.repeat(np.arange(windows)[:, None], 33, axis=1)
        splits[split] = split_of_windows(vocabulary, rng.integers(0, TYPES, (windows, 33)), documents)
    return ProbedText("made up", vocabulary, splits)


def run_suite(text: ProbedText, labels: dict[str, np.ndarray], acts: dict[str, np.ndarray], **more) -> TaskResult:
    shown = Representations(text, {ACTS: lambda s, rows: acts[s][rows], TOKENS: token_rows(text), **more})
    return probe_task(plan_task(token_task("made up", text, labels), SETTINGS), shown, "resid_post.0", SETTINGS)


def noise(text: ProbedText, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {s: rng.normal(size=(p.token_ids.size, D)).astype(np.float32) for s, p in text.splits.items()}


def test_labels_that_mean_nothing_are_struck_out(text: ProbedText, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(1)
    labels = {s: rng.random(p.token_ids.size) < 0.5 for s, p in text.splits.items()}
    result = run_suite(text, labels, noise(text, rng))
    for name in (DENSE, "difference of means", "PCA", "1 channel", "16 channels", TABLE, "majority"):
        probe = result.of(name)
        assert probe is not None and probe.is_struck, name
        assert probe.compression < 1.05 and probe.auroc.low < 0.53
        if name == TABLE:  # a label a word, which control tasks have and these labels have not, is what it learns
            assert probe.selectivity.value < -0.3
        else:
            assert abs(probe.selectivity.value) < 0.12
    twin = result.twins[PERMUTED]
    assert twin is not None and twin[1].low < 0
    print_task(result)
    printed = capsys.readouterr().out
    assert f"~~{DENSE}~~" in printed and "~~majority~~" in printed
    assert all(p["struck_out"] for p in result_dict(result)["probes"])


def test_a_linear_property_is_found_by_activations_and_by_its_latent(text: ProbedText):
    rng = np.random.default_rng(2)
    labels = {s: rng.random(p.token_ids.size) < 0.3 for s, p in text.splits.items()}
    direction = rng.normal(size=D)
    acts = {s: x + (labels[s][:, None] * direction * 1.2).astype(np.float32) for s, x in noise(text, rng).items()}
    latents = {}
    for s, y in labels.items():
        z = np.where(rng.random((len(y), NUM_LATENTS)) < 0.05, rng.uniform(1, 2, (len(y), NUM_LATENTS)), 0)
        z[:, LATENT] = np.where(y & (rng.random(len(y)) < 0.95), rng.uniform(1, 2, len(y)), 0)
        latents[s] = csr_matrix(z.astype(np.float32))
    result = run_suite(text, labels, acts, **{LATENTS: lambda s, rows: latents[s][rows]})
    dense, one = result.of(DENSE), result.of("1 latent")
    assert dense is not None and one is not None
    assert dense.auroc.low > 0.95 and not dense.is_struck and dense.selectivity.low > 0.2
    assert dense.compression > 2 and dense.control_compression < 1.1
    assert one.columns == (LATENT,) and not one.is_struck and one.auroc.value > 0.95
    table, majority = result.of(TABLE), result.of("majority")
    assert table is not None and table.is_struck and majority is not None and majority.is_struck
    twin = result.twins[PERMUTED]
    assert twin is not None and twin[1].low > 0.3


def test_a_property_of_the_word_type_alone_is_exposed(text: ProbedText):
    rng = np.random.default_rng(3)
    positive = rng.permutation(TYPES) < TYPES // 2
    types = {s: p.token_ids.ravel() for s, p in text.splits.items()}
    # more coordinates than types, so that any labelling of the types can be learned by heart
    wide = {s: np.eye(TYPES, dtype=np.float32)[t] + 0.05 * noise(text, rng)[s][:, :1] for s, t in types.items()}
    result = run_suite(text, {s: positive[t] for s, t in types.items()}, wide)
    dense, table = result.of(DENSE), result.of(TABLE)
    assert dense is not None and table is not None
    assert dense.auroc.value > 0.99 and table.auroc.value > 0.99  # taken alone, a perfect probe
    assert dense.control_accuracy > 0.97 and dense.is_struck and table.is_struck
    assert abs(dense.selectivity.value) < 0.03
    assert dense.against_dense is None and table.against_dense is not None and table.against_dense.high < 0.02


def test_code_lengths():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(600, D)).astype(np.float32)
    learnable, random = x[:, 3] > 0, rng.random(600) < 0.5
    probe = LogisticRegression()
    assert compression(probe, 1.0, x, learnable, 0) > 2.5
    assert compression(probe, 100.0, x, random, 0) < 1.05
    assert compression(Majority(), 1.0, x, random, 0) == pytest.approx(1, abs=0.03)
    # a table that only has the words that it has seen pays for the new ones
    words = csr_matrix(np.eye(600, dtype=np.float32))
    assert compression(TokenTable(), 1.0, words, learnable, 0) == pytest.approx(1)


@pytest.mark.parametrize("probe", [LogisticRegression(), DifferenceOfMeans(), PrincipalComponents(), BestColumns(2)])
def test_log_odds_are_calibrated(probe):
    rng = np.random.default_rng(5)
    # the direction between means is the best one only where coordinates vary alike
    scale = 1 if isinstance(probe, DifferenceOfMeans) else 5
    x = rng.normal(size=(3000, 6)).astype(np.float32) * np.array([1, scale, 1, 1, 1, 1], np.float32) + 2
    odds = 1.5 * (x[:, 0] - 2) - 2 / scale * (x[:, 1] - 2)
    y = rng.random(3000) < 1 / (1 + np.exp(-odds))
    setting, fitted = choose(probe, x[:2000], y[:2000], x[2000:2500], y[2000:2500])
    assert setting in probe.settings
    found, best = (log_loss(o[2500:], y[2500:]).mean() for o in (fitted.log_odds(x), odds))
    assert found < best + 0.02 and best > 0.3
    assert np.corrcoef(fitted.log_odds(x), odds)[0, 1] > 0.98


def test_column_auroc_is_that_of_every_column_alone():
    rng = np.random.default_rng(6)
    y = rng.random(80) < 0.4
    x = rng.normal(size=(80, 9)).astype(np.float32)
    sparse = np.round(np.maximum(x, 0), 1)
    sparse[:, 4] = 0
    for values, given in ((x, x), (sparse, csr_matrix(sparse))):
        expected = [auroc(values[y, c], values[~y, c]) for c in range(9)]
        np.testing.assert_allclose(column_auroc(given, y), expected, atol=1e-6)


def test_intervals_are_those_of_the_statistics():
    rng = np.random.default_rng(7)
    y, documents = rng.random(150) < 0.4, rng.integers(0, 12, 150)
    scores = rng.normal(size=150) + y
    draws = TestDocuments(documents, draws=500, seed=3)
    found = interval(draws.auroc(scores, y, documents))
    assert found.value == pytest.approx(auroc(scores[y], scores[~y]))
    expected = auroc_interval(scores[y], documents[y], scores[~y], documents[~y], draws=500, seed=3)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-5)
    accuracy = interval(draws.balanced_accuracy(scores, y, documents))
    assert accuracy.value == pytest.approx(((scores[y] > 0).mean() + (scores[~y] < 0).mean()) / 2)


def test_controls_relabel_units_and_keep_sizes(text: ProbedText):
    positive = np.random.default_rng(8).permutation(TYPES) < 15
    task = token_task("t", text, {s: positive[p.token_ids.ravel()] for s, p in text.splits.items()})
    assert task.unit == "word type"
    drawn = draw(task, max_cases=400, seed=0)
    labels = control_labels(drawn, 1)
    assert labels["train"].mean() == pytest.approx(drawn.train.y.mean(), abs=0.06)
    assert np.any(labels["train"] != drawn.train.y)
    of_unit: dict[int, set[bool]] = {}
    for split in SPLITS:
        for unit, label in zip(drawn.of(split).units.tolist(), labels[split].tolist(), strict=True):
            of_unit.setdefault(unit, set()).add(label)
    assert all(len(found) == 1 for found in of_unit.values())
    for twin in (permuted_twin(task, 0), bernoulli_twin(task, 0)):
        pure = {}
        for split in SPLITS:
            asked = task.labels[split] != OUT
            assert ((twin.labels[split] != OUT) == asked).all()
            for unit, label in zip(task.units[split][asked].tolist(), twin.labels[split][asked].tolist(), strict=True):
                pure.setdefault(unit, set()).add(label)
        assert all(len(found) == 1 for found in pure.values())
        num = sum(found == {YES} for found in pure.values())
        assert num == 15 if twin.name == "permuted twin" else 3 <= num <= 30
    assert all((permuted_twin(task, 0).labels[s] == permuted_twin(task, 0).labels[s]).all() for s in SPLITS)


def test_uses_of_one_word_take_pairs_for_units(text: ProbedText):
    one = {s: p.windows.tokens.ravel() < 4 for s, p in text.splits.items()}
    even = {s: np.arange(len(x)) % 2 == 0 for s, x in one.items()}
    task = token_task("uses", text, even, one)
    assert task.unit == "pair of word types"
    drawn = draw(task, max_cases=400, seed=0)
    assert 20 < len(np.unique(drawn.train.units)) <= 4 * TYPES
    types = set(text.types[:4].tolist())
    assert set((drawn.train.units % (TYPES + 1)).tolist()) <= types


def test_draws_are_balanced_and_too_few_cases_are_refused(text: ProbedText):
    labels = {s: p.token_ids.ravel() < 3 for s, p in text.splits.items()}
    drawn = draw(token_task("few", text, labels), max_cases=400, seed=0)
    for split in ("train", "calibration"):
        assert drawn.of(split).y.sum() * 2 == len(drawn.of(split))
    assert (~drawn.test.y).sum() == 200 >= drawn.test.y.sum()
    for split in SPLITS:
        part = text.splits[split]
        assert part.eligible[drawn.of(split).cases].all() and (drawn.of(split).cases % 33 > 0).all()
    none = {s: x & (s != "test") for s, x in labels.items()}
    with pytest.raises(TaskError, match="task none: 0 positive tokens in 0 documents of the test split"):
        draw(token_task("none", text, none), max_cases=400, seed=0)
    all_yes = replace(token_task("all", text, labels), labels={s: np.full(len(x), YES) for s, x in labels.items()})
    with pytest.raises(TaskError, match="0 negative tokens"):
        draw(all_yes, max_cases=400, seed=0)
    assert NO == 0
