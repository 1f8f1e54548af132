"""What the store raises; every message is one line, names the file or the value, and says the way out."""


class StoreError(ValueError):
    """A feature store that cannot be built, opened or read."""


class OldStoreError(StoreError):
    """A store of an older schema version, which can be upgraded."""


class SQLError(StoreError):
    """A statement that DuckDB refused, that would write, or that ran too long."""


class FeatureNotFound(StoreError):
    """A feature or dictionary that the store does not have; the message gives what it has."""


def one_line(error: BaseException | str) -> str:
    """The text of `error` without DuckDB's excerpt of the query and without line breaks."""
    lines = []
    for line in str(error).splitlines():
        if line.startswith("LINE ") or (line.strip() and not line.strip(" ^")):
            continue
        lines.append(line.strip())
    return " ".join(" ".join(lines).split()).strip()
