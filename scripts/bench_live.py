"""Training straight from the model: what the stream costs beyond the model's own forward pass, and what a resume costs.

    python scripts/bench_live.py [--tokens 12288] [--rounds 3] [--json FILE]

`bare` runs the truncated forward pass over windows that are tokenised already; `live` is everything that a training
waits for: reading, tokenising, packing, the forward pass, norms, the shuffled buffer, batches. Same model and windows,
interleaved, one thread, CPU time. `resume` is the time from a cursor in the middle of a group to its next batch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from saeql.pipelines import load_config, load_model
from saeql.pipelines.harvest import probe_widths
from saeql.pipelines.live_source import LiveSource
from saeql.pipelines.models import LanguageModel
from saeql.pipelines.train_windows import TrainWindows
from saeql.sae.hooks import capture
from saeql.sae.stream import Cursor

BATCH_TOKENS = 1024


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12_288, help="of one group, and of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None)
    lm: LanguageModel = load_model(config.model)
    widths = probe_widths(lm, config.model.hook_points)
    harvest = config.harvest
    windows = arguments.tokens // harvest.context_tokens // harvest.batch_windows * harvest.batch_windows
    row_bytes = sum(widths.values()) * lm.model.dtype.itemsize + 40
    group_bytes = windows * harvest.context_tokens * row_bytes

    def source() -> LiveSource:
        return LiveSource(
            lm, widths, config.corpus, harvest, batch_tokens=BATCH_TOKENS, norm_limits=dict.fromkeys(widths, 1e9),
            seed=0, buffer_bytes=group_bytes, overlap=False,
        )  # fmt: skip

    def live(cursor: Cursor | None = None) -> Cursor:
        """One group to its last batch; the cursor in its middle."""
        middle, num_batches = Cursor(), windows * (harvest.context_tokens - 1) // BATCH_TOKENS
        with source() as opened:
            assert opened.group_windows == windows
            stream = opened.batches(cursor)
            for number in range(1 if cursor else num_batches):
                batch = next(stream)
                middle = batch.cursor if number == num_batches // 2 else middle
        return middle

    reading = TrainWindows(lm, config.corpus, harvest)
    ids = [reading.take(harvest.batch_windows) for _ in range(windows // harvest.batch_windows)]
    tensors = [torch.from_numpy(batch.token_ids).long() for batch in ids if batch is not None]

    def bare() -> None:
        with torch.no_grad(), capture(lm.model, list(widths)) as reader:
            for batch in tensors:
                reader.run(batch)

    middle = live()  # warm
    bare()
    seconds: dict[str, list[float]] = {"bare": [], "live": [], "resume": []}
    for _ in range(arguments.rounds):
        seconds["bare"].append(cpu_seconds(bare))
        seconds["live"].append(cpu_seconds(live))
        seconds["resume"].append(cpu_seconds(lambda: live(middle)))
    tokens = windows * harvest.context_tokens
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "model": config.model.name,
        "hook_points": list(widths),
        "dtype": str(lm.model.dtype),
        "tokens": tokens,
        "tokens_per_cpu_second": {name: round(tokens / value) for name, value in medians.items()},
        "live_over_bare": round(
            statistics.median(b / n for b, n in zip(seconds["bare"], seconds["live"], strict=True)), 3
        ),
        "resume_over_group": round(medians["resume"] / medians["live"], 3),
        "cpu_seconds": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
        "torch": torch.__version__,
        "load": [round(v, 2) for v in os.getloadavg()],
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
