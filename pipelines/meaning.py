"""Features by meaning: sentence embeddings of labels and of evidence, and the features nearest to a text.

A feature's evidence is the tokens that it fires on most; so features that no label explains are found too.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from saeql.store.errors import StoreError
from saeql.store.feature_store import FeatureStore
from saeql.store.records import EMBEDDINGS
from saeql.store.search import SearchHit

from .embedder import EMBEDDED_EMBEDDER, Embedder, EmbedderConfig, EmbedderError
from .output import note
from .progress import progress

if TYPE_CHECKING:
    from .run import Run


def embed_features(
    store: FeatureStore,
    dictionary: str,
    embedder: Embedder,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> pa.Table:
    """The evidence table `embeddings` of a dictionary: its labels that passed, and the tokens its features fire on."""
    rows = store.trusted_sql(
        "SELECT feature, label, kind, top_tokens FROM features WHERE dictionary = $name ORDER BY feature",
        {"name": dictionary},
        timeout_seconds=None,
    ).to_pylist()
    texts = [("label", row["feature"], row["label"]) for row in rows if row["kind"] != "none"]
    for row in rows:
        words = dict.fromkeys(token.strip() for token in row["top_tokens"])
        words.pop("", None)
        if words:
            texts.append(("evidence", row["feature"], ", ".join(words)))
    vectors = embedder.embed([text for *_, text in texts], on_progress)
    return pa.table(
        {
            "dictionary": [dictionary] * len(texts),
            "feature": [feature for _, feature, _ in texts],
            "source": [source for source, *_ in texts],
            "model": [embedder.identity] * len(texts),
            "vector": [row.astype("<f2").tobytes() for row in vectors],
        },
        schema=EMBEDDINGS,
    )


def embed_run(run: "Run") -> bool:
    """Labels and tokens of the run's store -> evidence table `embeddings`, where there is a model for them.

    Returns whether there is. Raises EmbedderError where the configuration names another model than the default, and it
    cannot be had.
    """
    config = run.config.embedder
    if config.model == "none":
        return False
    try:
        embedder = Embedder(config)
    except EmbedderError as error:
        if config.model != EMBEDDED_EMBEDDER:
            raise
        note(f"without search by meaning: {error}")
        return False
    with run.store() as store, progress("embed", None, "texts") as advance:
        run.evidence.write("embeddings", embed_features(store, run.spec.name, embedder, advance.to))
    return True


def search_meaning(
    run: "Run | None",
    store: FeatureStore,
    text: str,
    *,
    limit: int = 10,
    where: str | None = None,
    dictionary: str | None = None,
) -> list[SearchHit]:
    """Features whose label or evidence is nearest in meaning to `text`, by cosine; a store without a run is asked with
    the default embedder.

    Without embeddings in the store, or without the model that made them, words are searched, and a line says so.
    Raises StoreError for an empty text.
    """
    if not text.strip():
        raise StoreError("there is nothing to search for: give a text")
    config = run.config.embedder if run is not None else EmbedderConfig()
    try:
        embedder = Embedder(config) if config.model != "none" else None
        reason = "embedder.model is none" if embedder is None else ""
    except EmbedderError as error:
        embedder, reason = None, str(error)
    if embedder is not None:
        made_by = store.embedding_model(dictionary)
        if made_by == embedder.identity:
            vector = np.asarray(embedder.embed([text])[0])
            return store.search_vector(vector, limit=limit, where=where, dictionary=dictionary)
        reason = "the store has no embeddings"
        if made_by is not None:
            reason = f"the store's embeddings are of {made_by}, not of {embedder.identity}"
        if run is not None:
            reason += f": `saeql store {run.path}` makes them"
    note(f"searched by words instead: {reason}")
    return store.search(text, limit=limit, where=where, dictionary=dictionary)
