"""What a feature is compared with: other directions for the same concept, made on calibration text, and random ones.

For one concept, none of them made with the words that measure it:

    diff_mean      mean of active less mean of silent calibration rows
    logistic       weights of a logistic regression between them
    unembedding    mean of the unembedding rows of the choosing words
    random_row     of as many isotropic random rows as the dictionary has, the one that the logit lens finds nearest to
                   the choosing words: what choosing among many directions gives by itself

For all of them: isotropic random directions, random ones with the covariance of the activations, random rows of the
dictionary, and the first principal component of the activations, each sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from saeql.sae.start_rows import start_rows

from ..index import direction_logits
from ..models import LanguageModel
from ..output_effects import WritePlace
from ..probing.activations import StoredRows
from ..probing.text import ProbedText, TextSplit
from ..split_rows import ActiveRows, FeatureRows
from .concept_words import Concept
from .reading import direction, unembedding_of_ids

if TYPE_CHECKING:
    from ..run import Run

#: Of one concept, in the order of tables.
OWN_METHODS = ("diff_mean", "logistic", "unembedding", "random_row")
#: Rows that a direction is made of, on either side.
MAX_ROWS = 256
#: Rows behind the covariance and the principal component.
_COMMON_ROWS = 4096


@dataclass(frozen=True)
class CommonDirections:
    """Directions [n, d_out] that are no concept's own."""

    random: torch.Tensor
    covariance: torch.Tensor
    rows: torch.Tensor
    pca: torch.Tensor  # [2, d_out] the first component, each sign

    def named(self) -> dict[str, torch.Tensor]:
        """By the names of tables."""
        return {
            "random": self.random, "random_covariance": self.covariance, "other_features": self.rows, "pca": self.pca
        }  # fmt: skip


class RivalDirections:
    """Makes directions from the calibration split of a run. Raises ShardError where its activations are missing."""

    def __init__(self, run: "Run", place: WritePlace, rows: FeatureRows, token_ids: np.ndarray, seed: int):
        split = rows.calibration
        self.place, self.rows, self.token_ids, self.seed = place, split, token_ids, seed
        self._decoder = run.dictionary().W_dec.detach().float().cpu()
        text = TextSplit(
            token_ids, split.windows, split.window_ids, split.eligible, split.documents, split.num_documents
        )
        probed = ProbedText("", split.windows.vocabulary, {"calibration": text})
        self._stored = StoredRows(run.activations, run.harvest_info, list(place.writes), probed)
        self._usual = split.eligible & ~self._stored.massive("calibration", text)

    def acts(self, rows: np.ndarray) -> torch.Tensor:
        """[n, d_out] float32 activations of calibration rows [n] where directions are added."""
        return torch.from_numpy(self._stored.acts("calibration", rows))

    def common(self, num_random: int, num_others: int) -> CommonDirections:
        """Directions for all concepts, by the seed."""
        rng = np.random.default_rng(self.seed)
        usual = np.flatnonzero(self._usual)
        acts = self.acts(np.sort(rng.choice(usual, min(_COMMON_ROWS, len(usual)), replace=False)))
        alive = np.unique(self.rows.active.features)
        features = rng.choice(alive, min(num_others, len(alive)), replace=False)
        return CommonDirections(
            self.place.random_directions(num_random, self.seed),
            start_rows("random_covariance", acts, num_others, self.seed),
            self._decoder[torch.from_numpy(features).long()],
            start_rows("pca", acts, 2, self.seed),
        )

    def of_concept(self, concept: Concept, feature: int | None) -> dict[str, torch.Tensor]:
        """Directions [d_out] of a concept by method, those that its text and words suffice for (`random_row` apart)."""
        found: dict[str, torch.Tensor] = {}
        positive, negative = self.contexts(concept, feature)
        if len(positive) >= 2 and len(negative) >= 2:
            acts = self.acts(positive), self.acts(negative)
            found = {method: direction(method, *acts) for method in ("diff_mean", "logistic")}
        if concept.choosing:
            own = unembedding_of_ids(self.place.lm, concept.choosing).cpu()
            found["unembedding"] = torch.cat([torch.zeros(sum(self.place.writes.values()) - len(own)), own])
        return found

    def contexts(self, concept: Concept, feature: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows where the concept is active and rows where it is not, neither at nor before a measured word.

        A feature is active where it exceeds its threshold, and silent rows are those where it is 0; a concept without a
        feature is active at its choosing words.
        """
        measured = np.isin(self.token_ids, concept.measured)
        near = measured.copy()
        near[:, :-1] |= measured[:, 1:]
        usable, fires = self._usual & ~near.ravel(), np.zeros(self.token_ids.size, bool)
        if feature is None:
            active = np.flatnonzero(np.isin(self.token_ids, concept.choosing))
            fires[active] = True
        else:
            active = _rows_of(self.rows.active, feature)
            fires[active] = True
            fires[_rows_of(self.rows.weak, feature)] = True
        rng = np.random.default_rng((self.seed, feature or 0))
        return _some(active[usable[active]], rng), _some(np.flatnonzero(usable & ~fires), rng)

    def random_rows(self, concepts: Sequence[Concept]) -> list[torch.Tensor | None]:
        """`random_row` of every concept [d_out]; None where no words choose."""
        drawn = self.place.random_directions(len(self._decoder), self.seed + 1)
        own = [c.choosing for c in concepts]
        scores = lens_scores(drawn, self.place.lm, own)
        return [drawn[int(scores[:, i].argmax())] if ids else None for i, ids in enumerate(own)]


def _rows_of(active: ActiveRows, feature: int) -> np.ndarray:
    return active.rows[active.starts[feature] : active.starts[feature + 1]].astype(np.int64)


def _some(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(rows, MAX_ROWS, replace=False)) if len(rows) > MAX_ROWS else rows


@torch.no_grad()
def lens_scores(directions: torch.Tensor, lm: LanguageModel, sets: Sequence[Sequence[int]]) -> np.ndarray:
    """[n, S] mean logit of each set of tokens under directions [n, d], in standard deviations of all logits.

    0 for an empty set. Logits are those of the logit lens.
    """
    out = np.zeros((len(directions), len(sets)), np.float32)
    chosen = [torch.tensor(list(s), dtype=torch.long, device=lm.device) for s in sets]
    for start, logits in direction_logits(directions.to(lm.device), lm):
        spread, mean = torch.std_mean(logits, dim=1)
        for i, ids in enumerate(chosen):
            if len(ids):
                out[start : start + len(logits), i] = ((logits[:, ids].mean(1) - mean) / spread).cpu().numpy()
    return out


@torch.no_grad()
def own_lens_scores(directions: torch.Tensor, lm: LanguageModel, sets: Sequence[Sequence[int]]) -> np.ndarray:
    """[n] the same of every direction with its own set, none of them empty."""
    out = np.zeros(len(directions), np.float32)
    for start, logits in direction_logits(directions.to(lm.device), lm):
        spread, mean = torch.std_mean(logits, dim=1)
        own = torch.stack([row[list(ids)].mean() for row, ids in zip(logits, sets[start:], strict=False)])
        out[start : start + len(logits)] = ((own - mean) / spread).cpu().numpy()
    return out
