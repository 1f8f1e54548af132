"""C17, absorption: a latent stands for a property, except on words whose own latent has swallowed it.

After Chanin et al. 2024, "A is for Absorption", arXiv 2409.14507, with the thresholds of SAEBench (arXiv 2503.09532). A
logistic probe learns the property from activations; the property's *main latents* are those that together find it. On
test cases that the probe gets right:

    full        all main latents are silent, and the latent with the largest part of the case's projection on the probe
                points along it (cosine >= 0.025) and carries at least 0.4 of that projection
    fraction    how much of what main latents and at most three absorbers (cosine >= 0.1) carry is the absorbers' part;
                0 where they carry less than 0.4 of the projection or the main latents carry all of it

Properties are the first letter of a word, in running text, and the planted concepts with their words for children.
Projections are of activations less the dictionary's `b_dec`: what latents have to make up.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.sparse import csr_matrix

from saeql.sae.metrics import Bootstrap, ratio
from saeql.store.records import SPLITS

from ..probing.activations import StoredRows, without_massive
from ..probing.planted_tasks import planted_tasks
from ..probing.probes import Linear, LogisticRegression, choose, column_auroc, dense, fit_logistic
from ..probing.representations import latent_rows
from ..probing.tasks import Task, TaskError, draw, token_task
from ..probing.text import ProbedText, run_text
from .control import Labelled
from .planted_concepts import CONCEPTS
from .receipt import REPORTED, Receipt

if TYPE_CHECKING:
    from ..run import Run

FULL_COSINE, FRACTION_COSINE, LEAST_SHARE, MOST_ABSORBERS = 0.025, 0.1, 0.4, 3
#: A further latent is a main one where it raises F1 on calibration by as much.
SPLIT_F1 = 0.03
MOST_MAIN = 10
#: Rows of one word type among the cases of a letter, so that "the" is not all of t.
ROWS_PER_TYPE = 8
MAX_CASES, NUM_BOOTSTRAP = 1000, 2000


class AbsorptionError(ValueError):
    """Absorption cannot be measured of this dictionary."""


@dataclass(frozen=True)
class Absorbed:
    """One property: what became of the n test cases that the probe gets right."""

    parent: str
    main: tuple[int, ...]  # main latents, best first
    absorber: np.ndarray  # [n] the latent that absorbed the property in full, -1 where none did
    fraction: np.ndarray  # [n] in 0 .. 1
    cases: np.ndarray  # [n] numbers of the cases among the test cases
    documents: np.ndarray  # [n]

    @property
    def rate(self) -> float:
        """Share of the cases with full absorption; NaN where there are none."""
        return float((self.absorber >= 0).mean()) if len(self.absorber) else float("nan")


def measure_absorption(
    parent: str,
    x: Mapping[str, np.ndarray],
    z: Mapping[str, csr_matrix],
    y: Mapping[str, np.ndarray],
    W_dec: np.ndarray,
    b_dec: np.ndarray,
    documents: np.ndarray,
) -> Absorbed:
    """Absorption of one property.

    By split: activations x [n, d], latents z [n, d_sae], labels y [n]. W_dec [d_sae, d], b_dec [d] are the decoder's;
    documents [n] are those of the test cases.
    """
    _, probe = choose(LogisticRegression(), x["train"], y["train"], x["calibration"], y["calibration"])
    assert isinstance(probe, Linear), "a task has cases of both labels"
    main = main_latents(z, y)
    direction = probe.weight / np.linalg.norm(probe.weight)
    right = np.flatnonzero(y["test"] & (probe.log_odds(x["test"]) > 0))
    along = W_dec @ direction  # [d_sae]
    cosines = along / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    whole = (x["test"][right] - b_dec) @ direction
    active = csr_matrix(z["test"])[right]
    absorber, fraction = np.full(len(right), -1), np.zeros(len(right))
    for n in range(len(right)):
        entries = slice(active.indptr[n], active.indptr[n + 1])
        latents = active.indices[entries]
        carried = active.data[entries] * along[latents]
        absorber[n] = _full(latents, carried, cosines, main, float(whole[n]))
        fraction[n] = _fraction(latents, carried, cosines, main, float(whole[n]))
    return Absorbed(parent, tuple(main.tolist()), absorber, fraction, right, documents[right])


def main_latents(z: Mapping[str, csr_matrix], y: Mapping[str, np.ndarray]) -> np.ndarray:
    """The latent that alone separates train best, and those that with it raise F1 on calibration by `SPLIT_F1` each."""
    order = np.argsort(-column_auroc(z["train"], y["train"]), kind="stable")[:MOST_MAIN]
    best, count = -1.0, 0
    for k in range(1, len(order) + 1):
        fitted = fit_logistic(dense(z["train"], order[:k]), y["train"], 1.0, order[:k])
        f1 = _f1(fitted.log_odds(z["calibration"]) > 0, y["calibration"])
        if k > 1 and f1 < best + SPLIT_F1:
            break
        best, count = f1, k
    return order[:count]


def _f1(said: np.ndarray, y: np.ndarray) -> float:
    return float(2 * (said & y).sum() / max(said.sum() + y.sum(), 1))


def _full(latents: np.ndarray, carried: np.ndarray, cosines: np.ndarray, main: np.ndarray, whole: float) -> int:
    """The latent that absorbed the property, -1 for none."""
    if len(latents) == 0 or whole <= 0 or np.isin(main, latents).any():
        return -1
    top = int(carried.argmax())
    is_absorber = cosines[latents[top]] >= FULL_COSINE and carried[top] >= LEAST_SHARE * whole
    return int(latents[top]) if is_absorber else -1


def _fraction(latents: np.ndarray, carried: np.ndarray, cosines: np.ndarray, main: np.ndarray, whole: float) -> float:
    is_main = np.isin(latents, main)
    of_main = float(carried[is_main].sum())
    may_absorb = ~is_main & (cosines[latents] >= FRACTION_COSINE) & (carried > 0)
    absorbed = float(np.sort(carried[may_absorb])[::-1][:MOST_ABSORBERS].sum())
    if whole <= 0 or of_main >= whole or absorbed < LEAST_SHARE * whole:
        return 0.0
    if of_main <= 0:
        return 1.0
    taken = min(absorbed, whole - of_main)
    return taken / (taken + of_main)


class Absorption:
    """C17 as a control: rates of first letters and of planted concepts, exceptions of the latents concerned."""

    code: ClassVar[str] = "C17"
    name: ClassVar[str] = "absorption"
    tier: ClassVar[str] = "paper"

    @classmethod
    def of(cls, run: "Run") -> "Absorption":
        """Raises AbsorptionError for a dictionary that does not reconstruct what it reads."""
        form = run.config.dictionary.form
        if form != "autoencoder":
            raise AbsorptionError(f"C17 absorption is measured of autoencoders; the dictionary is a {form}")
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Receipts of the whole dictionary, and of main latents that something was absorbed from."""
        run = labelled.run
        text = run_text(run.evidence, run.path.name)
        source = StoredRows(run.activations, run.harvest_info, run.spec.reads, text)
        text, dictionary = without_massive(text, source), run.dictionary()
        encode = latent_rows(source, dictionary)
        W_dec, b_dec = (p.detach().double().cpu().numpy() for p in (dictionary.W_dec, dictionary.b_dec))
        concepts = [concept for concept in CONCEPTS if not concept.same_token]
        receipts = []
        for group, tasks in (
            ("first letters", letter_tasks(text)),
            ("planted concepts", planted_tasks(text, concepts)),
        ):
            measured: list[Absorbed] = []
            for task in tasks:
                try:
                    drawn = draw(task, max_cases=MAX_CASES, seed=0)
                except TaskError:
                    continue
                rows = {s: drawn.of(s).cases for s in SPLITS}
                x = {s: source.acts(s, rows[s]) for s in SPLITS}
                z = {s: encode(s, rows[s]) for s in SPLITS}
                y = {s: drawn.of(s).y for s in SPLITS}
                found = measure_absorption(task.name, x, z, y, W_dec, b_dec, drawn.test.documents)
                measured.append(found)
                receipts += _exceptions(found, text, drawn.test.cases)
            receipts += _rates(group, measured, len(tasks))
        return receipts


