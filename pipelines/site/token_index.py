"""Which features fire on a token and which promote it, gathered while all features are read, then as files by token.

What fires on a token is in the order of the store's macro `fires_on`, cut at `NUM_FIRING` features a token: common
tokens have tens of thousands. What promotes it is whole.
"""

from itertools import pairwise

import numpy as np

from saeql.store.feature_batch import BatchActivations, FeatureBatch
from saeql.store.text_rows import TextRows

from .files import SiteFiles, shards, text_order

NUM_FIRING = 100
#: Entries of one file at least, but for the last.
SHARD_ENTRIES = 8_192
#: Pairs of token and feature that wait to be cut.
_MAX_WAITING = 4_000_000
_FIRING = np.dtype([("token", "i4"), ("feature", "i4"), ("count", "i8"), ("total", "i8"), ("f1", "f8")])
_PROMOTED = np.dtype([("token", "i4"), ("feature", "i4"), ("rank", "i4"), ("effect", "f8")])


class TokenIndex:
    """Takes features batch by batch; tokens that read the same are one."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._texts: dict[int, tuple[TextRows, np.ndarray, np.ndarray]] = {}  # the token of each id, and how often
        self._firing: list[np.ndarray] = [np.zeros(0, _FIRING)]
        self._promoted: list[np.ndarray] = [np.zeros(0, _PROMOTED)]
        self._waiting = 0

    def add(self, found: FeatureBatch) -> None:
        """Take in all that a batch of features does."""
        self._add_firing(found.places())
        rows = [(self._token(r["token"]), r["feature"], r["rank"], r["effect"]) for r in found.promoted() if r["token"]]
        self._promoted.append(np.array(rows, _PROMOTED))

    def write(self, files: SiteFiles, place: str, features: np.ndarray) -> None:
        """Write those of `features` (ascending), which stand in the files as their places among `features`."""
        self._cut()
        firing, promoted = self._firing[0], np.concatenate(self._promoted)
        firing, promoted = (rows[np.isin(rows["feature"], features)] for rows in (firing, promoted))
        texts = list(self._tokens)
        used = np.union1d(firing["token"], promoted["token"])
        order = sorted(used.tolist(), key=lambda n: text_order(texts[n]))
        rank = np.zeros(len(texts), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        for rows in (firing, promoted):
            rows["token"] = rank[rows["token"]]
        firing = firing[np.lexsort((firing["feature"], -firing["f1"], firing["token"]))]
        promoted = promoted[np.lexsort((promoted["feature"], -promoted["effect"], promoted["token"]))]
        ends = [np.cumsum(np.bincount(rows["token"], minlength=len(order))) for rows in (firing, promoted)]
        starts = shards(ends[0] + ends[1], SHARD_ENTRIES)
        times = self._num_places()[order]
        for number, (first, last) in enumerate(pairwise(starts)):
            bounds = [(int(e[first - 1]) if first else 0, int(e[last - 1])) for e in ends]
            fires, raises = firing[slice(*bounds[0])], promoted[slice(*bounds[1])]
            files.data(
                f"{place}/s{number}",
                {},
                fires_ends=(ends[0][first:last] - bounds[0][0]).astype(np.uint32),
                fires=np.searchsorted(features, fires["feature"]).astype(np.uint32),
                count=fires["count"].astype(np.uint32),
                of_token=_percent(fires["count"], times[fires["token"]]),
                of_feature=_percent(fires["count"], fires["total"]),
                promotes_ends=(ends[1][first:last] - bounds[1][0]).astype(np.uint32),
                promotes=np.searchsorted(features, raises["feature"]).astype(np.uint32),
                rank=(raises["rank"] + 1).astype(np.uint16),
            )
        files.data(f"{place}/tokens", {"tokens": [texts[n] for n in order], "shards": starts, "most": NUM_FIRING})

    def _add_firing(self, places: list[BatchActivations]) -> None:
        keys = [
            (part.features.astype(np.int64) << 32) | self._of(part.text)[0][part.text.token_ids[part.rows]]
            for part in places
        ]
        if not keys:
            return
        pairs, count = np.unique(np.concatenate(keys), return_counts=True)
        made = np.zeros(len(pairs), _FIRING)
        made["feature"], made["token"], made["count"] = pairs >> 32, pairs & (2**32 - 1), count
        features, owner = np.unique(made["feature"], return_inverse=True)
        total = np.bincount(owner, weights=count).astype(np.int64)[owner] if len(features) else count
        made["total"] = total
        made["f1"] = 2 * count / (total + self._num_places()[made["token"]])
        self._firing.append(made)
        self._waiting += len(made)
        if self._waiting > _MAX_WAITING:
            self._cut()

    def _cut(self) -> None:
        """Keep the best of every token."""
        rows = np.concatenate(self._firing)
        rows = rows[np.lexsort((rows["feature"], -rows["f1"], rows["token"]))]
        starts = np.searchsorted(rows["token"], rows["token"], side="left")
        kept = rows[np.arange(len(rows)) - starts < NUM_FIRING]
        self._firing, self._waiting = [kept], 0

    def _of(self, text: TextRows) -> tuple[np.ndarray, np.ndarray]:
        """(token of every token id, places of every token) of a text."""
        if id(text) not in self._texts:
            token = np.array([self._token(t) for t in text.vocabulary.tolist()], np.int64)
            self._texts[id(text)] = (text, token, np.bincount(token[text.token_ids]))
        return self._texts[id(text)][1:]

    def _num_places(self) -> np.ndarray:
        """How often each token stands in the texts."""
        total = np.zeros(len(self._tokens), np.int64)
        for _, _, count in self._texts.values():
            total[: len(count)] += count
        return total

    def _token(self, text: str) -> int:
        return self._tokens.setdefault(text, len(self._tokens))


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.rint(np.divide(100 * part, whole, out=np.zeros(len(part)), where=whole > 0)).astype(np.uint8)
