"""Commands that ask a finished run, or a store: search, show, sql."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .common import StorePath

if TYPE_CHECKING:
    from saeql.store.console import Console

StoredDictionary = Annotated[
    str | None, Parameter(help="A dictionary of the store; its first, unless named.", negative="")
]


def search(
    run: StorePath,
    text: Annotated[
        str | None, Parameter(help="Words to look for in labels and in promoted and activating tokens.")
    ] = None,
    *,
    meaning: Annotated[
        str | None, Parameter(help="Features whose label, or tokens they fire on, mean something like this text.")
    ] = None,
    token: Annotated[str | None, Parameter(help='Features that fire on this token, such as " bank".')] = None,
    effect: Annotated[str | None, Parameter(help="Features that raise the logit of this token.")] = None,
    prompt: Annotated[str | None, Parameter(help="Features that fire on this text; loads the model.")] = None,
    like: Annotated[
        str | None,
        Parameter(help="Features whose decoder row is nearest to that of this one, or to a steering vector: a file."),
    ] = None,
    among: Annotated[
        str | None, Parameter(help="With --like: another dictionary to look in, a name in the run or a folder or file.")
    ] = None,
    limit: Annotated[int, Parameter(help="Number of features.")] = 10,
    where: Annotated[str | None, Parameter(help="SQL condition on the view features.")] = None,
    dictionary: StoredDictionary = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Find features by words, meaning, token, effect, text or direction, best first, with what matched.

    Example: saeql search runs/demo "music" --where "density < 0.01"
    """
    from ..output import print_hits
    from ..search import find
    from ..stores import open_store

    store, opened = open_store(run)
    with store:
        asked = {"words": text, "meaning": meaning, "token": token, "effect": effect, "prompt": prompt, "like": like}
        found = find(opened, store, asked, dictionary=dictionary, among=among, limit=limit, where=where)
        print_hits(*found, as_json=json)


def show(
    run: StorePath,
    feature: Annotated[int, Parameter(help="Feature id.")],
    *,
    examples: Annotated[int, Parameter(help="Number of top examples.")] = 5,
    split: Annotated[str, Parameter(help="Split of the examples: train or test.")] = "train",
    dictionary: StoredDictionary = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """One feature: label and score, statistics, promoted tokens, neighbours, top examples.

    Example: saeql show runs/demo 123
    """
    from ..output import print_feature
    from ..stores import open_store

    with open_store(run)[0] as opened:
        print_feature(opened, feature, dictionary=dictionary, num_examples=examples, split=split, as_json=json)


def sql(
    run: StorePath,
    query: Annotated[
        str | None,
        Parameter(
            help="SQL over the views dictionaries, features, examples, documents, labels, "
            "neighbours, logit_effects, activations, metrics. Without one, statements are read from stdin."
        ),
    ] = None,
    *,
    file: Annotated[Path | None, Parameter(help="File of statements, each ended by a semicolon.")] = None,
    format: Annotated[
        str | None, Parameter(help="table, json, csv, arrow or parquet. Default: what --out says, else table.")
    ] = None,
    json: Annotated[bool, Parameter(help="Same as --format json.", negative="")] = False,
    csv: Annotated[bool, Parameter(help="Same as --format csv.", negative="")] = False,
    out: Annotated[Path | None, Parameter(help="File to write, .json, .csv, .arrow, .feather or .parquet.")] = None,
    max_rows: Annotated[
        int | None, Parameter(help="Rows at most. Default: 1000; all of them for --out, arrow and parquet.")
    ] = None,
    timeout: Annotated[float, Parameter(help="Seconds that a statement may take.")] = 30.0,
    memory: Annotated[str, Parameter(help="Memory that it may take; half of it is the largest result.")] = "2GB",
) -> None:
    """Ask the feature store in SQL. Read-only, in a process of its own that reaches nothing but the store.

    Example: saeql sql runs/demo "SELECT feature, label, density FROM features ORDER BY density DESC LIMIT 5"
    """  # fmt: skip
    import sys

    from saeql.store.errors import StoreError

    from ..results import BINARY, chosen_format
    from ..stores import store_path
    from .statements import Asker, prompt_of_terminal

    if (json, csv, format is not None).count(True) > 1:
        raise StoreError("--json, --csv and --format name one format: give one of them")
    if query is not None and file is not None:
        raise StoreError("give a query or --file, not both")
    style = chosen_format("json" if json else "csv" if csv else format, out)
    if max_rows is None and out is None and style not in BINARY:
        max_rows = 1000
    with _console(store_path(run), memory) as console:
        asker = Asker(console, style, out, max_rows=max_rows, seconds=timeout)
        if query is not None:
            asker.ask(query)
        elif file is not None:
            asker.ask_all(_text_of(file))
        elif sys.stdin.isatty() and sys.stdout.isatty():
            asker.converse(prompt_of_terminal())
        else:
            asker.ask_all(sys.stdin.read())


def _console(store: Path, memory: str) -> "Console":
    """A started console; a store of an older saeql is brought to this one's schema first, as everywhere."""
    from saeql.store.console import Console
    from saeql.store.errors import OldStoreError

    console = Console(store, memory_limit=memory)
    try:
        console.start()
    except OldStoreError:
        from saeql.store.feature_store import FeatureStore

        FeatureStore.open(store).close()
        console = Console(store, memory_limit=memory)
    return console


def _text_of(file: Path) -> str:
    from saeql.store.errors import StoreError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read {file}: {error}") from error
