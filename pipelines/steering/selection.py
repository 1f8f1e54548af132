"""Which features an edit is about: by id, by words, by SQL."""

from collections.abc import Sequence
from dataclasses import replace

from saeql.store.feature_store import FeatureStore

from .edits import Edit, SteerError
from .vectors import SteeringVector


def chosen(
    store: FeatureStore,
    edit: Edit,
    *,
    features: Sequence[str] = (),
    search: str | None = None,
    where: str | None = None,
    top: int = 1,
    vectors: Sequence[SteeringVector] = (),
    dictionary: str | None = None,
) -> list[Edit]:
    """One edit like `edit` for each feature named: "12", or "12:0.3" with a strength of its own.

    `search` adds the `top` features that words find, `where` (or both) those that meet a condition over the view
    `features`, best labels first; `vectors` join them.
    Raises SteerError for what is no feature, and where nothing is found; SQLError for a condition that is none.
    """
    check_top(top)
    found = [_parsed(text, edit) for text in features] + [replace(edit, feature=vector) for vector in vectors]
    if search is not None:
        hits = store.search(search, limit=top, where=where, dictionary=dictionary)
        found += [_of(edit, hit.feature) for hit in hits]
    elif where is not None:
        found += [_of(edit, feature) for feature in store.matching(where, limit=top, dictionary=dictionary)]
    if not found:
        asked = " and ".join(f"{k} {v!r}" for k, v in (("search", search), ("where", where)) if v is not None)
        raise SteerError(
            f"no feature meets {asked}" if asked else "name a feature (--feature, --search, --where) or a --vector"
        )
    return found


def chosen_features(
    store: FeatureStore,
    features: Sequence[str],
    *,
    search: str | None,
    where: str | None,
    top: int,
    dictionary: str | None = None,
) -> list[int]:
    """Ids of the features named, as `chosen` takes them. Raises what it raises."""
    found = chosen(store, Edit(0), features=features, search=search, where=where, top=top, dictionary=dictionary)
    return [edit.feature for edit in found if isinstance(edit.feature, int)]


def check_top(top: int) -> None:
    """Raises SteerError for a number of features that is none."""
    if top < 1:
        raise SteerError(f"--top {top}: at least 1 feature is taken")


def labels_of(store: FeatureStore, edits: Sequence[Edit], dictionary: str | None = None) -> list[str]:
    """What an edit is about, for each: the feature's label or the vector's name."""
    return [
        store.feature(e.feature, dictionary)["label"] if isinstance(e.feature, int) else e.feature.name for e in edits
    ]


def _parsed(text: str, edit: Edit) -> Edit:
    number, colon, strength = text.partition(":")
    try:
        return _of(edit, int(number), float(strength) if colon else edit.strength)
    except ValueError:
        raise SteerError(f"{text!r} is no feature: give its id, or id:strength") from None


def _of(edit: Edit, feature: int, strength: float | None = None) -> Edit:
    return replace(edit, feature=feature, strength=edit.strength if strength is None else strength)
