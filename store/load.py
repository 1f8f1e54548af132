"""Evidence into tables: a text with its windows and tokens, dictionaries, and the small tables that belong to them.

Each corpus gets ranges of window and document ids of its own, so that both are unique in the store.
"""

from collections.abc import Sequence

import duckdb

from .errors import StoreError
from .evidence import Evidence
from .names import files, named_rows
from .records import OPTIONAL_TABLES, TABLES

#: Small tables by the order of their rows within a dictionary. Loading them again replaces a dictionary's rows.
SMALL_TABLES = {
    "logit_effects": "feature, direction, rank",
    "neighbours": "feature, rank",
    "labels": "feature",
    "metrics": "split, metric",
    "receipts": "feature, control",
    "embeddings": "source, feature",
    "stability": "feature",
    "matches": "other_dictionary, feature",
    "steering_effects": "feature, method, at_budget, strength",
}
#: What the text of a corpus is made of.
TEXT_TABLES = ("documents", "windows", "vocabulary", "split_rows")


def next_id(connection: duckdb.DuckDBPyConnection, table: str, column: str) -> int:
    """Smallest unused id."""
    return connection.execute(f"SELECT coalesce(max({column}) + 1, 0) FROM {table}").fetchall()[0][0]


def load_text(connection: duckdb.DuckDBPyConnection, evidence: Evidence) -> int:
    """Add the corpus of a folder and return its id."""
    corpus_id = next_id(connection, "evidence.corpora", "corpus_id")
    vocabulary_id = _load_vocabulary(connection, evidence)
    first_window, first_document = connection.execute(
        "SELECT coalesce(max(first_window + num_windows), 0), coalesce(max(first_document + num_documents), 0) "
        "FROM evidence.corpora"
    ).fetchall()[0]
    documents, windows = {"files": files(evidence, "documents")}, {"files": files(evidence, "windows")}
    connection.execute(
        f"""
        INSERT INTO evidence.documents BY NAME
        SELECT {_columns("documents", "document_id")}, document_id + {first_document} AS document_id,
               {corpus_id} AS corpus_id
        FROM read_parquet($files) ORDER BY document_id
        """,
        documents,
    )
    connection.execute(
        f"""
        INSERT INTO evidence.split_rows BY NAME
        SELECT {_columns("split_rows")}, {corpus_id} AS corpus_id FROM read_parquet($files)
        """,
        {"files": files(evidence, "split_rows")},
    )
    connection.execute(
        f"""
        INSERT INTO evidence.tokens
        SELECT window_id + {first_window}, generate_subscripts(token_ids, 1) - 1, unnest(token_ids),
               unnest(document_ids) + {first_document}
        FROM (SELECT * FROM read_parquet($files) ORDER BY window_id)
        """,
        windows,
    )
    connection.execute(
        f"""
        INSERT INTO evidence.windows BY NAME
        SELECT w.window_id + {first_window} AS window_id, w.split, w.token_ids,
               list_transform(w.document_ids, lambda d: d + {first_document}) AS document_ids, t.tokens,
               {corpus_id} AS corpus_id
        FROM read_parquet($files) w
        JOIN (
            SELECT t.window_id, list(coalesce(v.token, '') ORDER BY t.position) AS tokens
            FROM evidence.tokens t
            LEFT JOIN evidence.vocabulary v ON v.token_id = t.token_id AND v.vocabulary_id = {vocabulary_id}
            WHERE t.window_id >= {first_window}
            GROUP BY t.window_id
        ) t ON t.window_id = w.window_id + {first_window}
        ORDER BY window_id
        """,
        windows,
    )
    connection.execute(
        f"""
        INSERT INTO evidence.corpora
        SELECT {corpus_id}, $name, sha256(coalesce(string_agg(sha256, ',' ORDER BY document_id), '')), {vocabulary_id},
               {first_window},
               (SELECT max(window_id) + 1 - {first_window} FROM evidence.windows WHERE corpus_id = {corpus_id}),
               {first_document}, max(document_id) + 1 - {first_document}
        FROM evidence.documents WHERE corpus_id = {corpus_id}
        """,
        {"name": _corpus_name(connection, evidence)},
    )
    return corpus_id


def _columns(table: str, *without: str) -> str:
    return ", ".join(name for name in TABLES[table].names if name not in without)


def _corpus_name(connection: duckdb.DuckDBPyConnection, evidence: Evidence) -> str:
    """The name that the folder gives its text, with a number where another text of the store has it."""
    name = "text"
    if evidence.has("runs"):
        found = connection.execute(
            "SELECT any_value(corpus) FROM read_parquet($files)", {"files": files(evidence, "runs")}
        ).fetchall()
        name = found[0][0] or name
    known = {row[0] for row in connection.execute("SELECT corpus FROM evidence.corpora").fetchall()}
    numbered = (name if n == 1 else f"{name} ({n})" for n in range(1, len(known) + 2))
    return next(n for n in numbered if n not in known)


