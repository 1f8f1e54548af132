"""One build of the feature store from the Parquet evidence: a temporary file, then a rename.

Memory is bounded by `memory_limit`: DuckDB spills the one big sort beside the file, and everything derived from the
activations is computed over chunks of features of about `CHUNK_ROWS` rows.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb

from . import migrations
from .errors import StoreError, one_line
from .evidence import Evidence
from .records import TABLES
from .words import WORDS_OF, stem_table

CHUNK_ROWS = 8_000_000

OnStep = Callable[[str, int, int], None]

#: Evidence that may not exist yet when the store is built.
OPTIONAL_TABLES = ("labels", "metrics")

_MACROS = f"""
CREATE OR REPLACE TEMP MACRO words_of(text) AS {WORDS_OF};
CREATE OR REPLACE TEMP MACRO mix(x) AS xor(x::UBIGINT, x::UBIGINT >> 15) % 2147483647 * 2246822519 % 2147483647;
CREATE OR REPLACE TEMP MACRO pick_hash(feature, window_id, place) AS
    mix(mix(feature::UBIGINT * 40503 + window_id::UBIGINT * 2654435761 % 2147483647) + place::UBIGINT * 48271);
"""


def build_store(
    path: str | Path,
    evidence: Evidence,
    *,
    threads: int | None = None,
    memory_limit: str = "4GB",
    on_step: OnStep | None = None,
) -> Path:
    """Build the store `path` from `evidence`; an older store there is replaced only by a whole new one.

    `on_step(name, done, total)` is called as every step begins and once with `done == total`. Raises EvidenceError for
    missing evidence and StoreError for evidence that contradicts itself or that DuckDB cannot read or hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    spill = Path(f"{temporary}.spill")
    _remove_leftovers(path)
    try:
        with _connect(temporary, spill, threads, memory_limit) as connection:
            _Build(connection, evidence, on_step or (lambda name, done, total: None)).run()
        _publish(temporary, path)
    except duckdb.Error as error:
        raise StoreError(f"cannot build {path} from {evidence.folder}: {one_line(error)}") from error
    finally:
        _remove(temporary)
    return path


