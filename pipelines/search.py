"""Searching for features with the model or the dictionary at hand: what fires on a text, what points in a direction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saeql.sae.config import ConfigError
from saeql.sae.hooks import capture
from saeql.store.feature_store import FeatureStore
from saeql.store.search import Scored, SearchHit
from saeql.store.vectors import unit_rows

from .find_dictionary import find_dictionary
from .meaning import search_meaning

if TYPE_CHECKING:
    from saeql.sae.model import SparseAutoencoder

    from .models import LanguageModel
    from .run import Run

#: Tokens named as the reason for a hit.
MAX_REASONS = 3


@dataclass(frozen=True)
class PromptHits:
    """What fires on a text: overall, and on each token."""

    hits: list[SearchHit]  # score: largest activation as a share of the feature's largest on train
    tokens: list[str]
    by_token: list[list[SearchHit]]  # strongest shares first


@dataclass(frozen=True)
class PromptReading:
    """What a dictionary makes of a text of T tokens: k active features a token, 0 where fewer are."""

    tokens: list[str]
    indices: np.ndarray  # [T, k] features
    values: np.ndarray  # [T, k] activations
    shares: np.ndarray  # [T, k] of the feature's largest on train, 0 where it never fired there

    def of(self, feature: int) -> np.ndarray:
        """[T] activations of one feature."""
        return (self.values * (self.indices == feature)).sum(1)


@torch.no_grad()
def read_prompt(
    lm: "LanguageModel", dictionary: "SparseAutoencoder", reads: Sequence[str], largest: np.ndarray, text: str
) -> PromptReading:
    """Run `text` through the model and the dictionary; `largest` [d_sae] are activations on train.

    The first position is BOS where the harvest had one, and is left out as it is everywhere.
    Raises ConfigError for a text without tokens.
    """
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"no tokens in {text!r}: give some text")
    with capture(lm.model, list(reads), lm.device) as reader:
        acts = reader.run(torch.tensor([[lm.bos_id, *ids]], device=lm.input_device))
    rows = torch.cat([acts[name][0] for name in reads], dim=-1)[1:]  # [T, d_in]
    latents = dictionary.encode(rows.float())
    values, indices = latents.values.cpu().numpy(), latents.indices.cpu().numpy()  # [T, k] each
    shares = np.where(values > 0, values / np.maximum(largest[indices], 1e-9), 0)
    shares[largest[indices] <= 0] = 0
    return PromptReading(lm.token_texts(ids), indices, values, shares)


def search_prompt(
    run: "Run", store: FeatureStore, text: str, *, limit: int = 10, where: str | None = None
) -> PromptHits:
    """Features of the run's dictionary that fire on `text`, nearest to their largest train activation first.

    Raises ConfigError for a text without tokens.
    """
    lm, dictionary = run.language_model, run.dictionary().to(run.language_model.device)
    largest = largest_activations(store, run.spec.name, dictionary.d_sae)
    reading = read_prompt(lm, dictionary, run.spec.reads, largest, text)
    return prompt_hits(store, run.spec.name, reading, limit=limit, where=where)


def prompt_hits(
    store: FeatureStore, name: str, reading: PromptReading, *, limit: int = 10, where: str | None = None
) -> PromptHits:
    """Features of dictionary `name` that a reading found, overall and by token. Raises SQLError as a search does."""
    tokens, indices, values, shares = reading.tokens, reading.indices, reading.values, reading.shares
    best: dict[int, list[tuple[float, int, float]]] = {}
    for place, feature in zip(*np.nonzero(shares), strict=True):
        best.setdefault(int(indices[place, feature]), []).append(
            (float(shares[place, feature]), int(place), float(values[place, feature]))
        )
    scored = []
    for feature, places in best.items():
        places.sort(reverse=True)
        why = [f"[{tokens[place]}] {value:.2f}" for _, place, value in places[:MAX_REASONS]]
        scored.append(Scored(feature, places[0][0], {"fires on": why}))
    scored.sort(key=lambda s: (-s.score, s.feature))
    by_token = []
    for place in range(len(tokens)):
        order = np.argsort(-shares[place], kind="stable")
        mine = [
            Scored(int(indices[place, i]), float(shares[place, i]), {"activation": [f"{values[place, i]:.2f}"]})
            for i in order
            if shares[place, i] > 0
        ]
        by_token.append(store.hits(mine, limit=3, where=where, dictionary=name))
    return PromptHits(store.hits(scored, limit=limit, where=where, dictionary=name), tokens, by_token)


def largest_activations(store: FeatureStore, name: str, d_sae: int) -> np.ndarray:
    """[d_sae] largest train activation, 0 where a feature never fired."""
    table = store.trusted_sql("SELECT feature, max_activation FROM features WHERE dictionary = $name", {"name": name})
    largest = np.zeros(d_sae)
    largest[table["feature"].to_numpy()] = table["max_activation"].to_numpy()
    return largest


def search_direction(
    run: "Run",
    store: FeatureStore,
    like: int | np.ndarray,
    *,
    among: str | None = None,
    limit: int = 10,
    where: str | None = None,
) -> list[SearchHit]:
    """Features whose decoder rows are nearest, by cosine, to that of feature `like` of the run, or to a vector [d_out].

    `among` names another dictionary to look in, as `find_dictionary` does; its features have labels where the store
    has them. Raises ConfigError for a feature that there is not, StoreError for a vector of another length.
    """
    dictionary, name = run.dictionary(), run.spec.name
    if among is None and isinstance(like, int):
        scored = scored_like(dictionary, name, like, dictionary.d_sae if where else limit)
    else:
        vector = like
        if isinstance(like, int):
            _check_feature(dictionary, name, like)
            vector = dictionary.W_dec[like].detach().float().numpy()
        if among is not None:
            name, dictionary, _ = find_dictionary(run, among)
        scored = _scored(dictionary, np.asarray(vector), dictionary.d_sae if where else limit)
    known = name in (row["dictionary"] for row in store.dictionaries())
    if known:
        return store.hits(scored, limit=limit, where=where, dictionary=name)
    if where:
        raise ConfigError(f"--where asks the store, which does not have {name}: `saeql store RUN --add` adds it")
    return [SearchHit(name, s.feature, s.score, "", "", None, float("nan"), s.matched) for s in scored[:limit]]


def direction(run: "Run", like: str) -> int | np.ndarray:
    """What `--like` names: a feature, or the direction [d_out] of a steering vector's file where the dictionary writes.

    Raises VectorError for no such file, ConfigError for a vector of another place.
    """
    if like.lstrip("-").isdecimal():
        return int(like)
    from .steering.vector_files import load_vector

    rows = load_vector(Path(like)).rows
    lacking = [place for place in run.spec.writes if place not in rows]
    if lacking:
        raise ConfigError(f"{like} is a vector at {', '.join(rows)}, and {run.spec.name} writes at {lacking[0]}")
    return torch.cat([rows[place] for place in run.spec.writes]).numpy()


def scored_like(dictionary: "SparseAutoencoder", name: str, feature: int, limit: int) -> list[Scored]:
    """The other features with decoder rows nearest to that of `feature`. Raises ConfigError where there is none."""
    _check_feature(dictionary, name, feature)
    found = _scored(dictionary, dictionary.W_dec[feature].detach().float().numpy(), limit + 1)
    return [s for s in found if s.feature != feature][:limit]


def _scored(dictionary: "SparseAutoencoder", vector: np.ndarray, limit: int) -> list[Scored]:
    rows = unit_rows(np.arange(dictionary.d_sae), dictionary.W_dec.detach().float().numpy())
    return [Scored(f, c, {"cosine": [f"{c:.3f}"]}) for f, c in rows.nearest(vector, limit)]


def _check_feature(dictionary: "SparseAutoencoder", name: str, feature: int) -> None:
    if not 0 <= feature < dictionary.d_sae:
        raise ConfigError(f"{name} has no feature {feature}: its features are 0 to {dictionary.d_sae - 1}")


def find(
    run: "Run | None",
    store: FeatureStore,
    asked: dict[str, Any],
    *,
    dictionary: str | None = None,
    among: str | None = None,
    limit: int = 10,
    where: str | None = None,
) -> tuple[list[SearchHit], PromptHits | None]:
    """What one command line asks for: hits, and for a prompt those of each token.

    `asked` has words, meaning, token, effect, prompt and like, all None but one. Raises ConfigError otherwise, and for
    what a store without its `run` cannot answer.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ConfigError("search for one thing: words, or one of --meaning, --token, --effect, --prompt, --like")
    way, what = next(iter(given.items()))
    if among is not None and way != "like":
        raise ConfigError("--among goes with --like")
    if way == "meaning":
        return search_meaning(run, store, what, limit=limit, where=where, dictionary=dictionary), None
    if way not in ("prompt", "like"):
        return store.search(what, by=way, limit=limit, where=where, dictionary=dictionary), None
    if run is None:
        raise ConfigError(
            f"--{way} asks the model or the dictionary of a run, and {store.path} is a store alone: words, --meaning, "
            "--token and --effect need nothing else"
        )
    if dictionary not in (None, run.spec.name):
        own = run.spec.name
        raise ConfigError(f"--{way} asks the run's own dictionary, {own}: search the run that made {dictionary}")
    if way == "prompt":
        found = search_prompt(run, store, what, limit=limit, where=where)
        return found.hits, found
    return search_direction(run, store, direction(run, what), among=among, limit=limit, where=where), None
