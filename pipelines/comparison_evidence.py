"""What a comparison found, kept as evidence of the runs that were compared, and so in their stores."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from saeql.sae.config import ConfigError
from saeql.store.records import MATCHES

from .compare import Comparison, locate
from .run import Run


@contextmanager
def held_runs(sources: Sequence[str]) -> Iterator[None]:
    """Hold the runs among `sources` against other writers, so that what is compared is what is saved.

    Raises ConfigError where none of them is a run, RunError where another process works on one.
    """
    runs = {place.run.resolve(): place.run for place in map(locate, sources) if place.run is not None}
    if not runs:
        raise ConfigError("--save keeps the comparison in the runs that are compared, and none of the sources is a run")
    with ExitStack() as held:
        for run in runs.values():
            held.enter_context(Run.open(run).locked())
        yield


def save_comparison(comparison: Comparison) -> dict[Path, bool]:
    """Keep a comparison in every run whose own dictionary is in it, in place of the one kept before.

    To be called within `held_runs`. Returns the runs, and whether the store of each is built and holds it.
    """
    saved = {}
    for number, compared in enumerate(comparison.dictionaries):
        if compared.run is not None:
            run = Run.open(compared.run)
            saved[run.path] = run.save_comparison(_tables(comparison, number, run.spec.name))
    return saved


def _tables(comparison: Comparison, number: int, dictionary: str) -> dict[str, pa.Table]:
    """Evidence tables `stability` and `matches` of one of the dictionaries, under its name in its run."""
    name = comparison.dictionaries[number].name
    names = [compared.name for compared in comparison.dictionaries]
    features = comparison.features.filter(pc.field("dictionary") == name)
    stability = features.drop_columns(["dictionary"])
    for column, values in (
        ("dictionary", pa.repeat(dictionary, len(features))),
        ("compared_as", pa.repeat(name, len(features))),
        ("compared", pa.array([names] * len(features), pa.list_(pa.string()))),
    ):
        stability = stability.append_column(column, values)
    return {"stability": stability, "matches": _matches(comparison, name, dictionary)}


def _matches(comparison: Comparison, name: str, dictionary: str) -> pa.Table:
    """Its pairs, whichever of the two it is in them."""
    both = comparison.matches
    first = both.filter(pc.field("dictionary") == name)
    second = both.filter(pc.field("other_dictionary") == name)
    turned = ["other_dictionary", "other_feature", "dictionary", "feature", *MATCHES.names[4:]]
    table = pa.concat_tables([first, second.select(turned).rename_columns(MATCHES.names)])
    return table.set_column(0, "dictionary", pa.repeat(dictionary, len(table)))
