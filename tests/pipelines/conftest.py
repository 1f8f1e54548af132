"""A real server of a real model, for what asks one; a labelled run of planted evidence."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeql.pipelines.config import RunConfig, to_toml
from saeql.pipelines.label_job import label_run
from saeql.pipelines.label_parts import LABEL_WORK
from saeql.pipelines.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_evidence as synthetic
from llama_server import llama_server


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A labelled run of planted evidence, which has neither model nor activations. Tests must not change it."""
    made = Run(tmp_path_factory.mktemp("planted"), RunConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "DICTIONARY", made.spec.name)
        synthetic.build(made.path / "evidence")
    (made.path / "config.toml").write_text(to_toml(made.config), encoding="utf-8")
    done = {stage: {"seconds": 1.0, "finished": "now"} for stage in ("harvest", "train", "index")}
    (made.path / "stages.json").write_text(json.dumps(done), encoding="utf-8")
    label_run(made)
    assert not (made.path / LABEL_WORK).exists()
    return made


@pytest.fixture(scope="session")
def llama() -> Iterator[str]:
    """Address of llama.cpp's server with SmolLM2-135M-Instruct."""
    if sys.platform != "linux":  # where the dev extra does not bring it
        pytest.importorskip("xllamacpp")
    with llama_server() as address:
        yield address
