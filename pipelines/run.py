"""A run: one directory, the stages that fill it, and what can be asked of it afterwards.

config.toml            the configuration as resolved
activations/<split>/   shards, and harvest.json
checkpoints/           what a resume needs
dictionaries/<name>/   cfg.json, sae_weights.safetensors, sparsity.safetensors
evidence/*.parquet     what was found
features.duckdb        the feature store, one build of the evidence
metrics.jsonl          training curve
report.html            everything on one page
stages.json            which stages are finished
hashes.json            hashes of all that is not in a manifest or a checkpoint
"""

import fcntl
import json
import os
import shutil
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.architectures import architecture
from saeql.sae.config import from_dict, suggestion, to_dict
from saeql.sae.files import load_dictionary, save_dictionary
from saeql.sae.model import SparseAutoencoder
from saeql.sae.resample import check_resampling
from saeql.sae.trainer import Trainer
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore

from .atomic import remove_leftovers, write_whole
from .config import RunConfig, to_toml
from .dictionaries import SWEEP_FOLDER, DictionarySpec, specify, start_dictionary
from .evaluate import Evaluator, metrics_table
from .harvest import HARVEST_FILE, HarvestInfo, harvest, module_names
from .hook_points import settle
from .index import index_dictionary
from .label import label_dictionary
from .models import LanguageModel, ModelIdentity, load_model, load_skeleton, pick_device
from .progress import progress
from .provenance import more_evidence, provenance
from .steer import Steerer
from .tracking import MetricsLog
from .training_stream import belongs_to, training_stream
from .verify import Verification, recorded, verify_run

#: In the order in which they run; a stage that runs again makes those after it stale.
STAGES = ("harvest", "train", "index", "label", "evaluate", "store", "report")
#: What each stage reads must be up to date.
_NEEDS = {
    "train": ("harvest",),
    "index": ("train",),
    "label": ("index",),
    "evaluate": ("train",),
    "store": ("index", "label", "evaluate"),
    "report": ("store",),
}


class RunError(ValueError):
    """A run directory is missing, busy, or holds something else than what is asked of it."""


