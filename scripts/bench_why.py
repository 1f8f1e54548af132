"""How well attribution agrees with ablation on held-out contexts, and what a prompt costs.

    python scripts/bench_why.py runs/demo --contexts 24 --tokens 32 --steps 1 8
    python scripts/bench_why.py runs/demo --contexts 24 --tokens 32 --feeds runs/later --features 4

Every context is the start of a test window; the target is the logit of the model's likeliest next token. Correlations
are over pairs of a feature and a token: a uniform sample of those that are active, and the strongest by attribution.
`gap` is the distance of the sum of attributions, error included, from what the target loses without all of it, as a
share of that loss. With `--feeds`: features active in each context are drawn at random, and what they feed in a later
dictionary is estimated, ablated, and ablated once more by steering.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from saeql.pipelines import Run
from saeql.pipelines.attribution.agreement import agreement
from saeql.pipelines.attribution.causes import Why
from saeql.pipelines.attribution.feeds import Feeds, LaterDictionary, feeds
from saeql.pipelines.attribution.of_run import later_dictionary
from saeql.pipelines.attribution.parts import rows_read
from saeql.pipelines.editing.what_moved import heldout_windows
from saeql.pipelines.steering.edits import Edit
from saeql.sae.hooks import capture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ablate", type=int, default=30)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--feeds")
    parser.add_argument("--features", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run.open(options.run)
    windows = heldout_windows(run, options.contexts)[0][:, : options.tokens].tolist()
    if options.feeds:
        tell_feeds(run, windows, options.feeds, options.features)
        return
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


@torch.no_grad()
def tell_feeds(run: Run, windows: list[list[int]], source: str, per_context: int) -> None:
    """Print how well the linear estimates of what features feed agree with ablation, and both with steering."""
    attributor, draw = run.attributor, random.Random(0)
    later, _ = later_dictionary(run, attributor, source)
    found: list[Feeds] = []
    seconds, apart = [], []
    for ids in windows:
        with capture(attributor.lm.model, [attributor.reads], attributor.lm.device) as reader:
            rows = reader.run(torch.tensor([ids]))[attributor.reads][0].float()
        latents = attributor.dictionary.encode(rows[rows_read(rows, attributor.reads, attributor.metadata)])
        active = sorted(set(latents.indices[latents.values > 0].tolist()))
        for feature in draw.sample(active, min(per_context, len(active))):
            started = time.perf_counter()
            found.append(feeds(attributor, feature, later, ids))
            seconds.append(time.perf_counter() - started)
            apart.append(_apart_from_steering(run, later, ids, found[-1]))
    fed = [f for one in found for f in one.fed]
    pooled = agreement("", [f.linear for f in fed], [f.exact for f in fed])
    each = [one.agreement for one in found]
    staying = [one.agreement_staying for one in found]
    sizes = [(one.num_appearing + one.num_vanishing) / max(one.agreement.n, 1) for one in found]
    print(
        f"{len(found)} features in {len(windows)} contexts, {statistics.median(seconds):.2f} s each (median)\n"
        f"  of one feature, over {statistics.median(a.n for a in each):.0f} (median) later activations: "
        f"Pearson {told([a.pearson for a in each])}  Spearman {told([a.spearman for a in each])}, median (least)\n"
        f"  without those that vanish: Pearson {told([a.pearson for a in staying])}  "
        f"Spearman {told([a.spearman for a in staying])}\n"
        f"  the {len(found[0].fed)} that each feeds most, n = {pooled.n}: "
        f"Pearson {pooled.pearson:.3f}  Spearman {pooled.spearman:.3f}\n"
        f"  later activations that appear or vanish: {statistics.median(sizes):.3f} of those there (median)\n"
        f"  exact effects against the steerer's ablation: {max(apart):.1e} of the largest effect at most"
    )


def _apart_from_steering(run: Run, later: LaterDictionary, ids: list[int], found: Feeds) -> float:
    """Largest difference of an exact effect from that of steering, as a share of the largest effect."""
    steerer, totals, keep = run.steerer(exact=True), [], None
    for edits in ([], [Edit(found.feature, "ablate", positions=tuple(found.positions))]):
        with steerer.applied(edits), capture(steerer.lm.model, [later.reads], steerer.lm.device) as reader:
            rows = reader.run(torch.tensor([ids]))[later.reads][0].float()
        keep = rows_read(rows, later.reads, later.metadata) if keep is None else keep
        latents = later.dictionary.encode(rows[keep])
        own = torch.zeros(later.dictionary.d_sae)
        totals.append(own.index_add(0, latents.indices.flatten().long(), latents.values.flatten()))
    change = totals[0] - totals[1]
    largest = max(abs(f.exact) for f in found.fed)
    return max(abs(f.exact - float(change[f.feature])) for f in found.fed) / max(largest, 1e-9)


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
