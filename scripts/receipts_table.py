"""Receipts of a labelled run as one JSON file, so that a table of them can be checked against what was measured.

    python scripts/receipts_table.py runs/more docs/benchmarks/receipts-2026-11-22.json

Every receipt of the whole dictionary without lists and tables in its details, those of features counted by control and
verdict, and the shares that the table of docs/receipts.md is made of, with Wilson's 95 % interval.
"""

import json
import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from saeql.pipelines.receipts.statistics import wilson
from saeql.pipelines.run import Run

#: Features by what their labels are; all that are active on test documents have a receipt of C5.
_SHARES = """
WITH f AS (
    SELECT feature, bool_or(control = 'C5 token identity' AND value >= 0.95) AS lexical,
        bool_or(control = 'C3 label permutation' AND verdict = 'passed') AS labelled,
        bool_or(control = 'C4 negative ladder contextual' AND verdict = 'passed') AS contextual,
        bool_or(control = 'C4 negative ladder contextual' AND verdict != 'reported') AS asked,
        bool_or(control = 'C14 activation range') AS ranged,
        bool_or(control = 'C14 activation range' AND verdict = 'failed') AS top_only,
        bool_or(control = 'C4 negative ladder N1') AS has_label
    FROM r WHERE feature IS NOT NULL GROUP BY feature
    HAVING bool_or(control = 'C5 token identity')
)
SELECT * FROM (VALUES
    ('labelled (C3)', (SELECT count(*) FROM f WHERE labelled), (SELECT count(*) FROM f)),
    ('contextual and labelled', (SELECT count(*) FROM f WHERE labelled AND contextual), (SELECT count(*) FROM f)),
    ('contextual of those that N2 was asked of', (SELECT count(*) FROM f WHERE contextual),
        (SELECT count(*) FROM f WHERE asked AND NOT lexical)),
    ('lexical', (SELECT count(*) FROM f WHERE lexical), (SELECT count(*) FROM f)),
    ('not lexical with a label', (SELECT count(*) FROM f WHERE NOT lexical AND has_label),
        (SELECT count(*) FROM f WHERE NOT lexical)),
    ('top-only (C14)', (SELECT count(*) FROM f WHERE top_only), (SELECT count(*) FROM f WHERE ranged))
) AS shares(share, k, n)
"""

_OF_FEATURES = """
SELECT control, verdict, count(*) AS n, round(median(value), 4) AS median, round(avg(value), 4) AS mean
FROM r WHERE feature IS NOT NULL GROUP BY ALL ORDER BY ALL
"""


def receipts(run: Run) -> dict[str, Any]:
    """What the evidence of a run says about its labels."""
    connection = duckdb.connect()
    files = [run.evidence.path("receipts"), *sorted((run.evidence.folder / "receipts").glob("*.parquet"))]
    connection.register("r", pa.concat_tables([pq.read_table(file) for file in files]))

    def records(query: str) -> list[dict[str, Any]]:
        found = connection.execute(query)
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    whole = records("SELECT * EXCLUDE (dictionary, feature) FROM r WHERE feature IS NULL ORDER BY control, detail")
    shares = []
    for row in records(_SHARES):
        low, high = (float(bound) for bound in wilson(row["k"], row["n"]))
        shares.append({**row, "value": round(row["k"] / row["n"], 4), "low": round(low, 4), "high": round(high, 4)})
    identity = run.path / "token_identity" / "token_identity.json"
    tokens = run.evidence.read("documents", columns=["split", "num_tokens"])
    return {
        "dictionary": run.spec.name,
        "documents": len(tokens),
        "tokens": sum(tokens["num_tokens"].to_pylist()),
        "shares": shares,
        "of_the_whole": [{**_short(row), "detail": _plain(json.loads(row["detail"] or "{}"))} for row in whole],
        "of_features": records(_OF_FEATURES),
        "token_identity": _short(json.loads(identity.read_text(encoding="utf-8"))) if identity.exists() else None,
    }


def _short(value: Any) -> Any:
    """The same with numbers of four decimal places."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _plain(detail: dict[str, Any]) -> dict[str, Any]:
    """Words and numbers of a receipt's details, without lists and tables in them."""
    return {key: _short(value) for key, value in detail.items() if not isinstance(value, dict | list)}


def as_text(found: dict[str, Any]) -> str:
    """JSON with one receipt a line."""

    def part(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n]"

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {part(value)}" for key, value in found.items()) + "\n}\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} RUN OUT.json")
    out = Path(sys.argv[2])
    out.write_text(as_text(receipts(Run.open(sys.argv[1]))), encoding="utf-8")
    print(out)
