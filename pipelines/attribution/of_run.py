"""Attribution for a run: its model in float32, its dictionary, a later dictionary by name, labels from its store."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from saeql.sae.hook_points import HookPointError, hook_points, resolve
from saeql.store.errors import StoreError

from ..dictionaries import load_any
from ..find_dictionary import HOOK_KEYS, dictionary_path
from .attributor import Attributor
from .feeds import LaterDictionary
from .target import WhyError

if TYPE_CHECKING:
    from ..run import Run


def attributor_of(run: "Run") -> Attributor:
    """The attributor of a run's dictionary. The model is in float32: effects of features are small differences.

    Raises WhyError for a crosscoder, ModelMismatch where the model is another by now.
    """
    spec, dictionary = run.spec, run.dictionary()
    return Attributor(
        run.exact_language_model, dictionary, spec.reads, spec.writes, dictionary.metadata.get("saeql", {})
    )


def later_dictionary(run: "Run", of: Attributor, source: str, at: str = "") -> tuple[LaterDictionary, "Run | None"]:
    """A dictionary by name in the run or its sweep, of another run's folder, or a folder or file; and the run it is of.

    `at` is the hook point it reads, where it does not say so itself.
    Raises DictionaryError where there is none, WhyError where its hook point is unknown, ModelMismatch.
    """
    from ..run import Run

    owner: Run | None = run
    if (Path(source) / "config.toml").exists():
        owner = Run.open(source)
        path = owner.dictionary_path
    else:
        path = dictionary_path(run, source)
        owner = run if path == run.dictionary_path else None
    dictionary = load_any(path)
    reads = (at,) if at else dictionary.config.reads or _named(of, dictionary.metadata)
    if not reads:
        raise WhyError(f"{source} does not say which hook point it reads: name it with --at")
    return LaterDictionary(dictionary, reads, dictionary.metadata.get("saeql", {}), of), owner


def _named(of: Attributor, metadata: dict) -> tuple[str, ...]:
    """The hook point of this model that another library's metadata names; none where it names none that there is."""
    named = [str(metadata[key]) for key in HOOK_KEYS if metadata.get(key)]
    for name in hook_points(of.lm.model):
        if {name, resolve(of.lm.model, name).transformer_lens_name} & set(named):
            return (name,)
    for name in named:
        with suppress(HookPointError):
            return (resolve(of.lm.model, name).name,)
    return ()


def labels_of(run: "Run | None", features: Iterable[int]) -> dict[int, str]:
    """Labels by feature from the run's store; none where there is no store, or no run."""
    wanted = sorted(set(features))
    if run is None:
        return {}
    try:
        with run.store() as store:
            rows = store.trusted_sql(
                "SELECT feature, label FROM features WHERE dictionary = $name AND feature IN (SELECT unnest($ids))",
                {"name": run.spec.name, "ids": wanted},
            )
    except StoreError:
        return {}
    return dict(zip(rows["feature"].to_pylist(), rows["label"].to_pylist(), strict=True))
