"""`saeql export`: a run, its store or its dictionary in any format; nothing is imported but what the format needs."""

from pathlib import Path
from typing import Any

from saeql.sae.config import ConfigError

#: Formats of whole runs; those of dictionaries are in `saeql.sae.exchange`.
RUN_FORMATS = ("parquet", "neuronpedia", "saedashboard")
#: Options of `export` that one format takes, and no other.
OPTIONS = {
    "neuronpedia": ("creator", "creator_id", "release"),
    "site": ("dictionary", "only", "top", "features_per_file", "workers"),
}


def export(source: Path, out: Path, *, format: str = "saelens", **options: Any) -> str:
    """Write a run or its dictionary in any format; returns one line.

    `options` are those of `OPTIONS`, unset where None or empty. Raises ConfigError for one of another format, and what
    the format's own function raises.
    """
    options = {name: value for name, value in options.items() if value not in (None, "", ())}
    for name in options:
        if name not in OPTIONS.get(format, ()):
            owner = next(owner for owner, names in OPTIONS.items() if name in names)
            raise ConfigError(f"--{name.replace('_', '-')} is for --format {owner}, not {format}")
    if format == "site":
        from .site.export import export_site

        return str(export_site(source, out, **options))
    if format not in RUN_FORMATS:
        from saeql.sae.exchange import WRITABLE

        from .exchange import export_dictionary

        if format not in WRITABLE:
            raise ConfigError(
                f"unknown format {format!r}: a dictionary is written as {', '.join(WRITABLE)}, a run's store as "
                f"{', '.join(RUN_FORMATS)} or site"
            )
        return export_dictionary(source, out, format=format)
    from .run import Run

    run = Run.open(source)
    if format == "parquet":
        from .share import export_store

        written = export_store(run, out)
    elif format == "saedashboard":
        from .saedashboard import export_saedashboard

        written = export_saedashboard(run, out)
    else:
        from .neuronpedia import export_neuronpedia

        written = export_neuronpedia(
            run,
            out,
            creator=options.get("creator", ""),
            creator_id=options.get("creator_id", ""),
            release=options.get("release") or run.path.resolve().name,
        )
    return f"{written}: {format}"
