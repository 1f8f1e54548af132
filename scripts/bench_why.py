"""How well attribution agrees with ablation on held-out contexts, and what a prompt costs.

    python scripts/bench_why.py runs/demo --contexts 24 --tokens 32 --steps 1 8

Every context is the start of a test window; the target is the logit of the model's likeliest next token. Correlations
are over pairs of a feature and a token: a uniform sample of those that are active, and the strongest by attribution.
`gap` is the distance of the sum of attributions, error included, from what the target loses without all of it, as a
share of that loss.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from saeql.pipelines import Run
from saeql.pipelines.attribution.agreement import agreement
from saeql.pipelines.attribution.causes import Why
from saeql.pipelines.editing.what_moved import heldout_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ablate", type=int, default=30)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run.open(options.run)
    windows = heldout_windows(run, options.contexts)[0][:, : options.tokens].tolist()
    run.why(windows[0], ablate=0)
    for steps in options.steps:
        found, seconds = [], []
        for ids in windows:
            started = time.perf_counter()
            found.append(run.why(ids, steps=steps, ablate=options.ablate))
            seconds.append(time.perf_counter() - started)
        tell(f"{steps} step{'s' * (steps > 1)}", found, seconds)


def tell(name: str, found: list[Why], seconds: list[float]) -> None:
    """Print one line of each number."""
    print(f"{name}: {len(found)} contexts, {statistics.median(seconds):.2f} s each (median)")
    for sample in ("random", "strongest"):
        pairs = [pairs_of(why, sample) for why in found]
        each = [a for why in found for a in why.agreements if a.sample == sample]
        x, y = ([p for pair in pairs for p in pair[i]] for i in (0, 1))
        pooled = agreement(sample, x, y)
        print(
            f"  {sample:<10} n = {pooled.n:>5}  pooled Pearson {pooled.pearson:.3f}  Spearman {pooled.spearman:.3f};  "
            f"by context, median (least): Pearson {told([a.pearson for a in each])}  "
            f"Spearman {told([a.spearman for a in each])}"
        )
    gaps = [abs(w.attribution - w.exact) / abs(w.exact) for why in found for w in why.wholes if w.part == "everything"]
    shares = [
        abs(parts["error"]) / (abs(parts["error"]) + abs(parts["features"]))
        for parts in ({w.part: w.exact for w in why.wholes} for why in found)
    ]
    print(
        f"  gap {statistics.median(gaps):.3f} (median); the error's share by ablation {statistics.median(shares):.2f}"
    )


def pairs_of(why: Why, sample: str) -> tuple[list[float], list[float]]:
    """Attributions and exact effects of one sample."""
    n = next(a.n for a in why.agreements if a.sample == sample)
    chosen = [p for p in why.pairs if p.is_random] if sample == "random" else why.pairs[:n]
    return [p.attribution for p in chosen], [p.exact for p in chosen if p.exact is not None]


def told(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known):.3f} ({min(known):.3f})"


if __name__ == "__main__":
    main()