def letter_tasks(text: ProbedText) -> list[Task]:
    """A task a letter: whole words (a blank in front, letters only) that begin with it, against other words."""
    words = [t[1:].casefold() if t[:1] == " " and t[1:].isalpha() and len(t) > 2 else "" for t in text.vocabulary.texts]
    first = np.array([ord(w[0]) if w and w[0] in ascii_lowercase else 0 for w in words] + [0])
    letters = {split: first[part.windows.tokens.ravel()] for split, part in text.splits.items()}
    among = {split: _few_of_each(text, split, letters[split] > 0) for split in text.splits}
    return [
        token_task(f"first letter {letter}", text, {s: found == ord(letter) for s, found in letters.items()}, among)
        for letter in ascii_lowercase
    ]


def _few_of_each(text: ProbedText, split: str, wanted: np.ndarray) -> np.ndarray:
    """[W * T] bool: at most `ROWS_PER_TYPE` of the wanted rows of every word type, at random."""
    rows = np.flatnonzero(wanted & text.splits[split].eligible)
    rows = np.random.default_rng(0).permutation(rows)
    types = text.word_types(split)[rows]
    order = np.argsort(types, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(types[order]) != 0]) if len(order) else np.zeros(0, np.int64)
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    out = np.zeros(len(wanted), bool)
    out[rows[order[place < ROWS_PER_TYPE]]] = True
    return out


