"""Stores and evidence shared by the tests of store/."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore

_SPEC = importlib.util.spec_from_file_location("store_synthetic", Path(__file__).with_name("synthetic.py"))
assert _SPEC is not None and _SPEC.loader is not None
_SYNTHETIC = importlib.util.module_from_spec(_SPEC)
sys.modules["store_synthetic"] = _SYNTHETIC
_SPEC.loader.exec_module(_SYNTHETIC)


@pytest.fixture(scope="session")
def synthetic() -> Any:
    """The module that makes evidence."""
    return _SYNTHETIC


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Two dictionaries of 40 features on 60 windows of 32 tokens."""
    size = _SYNTHETIC.Size(dictionaries=("topk", "other"))
    return _SYNTHETIC.write(tmp_path_factory.mktemp("evidence"), size)


@pytest.fixture(scope="session")
def store_path(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store built from `evidence`, not to be changed."""
    return FeatureStore.build(tmp_path_factory.mktemp("store") / "features.duckdb", evidence)


@pytest.fixture
def store(store_path: Path) -> Iterator[FeatureStore]:
    with FeatureStore.open(store_path) as opened:
        yield opened


@pytest.fixture
def bare_evidence(tmp_path: Path) -> Evidence:
    """One dictionary, no labels and no metrics."""
    return _SYNTHETIC.write(tmp_path / "evidence", _SYNTHETIC.Size(), labels=False, metrics=False)


@pytest.fixture
def bare_labelled(tmp_path: Path) -> Evidence:
    """One dictionary with labels, to be changed."""
    return _SYNTHETIC.write(tmp_path / "evidence", _SYNTHETIC.Size(), metrics=False)
