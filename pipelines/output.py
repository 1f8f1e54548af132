"""What commands print: tables for people, JSON and CSV for programs. Everything goes to stdout."""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .receipts.card import card_lines

if TYPE_CHECKING:  # a table of rows needs neither the store's engine nor torch
    from saeql.store.feature_store import Example, FeatureStore
    from saeql.store.search import SearchHit

    from .search import PromptHits
    from .steering.edits import Edit

_VISIBLE = {"\n": "↵", "\t": "→", "\r": "␍"}


def console() -> Console:
    """Console on stdout; wide where stdout is no terminal, so that tables are not cut."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def note(text: str) -> None:
    """A line beside the output, on stderr."""
    print(f"saeql: {text}", file=sys.stderr)


def visible(token: str) -> str:
    """A token as text of one line: line breaks and control characters shown as signs."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else "·") for c in token)


def print_records(columns: list[str], rows: list[list[Any]], style: str, *, title: str | None = None) -> None:
    """Print rows as "table", "json" (a list of objects) or "csv" (with a header)."""
    if style == "json":
        sys.stdout.write(json_text(columns, rows))
    elif style == "csv":
        sys.stdout.write(csv_text(columns, rows))
    else:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for n, column in enumerate(columns):
            numeric = any(isinstance(row[n], int | float | Decimal) for row in rows)
            table.add_column(Text(visible(column)), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell(value)) for value in row))
        console().print(table)
        if not rows:
            console().print(Text("(no rows)"))


def json_text(columns: list[str], rows: list[list[Any]]) -> str:
    """One line: a list of objects. What is not finite is null, bytes are hexadecimal, a second column a is a_1."""
    names: list[str] = []
    for column in columns:
        name, n = column, 0
        while name in names:
            n += 1
            name = f"{column}_{n}"
        names.append(name)
    return _json([dict(zip(names, row, strict=True)) for row in rows]) + "\n"


