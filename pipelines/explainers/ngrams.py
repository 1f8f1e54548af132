"""What text makes a feature fire, found out by changing it: n-grams with wildcards, for every feature a trie of them.

The idea is that of N2G (Foote et al. 2023, arXiv 2305.19911), which OpenAI applied to autoencoders: for an active row

1. the shortest ending of its context is looked for on which the feature keeps `keep` of its activation z;
2. every token of that ending is replaced in turn; its salience is 1 - z(replaced) / z;
3. tokens whose salience is below `min_salience` become wildcards.

That is causal: the model was run on the shortened and on the changed text. From the patterns of a feature's examples,
and their endings, those are put together whose union has the best F1 on train rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from saeql.sae.config import ConfigError, check_least

from ..feature_values import FeatureValues
from ..models import ModelError
from ..ngram_trie import NgramTrie, Pattern, TokenIndex, trimmed
from ..predicates import NGrams
from ..progress import OnProgress
from ..split_rows import FeatureRows, SplitRows, read_token_ids
from .base import Candidate

if TYPE_CHECKING:
    from ..run import Run

#: Endings that are tried, in tokens: the shortest of these that keeps the activation is taken.
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class NGramsConfig:
    """Causal n-grams (`ngrams` among the explainers): how often the model is run."""

    max_features: int = 0
    """Features that are explained, in the order asked for; 0: all."""
    examples: int = 24
    """Active train rows a feature, the strongest and others evenly over all strengths."""
    max_context: int = 8
    """Tokens of context tried at most, the row's own token included."""
    replacements: int = 1
    """Random tokens that a token is replaced by, one after the other; the mean activation counts."""
    keep: float = 0.5
    """Share of the activation that a shortened context must keep."""
    min_salience: float = 0.5
    """Share of the activation that replacing a token must cost, or it becomes a wildcard."""
    max_patterns: int = 12
    """Patterns of one label."""
    batch_tokens: int = 4096
    """Tokens of one forward pass."""
    seed: int = 0
    """Seed of the replacements."""

    def __post_init__(self):
        check_least(
            self, "ngrams", max_features=0, examples=1, max_context=1, replacements=1, max_patterns=1, batch_tokens=1
        )
        for name in ("keep", "min_salience"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"ngrams.{name} must be above 0 and at most 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class _Examples:
    """Active rows [n] with the feature they are of."""

    features: np.ndarray  # [n]
    rows: np.ndarray  # [n] flat train rows
    values: np.ndarray  # [n] stored activations

    def where(self, keep: np.ndarray) -> "_Examples":
        return _Examples(self.features[keep], self.rows[keep], self.values[keep])


class NGramExplainer:
    """Proposes n-gram labels. Raises ModelError for an encoder, whose activations do not depend on the past alone."""

    name: ClassVar[str] = "ngrams"

    def __init__(self, run: "Run", config: NGramsConfig):
        self.run, self.config = run, config
        self.num_tokens = 0  # put through the model so far

    @classmethod
    def of(cls, run: "Run") -> Self:
        return cls(run, run.config.ngrams)

    def propose(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress | None = None
    ) -> Mapping[int, list[Candidate]]:
        train, config = rows.train, self.config
        chosen = list(features)[: config.max_features or None]
        examples = _examples(train, chosen, config.examples)
        if len(examples.rows) == 0:
            return {}
        with FeatureValues.of(self.run, config.batch_tokens) as values:
            if not values.lm.is_causal:
                raise ModelError(
                    f"{values.lm.identity.model_name} is an encoder, which reads what follows too: n-grams need "
                    "a model that reads the past only; take another explainer"
                )
            causes = _Causes(values, read_token_ids(self.run.evidence, train), config)
            patterns = causes.patterns(train, examples, on_progress)
            self.num_tokens += values.num_tokens
        return {
            feature: [Candidate(n.describe(), n.kind, self.name, n) for n in made]
            for feature, made in _best_tries(train, patterns, config).items()
        }


def _examples(train: SplitRows, features: Sequence[int], num: int) -> _Examples:
    """Of every feature the strongest row and others evenly spread over the ranks of strength."""
    rows, values, starts = train.active.rows, train.active.values, train.active.starts
    picked = []
    for feature in features:
        own = np.arange(starts[feature], starts[feature + 1])
        ranks = np.unique(np.linspace(0, len(own) - 1, min(num, len(own))).round().astype(int))
        picked.append(own[np.argsort(-values[own], kind="stable")[ranks]])
    at = np.concatenate(picked) if picked else np.zeros(0, np.int64)
    return _Examples(train.active.features[at].astype(np.int64), rows[at].astype(np.int64), values[at])


class _Causes:
    """Shortens and changes the contexts of examples, and sees what that does to the features."""

    def __init__(self, values: FeatureValues, token_ids: np.ndarray, config: NGramsConfig):
        self.values, self.token_ids, self.config = values, token_ids, config
        self.rng = np.random.default_rng(config.seed)

    def patterns(
        self, train: SplitRows, examples: _Examples, on_progress: OnProgress | None
    ) -> dict[int, list[Pattern]]:
        """Patterns by feature, none twice; a feature that no short context makes fire has none."""
        steps = sum(n <= self.config.max_context for n in LENGTHS) + 1
        lengths, kept = self._shortest(examples, lambda done: on_progress and on_progress(done, steps))
        found = lengths > 0
        salient = self._salient(examples.where(found), lengths[found], kept[found])
        if on_progress is not None:
            on_progress(steps, steps)
        texts, tokens = train.windows.vocabulary.texts, train.windows.tokens.ravel()
        out: dict[int, dict[Pattern, None]] = {}
        for feature, row, marks in zip(examples.features[found], examples.rows[found], salient, strict=True):
            words = [texts[tokens[row - i]] if marks[-1 - i] else None for i in reversed(range(len(marks)))]
            if pattern := trimmed(words):
                out.setdefault(int(feature), {})[pattern] = None
        return {feature: list(own) for feature, own in out.items()}

    def _context(self, row: int, length: int) -> np.ndarray:
        """The window's first token (models write to it whatever they read) and the `length` tokens up to the row."""
        window, position = divmod(row, self.token_ids.shape[1])
        ids = self.token_ids[window]
        return np.concatenate([ids[:1], ids[position - length + 1 : position + 1]])

    def _shortest(self, examples: _Examples, on_round: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray]:
        """[n] tokens of the shortest ending that keeps the activation (0: none does), [n] the activation on it."""
        positions = examples.rows % self.token_ids.shape[1]
        lengths, kept = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.float32)
        rounds = [n for n in LENGTHS if n <= self.config.max_context]
        for done, length in enumerate(rounds):
            # a context that reaches the window's first token is whole, and longer ones are the same
            reach = np.minimum(length, positions)
            before = np.minimum(rounds[done - 1] if done else 0, positions)
            asked = np.flatnonzero((lengths == 0) & (reach > before))
            contexts = [self._context(int(examples.rows[i]), int(reach[i])) for i in asked]
            z = self.values.read(contexts, examples.features[asked])
            enough = z >= self.config.keep * examples.values[asked]
            lengths[asked[enough]], kept[asked[enough]] = reach[asked[enough]], z[enough]
            on_round(done + 1)
        return lengths, kept

    def _salient(self, examples: _Examples, lengths: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
        """For every example which of its `lengths[i]` tokens the activation `kept[i]` rests on, as bools."""
        changed, owner, place = [], [], []
        for i in np.flatnonzero(lengths > 1):  # one token by itself is what there is
            context = self._context(int(examples.rows[i]), int(lengths[i]))
            for at in range(1, len(context)):
                for token in self._replacements(int(context[at])):
                    new = context.copy()
                    new[at] = token
                    changed.append(new)
                    owner.append(i)
                    place.append(at - 1)
        owners, places = np.array(owner, np.int64), np.array(place, np.int64)
        z = self.values.read(changed, examples.features[owners])
        left = np.zeros((len(lengths), int(lengths.max(initial=1))))
        np.add.at(left, (owners, places), z / self.config.replacements)
        share = left / np.maximum(kept, 1e-9)[:, None]
        salient = 1 - share >= self.config.min_salience
        salient[lengths == 1, 0] = True
        return [salient[i, :n] for i, n in enumerate(lengths.tolist())]

    def _replacements(self, token: int) -> list[int]:
        """Other tokens, as often drawn as the text has them."""
        found: list[int] = []
        while len(found) < self.config.replacements:
            drawn = int(self.token_ids[self.rng.integers(len(self.token_ids)), self.rng.integers(1, self._width)])
            if drawn >= 0 and drawn != token:
                found.append(drawn)
        return found

    @property
    def _width(self) -> int:
        return self.token_ids.shape[1]


def _best_tries(
    train: SplitRows, patterns: Mapping[int, list[Pattern]], config: NGramsConfig
) -> dict[int, list[NGrams]]:
    """For every feature the union of patterns with the best train F1, and the best single pattern, best first."""
    index, starts = TokenIndex(train.windows), train.active.starts
    rows_of = {}  # patterns are shared by features
    is_active, covered = np.zeros(train.eligible.shape, bool), np.zeros(train.eligible.shape, bool)
    out = {}
    for feature, own in patterns.items():
        active = train.active.rows[starts[feature] : starts[feature + 1]]
        pool = list(dict.fromkeys(p for pattern in own for p in _endings(pattern)))
        for pattern in pool:
            if pattern not in rows_of:
                rows = NgramTrie([pattern]).matches(train.windows, index)
                rows_of[pattern] = rows[train.eligible[rows]]
        is_active[active] = True
        chosen = list(_greedy([(p, rows_of[p]) for p in pool], is_active, covered, len(active), config.max_patterns))
        is_active[active] = False
        if chosen:
            out[feature] = list(dict.fromkeys((NGrams(tuple(chosen)), NGrams((chosen[0],)))))
    return out


def _endings(pattern: Pattern) -> Iterator[Pattern]:
    """The pattern, and what is left of it as tokens are taken off its beginning."""
    for start in range(len(pattern)):
        if pattern[start] is not None:
            yield pattern[start:]


def _greedy(
    candidates: Sequence[tuple[Pattern, np.ndarray]],
    is_active: np.ndarray,
    covered: np.ndarray,
    num_active: int,
    limit: int,
) -> Iterator[Pattern]:
    """Patterns, each the one that raises the F1 of the union most, until none does. `covered` is room, left False."""
    hits = support = 0
    best_f1, marked = 0.0, []
    pool = [(p, rows) for p, rows in candidates if len(rows)]
    for _ in range(limit):
        best = None
        for n, (_, rows) in enumerate(pool):
            new = rows[~covered[rows]]
            more = int(np.count_nonzero(is_active[new]))
            f1 = 2 * (hits + more) / (num_active + support + len(new))
            if f1 > best_f1:
                best, best_f1 = (n, more, new), f1
        if best is None:
            break
        n, more, new = best
        covered[new] = True
        marked.append(new)
        hits, support = hits + more, support + len(new)
        yield pool.pop(n)[0]
    for rows in marked:
        covered[rows] = False
