"""Commands that exchange dictionaries with other libraries."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def import_(
    source: Annotated[str, Parameter(help="Folder or file of another library, or a hub repository.")],
    out: Annotated[Path, Parameter(help="Dictionary folder to write.")],
    *,
    format: Annotated[
        str | None,
        Parameter(
            help="saelens, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, "
            "openai, llama_scope or llamascopium; unset: the files decide. parquet: a shared store."
        ),
    ] = None,
    revision: Annotated[str | None, Parameter(help="Revision of a hub repository.")] = None,
) -> None:
    """Turn a dictionary of another library into one of ours, or (--format parquet) a shared store into one to ask.

    docs/formats.md says what is kept.

    Example: saeql import path/to/sparsify/layers.5 imported --format sparsify
    """  # fmt: skip
    from ..exchange import import_any

    print(import_any(source, out, format=format, revision=revision))


def export(
    source: Annotated[Path, Parameter(help="Run directory or dictionary folder; for site also a store alone.")],
    out: Annotated[Path, Parameter(help="Folder to write.")],
    *,
    format: Annotated[
        str,
        Parameter(
            help="A dictionary as saelens, sparsify or dictionary_learning; an indexed run as site (its browser as "
            "files for any web host), parquet (to share), neuronpedia or saedashboard."
        ),
    ] = "saelens",
    creator: Annotated[str, Parameter(help="Name of the author, for neuronpedia.")] = "",
    creator_id: Annotated[str, Parameter(help="The author's id in the database, for neuronpedia.")] = "",
    release: Annotated[str, Parameter(help="Id of the release, for neuronpedia; unset: the run's name.")] = "",
    dictionary: Annotated[
        list[str] | None, Parameter(help="A dictionary to show, for site; unset: all of the store.", negative="")
    ] = None,
    only: Annotated[
        str | None, Parameter(help="Features that meet this SQL condition on the view features, for site.")
    ] = None,
    top: Annotated[int | None, Parameter(help="So many features, those of the best labels, for site.")] = None,
    features_per_file: Annotated[int | None, Parameter(help="For site; unset: 16.")] = None,
    workers: Annotated[int | None, Parameter(help="Processes that draw features, for site; unset: 1.")] = None,
) -> None:
    """Write a dictionary in another library's format, or a run's store to share or to show elsewhere.

    Example: saeql export runs/demo exported --format sparsify
    Example: saeql export runs/demo pages --format site
    """
    from ..export_formats import export as export_any

    print(
        export_any(
            source,
            out,
            format=format,
            creator=creator,
            creator_id=creator_id,
            release=release,
            dictionary=tuple(dictionary or ()),
            only=only,
            top=top,
            features_per_file=features_per_file,
            workers=workers,
        )
    )