def csv_text(columns: list[str], rows: list[list[Any]]) -> str:
    """A header and a line a row; null is empty, lists and structs are JSON."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_json(value) if isinstance(value, list | dict) else _plain(value, float) for value in row])
    return file.getvalue()


def _json(value: Any) -> str:
    return json.dumps(_plain(value, _finite), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any, number: Any) -> Any:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Decimal):  # sums of integers are of 128 bits
        return int(value) if value == value.to_integral_value() else number(float(value))
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(k): _plain(v, number) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, number) for v in value]
    return value


def cell(value: Any) -> str:
    """One value of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return " ".join(cell(v) if not isinstance(v, str) else f"[{visible(v)}]" for v in value)
    if isinstance(value, dict):
        return "; ".join(f"{k}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in value.items())
    return visible(str(value))


def highlighted(example: "Example", *, by_token: bool = True) -> Text:
    """An example's tokens in one line, those on which the feature is active in bold, the peak in colour.

    Without `by_token` none stands out: the activation is not about the token that it stands at.
    """
    text = Text()
    for n, (token, activation) in enumerate(zip(example.tokens, example.activations, strict=True), 1):
        if not by_token:
            text.append(visible(token))
            continue
        style = "bold black on yellow" if n == example.focus else "bold yellow" if activation > 0 else ""
        text.append(visible(token), style)
    return text


def marked(example: "Example") -> str:
    """An example's tokens as plain text with the peak in double angle brackets."""
    return "".join(
        f"<<{visible(token)}>>" if n == example.focus else visible(token) for n, token in enumerate(example.tokens, 1)
    )


def print_hits(hits: "list[SearchHit]", prompt: "PromptHits | None", *, as_json: bool) -> None:
    """Print what a search found, and for a text what fires on each token."""
    if as_json and prompt is not None:
        tokens = [
            {"token": token, "features": [asdict(h) for h in own]}
            for token, own in zip(prompt.tokens, prompt.by_token, strict=True)
        ]
        print(json.dumps({"features": [asdict(h) for h in hits], "tokens": tokens}, ensure_ascii=False, default=str))
        return
    columns = ["feature", "score", "label", "kind", "auroc", "density", "matched", *(["dictionary"] if as_json else [])]
    rows = [[getattr(hit, column) for column in columns] for hit in hits]
    print_records(columns, rows, "json" if as_json else "table")
    if prompt is not None:
        rows = [
            [token, "; ".join(f"{h.feature} {h.label} ({h.score:.2f})" for h in own)]
            for token, own in zip(prompt.tokens, prompt.by_token, strict=True)
        ]
        print_records(["token", "features (share of their largest activation)"], rows, "table")


def print_feature(
    store: "FeatureStore",
    feature: int,
    *,
    dictionary: str | None = None,
    num_examples: int = 5,
    split: str = "train",
    as_json: bool = False,
) -> None:
    """Print one feature with examples, logit effects and neighbours. Raises FeatureNotFound."""
    from .receipts.token_identity_control import attributes_to_token

    card = store.feature(feature, dictionary)
    receipts = store.receipts(feature, dictionary=dictionary)
    examples = store.examples(feature, dictionary=dictionary, split=split, limit=num_examples)
    near = store.neighbours(feature, dictionary=dictionary, limit=5)
    effects = store.logit_effects(feature, dictionary=dictionary)
    if as_json:
        shown = {"examples": [asdict(e) for e in examples], "neighbours": near, "logit_effects": effects}
        card = {**card, **shown, "receipts": [_parsed(row) for row in receipts]}
        print(json.dumps(card, ensure_ascii=False, default=str))
        return
    out = console()
    out.print(Text(f"feature {feature} of {card['dictionary']}", "bold"))
    out.print(Text(f"label        {visible(card['label'])}  ({card['kind']})"))
    for line in card_lines(receipts):
        style = {"passed": "green", "failed": "red"}.get(line.verdict, "")
        out.print(Text(f"{line.title:<30} ").append(f"{line.verdict:<9}", style).append(line.text))
    if card["auroc"] is not None:
        out.print(
            f"receipt      AUROC {card['auroc']:.3f} on test documents (95 % interval {cell(card['auroc_low'])} to "
            f"{cell(card['auroc_high'])}), F1 {card['f1']:.3f}, "
            f"n = {card['n_active']} strongly active, {card['n_inactive']} not"
        )
    out.print(
        f"fires        on {card['density']:.4%} of train rows, {card['test_density']:.4%} of test rows; "
        f"mean {cell(card['mean_activation'])}, max {cell(card['max_activation'])}; "
        f"token entropy {cell(card['token_entropy'])} bits"
    )
    out.print(Text(f"fires on     {cell(card['top_tokens'])}"))
    out.print(Text(f"promotes     {cell(card['promotes'])}"))
    out.print(Text(f"suppresses   {cell(card['suppresses'])}"))
    for row in near:
        label = visible(str(row["neighbour_label"]))
        out.print(Text(f"neighbour    {row['neighbour']:>6}  cosine {row['cosine']:.3f}  {label}"))
    by_token = attributes_to_token([*receipts, *store.receipts(None, dictionary=dictionary)], feature) is not False
    why = "" if by_token else ": position, not token, so none stands out"
    out.print(Text(f"\ntop examples ({split}){why}", "bold"))
    for example in examples:
        out.print(Text(f"{example.activation:8.2f}  ").append_text(highlighted(example, by_token=by_token)))


def _parsed(receipt: dict[str, Any]) -> dict[str, Any]:
    """A receipt without what the card says anyway, its detail as an object."""
    kept = {key: value for key, value in receipt.items() if key not in ("dictionary", "feature")}
    return kept | {"detail": json.loads(receipt["detail"]) if receipt["detail"] else None}


def print_labels(edits: "Sequence[Edit]", labels: Sequence[str]) -> None:
    """Print what every edit is about, a line each."""
    for change, label in zip(edits, labels, strict=True):
        print(f"{change.describe()}: {visible(label)}")


def print_steering(
    edits: "Sequence[Edit]",
    prompts: Sequence[str],
    baselines: Sequence[str],
    steered: Sequence[str],
    *,
    labels: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Print continuations of prompts with and without edits, side by side; `labels` say what each edit is about."""
    texts = list(zip(prompts, baselines, steered, strict=True))
    if as_json:
        names = ("prompt", "baseline", "steered")
        made = [asdict(change) | {"strength": change.amount, "to": change.goal} for change in edits]
        made = [own | {"label": label} for own, label in zip(made, labels, strict=True)] if labels else made
        record = {"edits": made, "texts": [dict(zip(names, text, strict=True)) for text in texts]}
        print(json.dumps(record, ensure_ascii=False, default=str))
        return
    if labels:
        print_labels(edits, labels)
    for prompt, baseline, changed in texts:
        table = Table(title=Text(f"prompt: {prompt}"), title_justify="left", expand=True)
        table.add_column("baseline", ratio=1)
        table.add_column(Text("; ".join(change.describe() for change in edits)), ratio=1)
        table.add_row(Text(baseline.strip()), Text(changed.strip()))
        console().print(table)
