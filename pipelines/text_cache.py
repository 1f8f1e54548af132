"""A cache of answers about texts, by the hash of what was asked: embeddings, answers of language models.

One SQLite file for all programs of a user, safe for several at once. It holds hashes and answers, not the texts.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_CHUNK = 500  # variables of one statement


class TextCache:
    """Bytes by (namespace, text). `namespace` names everything else that the answer depends on: model, settings.

    A file that cannot be opened or written is a cache that remembers nothing: work is repeated, nothing fails.
    """

    def __init__(self, path: Path, namespace: str):
        self.path, self.namespace = path, namespace
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: sqlite3.Connection | None = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer BLOB) WITHOUT ROWID")
        except (sqlite3.Error, OSError):
            self._file = None

    def get(self, texts: Sequence[str]) -> dict[str, bytes]:
        """What is known of `texts`."""
        if self._file is None:
            return {}
        by_key = {self._key(text): text for text in texts}
        keys, found = list(by_key), {}
        try:
            for start in range(0, len(keys), _CHUNK):
                some = keys[start : start + _CHUNK]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, answer FROM answers WHERE key IN ({marks})"
                found.update({by_key[key]: answer for key, answer in self._file.execute(query, some)})
        except sqlite3.Error:
            pass
        return found

    def put(self, answers: Mapping[str, bytes]) -> None:
        """Remember answers by text; all of them or none."""
        if self._file is None or not answers:
            return
        rows: Iterable[tuple[bytes, bytes]] = [(self._key(text), answer) for text, answer in answers.items()]
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.Error:
            pass

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.namespace}\0{text}".encode("utf-8", "surrogatepass")).digest()
