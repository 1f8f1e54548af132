"""What caused a prediction, and what a feature feeds, as tables for people, JSON and CSV for programs."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..output import cell, print_records, visible
from .agreement import Agreement
from .causes import Why
from .feeds import Feeds

#: Parts of the whole, in words.
_PARTS = {
    "features": "all features",
    "skip": "linear skip",
    "error": "error: what the dictionary does not explain",
    "everything": "everything but b_dec",
}


def print_why(why: Why, labels: Mapping[int, str], style: str, *, top: int) -> None:
    """Print as "table", "json" (all but pairs beyond `top`) or "csv" (the `top` pairs, the error of every token)."""
    if style == "json":
        print(json.dumps(_record(why, labels, top), ensure_ascii=False))
    elif style == "csv":
        columns = ["part", "feature", "label", "position", "token", "activation", "attribution", "exact"]
        rows: list[list[Any]] = [
            ["feature", p.feature, labels.get(p.feature, ""), p.position, why.tokens[p.position], p.activation,
             p.attribution, p.exact]
            for p in why.pairs[:top]
        ]  # fmt: skip
        rows += [["error", None, "", t.position, t.token, None, t.error, None] for t in why.by_token[1:]]
        print_records(columns, rows, "csv")
    else:
        _print_tables(why, labels)


def _print_tables(why: Why, labels: Mapping[int, str]) -> None:
    print(
        f"{visible(why.target.describe())} after {visible(''.join(why.tokens[1:]))!r}: {why.value:.3f} "
        f"(probability {why.probability:.3f}, rank {why.rank})"
    )
    rows: list[list[Any]] = [
        [str(f.feature), labels.get(f.feature, ""), f"[{visible(why.tokens[f.position])}]", f.num_tokens, f.attribution,
         f.exact]
        for f in why.features
    ]  # fmt: skip
    wholes = {w.part: w for w in why.wholes}
    rows += [["", _PARTS[name], "", None, w.attribution, w.exact] for name, w in wholes.items()]
    print_records(["feature", "label", "mostly at", "tokens", "attribution", "exact"], rows, "table")
    print()
    places: list[list[Any]] = [
        [t.position, f"[{visible(t.token)}]", t.features, t.error,
         "" if t.feature is None else f"{t.feature} {labels.get(t.feature, '')}"]
        for t in why.by_token
    ]  # fmt: skip
    print_records(["position", "token", "features", "error", "strongest feature"], places, "table")
    print()
    print("attribution against ablation of one feature at one token:")
    for found in why.agreements:
        print(f"  {_NAMES[found.sample]:<24} {_in_words(found)}")
    whole = wholes["everything"]
    print(
        f"attributions of features and error add up to {whole.attribution:.3f}; without all of it the target loses "
        f"{whole.exact:.3f}"
    )


_NAMES = {"strongest": "the strongest", "random": "drawn at random", "both": "both"}


def _in_words(found: Agreement) -> str:
    return f"Pearson {cell(found.pearson) or '-'}, Spearman {cell(found.spearman) or '-'} (n = {found.n})"


def _record(why: Why, labels: Mapping[int, str], top: int) -> dict[str, Any]:
    record = asdict(why)
    record["target"]["describe"] = why.target.describe()
    record["num_pairs"] = len(why.pairs)
    record["pairs"] = record["pairs"][:top]
    for row in (*record["features"], *record["pairs"]):
        row["label"] = labels.get(row["feature"], "")
    return record


def print_feeds(found: Feeds, labels: Mapping[int, str], style: str) -> None:
    """Print the later features that one feeds."""
    columns = ["feature", "label", "mostly at", "tokens", "activation", "linear", "exact"]
    if style == "json":
        record = asdict(found)
        for row in record["fed"]:
            row["label"] = labels.get(row["feature"], "")
        print(json.dumps(record, ensure_ascii=False))
        return
    rows: list[list[Any]] = [
        [str(f.feature), labels.get(f.feature, ""), f"[{visible(found.tokens[f.position])}]", f.num_tokens,
         f.activation, f.linear, f.exact]
        for f in found.fed
    ]  # fmt: skip
    if style == "csv":
        print_records(columns, rows, "csv")
        return
    where = " ".join(f"[{visible(found.tokens[p])}]" for p in found.positions)
    print(f"feature {found.feature}, active on {where}, feeds at {found.later}:")
    print_records(columns, rows, "table")
    for agreement in (found.agreement, found.agreement_staying):
        print(f"linear against ablation over {agreement.sample}: {_in_words(agreement)}")
    print(
        f"without it {found.num_vanishing} of these activations vanish and {found.num_appearing} others appear, "
        "which no derivative sees"
    )
