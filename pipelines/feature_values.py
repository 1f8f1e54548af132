"""Activations of features on token sequences that are in no shard: what an explainer asks when it changes a text."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from saeql.sae.model import SparseAutoencoder

from .forward import ForwardPass
from .models import LanguageModel

if TYPE_CHECKING:
    from .run import Run

#: Questions answered by one comparison with all latents of their row.
QUESTIONS_AT_ONCE = 65_536


class FeatureValues:
    """Inside the block, reads one feature at one position of each of many short sequences.

    Equal sequences are run once; sequences of one length are run together, so that none is padded.
    `num_tokens` counts what was put through the model.
    """

    def __init__(
        self, language_model: LanguageModel, dictionary: SparseAutoencoder, reads: Sequence[str], batch_tokens: int
    ):
        self.lm, self.reads, self.batch_tokens = language_model, list(reads), batch_tokens
        self.dictionary = dictionary.to(language_model.device)
        self.num_tokens = 0
        self._stack = ExitStack()

    @classmethod
    def of(cls, run: "Run", batch_tokens: int) -> Self:
        """Of a run's dictionary and model, which are loaded here. Raises ModelMismatch where they do not fit."""
        lm = run.reading_model()
        run.harvest_info.identity.require(lm.identity)
        return cls(lm, run.dictionary(), run.spec.reads, batch_tokens)

    def __enter__(self) -> Self:
        self._pass = self._stack.enter_context(ForwardPass(self.lm, self.reads))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(
        self, sequences: Sequence[np.ndarray], features: np.ndarray, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """[N] float32: the activation of `features[i]` at `positions[i]` (None: the last) of token ids `sequences[i]`.

        Raises ModelError where memory does not suffice for one sequence.
        """
        out = np.zeros(len(sequences), np.float32)
        keys = [np.ascontiguousarray(s, np.int32).tobytes() for s in sequences]
        by_length: dict[int, dict[bytes, list[int]]] = {}
        for n, key in enumerate(keys):
            by_length.setdefault(len(key) // 4, {}).setdefault(key, []).append(n)
        if positions is None:
            positions = np.array([len(s) - 1 for s in sequences], np.int64)
        for length, asked in sorted(by_length.items()):
            distinct, at_once = list(asked), max(1, self.batch_tokens // length)
            for start in range(0, len(distinct), at_once):
                part = distinct[start : start + at_once]
                ids = np.frombuffer(b"".join(part), np.int32).reshape(len(part), length).copy()
                questions = np.array([n for key in part for n in asked[key]])
                place = np.repeat(np.arange(len(part)), [len(asked[key]) for key in part])
                out[questions] = self._answer(ids, place, positions[questions], features[questions])
        return out

    @torch.no_grad()
    def _answer(self, ids: np.ndarray, sequence: np.ndarray, position: np.ndarray, feature: np.ndarray) -> np.ndarray:
        """One answer a question (sequence, position, feature), all [n], about ids [b, T]."""
        rows, which = np.unique(sequence * ids.shape[1] + position, return_inverse=True)
        found = self._pass.run(ids)
        self.num_tokens += ids.size
        acts = [torch.from_numpy(_flat(found[name].values)[rows]) for name in self.reads]
        x = torch.cat([a.view(torch.bfloat16).float() if a.dtype == torch.uint16 else a for a in acts], dim=-1)
        latents = self.dictionary.encode(x.to(self.lm.device))
        values, indices = latents.values.float().cpu(), latents.indices.cpu()
        answers = []
        for start in range(0, len(which), QUESTIONS_AT_ONCE):
            part = torch.from_numpy(which[start : start + QUESTIONS_AT_ONCE])
            asked = torch.from_numpy(feature[start : start + QUESTIONS_AT_ONCE].astype(np.int64))
            answers.append((values[part] * (indices[part] == asked[:, None])).sum(1).numpy())
        return np.concatenate(answers)


def _flat(values: np.ndarray) -> np.ndarray:
    """[B, T, d] -> [B * T, d]."""
    return values.reshape(-1, values.shape[-1])
