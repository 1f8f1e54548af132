"""`saeql vector`: a steering vector from files of texts, and what is in it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..output import print_records
from .decompose import Decomposition, decompose
from .reading import ReadingError, direction, read_rows, unembedding_direction
from .vectors import SteeringVector

if TYPE_CHECKING:
    from ..run import Run


def make_vector(
    run: "Run",
    method: str,
    *,
    positive: Path | None = None,
    negative: Path | None = None,
    tokens: tuple[str, ...] = (),
    hook_point: str = "",
    rows: str = "last",
    name: str = "",
) -> SteeringVector:
    """A vector at one hook point (unset: the last that the dictionary writes).

    Raises ReadingError where texts or tokens are missing or say nothing, HookPointError for an unknown hook point.
    """
    lm, place = run.language_model, hook_point or run.spec.writes[-1]
    details: dict[str, Any] = {"method": method, "hook_point": place}
    norms = {place: run.harvest_info.median_norms[place]} if place in run.harvest_info.median_norms else {}
    if method == "unembedding":
        if not tokens:
            raise ReadingError("unembedding is a direction of tokens: give --token")
        found = unembedding_direction(lm, tokens)
        details |= {"tokens": list(tokens)}
    else:
        texts = _texts(positive, negative)
        read = [read_rows(lm, place, own, rows) for own in texts]
        found = direction(method, *read)
        norms = norms or {place: float(torch.cat(read).norm(dim=1).median())}
        details |= {"rows": rows, "positive": len(texts[0]), "negative": len(texts[1])}
    return SteeringVector(
        name, {place: found}, norms, lm.identity.model_name, lm.identity.model_sha256, method, details
    )


def taken_apart(run: "Run", vector: SteeringVector, max_features: int) -> Decomposition | None:
    """The vector as features of the run's dictionary; None where it lies at another hook point, or for 0 features."""
    places = [place for place in run.spec.writes if place in vector.rows]
    if not places or max_features < 1:
        return None
    dictionary, start = run.dictionary(), 0
    for place, width in dictionary.metadata["saeql"]["writes"].items():
        if place == places[0]:
            rows = dictionary.W_dec.detach()[:, start : start + width].float()
            return decompose(vector.rows[place], rows, max_features=max_features)
        start += width
    return None


def print_parts(run: "Run", vector: SteeringVector, found: Decomposition | None, *, as_json: bool) -> None:
    """Print what a vector is and which features are in it."""
    parts: list[dict[str, Any]] = []
    if found is not None:
        with run.store() as store:
            cards = {p.feature: store.feature(p.feature) for p in found.parts}
        parts = [
            {"feature": p.feature, "coefficient": p.coefficient, "cosine": p.cosine, "label": cards[p.feature]["label"]}
            for p in found.parts
        ]
    left = None if found is None or not found.residual_share else found.residual_share[-1]
    if as_json:
        norms = {place: float(row.norm()) for place, row in vector.rows.items()}
        about = {"name": vector.name, "made_by": vector.made_by, "norms": norms, **vector.details}
        print(json.dumps({**about, "parts": parts, "left_over": left}, ensure_ascii=False))
        return
    for place, row in vector.rows.items():
        median = vector.median_norms.get(place)
        share = f", {float(row.norm()) / median:.2f} of the median activation norm" if median else ""
        print(f"{vector.name} at {place}: norm {float(row.norm()):.3g}{share}")
    if found is None:
        return
    columns = ["feature", "coefficient", "cosine", "label"]
    print_records(columns, [[part[c] for c in columns] for part in parts], "table")
    print(
        f"{left:.0%} of its squared norm is in no feature above" if left is not None else "no feature points along it"
    )


def _texts(positive: Path | None, negative: Path | None) -> tuple[list[str], list[str]]:
    if positive is None:
        raise ReadingError("give --positive texts, one a line (and --negative ones, or .jsonl pairs)")
    if negative is None:
        return _pairs(positive)
    return _lines(positive), _lines(negative)


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ReadingError(f"{path} cannot be read: {error}") from None
    if not any(found):
        raise ReadingError(f"{path} has no text: give one a line")
    return [line for line in found if line]


def _pairs(path: Path) -> tuple[list[str], list[str]]:
    positive, negative = [], []
    for number, line in enumerate(_lines(path), 1):
        try:
            pair = json.loads(line)
            positive.append(str(pair["positive"]))
            negative.append(str(pair["negative"]))
        except (ValueError, TypeError, KeyError):
            raise ReadingError(
                f'{path} line {number} is no {{"positive": ..., "negative": ...}}: give pairs, or --negative too'
            ) from None
    return positive, negative
