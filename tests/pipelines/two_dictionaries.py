"""A store of two dictionaries on one text, of a run's evidence, with a comparison of both and texts that would run.

The second dictionary is the first one turned round: its feature n is the first one's last but n.
"""

import shutil
from pathlib import Path

import pyarrow as pa

from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.records import MATCHES, TABLES

OTHER = "other <b>one</b>"
HOSTILE = ["<img src=x onerror=window.pwn=1>", "<script>window.pwn=1</script>", "\u202eriver", "a river bank"]


def two_dictionaries(evidence: Path, folder: Path, *, hostile: bool = True) -> Path:
    """The store's path in `folder`."""
    shutil.copytree(evidence, folder / "one")
    one = Evidence(folder / "one")
    if hostile:
        for table, column in (("labels", "label"), ("documents", "title")):
            _set(one, table, column, [HOSTILE[n % len(HOSTILE)] for n in range(one.read(table).num_rows)])
        tokens = one.read("vocabulary")["token"].to_pylist()
        _set(
            one,
            "vocabulary",
            "token",
            [{" stone": HOSTILE[0], " green": HOSTILE[2]}.get(str(t), str(t)) for t in tokens],
        )
    name = one.read("dictionaries")["dictionary"][0].as_py()
    shutil.copytree(folder / "one", folder / "other")
    other = Evidence(folder / "other")
    last = one.read("dictionaries")["d_sae"][0].as_py() - 1
    for table in TABLES:
        if not other.has(table) or "dictionary" not in TABLES[table].names:
            continue
        rows = other.read(table)
        for column in ("feature", "neighbour"):
            if column in rows.column_names:
                turned = [None if f is None else last - f for f in rows[column].to_pylist()]
                rows = rows.set_column(rows.column_names.index(column), column, pa.array(turned, rows[column].type))
        for file in other.files(table):
            file.unlink()
        other.write(
            table, rows.set_column(rows.column_names.index("dictionary"), "dictionary", pa.array([OTHER] * len(rows)))
        )
    pairs = [{"dictionary": name, "feature": n, "other_dictionary": OTHER, "other_feature": last - n,
              "decoder_cosine": 1.0, "encoder_cosine": 1.0, "encoder_agrees": True, "shared": True}
             for n in range(last + 1)]  # fmt: skip
    one.write("matches", pa.Table.from_pylist(pairs, MATCHES))
    return FeatureStore.build(folder / "features.duckdb", [one, other])


def _set(evidence: Evidence, table: str, column: str, texts: list[str]) -> None:
    rows = evidence.read(table)
    evidence.write(table, rows.set_column(rows.column_names.index(column), column, pa.array(texts)))
