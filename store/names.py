"""What dictionaries are called in a store.

Two folders may call different dictionaries by one name, as seeds of one recipe are; one of them then has another name
in the store, `Evidence.names`.
"""

import re
from collections.abc import Sequence

import duckdb

from .errors import StoreError
from .evidence import Evidence
from .query import quoted

#: Share of the features that have the same nearest neighbour at the same cosine in one dictionary indexed twice.
_SAME_NEIGHBOURS = 0.95
_SAME_COSINE = 1e-3


def files(evidence: Evidence, table: str) -> list[str]:
    """The table's files as DuckDB takes them."""
    return [str(file) for file in evidence.files(table)]


def named_rows(evidence: Evidence) -> str:
    """The rows of $files, a table of the folder, with the names that its dictionaries have in the store: a relation."""
    if not evidence.names:
        return "read_parquet($files)"
    cases = " ".join(f"WHEN {quoted(own)} THEN {quoted(name)}" for own, name in evidence.names.items())
    return f"(SELECT * REPLACE (CASE dictionary {cases} ELSE dictionary END AS dictionary) FROM read_parquet($files))"


def dictionary_names(connection: duckdb.DuckDBPyConnection, evidence: Evidence) -> list[str]:
    """The dictionaries of a folder, in its order, by their names in the store."""
    found = connection.execute(
        "SELECT dictionary FROM read_parquet($files, file_row_number = true) ORDER BY file_row_number, dictionary",
        {"files": files(evidence, "dictionaries")},
    ).fetchall()
    return [evidence.names.get(own, own) for own in dict.fromkeys(str(row[0]) for row in found)]


def check_names(connection: duckdb.DuckDBPyConnection, folders: Sequence[Evidence]) -> None:
    """Raises StoreError where folders call different dictionaries by one name."""
    first: dict[str, Evidence] = {}
    for evidence in folders:
        for name in dictionary_names(connection, evidence):
            known = first.setdefault(name, evidence)
            differs = None if known is evidence else difference(connection, known, evidence, name)
            if differs:
                raise StoreError(
                    f"{evidence.folder} has another dictionary named {name!r} ({differs}): a store needs another name "
                    "for one of them, which `saeql store RUN --add RUN2` gives it, and so does Evidence(folder, names)"
                )


def difference(connection: duckdb.DuckDBPyConnection, known: Evidence, other: Evidence, name: str) -> str | None:
    """In what the dictionaries differ that two folders have as `name`; None for one dictionary that was indexed twice.

    One dictionary has the same latents: the same nearest neighbours, at the same cosines.
    """
    params = {"name": name}
    ((*same,),) = connection.execute(
        f"""
        SELECT n.d_sae = k.d_sae, n.model_sha256 IS NOT DISTINCT FROM k.model_sha256,
               n.hook_point IS NOT DISTINCT FROM k.hook_point
        FROM {_rows(other, "dictionaries")} n JOIN {_rows(known, "dictionaries")} k USING (dictionary)
        WHERE dictionary = $name LIMIT 1
        """,
        params,
    ).fetchall()
    for what, equal in zip(("its d_sae", "its model", "its hook point"), same, strict=True):
        if not equal:
            return f"{what} differs"
    if not (known.has("neighbours") and other.has("neighbours")):
        return None
    ((equal, both),) = connection.execute(
        f"""
        SELECT count(*) FILTER (n.neighbour = k.neighbour AND abs(n.cosine - k.cosine) < {_SAME_COSINE}), count(*)
        FROM {_rows(other, "neighbours")} n JOIN {_rows(known, "neighbours")} k USING (dictionary, feature, rank)
        WHERE dictionary = $name AND rank = 0
        """,
        params,
    ).fetchall()
    return "its features have other neighbours, as after another seed" if equal < both * _SAME_NEIGHBOURS else None


def _rows(evidence: Evidence, table: str) -> str:
    """`named_rows` with the files written out, for a statement that reads two folders."""
    return named_rows(evidence).replace("$files", f"[{', '.join(map(quoted, files(evidence, table)))}]")


def name_apart(folders: Sequence[Evidence], other: Evidence, label: str, wanted: str | None = None) -> Evidence:
    """`other` with a name for each dictionary that no other one of `folders` has: NAME@label where NAME is taken.

    `wanted` is what its only dictionary is to be called. Raises StoreError where that is taken, or it has several.
    """
    with duckdb.connect() as connection:
        own = dictionary_names(connection, other)
        if wanted is not None:
            if not re.fullmatch(r"[\w.@+-]{1,100}", wanted):
                raise StoreError(f"a dictionary's name is up to 100 letters, digits, '_.@+-', not {wanted!r}")
            if len(own) > 1:
                raise StoreError(f"{other.folder} has {len(own)} dictionaries, one name is for one: {', '.join(own)}")
            named = Evidence(other.folder, {own[0]: wanted} if wanted != own[0] else None)
            check_names(connection, [*folders, named])
            return named
        names: dict[str, str] = {}
        for name in own:
            tries = (f"{name}@{label}" + (f"-{n}" if n > 1 else "") for n in range(1, len(folders) + 2))
            for found in (name, *tries):
                named = Evidence(other.folder, {name: found} if found != name else None)
                holders = [folder for folder in folders if found in dictionary_names(connection, folder)]
                if not any(difference(connection, holder, named, found) for holder in holders):
                    names |= named.names
                    break
        return Evidence(other.folder, names)