class Run:
    """One run directory.

    `Run.create(path, config).execute()` does the whole job; `Run.open(path)` goes on with an existing one.
    """

    def __init__(self, path: str | Path, config: RunConfig):
        self.path, self.config = Path(path), config

    # --- making and opening --------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "Run":
        """Start a run in `path`, or go on with the one there if it has the same configuration.

        Globs of hook points become the names that this model has.
        Raises ConfigError where the configuration does not hold together, HookPointError where a glob has no match,
        RunError, naming the first key that differs, where the directory holds another configuration.
        """
        path, config = Path(path), settle(config)
        kind = specify(config.dictionary, config.model, config.seed).config.architecture
        check_resampling(architecture(kind), config.train)
        if (path / "config.toml").exists():
            run = cls.open(path)
            difference = _first_difference(to_dict(run.config), to_dict(config))
            if difference:
                key, old, new = difference
                raise RunError(
                    f"{path} already holds a run with {key} = {old!r}, not {new!r}; choose another directory with --out"
                )
            return run
        others = [file for file in path.iterdir() if ".tmp." not in file.name] if path.exists() else []
        if others and not (path / "config.toml").exists():  # another process may make the same run in this moment
            raise RunError(f"{path} is not empty and holds no run; choose another directory with --out")
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "config.toml", to_toml(config))
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run. Raises RunError where there is none."""
        path = Path(path)
        file = path / "config.toml"
        if not file.exists():
            raise RunError(f"no run in {path}: config.toml is missing (start one with `saeql run` or `saeql demo`)")
        return cls(path, from_dict(RunConfig, tomllib.loads(file.read_text(encoding="utf-8"))))

    # --- places --------------------------------------------------------------------------------------------------

    @property
    def activations(self) -> Path:
        """Folder of the shards."""
        return self.path / "activations"

    @property
    def evidence(self) -> Evidence:
        """The Parquet evidence."""
        return Evidence(self.path / "evidence")

    @property
    def dictionary_path(self) -> Path:
        """Folder of the dictionary."""
        return self.path / "dictionaries" / self.spec.name

    @property
    def spec(self) -> DictionarySpec:
        """The dictionary of this run. Raises ConfigError where it reads or writes what is not harvested."""
        return specify(self.config.dictionary, self.config.model, self.config.seed)

    @property
    def metrics_path(self) -> Path:
        """The training curve."""
        return self.path / "metrics.jsonl"

    @cached_property
    def language_model(self) -> LanguageModel:
        """The whole model of this run, loaded on first use."""
        return load_model(replace(self.config.model, truncate=False))

    @property
    def harvest_info(self) -> HarvestInfo:
        """What the harvest found. Raises RunError before it has run."""
        if not (self.activations / HARVEST_FILE).exists():
            raise RunError(f"{self.path} has no harvested activations yet: `saeql harvest {self.path}` makes them")
        return HarvestInfo.load(self.activations)

    def dictionary(self) -> SparseAutoencoder:
        """The trained dictionary; it works on raw activations. Raises DictionaryError before training."""
        return load_dictionary(self.dictionary_path)

    def store(self) -> FeatureStore:
        """The feature store, opened read-only; `features.parquet/` where there is no file.

        Raises StoreError before it is built.
        """
        path = self.path / "features.duckdb"
        if not path.exists() and (self.path / "features.parquet").is_dir():
            path = self.path / "features.parquet"
        return FeatureStore.open(path)

    def steerer(self, *, allow_mismatch: bool = False) -> Steerer:
        """A steerer over this run's model and dictionary. Raises ModelMismatch where they do not belong together."""
        dictionary = self.dictionary()
        metadata = dictionary.metadata["saeql"]
        return Steerer(
            self.language_model,
            dictionary,
            ModelIdentity(**metadata["identity"]),
            writes=metadata["writes"],
            median_norms=metadata["median_norms"],
            max_activations=self._max_activations(),
            allow_mismatch=allow_mismatch,
        )

    def _max_activations(self) -> dict[int, float]:
        with self.store() as store:
            table = store.trusted_sql("SELECT feature, max_activation FROM features WHERE max_activation > 0")
        return dict(zip(table["feature"].to_pylist(), table["max_activation"].to_pylist(), strict=True))

    # --- stages --------------------------------------------------------------------------------------------------

    def finished(self) -> dict[str, dict[str, Any]]:
        """Finished stages with their seconds and time of completion."""
        file = self.path / "stages.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def execute(self, stages: tuple[str, ...] = STAGES, *, again: bool = False, resume: bool = True, **options: Any):
        """Run the stages that are not finished yet, in order, yielding (stage, seconds or None where reused).

        `again` runs the named stages even so. `resume` lets an interrupted harvest and training go on where they were.
        Raises RunError where another process works on this run, or a stage that a named one reads from is not finished.
        """
        for stage in stages:
            if stage not in STAGES:
                raise RunError(f"no stage {stage!r}: there is {', '.join(STAGES)}{suggestion(stage, STAGES)}")
        with self.locked():
            remove_leftovers(self.path)
            for stage in stages:
                if not again and stage in self.finished():
                    yield stage, None
                    continue
                self._require_inputs(stage)
                is_begun = stage != "harvest" or stage not in self.finished()  # a finished harvest is made anew
                self._mark_stale(stage)
                started = time.monotonic()
                with recorded(self.path, stage):
                    self._run_stage(stage, resume=resume and is_begun, **options)
                seconds = time.monotonic() - started
                self._mark_finished(stage, seconds)
                yield stage, seconds

    def _run_stage(
        self, stage: str, *, resume: bool, report_to: str = "none", truncate: bool = False, rebuild: bool = False
    ) -> None:
        if stage == "train":
            self.train(resume=resume, report_to=report_to)
        elif stage == "harvest":
            self.harvest(truncate=truncate, resume=resume)
        elif stage == "store":
            self.build_store(rebuild=rebuild)
        else:
            {
                "index": self.index,
                "label": self.label,
                "evaluate": self.evaluate,
                "report": self.report,
            }[stage]()

    def harvest(self, *, truncate: bool = False, resume: bool = False, **options: Any) -> HarvestInfo:
        """corpus -> windows -> activations in shards.

        `truncate`, like `model.truncate`: without the layers after the deepest hook point in memory. `resume` goes on
        with an interrupted harvest; `options` are those of `saeql.pipelines.harvest.harvest`.
        """
        config = self.config
        stored = replace(config.harvest, max_train_tokens=config.stored_train_tokens)
        return harvest(
            self._reading_model(truncate),
            config.model.hook_points,
            config.corpus,
            stored,
            self.activations,
            self.evidence,
            resume=resume,
            **options,
        )

    def _reading_model(self, truncate: bool = False) -> LanguageModel:
        """The model for reading activations: without the layers after the deepest hook point where asked for."""
        truncate = truncate or self.config.model.truncate
        return load_model(replace(self.config.model, truncate=True)) if truncate else self.language_model

    def join_harvest(self, *, truncate: bool = False, lease_seconds: float = 180.0) -> HarvestInfo:
        """Harvest parts of the corpus beside other processes that do the same, until all are done.

        Under torchrun every rank is one of them, on its own device. Raises RunError where a stage of this run is at
        work, which is another thing than a harvest.
        """
        with self.locked(shared=True):
            if "harvest" in self.finished():
                return self.harvest_info
            self._mark_stale("harvest")
            started = time.monotonic()
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            info = self.harvest(
                truncate=truncate,
                resume=True,
                beside_others=True,
                expire_seconds=lease_seconds,
                merging=lambda: recorded(self.path, "harvest"),
            )
            if "harvest" not in self.finished():
                self._mark_finished("harvest", time.monotonic() - started)
            return info

    def train(self, *, resume: bool = True, report_to: str = "none") -> SparseAutoencoder:
        """shards, or the model itself (train.source = "live") -> dictionary folder."""
        self.train_together([self.spec], self.path, resume=resume, report_to=report_to)
        return self.dictionary()

    def train_together(
        self, specs: Sequence[DictionarySpec], folder: Path, *, resume: bool = True, report_to: str = "none"
    ) -> dict[str, float]:
        """Train dictionaries on one stream into `folder`: checkpoints, metrics.jsonl, `dictionaries/<name>/`.

        Returns the seconds that each one's steps took.
        """
        config, info = self.config, self.harvest_info
        if config.train.feature_shards > 1 or os.environ.get("WORLD_SIZE", "1") != "1":
            raise RunError(
                "`saeql train` trains in one process: leave train.feature_shards at 1 and start it without torchrun "
                "(in Python, saeql.sae.trainer.Trainer takes the ranks of saeql.sae.comm.join)"
            )
        device = pick_device(config.model.device)
        needed = {hook_point for spec in specs for hook_point in (*spec.reads, *spec.writes)}
        widths = {name: width for name, width in info.widths.items() if name in needed}
        made = {
            spec.name: start_dictionary(spec, _width(info, spec.reads), _width(info, spec.writes)).to(device)
            for spec in specs
        }
        log_config = {"name": self.path.name, **to_dict(config)}
        with (
            progress("train", config.train.num_steps * config.train.batch_tokens, "tok") as advance,
            MetricsLog(folder / "metrics.jsonl", report_to, run_name=self.path.name, config=log_config) as log,
            training_stream(config, self.activations, info, widths, device, self._reading_model) as source,
        ):
            trainer = Trainer(
                config.train,
                made,
                source,
                places={spec.name: spec.places for spec in specs},
                pretrained=[spec.name for spec in specs if spec.config.start_from],
                folder=folder / "checkpoints",
                on_log=log,
                on_step=lambda n: advance(n * config.train.batch_tokens),
                matmul_dtype=_matmul_dtype(config.train.matmul_dtype, device),
                belongs_to=belongs_to(config, info, widths),
            )
            if resume and trainer.resume():
                advance(trainer.step * config.train.batch_tokens)
            else:  # what another start left would be taken for this one's by a later resume
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            log.keep_until(trainer.step)
            trainer.fit()
            trainer.finish()
        for spec in specs:
            made[spec.name].metadata = self._metadata(spec, info)
            save_dictionary(made[spec.name], folder / "dictionaries" / spec.name)
        return {learner.name: learner.seconds for learner in trainer.learners}

    def _metadata(self, spec: DictionarySpec, info: HarvestInfo) -> dict[str, Any]:
        """Metadata of a dictionary: SAELens's keys, then ours."""
        config = self.config
        # the model's weights are not needed to train, and are not loaded for its names
        names = info.module_names or module_names(load_skeleton(config.model), list(info.widths))
        metadata = {
            "model_name": info.identity.model_name,
            "hook_name": " + ".join(names[name][0] for name in spec.reads),
            "hf_hook_name": " + ".join(names[name][1] for name in spec.reads),
            "hook_head_index": None,
            "context_size": config.harvest.context_tokens,
            "prepend_bos": config.corpus.bos != "never",
            "dataset_path": config.corpus.title,
        }
        if spec.writes != spec.reads:
            target = names[spec.writes[0]]
            metadata |= {"hook_name_out": target[0], "hf_hook_name_out": target[1]}
        ours = {
            "identity": asdict(info.identity.at(spec.reads)),
            "writes": {name: info.widths[name] for name in spec.writes},
            "median_norms": {name: info.median_norms[name] for name in spec.writes},
            "massive_norm_multiple": info.massive_norm_multiple,
            "text": {key: getattr(config.corpus, key) for key in ("bos", "separator", "pack")},
            "seed": spec.seed,
        }
        return {**metadata, "saeql": ours}

    def index(self) -> None:
        """dictionary + shards -> Parquet evidence."""
        spec, info, dictionary = self.spec, self.harvest_info, self.dictionary()
        info.identity.require(self.language_model.identity)
        result = index_dictionary(
            dictionary,
            spec.name,
            self.language_model,
            self.activations,
            info,
            self.evidence,
            self.config.index,
            reads=spec.reads,
        )
        self.evidence.write("runs", provenance(self.path.name, spec.name, self.config, info, self.evidence))
        density = result.fire_counts["train"] / result.num_rows["train"]
        save_dictionary(dictionary, self.dictionary_path, density=density)

    def label(self) -> None:
        """evidence -> labels with their held-out scores."""
        name = self.spec.name
        with progress("label", None, "candidates") as advance:
            labels = label_dictionary(self.evidence, dictionary=name, config=self.config.label, on_progress=advance.to)
        self.evidence.write("labels", labels)

    def evaluator(self) -> Evaluator:
        """What measures dictionaries of this run. Raises ModelMismatch where the model is another by now."""
        info = self.harvest_info
        info.identity.require(self.language_model.identity)
        return Evaluator(self.language_model, self.activations, info, self.config.evaluate, seed=self.config.seed)

    def evaluate(self) -> None:
        """dictionary + test documents -> metrics."""
        spec = self.spec
        self.evidence.write(
            "metrics", metrics_table(spec.name, self.evaluator().metrics(self.dictionary(), spec.places))
        )

    def build_store(self, *, rebuild: bool = False) -> list[str]:
        """evidence -> features.duckdb: what is new is added, published by rename; `rebuild` makes all of it anew.

        Returns what was added.
        """
        path, folders = self.path / "features.duckdb", [self.evidence, *more_evidence(self.path)]
        with progress("store", None, "steps") as advance:

            def on_step(_name: str, done: int, total: int) -> None:
                advance.to(done, total)

            if rebuild:
                FeatureStore.build(path, folders, on_step=on_step)
                return ["built anew"]
            return FeatureStore.sync(path, folders, on_step=on_step)

    def report(self) -> None:
        """store -> showcase.json and report.html."""
        from .run_report import write_run_report
        from .showcase import make_showcase

        write_run_report(self, make_showcase(self))

    def verify(self) -> Verification:
        """Check every file against the hash taken when it was written. Raises RunError while another process works."""
        with self.locked():
            return verify_run(self.path)

    # --- bookkeeping ---------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold this run against other writers; `shared`, only against those that want it for themselves.

        Raises RunError at once, naming the other's pid.
        """
        file = (self.path / ".lock").open("a+")
        try:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(f"{self.path} is in use by another saeql process (pid {file.read().strip()})") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            file.close()

    def _require_inputs(self, stage: str) -> None:
        missing = [name for name in _NEEDS.get(stage, ()) if name not in self.finished()]
        if missing:
            raise RunError(
                f"{self.path}: {stage} reads what {missing[0]} makes, which is missing or out of date: "
                f"`saeql {missing[0]} {self.path}` first"
            )

    def _mark_stale(self, stage: str) -> None:
        first = STAGES.index(stage)
        kept = {name: value for name, value in self.finished().items() if STAGES.index(name) < first}
        write_whole(self.path / "stages.json", json.dumps(kept, indent=2) + "\n")
        if stage == "harvest":
            for folder in (self.path, self.path / SWEEP_FOLDER):
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _mark_finished(self, stage: str, seconds: float) -> None:
        record = {"seconds": round(seconds, 1), "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_whole(self.path / "stages.json", json.dumps({**self.finished(), stage: record}, indent=2) + "\n")


def _width(info: HarvestInfo, hook_points: Sequence[str]) -> int:
    return sum(info.widths[name] for name in hook_points)


def _matmul_dtype(name: str, device: torch.device) -> torch.dtype | None:
    return fast_matmul_dtype(device) if name == "auto" else getattr(torch, name)


def _first_difference(old: dict, new: dict, where: str = "") -> tuple[str, Any, Any] | None:
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, full = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found = _first_difference(a, b, f"{full}.")
            if found:
                return found
        elif a != b:
            return full, a, b
    return None
