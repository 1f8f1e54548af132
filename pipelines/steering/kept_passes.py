"""Passes of a study of effects kept until it ends, so that one that was stopped or killed goes on behind them.

    RUN/effect.parts/<hash>.npz   what one group of directions did: shifts, kl, ce as in `Effects`

The hash is of all that the numbers are made of: model, place, text, words, directions, strengths, the code.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..atomic import remove_folder, write_whole
from ..output import note
from ..output_effects import Effects, WritePlace, direction_effects
from ..progress import OnProgress

EFFECT_WORK = "effect.parts"
#: Directions of a file: what is measured again at most. Each group also runs the model once as it is.
GROUP = 64


class KeptPasses:
    """Effects of directions, read from `folder` where it has them. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None):
        self.folder, self._is_told = folder, False

    def effects(
        self,
        place: WritePlace,
        directions: torch.Tensor,
        windows: np.ndarray,
        token_sets: Sequence[Sequence[int]],
        *,
        strength: float | Sequence[float],
        batch_windows: int = 4,
        on_progress: OnProgress | None = None,
    ) -> Effects:
        """`direction_effects`, a group of directions at a time."""
        n = len(directions)
        strengths = np.broadcast_to(np.asarray(strength, np.float64), (n,))
        text = _key_of(place, windows, token_sets)
        batches = -(-len(windows) // batch_windows)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start in range(0, n, GROUP):
            rows, own = directions[start : start + GROUP], strengths[start : start + GROUP]

            def told(done: int, _: int, start: int = start) -> None:
                if on_progress is not None:
                    on_progress(start * batches + done, n * batches)

            key = hashlib.sha256(rows.contiguous().numpy().tobytes() + own.tobytes() + text).hexdigest()[:32]
            if (kept := self._read(key)) is None:
                made = direction_effects(
                    place, rows, windows, token_sets, strength=own.tolist(), batch_windows=batch_windows,
                    on_progress=told,
                )  # fmt: skip
                kept = (made.shifts, made.kl, made.ce)
                self._write(key, kept)
            found.append(kept)
        shifts, kl, ce = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Effects(shifts, kl, ce, np.zeros((n, 0)), np.zeros((n, 0)))

    def _read(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        file = None if self.folder is None else self.folder / f"{key}.npz"
        if file is None or not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as data:
                found = data["shifts"], data["kl"], data["ce"]
        except (OSError, ValueError, LookupError, zipfile.BadZipFile):  # not what was written: measured again
            file.unlink()
            return None
        if not self._is_told:
            note(f"effect: going on behind what {self.folder} holds")
            self._is_told = True
        return found

    def _write(self, key: str, found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        sink = io.BytesIO()
        np.savez(sink, shifts=found[0], kl=found[1], ce=found[2])
        write_whole(self.folder / f"{key}.npz", sink.getvalue())

    def remove(self) -> None:
        """The study has ended."""
        if self.folder is not None:
            remove_folder(self.folder)


def _key_of(place: WritePlace, windows: np.ndarray, token_sets: Sequence[Sequence[int]]) -> bytes:
    """Everything but directions and strengths that effects are made of."""
    lm = place.lm
    about = [
        lm.identity.model_sha256,
        str(next(lm.model.parameters()).dtype),
        dict(place.writes),
        {name: float(norm) for name, norm in place.median_norms.items()},
        [[int(i) for i in s] for s in token_sets],
        list(windows.shape),
    ]
    digest = hashlib.sha256(json.dumps(about).encode() + np.ascontiguousarray(windows).tobytes())
    for file in ("output_effects.py", "splice.py"):
        digest.update((Path(__file__).parents[1] / file).read_bytes())
    return digest.digest()
