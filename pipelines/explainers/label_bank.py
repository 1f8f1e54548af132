"""Labels from a bank: the concept whose sentence embedding is nearest to what a feature's active texts share.

    argmax over labels l of  d(l) = cos(e(l), mean e(active) - mean e(background))

on train rows, once for each of three views of a row (`receipts/row_text.py`): its word, its near words, its
surroundings. Beside the largest d stands, of the labels near the top, the one that fits all texts most evenly: d in
units of its own spread. The bank is plain text, `pipelines/data/label_bank.txt` and the file that `label.bank` names.
What is proposed always sounds plausible: whether it is true is for the scorers to say.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from saeql.sae.config import ConfigError

from ..embedder import Embedder
from ..progress import OnProgress
from ..receipts.row_text import VIEWS
from ..split_rows import FeatureRows
from .base import Candidate

if TYPE_CHECKING:
    from ..run import Run

#: Active rows of a feature that are read in each view: words are short, and repeat.
TEXTS_PER_FEATURE = {"word": 24, "near": 12, "window": 12}
#: Labels of largest d among which the most even one is looked for.
NEAR_THE_TOP = 5
#: Fewer texts than this have nothing in common that could be told from chance: the view is left out.
FEWEST_TEXTS = 3
#: Rows of all features together: words repeat and are short, contexts do neither.
MAX_WORDS, MAX_CONTEXTS = 40_000, 6_000
NUM_BACKGROUND = 128
_PART = 256  # features at a time


def read_bank(extra: str | Path = "") -> list[str]:
    """The packaged labels and those of the file `extra`: one a line, headings behind #; each once.

    Raises ConfigError where `extra` cannot be read or holds no label.
    """
    text = files("saeql.pipelines").joinpath("data/label_bank.txt").read_text(encoding="utf-8")
    labels = _labels(text)
    if extra:
        try:
            own = _labels(Path(extra).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"label.bank: cannot read {extra}: {error}") from None
        if not own:
            raise ConfigError(f"label.bank: {extra} holds no label (one a line; lines with # are headings)")
        labels += own
    return list(dict.fromkeys(labels))


def _labels(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class LabelBank:
    """Proposes the labels of a bank that are nearest in meaning to a feature's active train rows."""

    name: ClassVar[str] = "label_bank"

    def __init__(
        self,
        embedder: Embedder,
        labels: Sequence[str],
        *,
        views: Sequence[str] = tuple(VIEWS),
        seed: int = 0,
    ):
        self.embedder, self.labels, self.views, self.seed = embedder, list(labels), views, seed

    @classmethod
    def of(cls, run: "Run") -> "LabelBank":
        """With the run's embedder and `label.bank`. Raises EmbedderError or ConfigError where they cannot be had."""
        return cls(run.embedder, read_bank(run.config.label.bank), seed=run.config.label.seed)

    def propose(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress = lambda done, total: None
    ) -> Mapping[int, list[Candidate]]:
        """Two labels of every view; those that train texts set off best from the background come first.

        Each view reads at most `TEXTS_PER_FEATURE` rows of a feature, spread over all strengths, and fewer where many
        features share `MAX_WORDS` or `MAX_CONTEXTS`.
        """
        active = rows.train.active
        starts = active.starts
        asked = [f for f in features if starts[f + 1] - starts[f] >= FEWEST_TEXTS]
        found: dict[int, list[tuple[float, str]]] = {f: [] for f in asked}
        if not asked:
            return {}
        labels = self.embedder.embed(self.labels)
        plan = {view: self._texts_each(view, len(asked)) for view in self.views}
        steps = [(view, start) for view, texts in plan.items() if texts for start in range(0, len(asked), _PART)]
        picked = {f: np.arange(starts[f], starts[f + 1]) for f in asked}
        for f in asked:  # by strength, so that even steps through them are a spread over all strengths
            picked[f] = picked[f][np.argsort(active.values[picked[f]], kind="stable")]
        for done, (view, start) in enumerate(steps):
            some = asked[start : start + _PART]
            own = [active.rows[_spread(picked[f], plan[view])] for f in some]
            for f, score, label in self._best(rows, view, some, own, labels):
                found[f].append((score, label))
            on_progress(done + 1, len(steps))
        return {f: self._candidates(scored) for f, scored in found.items() if scored}

    def _texts_each(self, view: str, num_features: int) -> int:
        contexts = max(sum(v != "word" for v in self.views), 1)
        most = MAX_WORDS if view == "word" else MAX_CONTEXTS // contexts
        texts = min(TEXTS_PER_FEATURE[view], most // num_features)
        return texts if texts >= FEWEST_TEXTS else 0

    def _best(
        self, rows: FeatureRows, view: str, features: Sequence[int], own: Sequence[np.ndarray], labels: np.ndarray
    ) -> Iterator[tuple[int, float, str]]:
        """(feature, by how many spreads its texts lie nearer to the label than the background does, label)."""
        windows = rows.train.windows
        eligible = np.flatnonzero(rows.train.eligible)
        rng = np.random.default_rng(self.seed)
        others = np.sort(rng.choice(eligible, min(NUM_BACKGROUND, len(eligible)), replace=False))
        background = self.embedder.embed(VIEWS[view](windows, others))  # cached, so the same for every part
        vectors = self.embedder.embed(VIEWS[view](windows, np.concatenate(own)))
        groups = np.split(vectors, np.cumsum([len(r) for r in own])[:-1])
        near = background @ labels.T  # [B, L]
        for feature, group in zip(features, groups, strict=True):
            fit = group @ labels.T  # [n, L]
            above = fit.mean(axis=0) - near.mean(axis=0)  # d, but for the length of the difference
            evenness = above / np.sqrt(fit.var(axis=0) + near.var(axis=0) + 1e-6)
            top = np.argsort(-above, kind="stable")[:NEAR_THE_TOP]
            for label in dict.fromkeys((int(top[evenness[top].argmax()]), int(top[0]))):
                yield feature, float(evenness[label]), self.labels[label]

    def _candidates(self, scored: list[tuple[float, str]]) -> list[Candidate]:
        order = sorted(range(len(scored)), key=lambda i: -scored[i][0])  # stable: views keep their order among equals
        names = dict.fromkeys(scored[i][1] for i in order)
        return [Candidate(label=name, kind="semantic", explainer=self.name) for name in names]


def _spread(entries: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them at even steps."""
    return entries[np.unique(np.linspace(0, len(entries) - 1, min(count, len(entries))).astype(np.int64))]
