"""Compare dictionaries: between seeds, widths, layers of one width, or checkpoints of a model in the order of training.

Every two of them are matched (`matching.py`). From the pairs come, for every feature, the share of the other
dictionaries that have it (`stability`) and the first in the order given that has it (`first_seen`); and, where one
dictionary is wider, which of its features lie nearest to one and the same of the narrower (splitting).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from saeql.sae.config import ConfigError
from saeql.sae.files import SPARSITY_FILE, DictionaryError

from .atomic import write_whole
from .dictionaries import dictionary_homes, load_any
from .matching import NULL_KINDS, LatentRows, Matching, NullKind, match, null_cosines
from .run import Run

#: Decoder cosine from which a pair counts as one feature; the literature's value.
SHARED_COSINE = 0.7
#: Decoder cosine from which a feature of a wider dictionary counts as part of the nearest one of a narrower.
SPLIT_COSINE = 0.5


@dataclass(frozen=True)
class Compared:
    """One of the dictionaries that are compared."""

    name: str  # unique in the comparison
    folder: Path
    rows: LatentRows
    density: NDArray[np.float32] | None  # share of rows on which a latent fires, where it was indexed
    model: str
    hook_point: str
    seed: int | None
    run: Path | None = None  # of which it is the own dictionary, where it was named by that run

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.rows)


@dataclass(frozen=True)
class Pair:
    """Two dictionaries, matched; `first` and `second` are places in the order given."""

    first: int
    second: int
    matching: Matching
    chance: dict[NullKind, NDArray[np.float32]]  # cosines with the nearest of as many random rows
    summary: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Everything that was found; `features` has one row a feature of every dictionary, `matches` one a pair."""

    dictionaries: list[Compared]
    pairs: list[Pair]
    features: pa.Table
    matches: pa.Table
    splitting: pa.Table
    settings: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """What `comparison.json` holds."""
        return {
            "settings": self.settings,
            "dictionaries": [
                {"dictionary": d.name, "folder": str(d.folder), "d_sae": d.d_sae, "model": d.model,
                 "hook_point": d.hook_point, "seed": d.seed}
                for d in self.dictionaries
            ],
            "pairs": [pair.summary for pair in self.pairs],
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write comparison.json and the tables features, matches and splitting as Parquet."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("features", "matches", "splitting"):
            buffer = pa.BufferOutputStream()
            pq.write_table(getattr(self, name), buffer, compression="zstd")
            write_whole(folder / f"{name}.parquet", buffer.getvalue().to_pybytes())
        write_whole(folder / "comparison.json", json.dumps(self.summary(), indent=2) + "\n")


def find_compared(sources: Sequence[str], device: torch.device | None = None) -> list[Compared]:
    """Dictionaries by run directory, RUN:NAME (a dictionary of a run or of its sweep), or folder, of any known format.

    Raises DictionaryError where there is none, ConfigError where fewer than two are named or their widths differ.
    """
    if len(sources) < 2:
        raise ConfigError("name at least two dictionaries to compare")
    places = [locate(source) for source in sources]
    folders = [place.folder.resolve() for place in places]
    twice = next((s for n, s in enumerate(sources) if folders[n] in folders[:n]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice")
    found = [_load(place, name, device) for place, name in zip(places, _names(places), strict=True)]
    for other in found[1:]:
        for what in ("decoder", "encoder"):
            widths = [getattr(c.rows, what).shape[1] for c in (found[0], other)]
            if widths[0] != widths[1]:
                raise ConfigError(
                    f"{found[0].name} and {other.name} lie in different spaces: "
                    f"their {what} rows have {widths[0]} and {widths[1]} coordinates"
                )
    return found


def compare(
    dictionaries: Sequence[Compared],
    *,
    shared_cosine: float = SHARED_COSINE,
    split_cosine: float = SPLIT_COSINE,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Match every two dictionaries. Raises ConfigError for a threshold outside (0, 1]."""
    for name, value in (("--shared-cosine", shared_cosine), ("--split-cosine", split_cosine)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} must be above 0 and at most 1, got {value:g}")
    dictionaries = list(dictionaries)
    places = list(combinations(range(len(dictionaries)), 2))
    pairs = []
    for done, (first, second) in enumerate(places, 1):
        a, b = dictionaries[first], dictionaries[second]
        matching = match(a.rows, b.rows)
        chance: dict[NullKind, NDArray[np.float32]] = {
            kind: null_cosines(a.rows.decoder, b.rows.decoder, kind) for kind in NULL_KINDS
        }
        summary = _summarise(a, b, matching, chance, shared_cosine, split_cosine)
        pairs.append(Pair(first, second, matching, chance, summary))
        on_pair(done, len(places))
    return Comparison(
        dictionaries,
        pairs,
        _features(dictionaries, pairs, shared_cosine),
        pa.concat_tables(_matches(dictionaries, pair, shared_cosine) for pair in pairs),
        pa.concat_tables(_splitting(dictionaries, pair, split_cosine) for pair in pairs),
        {"shared_cosine": shared_cosine, "split_cosine": split_cosine},
    )


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a dictionary lies."""

    folder: Path
    home: Path  # the run directory, or the folder itself
    dictionary: str = ""  # name within the run, where it was given
    run: Path | None = None  # the run directory where it is the run's own dictionary


def locate(source: str) -> Place:
    """The place of a dictionary as `find_compared` takes it. Raises DictionaryError where there is none."""
    path = Path(source).expanduser().absolute()
    if (path / "config.toml").exists():
        return Place(Run.open(path).dictionary_path, path, run=path)
    if path.exists():
        return Place(path, path)
    place, colon, name = source.rpartition(":")
    run = Path(place).expanduser().absolute()
    if colon and (run / "config.toml").exists():
        for home in dictionary_homes(run):
            if (home / name).exists():
                own = home / name == Run.open(run).dictionary_path
                return Place(home / name, run, name, run if own else None)
    raise DictionaryError(f"no dictionary {source!r}: name a run directory, RUN:NAME, or a dictionary's folder")


def _names(places: Sequence[Place]) -> list[str]:
    """The shortest ends of paths that tell all places apart."""
    length, names = 0, [""] * len(places)
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(p.home.parts[-length:]) + (f":{p.dictionary}" if p.dictionary else "") for p in places]
    return names


def _load(place: Place, name: str, device: torch.device | None) -> Compared:
    folder = place.folder
    dictionary = load_any(folder)
    metadata = dictionary.metadata
    ours = metadata.get("saeql", {})
    rows = LatentRows.of(dictionary.W_dec.to(device), dictionary.W_enc.to(device))
    density = None
    if (folder / SPARSITY_FILE).exists():
        # SAELens's file and ours hold log10(density + 1e-10)
        density = (10 ** load_file(folder / SPARSITY_FILE)["sparsity"].double() - 1e-10).clamp(min=0).float().numpy()
    return Compared(
        name=name,
        folder=folder,
        rows=rows,
        density=density,
        model=str(ours.get("identity", {}).get("model_name") or metadata.get("model_name") or ""),
        hook_point=str(ours.get("identity", {}).get("hook_point") or metadata.get("hook_name") or ""),
        seed=ours.get("seed"),
        run=place.run,
    )


# --- what pairs say ------------------------------------------------------------------------------------------------


def _summarise(
    a: Compared,
    b: Compared,
    matching: Matching,
    chance: dict[NullKind, NDArray[np.float32]],
    shared_cosine: float,
    split_cosine: float,
) -> dict[str, Any]:
    shared = matching.shared(shared_cosine)
    smaller = min(a.d_sae, b.d_sae)
    summary: dict[str, Any] = {
        "first": a.name,
        "second": b.name,
        "method": matching.method,
        "num_matched": int((matching.partner >= 0).sum()),
        "num_shared": int(shared.sum()),
        "shared_share": float(shared.sum() / smaller),  # of the narrower dictionary
        "shared_interval": _wilson(int(shared.sum()), smaller),
        "encoder_agrees_share": float(matching.encoder_agrees.sum() / smaller),
        "mean_max_cosine": float(matching.nearest_cosine.mean()),
        "nulls": {},
    }
    if a.density is not None:
        alive = a.density > 0
        summary["shared_share_of_alive"] = float(shared[alive].mean()) if alive.any() else None
    for kind, cosines in chance.items():
        summary["nulls"][kind] = {
            "mean_max_cosine": float(cosines.mean()),
            "p99_max_cosine": float(np.quantile(cosines, 0.99)),
            "share_above_shared_cosine": float((cosines >= shared_cosine).mean()),
            "share_of_latents_above_its_p99": float((matching.nearest_cosine > np.quantile(cosines, 0.99)).mean()),
        }
    if a.d_sae != b.d_sae:
        parents, cosines, wide = _parents(a, b, matching)
        children = np.bincount(parents[cosines >= split_cosine], minlength=smaller)
        summary["splitting"] = {
            "wider": wide.name,
            "num_split": int((children > 1).sum()),  # features of the narrower with two or more in the wider
            "num_kept": int((children == 1).sum()),
            "num_gone": int((children == 0).sum()),
            "num_new": int((cosines < split_cosine).sum()),  # features of the wider that are near none
        }
    return summary


def _parents(a: Compared, b: Compared, matching: Matching) -> tuple[NDArray[np.int64], NDArray[np.float32], Compared]:
    """For every latent of the wider of two dictionaries its nearest in the narrower, and the cosine."""
    if a.d_sae > b.d_sae:
        return matching.nearest, matching.nearest_cosine, a
    return matching.nearest_of_other, matching.nearest_of_other_cosine, b


def _wilson(count: int, total: int) -> list[float]:
    """95 % interval of a share by Wilson's score; too narrow, for latents of one dictionary are not independent."""
    z, share = 1.96, count / total
    centre, width = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return [max(0.0, (centre - width) / (1 + z * z / total)), min(1.0, (centre + width) / (1 + z * z / total))]


def _features(dictionaries: list[Compared], pairs: list[Pair], shared_cosine: float) -> pa.Table:
    """Every feature of every dictionary with `stability`, `mean_cosine` and `first_seen`."""
    has = {}  # (mine, other) -> which of my features the other one has, and the cosine
    for pair in pairs:
        m, shared = pair.matching, pair.matching.shared(shared_cosine)
        has[pair.first, pair.second] = shared, m.decoder_cosine
        mine = np.zeros(dictionaries[pair.second].d_sae, bool)
        cosine = np.zeros(len(mine), np.float32)
        found = m.partner >= 0
        mine[m.partner[shared]] = True
        cosine[m.partner[found]] = m.decoder_cosine[found]
        has[pair.second, pair.first] = mine, cosine
    tables = []
    for n, one in enumerate(dictionaries):
        others = [o for o in range(len(dictionaries)) if o != n]
        shared = np.stack([has[n, o][0] for o in others])  # [others, d_sae]
        first = np.full(one.d_sae, n)
        for other in reversed(others):
            if other < n:
                first = np.where(has[n, other][0], other, first)
        names = np.array([d.name for d in dictionaries], dtype=object)
        density = pa.nulls(one.d_sae, pa.float32()) if one.density is None else pa.array(one.density, pa.float32())
        tables.append(
            pa.table(
                {
                    "dictionary": pa.array([one.name] * one.d_sae, pa.string()),
                    "feature": np.arange(one.d_sae, dtype=np.int32),
                    "density": density,
                    "num_compared": np.full(one.d_sae, len(others), np.int16),
                    "num_shared": shared.sum(0).astype(np.int16),
                    "stability": shared.mean(0).astype(np.float32),
                    "mean_cosine": np.stack([has[n, o][1] for o in others]).mean(0),
                    "first_seen": pa.array(names[first], pa.string()),
                }
            )
        )
    return pa.concat_tables(tables)


def _matches(dictionaries: list[Compared], pair: Pair, shared_cosine: float) -> pa.Table:
    m = pair.matching
    found = np.flatnonzero(m.partner >= 0)
    names = [pa.array([dictionaries[n].name] * len(found), pa.string()) for n in (pair.first, pair.second)]
    return pa.table(
        {
            "dictionary": names[0],
            "feature": found.astype(np.int32),
            "other_dictionary": names[1],
            "other_feature": m.partner[found].astype(np.int32),
            "decoder_cosine": m.decoder_cosine[found],
            "encoder_cosine": m.encoder_cosine[found],
            "encoder_agrees": m.encoder_agrees[found],
            "shared": m.shared(shared_cosine)[found],
        }
    )


def _splitting(dictionaries: list[Compared], pair: Pair, split_cosine: float) -> pa.Table:
    """Features of the wider dictionary beside their parent in the narrower; no row where both are of one width."""
    a, b = dictionaries[pair.first], dictionaries[pair.second]
    parents, cosines, wide = _parents(a, b, pair.matching)
    near = np.flatnonzero(cosines >= split_cosine) if a.d_sae != b.d_sae else np.empty(0, np.int64)
    near = near[np.lexsort((-cosines[near], parents[near]))]
    siblings = np.bincount(parents[near], minlength=1)
    return pa.table(
        {
            "dictionary": pa.array([(b if wide is a else a).name] * len(near), pa.string()),
            "feature": parents[near].astype(np.int32),
            "wider_dictionary": pa.array([wide.name] * len(near), pa.string()),
            "child": near.astype(np.int32),
            "cosine": cosines[near],
            "num_children": siblings[parents[near]].astype(np.int32) if len(near) else np.empty(0, np.int32),
        }
    )