def _remove(temporary: Path) -> None:
    """Remove a build's temporary file and what DuckDB puts beside it."""
    temporary.unlink(missing_ok=True)
    Path(f"{temporary}.wal").unlink(missing_ok=True)
    shutil.rmtree(f"{temporary}.spill", ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed builds of `path` on this machine left; builds that still run keep theirs."""
    name = re.compile(rf"{re.escape(path.name)}\.tmp\.(\d+)")
    for file in list(path.parent.iterdir()):
        found = name.match(file.name)
        if found is not None and not _is_running(int(found.group(1))):
            _remove(path.with_name(found.group(0)))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _connect(file: Path, spill: Path, threads: int | None, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory_limit,
        "temp_directory": str(spill),
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "python_enable_replacements": "false",
    }
    if threads is not None:
        config["threads"] = str(threads)
    connection = duckdb.connect(str(file), config=config)
    try:
        connection.execute("SET enable_progress_bar = false")
        yield connection
    finally:
        connection.close()


def _publish(temporary: Path, path: Path) -> None:
    """Make the bytes durable, then the name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _columns(table: str) -> str:
    return ", ".join(TABLES[table].names)


class _Build:
    """The steps of one build, in order, on one connection."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, evidence: Evidence, on_step: OnStep):
        self.connection = connection
        self.evidence = evidence
        self.on_step = on_step

    def run(self) -> None:
        steps = [
            ("schema", self.create_schema),
            ("tables", self.load_small_tables),
            ("activations", self.load_activations),
            ("statistics and examples", self.derive_features),
            ("search", self.derive_search),
            ("checkpoint", lambda: self.execute("CHECKPOINT")),
        ]
        for done, (name, step) in enumerate(steps):
            self.on_step(name, done, len(steps))
            step()
        self.on_step("done", len(steps), len(steps))

    def execute(self, sql: str, params: Mapping[str, object] | None = None) -> None:
        self.connection.execute(sql, dict(params)) if params else self.connection.execute(sql)

    def rows(self, sql: str) -> list[tuple]:
        return self.connection.execute(sql).fetchall()

    def files(self, table: str) -> list[str]:
        return [str(file) for file in self.evidence.files(table)]

    def create_schema(self) -> None:
        migrations.apply(self.connection)
        self.execute(_MACROS)

    def load_small_tables(self) -> None:
        self.execute(
            "INSERT INTO evidence.dictionaries BY NAME "
            f"SELECT file_row_number AS dictionary_id, {_columns('dictionaries')} "
            "FROM read_parquet($files, file_row_number = true)",
            {"files": self.files("dictionaries")},
        )
        for table in ("documents", "vocabulary", "split_rows"):
            self.execute(
                f"INSERT INTO evidence.{table} BY NAME SELECT {_columns(table)} FROM read_parquet($files)",
                {"files": self.files(table)},
            )
        for table in ("logit_effects", "neighbours", *OPTIONAL_TABLES):
            if table not in OPTIONAL_TABLES or self.evidence.has(table):
                self.load_by_dictionary(table)
        windows = {"files": self.files("windows")}
        self.execute(
            """
            INSERT INTO evidence.tokens
            SELECT window_id, generate_subscripts(token_ids, 1) - 1, unnest(token_ids), unnest(document_ids)
            FROM read_parquet($files) ORDER BY window_id
            """,
            windows,
        )
        self.execute(
            """
            INSERT INTO evidence.windows
            SELECT w.window_id, w.split, w.token_ids, w.document_ids, t.tokens
            FROM read_parquet($files) w
            JOIN (
                SELECT window_id, list(coalesce(token, '') ORDER BY position) AS tokens
                FROM evidence.tokens LEFT JOIN evidence.vocabulary USING (token_id) GROUP BY window_id
            ) t USING (window_id)
            ORDER BY window_id
            """,
            windows,
        )

    def load_by_dictionary(self, table: str) -> None:
        """Copy a small evidence table, ordered by feature where it has one."""
        order = "feature" if table != "metrics" else "split, metric"
        extra = ", rank" if table in ("logit_effects", "neighbours") else ""
        self.execute(
            f"""
            INSERT INTO evidence.{table} BY NAME
            SELECT dictionary_id, e.* EXCLUDE (dictionary)
            FROM (SELECT {_columns(table)} FROM read_parquet($files)) e
            JOIN (SELECT dictionary, dictionary_id FROM evidence.dictionaries) USING (dictionary)
            ORDER BY dictionary_id, {order}{extra}
            """,
            {"files": self.files(table)},
        )

    def load_activations(self) -> None:
        """The one big sort."""
        self.execute(
            """
            INSERT INTO evidence.activations
            SELECT d.dictionary_id, a.feature, a.split, a.window_id, a.position, a.token_id, t.document_id, a.activation
            FROM read_parquet($files) a
            JOIN (SELECT dictionary, dictionary_id FROM evidence.dictionaries) d USING (dictionary)
            LEFT JOIN (SELECT window_id, position, document_id FROM evidence.tokens) t USING (window_id, position)
            ORDER BY d.dictionary_id, a.feature, a.split, a.activation DESC, a.window_id, a.position
            """,
            {"files": self.files("activations")},
        )
        self.execute(
            """
            INSERT INTO derived.row_groups
            SELECT dictionary_id, feature, split, min(rowid), count(*)
            FROM evidence.activations GROUP BY dictionary_id, feature, split ORDER BY dictionary_id, feature, split
            """
        )
        self.check_activations()

    def check_activations(self) -> None:
        """Raises StoreError for a dictionary, window or feature that the other evidence does not have."""
        stored = self.rows("SELECT count(*) FROM evidence.activations")[0][0]
        given = self.connection.execute(
            "SELECT count(*) FROM read_parquet($f)", {"f": self.files("activations")}
        ).fetchall()
        if given[0][0] != stored:
            raise StoreError(f"{given[0][0] - stored} activations belong to no dictionary of the evidence: index again")
        lost = self.rows("SELECT count(*), min(window_id) FROM evidence.activations WHERE document_id IS NULL")[0]
        if lost[0]:
            raise StoreError(f"{lost[0]} activations lie outside the windows, first in window {lost[1]}: index again")
        outside = self.rows(
            "SELECT d.dictionary, g.feature, d.d_sae FROM derived.row_groups g "
            "JOIN evidence.dictionaries d USING (dictionary_id) WHERE g.feature NOT BETWEEN 0 AND d.d_sae - 1 LIMIT 1"
        )
        if outside:
            name, feature, d_sae = outside[0]
            raise StoreError(f"an activation of {name} names feature {feature}, it has {d_sae}: index again")
        total, groups = self.rows("SELECT sum(num_activations), count(*) FROM derived.row_groups")[0]
        scattered = self.rows(
            "SELECT count(*) FROM derived.row_groups a POSITIONAL JOIN "
            "(SELECT first_row AS next_row FROM derived.row_groups OFFSET 1) b "
            "WHERE b.next_row <> a.first_row + a.num_activations"
        )[0][0]
        assert not scattered, f"{scattered} of {groups} groups of {total} activations are not contiguous"

    def derive_features(self) -> None:
        self.execute(
            """
            INSERT INTO derived.feature_logits
            SELECT g.dictionary_id, g.feature, list(v.token ORDER BY g.rank) FILTER (g.direction = 'promoted'),
                   list(v.token ORDER BY g.rank) FILTER (g.direction = 'suppressed')
            FROM evidence.logit_effects g JOIN evidence.vocabulary v USING (token_id)
            GROUP BY g.dictionary_id, g.feature ORDER BY g.dictionary_id, g.feature
            """
        )
        statistics, examples = migrations.sql_text("derive_stats"), migrations.sql_text("derive_examples")
        for dictionary_id, first, last in self.chunks():
            where = f"dictionary_id = {dictionary_id} AND feature BETWEEN {first} AND {last}"
            self.execute(
                f"""
                CREATE OR REPLACE TEMP VIEW chunk AS SELECT rowid AS row_id, * FROM evidence.activations WHERE {where};
                CREATE OR REPLACE TEMP VIEW chunk_features AS
                SELECT {dictionary_id}::USMALLINT AS dictionary_id, f::INTEGER AS feature
                FROM range({first}, {last + 1}) r(f);
                """
            )
            self.execute(statistics)
            self.execute(examples)
        self.execute("DROP VIEW IF EXISTS chunk; DROP VIEW IF EXISTS chunk_features")

    def chunks(self) -> list[tuple[int, int, int]]:
        """(dictionary_id, first feature, last feature) of every chunk, all features covered, in order."""
        chunks: list[tuple[int, int, int]] = []
        for dictionary_id, d_sae in self.rows("SELECT dictionary_id, d_sae FROM evidence.dictionaries ORDER BY 1"):
            counts = self.rows(
                "SELECT feature, sum(num_activations)::BIGINT FROM derived.row_groups "
                f"WHERE dictionary_id = {dictionary_id} GROUP BY feature ORDER BY feature"
            )
            first, filled = 0, 0
            for feature, count in counts:
                if filled and filled + count > CHUNK_ROWS:
                    chunks.append((dictionary_id, first, feature - 1))
                    first, filled = feature, 0
                filled += count
            chunks.append((dictionary_id, first, d_sae - 1))
        return chunks

    def derive_search(self) -> None:
        self.execute(migrations.sql_text("derive_search"))
        words = [row[0] for row in self.rows("SELECT DISTINCT word FROM feature_words ORDER BY word")]
        self.connection.register("stems", stem_table(words))
        self.execute(
            """
            INSERT INTO derived.search_postings
            SELECT term, dictionary_id, feature, field, word, weight FROM feature_words JOIN stems USING (word)
            ORDER BY term, dictionary_id, feature, field, word;
            INSERT INTO derived.search_features
            SELECT dictionary_id, feature, sum(weight) FROM derived.search_postings
            GROUP BY dictionary_id, feature ORDER BY dictionary_id, feature;
            INSERT INTO derived.search_terms
            SELECT term, dictionary_id, count(DISTINCT feature) FROM derived.search_postings
            GROUP BY term, dictionary_id ORDER BY term, dictionary_id;
            DROP TABLE feature_words;
            """
        )
        self.connection.unregister("stems")
