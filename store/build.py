"""The feature store from Parquet evidence: built anew, or brought up to date by adding what it does not have yet.

DuckDB's memory is bounded by `memory_limit`, it spills the sort by document beside the file; what numpy holds is
bounded by chunks of features (`segment.py`). Either way the store is published by one rename (`publish.py`).
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb

from . import migrations, sources
from .errors import StoreError, one_line
from .evidence import Evidence
from .load import (
    SMALL_TABLES,
    TEXT_TABLES,
    load_dictionary,
    load_runs,
    load_small_tables,
    load_text,
    next_id,
)
from .names import check_names, dictionary_names, files, named_rows
from .publish import find_store_damage, writing
from .query import read_beside
from .search_index import index_words
from .segment import derive_segment, derive_token_features, load_by_document

OnStep = Callable[[str, int, int], None]
Step = tuple[str, Callable[[], None]]

#: DuckDB's share of the memory; numpy takes about 1 GB beside it.
MEMORY_LIMIT = "2500MB"


def build_store(
    path: str | Path,
    evidence: Evidence | Sequence[Evidence],
    *,
    threads: int | None = None,
    memory_limit: str = MEMORY_LIMIT,
    on_step: OnStep | None = None,
) -> Path:
    """Build the store `path` from `evidence`, one folder a corpus; an older store is replaced only by a whole new one.

    `on_step(name, done, total)` is called as every step begins and once with `done == total`. Raises EvidenceError for
    missing evidence and StoreError for evidence that contradicts itself or that DuckDB cannot read or hold.
    """
    path, folders = Path(path), _folders(evidence)
    with (
        writing(path) as temporary,
        _explained(path, folders),
        connect_writer(temporary, threads, memory_limit) as connection,
    ):
        _Writer(connection, Path(f"{temporary}.spill")).build(folders, on_step or _no_step)
    return path


def sync_store(
    path: str | Path,
    evidence: Evidence | Sequence[Evidence],
    *,
    threads: int | None = None,
    memory_limit: str = MEMORY_LIMIT,
    on_step: OnStep | None = None,
) -> list[str]:
    """Bring the store `path` up to date with `evidence` and return what was done, [] where it was.

    What is new is added: corpora, dictionaries, labels and other small tables. A store that is missing, damaged, or
    whose text or activations have changed is built anew.
    """
    path, folders = Path(path), _folders(evidence)
    reason = _why_anew(path, folders)
    if reason is not None:
        build_store(path, folders, threads=threads, memory_limit=memory_limit, on_step=on_step)
        return [f"built anew: {reason}"]
    with writing_if_needed(path, folders) as temporary, _explained(path, folders):
        if temporary is None:
            return []
        with connect_writer(temporary, threads, memory_limit) as connection:
            return _Writer(connection, Path(f"{temporary}.spill")).update(folders, on_step or _no_step)


@contextmanager
def writing_if_needed(path: Path, folders: Sequence[Evidence]) -> Iterator[Path | None]:
    """`writing` on a copy of the store, or None where the store has all of `folders`."""
    if _pending(path, folders):
        with writing(path, from_previous=True) as temporary:
            yield temporary
    else:
        yield None


def upgrade_store(path: str | Path, *, threads: int | None = None, memory_limit: str = MEMORY_LIMIT) -> list[str]:
    """Bring a store of an older saeql to this schema, on a copy; returns the names of the migrations applied.

    Raises StoreError for a newer store, and where the file cannot be upgraded.
    """
    path = Path(path)
    try:
        with (
            writing(path, from_previous=True) as temporary,
            connect_writer(temporary, threads, memory_limit) as connection,
        ):
            applied = migrations.apply(connection)
            if any(step.name == "keyed" for step in applied):  # what that migration dropped
                _Writer(connection, Path(f"{temporary}.spill")).derive_new()
            if any(step.name == "token_features" for step in applied):
                _Writer(connection, Path(f"{temporary}.spill")).derive_token_features()
            return [step.name for step in applied]
    except duckdb.Error as error:
        raise StoreError(
            f"cannot upgrade {path}, rebuild it with `saeql index --rebuild`: {one_line(error)}"
        ) from error


def _folders(evidence: Evidence | Sequence[Evidence]) -> list[Evidence]:
    return [evidence] if isinstance(evidence, Evidence) else list(evidence)


def _no_step(name: str, done: int, total: int) -> None:
    pass


@contextmanager
def _explained(path: Path, folders: Sequence[Evidence]) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        names = ", ".join(str(f.folder) for f in folders)
        raise StoreError(f"cannot build {path} from {names}: {one_line(error)}") from error


def _why_anew(path: Path, folders: Sequence[Evidence]) -> str | None:
    """Why the store cannot be brought up to date by adding to it; None where it can."""
    if not path.exists():
        return "there was none"
    damage = find_store_damage(path)
    if damage:
        return damage
    try:
        with read_beside(path) as connection:
            have = migrations.applied_version(connection)
            migrations.check_not_newer(have, migrations.schema_version(), str(path))
            if have < migrations.schema_version():
                return f"it had schema version {have}"
            return sources.contradiction(connection, folders)
    except duckdb.Error as error:
        return one_line(error)


def _pending(path: Path, folders: Sequence[Evidence]) -> bool:
    with read_beside(path) as connection:
        plans = [sources.missing(connection, folder) for folder in folders]
    return any(plan.text or plan.dictionaries or plan.tables for plan in plans)


@contextmanager
def connect_writer(file: Path, threads: int | None, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """The one connection to a temporary file, with what it spills beside it; checkpointed at the end."""
    spill = Path(f"{file}.spill")
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
        connection.execute("CHECKPOINT")
    finally:
        connection.close()


class _Writer:
    """The steps of one build or update, in order, on one connection."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, spool: Path):
        self.connection, self.spool = connection, spool

    def build(self, folders: Sequence[Evidence], on_step: OnStep) -> None:
        """All of `folders` into an empty file."""
        migrations.apply(self.connection)
        self.update(folders, on_step)

    def update(self, folders: Sequence[Evidence], on_step: OnStep) -> list[str]:
        """What the file does not have of `folders`; returns what was done."""
        check_names(self.connection, folders)
        done: list[str] = []
        steps: list[Step] = []
        planned: dict[frozenset, set[str]] = {}  # by text: dictionaries that a folder before brings in
        for folder in folders:
            plan, text = sources.missing(self.connection, folder), sources.text_key(folder)
            plan.text = plan.text and text not in planned
            before = planned.setdefault(text, set())
            plan.dictionaries = [name for name in plan.dictionaries if name not in before]
            before.update(plan.dictionaries)
            steps += self.steps(folder, plan)
            done += [*(["text"] if plan.text else []), *plan.dictionaries, *([] if plan.dictionaries else plan.tables)]
        steps.append(("sources", lambda: self.note_sources(folders)))
        steps.append(("checkpoint", lambda: self.execute("CHECKPOINT")))
        for number, (name, step) in enumerate(steps):
            on_step(name, number, len(steps))
            step()
        on_step("done", len(steps), len(steps))
        return done

    def execute(self, sql: str, params: dict | None = None) -> None:
        self.connection.execute(sql, params) if params else self.connection.execute(sql)

    def steps(self, evidence: Evidence, plan: sources.Missing) -> Iterator[Step]:
        """Steps for what is missing of a folder. Ids are looked up when a step runs: earlier steps make them."""
        if plan.text:
            yield "text", lambda: self.add_text(evidence)
        for name in plan.dictionaries:
            yield "tables", lambda name=name: self.add_dictionary(evidence, name)
            yield "activations", lambda name=name: self.add_activations(evidence, name)
            yield "statistics and examples", lambda name=name: self.derive(evidence, name)
        stale = sorted(set(plan.tables) - {"runs"})
        stored = [n for n in dictionary_names(self.connection, evidence) if n not in plan.dictionaries]
        if stale and stored:
            yield "tables", lambda: self.replace_tables(evidence, stored, stale)
        searched = [*plan.dictionaries, *(stored if set(stale) & {"labels", "logit_effects"} else [])]
        if searched:
            yield "search", lambda: self.index_search(searched)

    def add_text(self, evidence: Evidence) -> None:
        corpus_id = load_text(self.connection, evidence)
        sources.note(self.connection, evidence, corpus_id, TEXT_TABLES)

    def add_dictionary(self, evidence: Evidence, name: str) -> None:
        corpus_id = sources.corpus_of(self.connection, evidence)
        assert corpus_id is not None
        dictionary_id = load_dictionary(self.connection, evidence, name, corpus_id)
        segment_id = next_id(self.connection, "evidence.segments", "segment_id")
        self.execute(f"INSERT INTO evidence.segments VALUES ({segment_id}, {dictionary_id}, {corpus_id}, 0)")
        load_small_tables(self.connection, evidence, [name], list(SMALL_TABLES))
        self.derive_logits([name])

    def segment(self, evidence: Evidence, name: str) -> tuple[int, int]:
        """(segment id, first window of its corpus)."""
        corpus_id = sources.corpus_of(self.connection, evidence)
        return self.connection.execute(
            "SELECT g.segment_id, c.first_window FROM evidence.segments g JOIN evidence.corpora c USING (corpus_id) "
            "JOIN evidence.dictionaries d USING (dictionary_id) WHERE c.corpus_id = $corpus AND d.dictionary = $name",
            {"corpus": corpus_id, "name": name},
        ).fetchall()[0]

    def add_activations(self, evidence: Evidence, name: str) -> None:
        given = self.connection.execute(
            f"SELECT count(*) FROM {named_rows(evidence)} WHERE NOT list_contains($names, dictionary)",
            {"files": files(evidence, "activations"), "names": dictionary_names(self.connection, evidence)},
        ).fetchall()[0][0]
        if given:
            raise StoreError(f"{given} activations belong to no dictionary of the evidence: index again")
        segment_id, first_window = self.segment(evidence, name)
        load_by_document(self.connection, evidence, segment_id, name, first_window)

    def derive(self, evidence: Evidence, name: str) -> None:
        segment_id, _ = self.segment(evidence, name)
        try:
            derive_segment(self.connection, segment_id, self.spool / f"segment-{segment_id}")
        finally:
            shutil.rmtree(self.spool / f"segment-{segment_id}", ignore_errors=True)
        self.execute(
            "UPDATE evidence.segments SET num_activations = "
            f"(SELECT count(*) FROM evidence.activations_by_feature WHERE segment_id = {segment_id}) "
            f"WHERE segment_id = {segment_id}"
        )

    def derive_new(self) -> None:
        """What a store without segments does not have: co-activation and the word index."""
        for (dictionary_id,) in self.connection.execute("SELECT dictionary_id FROM evidence.dictionaries").fetchall():
            index_words(self.connection, dictionary_id)
        for (segment_id,) in self.connection.execute("SELECT segment_id FROM evidence.segments").fetchall():
            try:
                derive_segment(self.connection, segment_id, self.spool / "cofirings", only_cofirings=True)
            finally:
                shutil.rmtree(self.spool / "cofirings", ignore_errors=True)

    def derive_token_features(self) -> None:
        """What stands for every token, of all segments."""
        for (segment_id,) in self.connection.execute("SELECT segment_id FROM evidence.segments").fetchall():
            derive_token_features(self.connection, segment_id)

    def replace_tables(self, evidence: Evidence, names: Sequence[str], tables: Sequence[str]) -> None:
        load_small_tables(self.connection, evidence, names, tables)
        if "logit_effects" in tables:
            self.derive_logits(names)

    def derive_logits(self, names: Sequence[str]) -> None:
        ids = "SELECT dictionary_id FROM evidence.dictionaries WHERE list_contains($names, dictionary)"
        params = {"names": list(names)}
        self.execute(f"DELETE FROM derived.feature_logits WHERE dictionary_id IN ({ids})", params)
        self.execute(
            f"""
            INSERT INTO derived.feature_logits
            SELECT g.dictionary_id, g.feature, list(v.token ORDER BY g.rank) FILTER (g.direction = 'promoted'),
                   list(v.token ORDER BY g.rank) FILTER (g.direction = 'suppressed')
            FROM evidence.logit_effects g
            JOIN evidence.dictionaries d USING (dictionary_id)
            JOIN evidence.models m USING (model_id)
            JOIN evidence.vocabulary v ON v.token_id = g.token_id AND v.vocabulary_id = m.vocabulary_id
            WHERE g.dictionary_id IN ({ids})
            GROUP BY g.dictionary_id, g.feature ORDER BY g.dictionary_id, g.feature
            """,
            params,
        )

    def index_search(self, names: Sequence[str]) -> None:
        for (dictionary_id,) in self.connection.execute(
            "SELECT dictionary_id FROM evidence.dictionaries WHERE list_contains($names, dictionary)",
            {"names": list(names)},
        ).fetchall():
            index_words(self.connection, dictionary_id)

    def note_sources(self, folders: Sequence[Evidence]) -> None:
        for evidence in folders:
            corpus_id = sources.corpus_of(self.connection, evidence)
            assert corpus_id is not None
            load_runs(self.connection, evidence, corpus_id)
            sources.note(self.connection, evidence, corpus_id, sources.ALL)
        sources.forget(self.connection, folders)
