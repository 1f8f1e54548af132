"""Does a feature rest on its row's own token? Its activation with that token replaced, and with another one replaced.

Delta = 1 - z(replaced) / z: 1 where the activation is gone, 0 where it does not care.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .feature_values import FeatureValues
from .progress import OnProgress
from .split_rows import SplitRows
from .token_identity import TokensConfig


@dataclass(frozen=True)
class MaskedEffect:
    """Of one feature on its strongest rows, n of them: means over the replacements."""

    own: np.ndarray  # [n] Delta with the row's own token replaced
    other: np.ndarray  # [n] Delta with one random other token of the context replaced; NaN where there is none


def masked_effects(
    values: FeatureValues,
    split: SplitRows,
    token_ids: np.ndarray,
    features: Sequence[int],
    config: TokensConfig,
    on_progress: OnProgress | None = None,
) -> dict[int, MaskedEffect]:
    """Delta of the features that are active on rows of `split`; `token_ids` [W, T] are its windows.

    The context is the window up to the row, all of the window for an encoder.
    """
    rng, width = np.random.default_rng(config.seed), token_ids.shape[1]
    sequences: list[np.ndarray] = []
    asked: list[tuple[int, int, str]] = []  # feature, position, what is replaced
    rows_of, values_of = split.active.by_feature(), split.active.values_by_feature()
    for feature in features:
        strongest = rows_of[feature][np.argsort(-values_of[feature], kind="stable")[: config.rows]]
        for row in strongest.tolist():
            window, position = divmod(row, width)
            ids = token_ids[window][token_ids[window] >= 0]
            ids = ids[: position + 1] if values.lm.is_causal else ids
            others = [i for i in range(1, len(ids)) if i != position]
            places = [("own", position)] * config.replacements
            if others:
                places += [("other", int(rng.choice(others))) for _ in range(config.replacements)]
            sequences.append(ids)
            asked.append((feature, position, "none"))
            for what, place in places:
                sequences.append(_replaced(ids, place, token_ids, rng))
                asked.append((feature, position, what))
    z = _read(values, sequences, asked, on_progress)
    return _by_feature(z, asked, features)


def _replaced(ids: np.ndarray, place: int, token_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy with another token at `place`, drawn as often as the text has it."""
    new = ids.copy()
    for _ in range(100):  # a text of one token has no other
        drawn = int(token_ids[rng.integers(len(token_ids)), rng.integers(1, token_ids.shape[1])])
        if drawn >= 0 and drawn != ids[place]:
            new[place] = drawn
            break
    return new


def _read(
    values: FeatureValues,
    sequences: list[np.ndarray],
    asked: list[tuple[int, int, str]],
    on_progress: OnProgress | None,
) -> np.ndarray:
    features = np.array([f for f, _, _ in asked], np.int64)
    positions = np.array([p for _, p, _ in asked], np.int64)
    out, order = np.zeros(len(asked), np.float32), np.argsort([len(s) for s in sequences], kind="stable")
    done = 0
    for part in np.array_split(order, max(1, len(order) // 512)):
        out[part] = values.read([sequences[i] for i in part], features[part], positions[part])
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(asked))
    return out


def _by_feature(z: np.ndarray, asked: list[tuple[int, int, str]], features: Sequence[int]) -> dict[int, MaskedEffect]:
    """Rows begin at their unchanged sequence; those on which the feature is not active again are left out."""
    own: dict[int, list[float]] = {f: [] for f in features}
    other: dict[int, list[float]] = {f: [] for f in features}
    starts = [i for i, (_, _, what) in enumerate(asked) if what == "none"]
    for start, stop in zip(starts, [*starts[1:], len(asked)], strict=True):
        if z[start] <= 0:
            continue
        feature = asked[start][0]
        for what, into in (("own", own), ("other", other)):
            found = [1 - z[i] / z[start] for i in range(start + 1, stop) if asked[i][2] == what]
            into[feature].append(float(np.mean(found)) if found else float("nan"))
    return {f: MaskedEffect(np.array(own[f]), np.array(other[f])) for f in features if own[f]}
