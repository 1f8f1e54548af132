"""Train dictionaries on one run's stored rows, with saeql and with SAELens, and score both on the same held-out rows.

    python scripts/bench_quality.py ours RUN RESULTS
    python scripts/bench_quality.py saelens RUN RESULTS
    python scripts/bench_quality.py report RUN RESULTS [--save]

RUN is a run directory whose activations are harvested; it is only read. Steps, batch, d_sae and k are those of its
config.toml. RESULTS takes the dictionaries and one line of results.jsonl after every training; trainings that it
already holds are not repeated, so a killed benchmark goes on where it was. Everything is float32 on one CPU thread
unless told otherwise. `saelens` needs sae-lens in the same environment as saeql.

Both libraries see the same rows in the same order: the run's training rows, shuffled with the seed. saeql trains as
`saeql train` does. SAELens trains by its own SAETrainer with its own training classes, loss, auxiliary loss and Adam;
its inputs are scaled by its own `expected_average_only_in`, estimated on the rows that saeql measures its input on. Its
learning rate is chosen for it: the first seed of TopK with every `--lrs`; then likewise the steps without firing after
which a latent is dead (`--dead-after-steps`: its default, and about what saeql's dead_after_tokens comes to). The best
of both goes on to all the other trainings.

Scored are all test rows that training would keep (no first positions, no massive rows), through one dense float64
forward pass over what either library saved. BatchTopK is scored as it is used: with its inference threshold.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bench_about import ROOT, about

from saeql.kernels.sparse_matmul import SparseLatents
from saeql.pipelines import Run
from saeql.pipelines.atomic import write_whole
from saeql.pipelines.dictionaries import specify
from saeql.pipelines.harvest import open_source
from saeql.pipelines.sources import ShardSource
from saeql.pipelines.train import train_dictionaries
from saeql.sae.exchange.registry import read
from saeql.sae.exchange.weights import DictionaryWeights
from saeql.sae.files import load_dictionary
from saeql.sae.metrics import RowMetrics

RESULTS_FILE = "results.jsonl"
_SCORE_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: what makes it a different one."""

    library: str
    architecture: str
    seed: int
    num_steps: int
    lr: float
    warmup_steps: int
    decay_steps: int
    dead_after_steps: int
    matmul_dtype: str = "float32"

    @property
    def name(self) -> str:
        """Folder of its dictionary."""
        fields = asdict(self)
        library, architecture, seed = (fields.pop(key) for key in ("library", "architecture", "seed"))
        settings = "_".join(f"{value:g}" if isinstance(value, float) else str(value) for value in fields.values())
        return f"{library}_{architecture}_{settings}_seed{seed}"


# --- what both share -------------------------------------------------------------------------------------------------


def kept_rows(run: Run, split: str, batch_tokens: int, **options: Any) -> ShardSource:
    """The rows of a split that training keeps, at the hook point of the run's dictionary."""
    return open_source(run.activations, split, run.harvest_info, run.spec.reads, batch_tokens, **options)


@torch.no_grad()
def score(run: Run, weights: DictionaryWeights, own: torch.nn.Module) -> dict[str, Any]:
    """fvu with its interval, l0 and dead share on the kept test rows, by the container's dense forward pass in float64.

    `own_fvu`, by the float32 forward pass of the library's own class, is there to check that.
    """
    double = replace(weights, tensors={name: tensor.double() for name, tensor in weights.tensors.items()})
    meter, own_meter = (RowMetrics(weights.d_out, weights.d_sae) for _ in range(2))
    for batch in kept_rows(run, "test", _SCORE_ROWS).batches():
        x = batch.acts.double()
        z = double.encode_dense(x)
        latents = SparseLatents(*z.topk(int((z > 0).sum(1).max())), weights.d_sae)
        meter.update(x, double.decode_dense(z, x), latents, batch.document_ids)
        own_meter.update(x, own(batch.acts.float()), latents, batch.document_ids)
    found, own_found = meter.estimates(), own_meter.estimates()
    return {
        "fvu": found["fvu"].value,
        "fvu_interval": [found["fvu"].low, found["fvu"].high],
        "l0": found["l0"].value,
        "dead_share": found["dead_share"].value,
        "num_test_rows": found["fvu"].n,
        "own_fvu": own_found["fvu"].value,
    }


