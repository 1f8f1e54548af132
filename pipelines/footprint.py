"""What a process of saeql holds before it does anything, measured in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Where the operating system does not say (no /proc): Linux, torch 2.13, transformers 5.23.
_TYPICAL = (180_000_000, 390_000_000)


@dataclass(frozen=True)
class Footprint:
    """Anonymous memory in bytes: of training and labelling, and of the stages that also load a language model."""

    without_model: int
    with_model: int
    measured: bool


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous resident memory of a process (`RssAnon`): its own, without mapped files. 0 where it is unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def start_measuring(tokenizer: str, *, wikipedia: bool) -> Callable[[], Footprint]:
    """Start a child that imports what the stages import; the returned function waits for its answer."""
    command = [sys.executable, "-m", "saeql.pipelines.footprint", tokenizer, str(int(wikipedia))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def finish() -> Footprint:
        out, _ = child.communicate()
        try:
            without_model, with_model = json.loads(out)
        except ValueError:
            without_model = with_model = 0
        return Footprint(without_model, with_model, True) if without_model else Footprint(*_TYPICAL, False)

    return finish


def _main(tokenizer: str, wikipedia: str) -> None:
    import saeql.pipelines.cli
    import saeql.pipelines.run  # noqa: F401

    without_model = anonymous_bytes()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.from_pretrained(tokenizer)
    AutoModelForCausalLM._model_mapping.get(type(config), None)  # imports the model's own code
    if wikipedia == "1":
        import gensim.corpora.wikicorpus  # noqa: F401
    print(json.dumps([without_model, anonymous_bytes()]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
