"""What the tests of crashes start and kill: `python writers.py build|labels|upgrade STORE EVIDENCE`.

Prints `ready` when it begins to write. A second process of it is also what a busy store is tested with.
"""

import sys

from saeql.store import publish
from saeql.store.build import upgrade_store
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore


def main(what: str, store: str, evidence: str) -> None:
    """Write `store` in one of three ways."""
    print("ready", flush=True)
    if what == "build":
        FeatureStore.build(store, Evidence(evidence))
    elif what == "labels":
        FeatureStore.sync(store, Evidence(evidence))
    elif what == "upgrade":
        upgrade_store(store)
    elif what == "hold":
        from pathlib import Path

        with publish.writing(Path(store), from_previous=True):
            print("holding", flush=True)
            sys.stdin.read()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