def load_results(folder: Path) -> list[dict[str, Any]]:
    """One mapping for every finished training."""
    file = folder / RESULTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_once(run: Run, folder: Path, training: Training) -> dict[str, Any]:
    """The result of a training: the stored one, or of the training that this starts."""
    for result in load_results(folder):
        if result["training"] == asdict(training):
            return result
    print(f"{datetime.datetime.now():%H:%M:%S} {training.name}", flush=True)
    wall, cpu = time.monotonic(), time.process_time()
    train = train_ours if training.library == "saeql" else train_saelens
    saved, load, package = train(run, training, folder / training.name)
    seconds = {"wall_seconds": round(time.monotonic() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    result = {
        "training": asdict(training),
        **score(run, read(saved), load(saved)),
        **seconds,
        "versions": {"torch": torch.__version__, **({package: version(package)} if package else {})},
    }
    with (folder / RESULTS_FILE).open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{datetime.datetime.now():%H:%M:%S} fvu {result['fvu']:.5f}, l0 {result['l0']:.2f}, {seconds}", flush=True)
    return result


# --- saeql -----------------------------------------------------------------------------------------------------------


def our_training(
    run: Run, architecture: str, seed: int, *, num_steps: int | None, lr: float | None, matmul_dtype: str
) -> Training:
    """What `saeql train` would do with the run's configuration and another architecture, seed and so on."""
    train = run.config.train
    num_steps = num_steps or train.num_steps
    return Training(
        library="saeql",
        architecture=architecture,
        seed=seed,
        num_steps=num_steps,
        lr=lr or train.peak_lr(run.config.dictionary.d_sae),
        warmup_steps=train.warmup_steps,
        decay_steps=round(train.decay_share * num_steps),
        dead_after_steps=train.dead_after_tokens // train.batch_tokens,
        matmul_dtype=matmul_dtype,
    )


def train_ours(run: Run, training: Training, folder: Path):
    """Train as `saeql train` does; the dictionary's folder, its loader, and no package."""
    dictionary = replace(run.config.dictionary, architecture=training.architecture)
    train = replace(run.config.train, num_steps=training.num_steps, matmul_dtype=training.matmul_dtype, lr=training.lr)
    config = replace(run.config, seed=training.seed, dictionary=dictionary, train=train)
    spec = specify(dictionary, config.model, training.seed)
    folder.mkdir(parents=True, exist_ok=True)
    train_dictionaries(Run(run.path, config), [spec], folder, resume=False)
    return folder / "dictionaries" / spec.name, load_dictionary, None


def ours(run: Run, folder: Path, arguments: argparse.Namespace) -> None:
    """All trainings of saeql."""
    for seed in arguments.seeds:
        for architecture in arguments.architectures:
            options = {"num_steps": arguments.steps, "lr": arguments.lr, "matmul_dtype": arguments.matmul_dtype}
            run_once(run, folder, our_training(run, architecture, seed, **options))


# --- SAELens ---------------------------------------------------------------------------------------------------------


def rows_for_saelens(run: Run, seed: int) -> tuple[Iterator[torch.Tensor], int]:
    """Raw float32 batches without end in the order in which saeql sees them, and how many come first for the scale.

    Its trainer takes the batches that the scale is estimated on from the same iterator; those come again afterwards.
    """
    train = run.config.train
    source = kept_rows(
        run,
        "train",
        train.batch_tokens,
        shuffle_seed=seed,
        block_rows=train.shuffle_block_rows,
        buffer_bytes=train.shuffle_buffer_bytes,
    )
    first = -(-train.init_tokens // train.batch_tokens)
    batches = chain(islice(source.batches(), first), source.batches())
    return (batch.acts.float() for batch in batches), first


def train_saelens(run: Run, training: Training, folder: Path):
    """Train with SAELens's own trainer; the folder of its inference form, its loader, and its package."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import batchtopk_sae, topk_sae  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    kinds = {
        "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig),
        "batchtopk": (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig),
    }
    rows, num_for_scale = rows_for_saelens(run, training.seed)
    batch, shape = run.config.train.batch_tokens, run.config.dictionary
    torch.manual_seed(training.seed)
    make, configure = kinds[training.architecture]
    d_in = run.harvest_info.widths[run.spec.reads[0]]
    sae = make(configure(d_in=d_in, d_sae=shape.d_sae, k=shape.k, normalize_activations="expected_average_only_in"))
    config = SAETrainerConfig(
        total_training_samples=training.num_steps * batch,
        train_batch_size_samples=batch,
        lr=training.lr,
        lr_end=training.lr,
        lr_warm_up_steps=training.warmup_steps,
        lr_decay_steps=training.decay_steps,
        dead_feature_window=training.dead_after_steps,
        n_batches_for_norm_estimate=num_for_scale,
    )
    trainer = SAETrainer(config, sae, rows)
    step = trainer.step

    def logged_step(acts: torch.Tensor) -> Any:
        out, n = step(acts), trainer.n_training_steps
        if n % 100 == 0:
            dead = int(trainer.dead_neurons.sum())
            print(f"  step {n}, mse {out.losses['mse_loss'].item():.3f}, dead {dead}", flush=True)
        return out

    trainer.step = logged_step
    trainer.fit()
    sae.save_inference_model(folder)
    return folder, lambda path: SAE.load_from_disk(path, device="cpu"), "sae-lens"


def saelens(run: Run, folder: Path, arguments: argparse.Namespace) -> None:
    """The choice of the learning rate and of the window after which a latent is dead, then everything with the best."""
    num_steps = arguments.steps or run.config.train.num_steps
    best = Training(
        library="sae-lens",
        architecture="topk",
        seed=arguments.seeds[0],
        num_steps=num_steps,
        lr=arguments.lrs[0],
        warmup_steps=arguments.warmup,
        decay_steps=round(arguments.decay_share * num_steps),
        dead_after_steps=arguments.dead_after_steps[0],
    )
    for field, values in (("lr", arguments.lrs), ("dead_after_steps", arguments.dead_after_steps)):
        tried = {value: run_once(run, folder, replace(best, **{field: value}))["fvu"] for value in values}
        best = replace(best, **{field: min(tried, key=lambda value: tried[value])})
        print(f"fvu by {field} {tried}: going on with {getattr(best, field):g}", flush=True)
    for seed in arguments.seeds:
        for architecture in arguments.architectures:
            run_once(run, folder, replace(best, architecture=architecture, seed=seed))


# --- the report ------------------------------------------------------------------------------------------------------


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of trainings that differ in nothing else, in the order of the results."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        settings = {key: value for key, value in result["training"].items() if key != "seed"}
        groups.setdefault(json.dumps(settings), []).append(result)
    rows = []
    for settings, members in groups.items():
        members.sort(key=lambda member: member["training"]["seed"])
        row: dict[str, Any] = {**json.loads(settings), "seeds": [m["training"]["seed"] for m in members]}
        for key in ("fvu", "l0", "dead_share", "cpu_seconds"):
            row[key] = statistics.fmean(m[key] for m in members)
        rows.append({**row, "fvu_by_seed": [m["fvu"] for m in members]})
    return rows


def report(run: Run, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the means as a Markdown table; `--save` keeps them with all trainings under docs/benchmarks/."""
    results = load_results(folder)
    rows = summarise(results)
    heads = ["library", "architecture", "lr", "warm-up, decay, dead window", "fvu (by seed)", "l0", "dead", "CPU s"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        seeds = ", ".join(f"{value:.4f}" for value in row["fvu_by_seed"])
        name = row["library"] + ("" if row["matmul_dtype"] == "float32" else f", encoder {row['matmul_dtype']}")
        steps = f"{row['warmup_steps']}, {row['decay_steps']}, {row['dead_after_steps']}"
        print(
            f"| {name} | {row['architecture']} | {row['lr']:.2g} | {steps} | {row['fvu']:.4f} ({seeds}) | "
            f"{row['l0']:.1f} | {row['dead_share']:.1%} | {row['cpu_seconds']:.0f} |"
        )
    if arguments.save:
        config, info = run.config, run.harvest_info
        entry = {
            **about(("sae-lens",), threads=1),
            "rows": {
                "model": info.identity.model_name,
                "hook_points": list(run.spec.reads),
                "stored_train_rows": kept_rows(run, "train", _SCORE_ROWS).num_rows,
                "dtype": info.dtype,
                "batch_tokens": config.train.batch_tokens,
                "d_sae": config.dictionary.d_sae,
                "k": config.dictionary.k,
            },
            "means": rows,
            "trainings": results,
        }
        path = ROOT / "docs" / "benchmarks" / f"quality-{entry['date']}.json"
        write_whole(path, json.dumps(entry, indent=1) + "\n")
        print(f"saved to {path.relative_to(ROOT)}")


def main() -> None:
    """Parse and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for part in (ours, saelens, report):
        sub = parts.add_parser(part.__name__, help=part.__doc__)
        sub.set_defaults(part=part)
        sub.add_argument("run", type=Path, help="run directory with harvested activations; only read")
        sub.add_argument("results", type=Path, help="folder for dictionaries and results.jsonl")
        if part is report:
            sub.add_argument("--save", action="store_true", help="write docs/benchmarks/quality-<date>.json")
            continue
        names = ["topk", "batchtopk", *(["matryoshka"] if part is ours else [])]
        sub.add_argument("--architectures", nargs="+", default=names, choices=names)
        sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        sub.add_argument("--steps", type=int, help="instead of the run's train.num_steps")
        if part is ours:
            sub.add_argument("--lr", type=float, help="instead of the run's train.lr")
            sub.add_argument("--matmul-dtype", default="float32", help="train.matmul_dtype: float32, bfloat16 or auto")
        else:
            sub.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3, 2e-3], help="learning rates to try")
            sub.add_argument("--warmup", type=int, default=50, help="steps of warm-up")
            sub.add_argument("--decay-share", type=float, default=0.3, help="last share of the steps, decaying to 0")
            windows = "dead_feature_window, to try with the best learning rate"
            sub.add_argument("--dead-after-steps", nargs="+", type=int, default=[1000, 100], help=windows)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.results.mkdir(parents=True, exist_ok=True)
    arguments.part(Run.open(arguments.run), arguments.results, arguments)


if __name__ == "__main__":
    main()
