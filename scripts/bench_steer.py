"""What steering costs a model while it writes: CPU time a token with edits over CPU time without, interleaved.

    python scripts/bench_steer.py runs/demo --tokens 64 --rounds 7

Prints the median ratio of every set of edits with the smallest and the largest. Edits that read the dictionary encode
each new token once, however many features they are about.
"""

import argparse
import statistics
import time

import torch

from saeql.pipelines import Edit, Run

PROMPT = "The history of the city begins with a small settlement on the river, and over the centuries"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steerer = Run.open(options.run).steerer()
    features = sorted(steerer.scales)[:5]
    cases = {
        "add, one feature": [Edit(features[0], "add", 0.1)],
        "add, five features": [Edit(f, "add", 0.05) for f in features],
        "clamp, one feature": [Edit(features[0], "clamp")],
        "clamp, five features": [Edit(f, "clamp") for f in features],
        "ablate_direction": [Edit(features[0], "ablate_direction")],
        "add, generated tokens only, fading": [
            Edit(features[0], "add", 0.1, positions="generated", schedule="fade:50")
        ],
    }
    fixed = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}

    def seconds(edits: list[Edit]) -> float:
        started = time.process_time()
        steerer.generate(PROMPT, edits, **fixed)
        return time.process_time() - started

    seconds([])
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    plain = []
    for _ in range(options.rounds):
        for name, edits in cases.items():
            before, with_edits, after = seconds([]), seconds(edits), seconds([])
            plain += [before, after]
            ratios[name].append(2 * with_edits / (before + after))
    print(f"plain: {1000 * statistics.median(plain) / options.tokens:.1f} ms of CPU a token")
    for name, found in ratios.items():
        print(f"{name:<36} {statistics.median(found):.3f}  ({min(found):.3f} to {max(found):.3f})")


if __name__ == "__main__":
    main()
