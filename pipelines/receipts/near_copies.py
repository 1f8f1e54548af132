"""Windows of a held-out split that nearly repeat a train window: 8-gram Jaccard of at least 1/2 (Broder 1997), exactly.

A held-out window with n distinct 8-grams shares at least n / 2 of them with a window that it nearly repeats, so at
least one of any n - ceil(n / 2) + 1 is among the shared: only train windows that hold one of those, the rarest, are
compared. Train is read in blocks, so memory does not grow with it.
"""

import numpy as np

NGRAM = 8
JACCARD = 0.5
_WINDOWS_AT_ONCE = 4096
#: Train windows of one block that a held-out window is compared with, those that share most of its rare 8-grams first.
_COMPARED_AT_ONCE = 64


def ngram_hashes(tokens: np.ndarray) -> np.ndarray:
    """[W, T] token codes (-1 behind the end) -> [W, T - 7] uint64 hashes of 8-grams, 0 where there is none."""
    width = tokens.shape[1] - NGRAM + 1
    if width < 1:
        return np.zeros((len(tokens), 0), np.uint64)
    out = np.zeros((len(tokens), width), np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(NGRAM):
            part = (tokens[:, offset : offset + width] + 1).astype(np.uint64)
            out = (out ^ part) * np.uint64(0x9E3779B97F4A7C15)
            out ^= out >> np.uint64(29)
    out[out == 0] = 1
    out[tokens[:, NGRAM - 1 :] < 0] = 0
    return out


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """The same rows sorted, repeats and missing ones as 0 in front."""
    ordered = np.sort(hashes, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = 0
    return np.sort(ordered, axis=1)


def near_copies(held_out: np.ndarray, train: np.ndarray) -> np.ndarray:
    """[H] bool: windows of `held_out` [H, T] token codes that nearly repeat a window of `train` [W, T].

    Windows shorter than 8 tokens repeat nothing. Codes are of one vocabulary, -1 behind the end of a window.
    """
    copies = np.zeros(len(held_out), bool)
    own = _distinct(ngram_hashes(held_out))
    rare = _rarest(own)
    present = rare > 0
    order = np.argsort(rare[present], kind="stable")
    keys, owner = rare[present][order], np.nonzero(present)[0][order]
    for start in range(0, len(train), _WINDOWS_AT_ONCE):
        if len(keys) == 0:
            break
        other = _distinct(ngram_hashes(train[start : start + _WINDOWS_AT_ONCE]))
        pairs = _candidates(keys, owner, other, copies)
        for at in range(0, len(pairs), _WINDOWS_AT_ONCE):
            a, b = pairs[at : at + _WINDOWS_AT_ONCE].T
            copies[a[_jaccard(own[a], other[b]) >= JACCARD]] = True
    return copies


def _rarest(own: np.ndarray) -> np.ndarray:
    """Of every row those 8-grams of which a near copy must have one: the rarest within the split; 0 elsewhere."""
    _, inverse, counts = np.unique(own, return_inverse=True, return_counts=True)
    often = counts[inverse.reshape(own.shape)]
    often = np.where(own > 0, often, np.iinfo(np.int64).max)
    size = (own > 0).sum(axis=1)
    keep = size - -(-size // 2) + 1
    place = np.argsort(np.argsort(often, axis=1, kind="stable"), axis=1, kind="stable")
    return np.where((place < keep[:, None]) & (own > 0), own, 0)


def _candidates(keys: np.ndarray, owner: np.ndarray, other: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[n, 2] (held-out window, window of the block) that share a rare 8-gram, at most a few of each held-out window."""
    low, high = np.searchsorted(keys, other, "left"), np.searchsorted(keys, other, "right")
    times = np.where(other > 0, high - low, 0)
    block, column = np.nonzero(times)
    times = times[block, column]
    index = np.repeat(low[block, column], times)
    index += np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
    mine, block = owner[index], np.repeat(block, times)
    new = ~known[mine]
    pairs, shared = np.unique(np.stack([mine[new], block[new]], axis=1), axis=0, return_counts=True)
    order = np.lexsort((-shared, pairs[:, 0]))
    pairs = pairs[order]
    place = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    return pairs[place < _COMPARED_AT_ONCE]


def _jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] Jaccard similarity of rows of distinct hashes, 0 for none."""
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    shared = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] > 0)).sum(axis=1)
    union = (a > 0).sum(axis=1) + (b > 0).sum(axis=1) - shared
    return shared / np.maximum(union, 1)