def _rates(group: str, measured: Sequence[Absorbed], asked: int) -> list[Receipt]:
    """Both rates over all cases of a group, with intervals over documents."""
    detail = {
        "properties": {m.parent: {"main": list(m.main), "rate": m.rate, "n": len(m.absorber)} for m in measured},
        "not_measured": asked - len(measured),
    }
    if not measured or not sum(len(m.absorber) for m in measured):
        return [Receipt(control=f"C17 absorption of {group}", value=None, verdict=REPORTED, detail=detail)]
    names, group_of = np.unique(np.concatenate([m.documents for m in measured]), return_inverse=True)
    draws = Bootstrap(len(names), NUM_BOOTSTRAP)
    count = np.bincount(group_of, minlength=len(names)).astype(float)
    receipts = []
    for what, values in (
        (f"C17 absorption of {group}", [m.absorber >= 0 for m in measured]),
        (f"C17 absorption of {group}, fraction", [m.fraction for m in measured]),
    ):
        total = np.bincount(group_of, weights=np.concatenate(values).astype(float), minlength=len(names))
        found = draws.estimate(ratio(total, count), len(group_of))
        receipts.append(
            Receipt(
                control=what,
                value=found.value,
                verdict=REPORTED,
                n=found.n,
                low=found.low,
                high=found.high,
                detail=detail,
            )
        )
    return receipts


def _exceptions(found: Absorbed, text: ProbedText, cases: np.ndarray) -> list[Receipt]:
    """What the best main latent misses because another has absorbed it: one receipt, or none."""
    absorbed = np.flatnonzero(found.absorber >= 0)
    if not len(absorbed):
        return []
    tokens = text.splits["test"].windows.tokens.ravel()
    words: dict[int, Counter[str]] = {}
    for n in absorbed:
        token = text.vocabulary.texts[tokens[cases[found.cases[n]]]]
        words.setdefault(int(found.absorber[n]), Counter())[token] += 1
    absorbers = [
        {"feature": feature, "cases": count.total(), "tokens": [token for token, _ in count.most_common(5)]}
        for feature, count in sorted(words.items(), key=lambda item: -item[1].total())
    ]
    detail = {"property": found.parent, "main": list(found.main), "absorbers": absorbers}
    return [
        Receipt(
            control=f"C17 absorption: {found.parent}",
            feature=found.main[0],
            value=found.rate,
            verdict=REPORTED,
            n=len(found.absorber),
            detail=detail,
        )
    ]
