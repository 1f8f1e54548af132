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
            "openai, llama_scope or llamascopium; unset: the files decide."
        ),
    ] = None,
    revision: Annotated[str | None, Parameter(help="Revision of a hub repository.")] = None,
) -> None:
    """Turn a dictionary of another library into one of ours; docs/formats.md says what is kept.

    Example: saeql import path/to/sparsify/layers.5 imported --format sparsify
    """  # fmt: skip
    from ..exchange import import_dictionary

    print(import_dictionary(source, out, format=format, revision=revision))


def export(
    source: Annotated[Path, Parameter(help="Run directory or dictionary folder.")],
    out: Annotated[Path, Parameter(help="Folder to write.")],
    *,
    format: Annotated[str, Parameter(help="saelens, sparsify or dictionary_learning.")] = "saelens",
) -> None:
    """Write a dictionary in another library's format.

    Example: saeql export runs/demo exported --format sparsify
    """
    from ..exchange import export_dictionary

    print(export_dictionary(source, out, format=format))
