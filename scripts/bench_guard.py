"""What a guard costs a model while it writes: CPU time a token under a guard over CPU time without, interleaved.

    python scripts/bench_guard.py runs/demo guard.json --tokens 64 --rounds 7

Prints the median ratio of every action with the smallest and the largest. Thresholds are out of reach for "log" and
"nothing fires"; where it "fires", all features do from the first token on, and stay clamped.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from saeql.pipelines import Run
from saeql.pipelines.guarding.guard import Guard
from saeql.pipelines.guarding.watch import guarded

PROMPT = "The history of the city begins with a small settlement on the river, and over the centuries"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("guard")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steerer, learned = Run.open(options.run).steerer(), Guard.load(options.guard)
    silent = replace(learned, features=tuple(replace(w, threshold=1e9) for w in learned.features))
    always = replace(learned, features=tuple(replace(w, threshold=-1.0) for w in learned.features))
    cases = {"log": (silent, "log"), "clamp, nothing fires": (silent, "clamp"), "clamp, fires": (always, "clamp")}
    fixed = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}

    def plain() -> float:
        started = time.process_time()
        steerer.generate(PROMPT, **fixed)
        return time.process_time() - started

    def under(guard: Guard, action: str) -> float:
        started = time.process_time()
        guarded(guard, steerer, PROMPT, action, **fixed)
        return time.process_time() - started

    plain()
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    alone = []
    for _ in range(options.rounds):
        for name, (guard, action) in cases.items():
            before, watched, after = plain(), under(guard, action), plain()
            alone += [before, after]
            ratios[name].append(2 * watched / (before + after))
    print(
        f"plain: {1000 * statistics.median(alone) / options.tokens:.1f} ms of CPU a token; {len(learned.ids)} features"
    )
    for name, found in ratios.items():
        print(f"{name:<24} {statistics.median(found):.3f}  ({min(found):.3f} to {max(found):.3f})")


if __name__ == "__main__":
    main()
