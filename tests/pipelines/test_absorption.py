"""Absorption: found where a child's latent has taken over its parent's direction, and only there."""

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from saeql.pipelines import Run
from saeql.pipelines.probing.text import run_text
from saeql.pipelines.receipts.absorption import (
    ROWS_PER_TYPE,
    Absorbed,
    Absorption,
    AbsorptionError,
    letter_tasks,
    measure_absorption,
)
from saeql.pipelines.receipts.control import Labelled
from saeql.store.records import SPLITS

D, PARENT, CHILD, NUM = 16, 3, 5, 12


def made_up(*, absorbs: float, parent_fires_too: bool = False) -> Absorbed:
    """A property with a child word; on it the child's latent carries `absorbs` of the property's direction."""
    rng = np.random.default_rng(0)
    W_dec = rng.normal(size=(NUM, D)) / np.sqrt(D)
    W_dec[:, 0] = 0  # the property's direction is coordinate 0, the child's is coordinate 1
    W_dec[PARENT], W_dec[CHILD] = np.eye(D)[0], absorbs * np.eye(D)[0] + np.eye(D)[1]
    x, y, z = {}, {}, {}
    for split, n in (("train", 2000), ("calibration", 1000), ("test", 2000)):
        y[split] = np.arange(n) % 2 == 0
        child = y[split] & (rng.random(n) < 0.05)  # so few that a latent more would not pay
        acts = rng.normal(size=(n, D)) * 0.1
        acts[:, 0] += 4 * y[split]
        acts[:, 1] += 4 * child
        latents = np.where(rng.random((n, NUM)) < 0.1, 0.2, 0.0)
        latents[:, PARENT] = 4 * (y[split] & (~child | parent_fires_too))
        latents[:, CHILD] = 4 * child
        x[split], z[split] = acts.astype(np.float32), csr_matrix(latents.astype(np.float32))
    documents = np.arange(2000) // 100
    found = measure_absorption("made up", x, z, y, W_dec, np.zeros(D), documents)
    is_child = np.asarray(z["test"][:, [CHILD]].todense()).ravel()[found.cases] > 0
    assert len(found.cases) >= 990 and (found.documents == documents[found.cases]).all()
    return Absorbed(found.parent, found.main, found.absorber, found.fraction, is_child, found.documents)


def test_a_child_that_carries_its_parent_absorbs_it():
    found = made_up(absorbs=1.0)
    is_child = found.cases
    assert found.main[0] == PARENT and CHILD not in found.main
    assert (found.absorber[is_child] == CHILD).mean() > 0.9 and (found.absorber[~is_child] == -1).all()
    assert (found.fraction[is_child] == 1).mean() > 0.9 and (found.fraction[~is_child] == 0).all()
    assert found.rate == pytest.approx(is_child.mean(), abs=0.005)


def test_no_absorption_where_the_parent_fires_or_the_child_carries_little():
    both = made_up(absorbs=1.0, parent_fires_too=True)
    assert both.rate == 0 and (both.fraction[~both.cases] == 0).all()
    little = made_up(absorbs=0.2)
    assert little.rate == 0 and little.fraction.max() == 0


def test_of_a_real_run(tiny_run: Path):
    run = Run.open(tiny_run)
    text = run_text(run.evidence, "tiny")
    for task in letter_tasks(text):
        for split in SPLITS:
            asked = task.labels[split] >= 0
            types = text.word_types(split)[asked]
            assert len(types) == 0 or np.bincount(types).max() <= ROWS_PER_TYPE
            texts = {text.vocabulary.texts[t] for t in text.splits[split].windows.tokens.ravel()[asked]}
            assert all(t.startswith(" ") and t[1:].isalpha() for t in texts)
            yes = {text.vocabulary.texts[t] for t in text.splits[split].windows.tokens.ravel()[task.labels[split] == 1]}
            assert all(t[1].casefold() == task.name[-1] for t in yes)
    labelled = Labelled(run, None, {}, {}, "paper")  # pyright: ignore[reportArgumentType]  # reads the run alone
    receipts = Absorption.of(run).check(labelled)
    whole = {r.control: r for r in receipts if r.feature is None}
    # 20 words, 8 rows of each: too few for any letter, which is said
    letters = whole["C17 absorption of first letters"]
    assert letters.value is None and letters.detail["not_measured"] == 26
    for name in ("C17 absorption of planted concepts", "C17 absorption of planted concepts, fraction"):
        found = whole[name]
        assert found.value is not None and found.low is not None and found.high is not None and found.n > 20
        assert 0 <= found.low <= found.value <= found.high <= 1 and {"years", "music"} <= set(
            found.detail["properties"]
        )
    for receipt in receipts:
        if receipt.feature is not None:
            assert 0 <= receipt.feature < 96 and receipt.value and receipt.detail["absorbers"][0]["tokens"]
            assert receipt.feature not in {a["feature"] for a in receipt.detail["absorbers"]}


def test_only_autoencoders(tiny_run: Path):
    run = Run.open(tiny_run)
    object.__setattr__(run.config.dictionary, "form", "transcoder")
    with pytest.raises(AbsorptionError, match="C17 absorption is measured of autoencoders; the dictionary is a transc"):
        Absorption.of(run)
