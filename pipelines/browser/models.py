"""The run's model, dictionary and sentence encoder, loaded when something first asks them; one job at a time.

torch is imported here alone, and only then: a server that nobody asks to compute stays small.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Found

from .questions import whole_of
from .settings import Refused, Settings

if TYPE_CHECKING:
    from ..embedder import Embedder
    from ..run import Run
    from ..search import PromptReading
    from ..steering.steerer import Steerer

#: Features that a search by the model lists at most.
NUM_FOUND = 1000


class Models:
    """What computes. Each of its answers is given inside `turn`, so that hooks of two jobs never meet."""

    def __init__(self, settings: Settings):
        """Loads nothing."""
        self.settings = settings
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._jobs = 0
        self._run: Run | None = None
        self._steerer: tuple[FeatureStore, Steerer] | None = None
        self._largest: tuple[FeatureStore, Any] | None = None
        self._embedder: Embedder | None = None

    @contextmanager
    def turn(self, cancelled: threading.Event | None = None) -> Iterator[None]:
        """The model for the block alone; waits for the job before.

        Raises Refused: 429 where enough jobs wait already, 409 where `cancelled` came first.
        """
        with self._count:
            full = self.free_place()
            if full is not None:
                raise full
            self._jobs += 1
        try:
            while not self._turn.acquire(timeout=0.1):
                if cancelled is not None and cancelled.is_set():
                    raise Refused(409, "cancelled while it waited for the model")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            with self._count:
                self._jobs -= 1

    def free_place(self) -> Refused | None:
        """What `turn` would refuse a job with now."""
        most = self.settings.limits.jobs
        return None if self._jobs < most else Refused(429, f"{most} jobs wait for the model already: try again later")

    def forget(self) -> None:
        """Let go of all that was loaded."""
        self._run = self._steerer = self._largest = self._embedder = None

    @property
    def is_busy(self) -> bool:
        """Whether a job is at work."""
        return self._turn.locked()

    def run(self) -> "Run":
        """The run. Raises Refused (404) where only a store is served."""
        if self.settings.run is None:
            raise Refused(404, "this is a store alone: a model is asked where a run directory is served")
        if self._run is None:
            from ..run import Run

            self._run = Run.open(self.settings.run)
        return self._run

    def dictionary(self) -> str:
        """Name of the dictionary that the model belongs to. Raises Refused as `run` does."""
        return self.run().spec.name

    def steerer(self, store: FeatureStore) -> "Steerer":
        """Model and dictionary. Raises ModelMismatch, ModelError, DictionaryError."""
        if self._steerer is None or self._steerer[0] is not store:
            self._steerer = (store, self.run().steerer(store=store))
        return self._steerer[1]

    def read(self, store: FeatureStore, text: str) -> "PromptReading":
        """What fires on a text. Raises Refused (413) for one of too many tokens, ConfigError for one of none."""
        from ..search import largest_activations, read_prompt

        steerer, spec = self.steerer(store), self.run().spec
        self.check_prompt(steerer, text)
        if self._largest is None or self._largest[0] is not store:
            self._largest = (store, largest_activations(store, spec.name, steerer.dictionary.d_sae))
        return read_prompt(steerer.lm, steerer.dictionary, spec.reads, self._largest[1], text)

    def check_prompt(self, steerer: "Steerer", text: str) -> None:
        """Raises Refused (413) for a prompt of too many tokens."""
        tokens = len(steerer.lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        most = self.settings.limits.prompt_tokens
        if tokens > most:
            raise Refused(413, f"a prompt has at most {most} tokens, this one has {tokens}")

    def found(self, store: FeatureStore, way: str, text: str, dictionary: str | None) -> Found:
        """Features by meaning, or by the direction of another one, the `NUM_FOUND` nearest.

        Raises Refused, StoreError, ConfigError.
        """
        if way == "like":
            from ..search import scored_like

            feature = whole_of("the feature that others are like", text)
            return Found.of(scored_like(self.run().dictionary(), self.dictionary(), feature, NUM_FOUND))
        embedder = self._sentence_encoder()
        made_by = store.embedding_model(dictionary)
        if made_by != embedder.identity:
            raise Refused(404, f"no search by meaning: the store's embeddings are of {made_by or 'nothing'}")
        vector = embedder.embed([text])[0]
        return Found.of(store.nearest_in_meaning(vector, NUM_FOUND, dictionary=dictionary)[:NUM_FOUND])

    def _sentence_encoder(self) -> "Embedder":
        if self._embedder is None:
            from ..embedder import Embedder, EmbedderConfig, EmbedderError

            config = self.run().config.embedder if self.settings.run is not None else EmbedderConfig()
            try:
                self._embedder = Embedder(config)
            except EmbedderError as error:
                raise Refused(404, f"no search by meaning: {error}") from None
        return self._embedder
