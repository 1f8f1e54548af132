"""A real server of a real model, for what asks one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from llama_server import llama_server


@pytest.fixture(scope="session")
def llama() -> Iterator[str]:
    """Address of llama.cpp's server with SmolLM2-135M-Instruct."""
    if sys.platform != "linux":  # where the dev extra does not bring it
        pytest.importorskip("xllamacpp")
    with llama_server() as address:
        yield address