def _load_vocabulary(connection: duckdb.DuckDBPyConnection, evidence: Evidence) -> int:
    """Add the folder's vocabulary unless the store has it, and return its id."""
    content = "SELECT count(*), sum(hash(token_id, token)) FROM {}"
    params = {"files": files(evidence, "vocabulary")}
    found = connection.execute(content.format("read_parquet($files)"), params).fetchall()[0]
    new = next_id(connection, "evidence.vocabulary", "vocabulary_id")
    for known in range(new):
        if (
            connection.execute(content.format(f"evidence.vocabulary WHERE vocabulary_id = {known}")).fetchall()[0]
            == found
        ):
            return known
    connection.execute(
        f"INSERT INTO evidence.vocabulary SELECT {new}, token_id, token FROM read_parquet($files) ORDER BY token_id",
        params,
    )
    return new


def load_dictionary(connection: duckdb.DuckDBPyConnection, evidence: Evidence, name: str, corpus_id: int) -> int:
    """Add a dictionary of the folder, or find it in the store, and return its id.

    Raises StoreError where the store has another dictionary of that name.
    """
    row = f"(SELECT {_columns('dictionaries')} FROM {named_rows(evidence)} WHERE dictionary = $name LIMIT 1)"
    params = {"files": files(evidence, "dictionaries"), "name": name}
    known = connection.execute(
        f"""
        SELECT k.dictionary_id, k.d_sae = n.d_sae AND k.model_sha256 IS NOT DISTINCT FROM n.model_sha256
               AND k.hook_point IS NOT DISTINCT FROM n.hook_point
        FROM evidence.dictionaries k JOIN {row} n USING (dictionary)
        """,
        params,
    ).fetchall()
    if known:
        if not known[0][1]:
            raise StoreError(
                f"{evidence.folder} has another dictionary named {name!r} (its d_sae, model or hook point differs): "
                "rename one of them"
            )
        return known[0][0]
    model_id = _model_id(connection, row, params, corpus_id)
    dictionary_id = next_id(connection, "evidence.dictionaries", "dictionary_id")
    connection.execute(
        "INSERT INTO evidence.dictionaries BY NAME "
        f"SELECT {dictionary_id} AS dictionary_id, {model_id} AS model_id, n.* FROM {row} n",
        params,
    )
    return dictionary_id


def _model_id(connection: duckdb.DuckDBPyConnection, row: str, params: dict, corpus_id: int) -> int:
    same = " AND ".join(f"m.{c} IS NOT DISTINCT FROM n.{c}" for c in ("model_name", "model_sha256", "tokenizer_sha256"))
    found = connection.execute(f"SELECT m.model_id FROM evidence.models m JOIN {row} n ON {same}", params).fetchall()
    if found:
        return found[0][0]
    model_id = next_id(connection, "evidence.models", "model_id")
    connection.execute(
        f"""
        INSERT INTO evidence.models
        SELECT {model_id}, model_name, NULL, model_sha256, tokenizer_sha256,
               (SELECT vocabulary_id FROM evidence.corpora WHERE corpus_id = {corpus_id})
        FROM {row}
        """,
        params,
    )
    return model_id


def load_small_tables(
    connection: duckdb.DuckDBPyConnection, evidence: Evidence, names: Sequence[str], tables: Sequence[str]
) -> None:
    """Load small tables of the dictionaries `names`, in place of what the store has of them."""
    ids = "SELECT dictionary_id FROM evidence.dictionaries WHERE list_contains($names, dictionary)"
    for table in tables:
        if table in OPTIONAL_TABLES and not evidence.has(table):
            continue
        connection.execute(f"DELETE FROM evidence.{table} WHERE dictionary_id IN ({ids})", {"names": list(names)})
        connection.execute(
            f"""
            INSERT INTO evidence.{table} BY NAME
            SELECT d.dictionary_id, {", ".join(f"e.{c}" for c in TABLES[table].names if c != "dictionary")}
            FROM {named_rows(evidence)} e
            JOIN (SELECT dictionary, dictionary_id FROM evidence.dictionaries WHERE list_contains($names, dictionary)) d
                USING (dictionary)
            ORDER BY dictionary_id, {SMALL_TABLES[table]}
            """,
            {"files": files(evidence, table), "names": list(names)},
        )


def load_runs(connection: duckdb.DuckDBPyConnection, evidence: Evidence, corpus_id: int) -> None:
    """Load where the evidence of a folder comes from, in place of what the store has of its dictionaries."""
    if not evidence.has("runs"):
        return
    params = {"files": files(evidence, "runs")}
    connection.execute(
        f"""
        DELETE FROM evidence.runs WHERE corpus_id = {corpus_id} AND dictionary_id IN (
            SELECT dictionary_id FROM evidence.dictionaries JOIN {named_rows(evidence)} r USING (dictionary)
        )
        """,
        params,
    )
    connection.execute(
        f"""
        INSERT INTO evidence.runs BY NAME
        SELECT d.dictionary_id, {corpus_id} AS corpus_id, r.* EXCLUDE (dictionary, corpus)
        FROM {named_rows(evidence)} r JOIN evidence.dictionaries d USING (dictionary) ORDER BY dictionary_id
        """,
        params,
    )
    connection.execute(
        """
        UPDATE evidence.models SET model_revision = r.model_revision
        FROM read_parquet($files) r
        WHERE r.model_sha256 = models.model_sha256 AND r.tokenizer_sha256 = models.tokenizer_sha256
        """,
        params,
    )
