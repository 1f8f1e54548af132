"""A run: one directory, the stages that fill it, and what can be asked of it afterwards.

config.toml            the configuration as resolved
activations/<split>/   shards, and harvest.json
checkpoints/           what a resume needs
dictionaries/<name>/   cfg.json, sae_weights.safetensors, sparsity.safetensors
evidence/*.parquet     what was found
features.duckdb        the feature store, one build of the evidence
metrics.jsonl          training curve
evaluation.html        what the dictionary is worth, and what its controls allow to say
report.html            everything on one page
stages.json            which stages are finished
hashes.json            hashes of all that is not in a manifest or a checkpoint
controls/<kind>/       runs with one switch changed, to compare with
effects/               what steering was measured to do
stopped.json           there while a training stands still because it was asked to stop
"""

import shutil
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from saeql.sae.comm import ALONE, Comm
from saeql.sae.config import from_dict, to_dict
from saeql.sae.files import load_dictionary, save_density
from saeql.sae.model import SparseAutoencoder
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore

from .atomic import remove_folder, remove_leftovers, write_whole
from .attribution.attributor import Attributor
from .attribution.causes import Why
from .attribution.of_run import attributor_of
from .config import RunConfig, to_toml
from .dictionaries import SWEEP_FOLDER, DictionarySpec, specify
from .embedder import Embedder
from .evaluate import Evaluator, metrics_table
from .evaluation_page import write_evaluation
from .harvest import HARVEST_FILE, HarvestInfo, harvest
from .hook_points import settle
from .index import Indexer, IndexResult
from .index_shards import INDEX_WORK, SharedIndex, index_conditions
from .label_job import LabelOptions, label_run
from .lock import LockedError, hold
from .meaning import embed_run
from .models import LanguageModel, ModelIdentity, load_model
from .progress import progress
from .provenance import more_evidence, provenance
from .ranks import take_own_gpu
from .run_checks import check_inputs, check_training
from .stages import STAGES, RunError, StageRecord, check_stages
from .steering.edits import FeatureScale
from .steering.steerer import Steerer
from .stopping import leave_if_asked
from .stores import for_notebooks
from .train import STOPPED_FILE, train_dictionaries
from .verify import Verification, recorded, verify_run

if TYPE_CHECKING:
    from .steering.effect_config import EffectConfig
    from .steering.effect_results import EffectStudy
    from .steering.kept_passes import KeptPasses
    from .steering.vectors import SteeringVector

#: Evidence about the dictionary as it is that no stage makes anew: training removes it.
COMPARISON_TABLES = ("stability", "matches")


class Run:
    """One run directory.

    `Run.create(path, config).execute()` does the whole job; `Run.open(path)` goes on with an existing one.
    """

    def __init__(self, path: str | Path, config: RunConfig):
        self.path, self.config = Path(path), config
        self._stages = StageRecord(self.path)

    # --- making and opening --------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "Run":
        """Start a run in `path`, or go on with the one there if it has the same configuration.

        Globs of hook points become the names that this model has.
        Raises ConfigError where the configuration does not hold together, HookPointError, ModelError or CorpusError
        where a new run's hook point, model or text is missing (nothing is left behind), RunError, naming the first key
        that differs, where the directory holds another configuration.
        """
        path, config = Path(path), settle(config)
        check_training(config)
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
        check_inputs(config)
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

    @cached_property
    def embedder(self) -> Embedder:
        """The sentence encoder of this run, loaded on first use. Raises EmbedderError where there is none."""
        return Embedder(self.config.embedder)

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
        return for_notebooks(FeatureStore.open(path))

    @cached_property
    def exact_language_model(self) -> LanguageModel:
        """The whole model in float32, for what small differences of predictions tell; loaded on first use."""
        return load_model(replace(self.config.model, truncate=False, dtype="float32"))

    def steerer(
        self, *, allow_mismatch: bool = False, exact: bool = False, store: FeatureStore | None = None
    ) -> Steerer:
        """A steerer over this run's model (`exact`: in float32) and dictionary; `store` is the run's, where it is open.

        Raises ModelMismatch where they do not belong together.
        """
        dictionary = self.dictionary()
        metadata = dictionary.metadata["saeql"]
        return Steerer(
            self.exact_language_model if exact else self.language_model,
            dictionary,
            ModelIdentity(**metadata["identity"]),
            writes=metadata["writes"],
            median_norms=metadata["median_norms"],
            scales=self._feature_scales(store),
            allow_mismatch=allow_mismatch,
        )

    @cached_property
    def attributor(self) -> Attributor:
        """What explains predictions by this run's features, its model in float32; loaded on first use.

        Raises WhyError for a crosscoder, ModelMismatch where the model is another by now.
        """
        return attributor_of(self)

    def why(self, prompt: str | Sequence[int], token: str | None = None, **options: Any) -> Why:
        """Which features caused the next token of a prompt; the options of `Attributor.why`. Raises WhyError."""
        return self.attributor.why(prompt, token, **options)

    def effect(
        self,
        features: Sequence[int] = (),
        *,
        search: str | None = None,
        where: str | None = None,
        top: int | None = None,
        words: Sequence[str] = (),
        vectors: "Sequence[SteeringVector]" = (),
        config: "EffectConfig | None" = None,
        kept: "KeptPasses | None" = None,
    ) -> "EffectStudy":
        """What steering with features or vectors does to their concepts, beside rival directions (docs/effects.md).

        `top` alone: the features with the best output scores. `words` in place of the features' own, every other one
        to measure on. Raises SteerError for what cannot be measured.
        """
        from .steering.effect_study import measure_effects
        from .steering.effect_subjects import Asked

        asked = Asked(tuple(features), search, where, top, tuple(words), tuple(vectors))
        return measure_effects(self, asked, config, kept)

    def _feature_scales(self, opened: FeatureStore | None) -> dict[int, FeatureScale]:
        query = (
            "SELECT feature, p99, density * mean_activation AS mean FROM features "
            "WHERE dictionary = $name AND max_activation > 0"
        )
        with self.store() if opened is None else nullcontext(opened) as store:
            rows = store.trusted_sql(query, {"name": self.spec.name}).to_pylist()
        return {row["feature"]: FeatureScale(row["p99"], row["mean"]) for row in rows}

    # --- stages --------------------------------------------------------------------------------------------------

    def finished(self) -> dict[str, dict[str, Any]]:
        """Finished stages with their seconds and time of completion."""
        return self._stages.finished()

    def execute(
        self,
        stages: tuple[str, ...] = STAGES,
        *,
        again: bool = False,
        resume: bool = True,
        comm: Comm = ALONE,
        **options: Any,
    ) -> Iterator[tuple[str, float | None]]:
        """Run the stages that are not finished yet, in order, yielding (stage, seconds or None where reused).

        `again` runs the named stages even so. `resume` lets an interrupted harvest and training go on where they were.
        Several ranks can train, and part afterwards.
        Raises RunError where another process works on this run, or a stage that a named one reads from is not finished.
        """
        check_stages(stages)
        with self.locked(comm):
            if comm.is_first:
                remove_leftovers(self.path)
                (self.path / STOPPED_FILE).unlink(missing_ok=True)
            for stage in stages:
                leave_if_asked()
                if not again and comm.on_first(lambda stage=stage: stage in self.finished()):
                    yield stage, None
                    continue
                # a finished harvest is made anew
                is_begun = stage != "harvest" or comm.on_first(lambda: "harvest" not in self.finished())
                started = time.monotonic()
                with self._entered(stage, comm):
                    self._run_stage(stage, resume=resume and is_begun, comm=comm, **options)
                seconds = time.monotonic() - started
                if comm.is_first:
                    self._stages.mark_finished(stage, seconds)
                yield stage, seconds

    @contextmanager
    def _entered(self, stage: str, comm: Comm) -> Iterator[None]:
        """Where a stage may run: its inputs are there, what follows is stale, the first rank takes hashes."""
        comm.on_first(lambda: self._require_inputs(stage))
        comm.on_first(lambda: self._mark_stale(stage))
        with recorded(self.path, stage) if comm.is_first else nullcontext():
            yield

    def _run_stage(
        self,
        stage: str,
        *,
        resume: bool,
        comm: Comm,
        report_to: str = "none",
        truncate: bool = False,
        reshard: bool = False,
        rebuild: bool = False,
        label: LabelOptions | None = None,
    ) -> None:
        if stage == "train":
            self.train(resume=resume, report_to=report_to, comm=comm, reshard=reshard)
        elif stage == "harvest":
            self.harvest(truncate=truncate, resume=resume)
        elif stage == "store":
            self.build_store(rebuild=rebuild)
        elif stage == "label":
            self.label(label)
        else:
            {
                "index": self.index,
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
            self.reading_model(truncate),
            config.model.hook_points,
            config.corpus,
            stored,
            self.activations,
            self.evidence,
            resume=resume,
            **options,
        )

    def reading_model(self, truncate: bool = False) -> LanguageModel:
        """The model for reading activations: without the layers after the deepest hook point where asked for."""
        truncate = truncate or self.config.model.truncate
        return load_model(replace(self.config.model, truncate=True)) if truncate else self.language_model

    def join_harvest(self, *, truncate: bool = False, lease_seconds: float = 180.0) -> HarvestInfo:
        """Harvest parts of the corpus beside other processes that do the same, until all are done.

        Under torchrun every rank is one of them, on its own device. Raises RunError where a stage of this run is at
        work, which is another thing than a harvest.
        """
        self._require_own_activations()
        with self.locked(shared=True):
            if "harvest" in self.finished():
                return self.harvest_info
            self._mark_stale("harvest")
            started = time.monotonic()
            take_own_gpu()
            info = self.harvest(
                truncate=truncate,
                resume=True,
                beside_others=True,
                expire_seconds=lease_seconds,
                merging=lambda: recorded(self.path, "harvest"),
            )
            if "harvest" not in self.finished():
                self._stages.mark_finished("harvest", time.monotonic() - started)
            return info

    def train(
        self, *, resume: bool = True, report_to: str = "none", comm: Comm = ALONE, reshard: bool = False
    ) -> SparseAutoencoder | None:
        """shards, or the model itself (train.source = "live") -> dictionary folder; on all ranks of `comm`.

        They part at the end; all but the first return None.

        Raises Stopped, after a checkpoint, where the process was asked to stop.
        """
        if comm.is_first:
            for table in COMPARISON_TABLES:  # of the dictionary that was here before
                self.evidence.path(table).unlink(missing_ok=True)
            from .probing.probe_receipts import remove_receipts
            from .steering.effect_evidence import remove_effects

            remove_receipts(self)
            remove_effects(self)
        train_dictionaries(self, [self.spec], self.path, resume=resume, report_to=report_to, comm=comm, reshard=reshard)
        return self.dictionary() if comm.is_first else None

    def index(self) -> None:
        """dictionary + shards -> Parquet evidence."""
        remove_folder(self.path / INDEX_WORK)
        indexer = self._indexer()
        self._finish_index(indexer, indexer.write(self.evidence))

    def join_index(self, *, lease_seconds: float = 180.0) -> None:
        """Index rows beside other processes that do the same, until all are done; the evidence is that of `index`.

        Under torchrun every rank is one of them, on its own device. Raises RunError where a stage of this run is at
        work, or the training is not finished; SharedIndexError where the index was begun under other conditions.
        """
        with self.locked(shared=True):
            self._require_inputs("index")
            started = time.monotonic()
            if "index" not in self.finished() and self._stages.is_finished_after("index"):
                self._mark_stale("index")
            take_own_gpu()

            @contextmanager
            def merging() -> Iterator[None]:
                with recorded(self.path, "index"):
                    yield
                self._stages.mark_finished("index", time.monotonic() - started)

            indexer = self._indexer()
            SharedIndex(
                indexer,
                self.evidence,
                self.path / INDEX_WORK,
                index_conditions(indexer, self.dictionary_path, self.activations),
                is_finished=lambda: "index" in self.finished(),
                merging=merging,
                finish=lambda result: self._finish_index(indexer, result),
            ).join(lease_seconds)

    def _indexer(self) -> Indexer:
        spec, info, dictionary = self.spec, self.harvest_info, self.dictionary()
        info.identity.require(self.language_model.identity)
        return Indexer(
            dictionary, spec.name, self.language_model, self.activations, info, self.config.index, reads=spec.reads
        )

    def _finish_index(self, indexer: Indexer, result: IndexResult) -> None:
        """Evidence table runs, and how often latents fire beside the dictionary."""
        runs = provenance(self.path.name, indexer.name, self.config, indexer.info, self.evidence)
        self.evidence.write("runs", runs)
        save_density(self.dictionary_path, result.density)

    def label(self, options: LabelOptions | None = None) -> None:
        """evidence -> labels with their held-out scores, and receipts."""
        label_run(self, options)

    def evaluator(self) -> Evaluator:
        """What measures dictionaries of this run. Raises ModelMismatch where the model is another by now."""
        info = self.harvest_info
        info.identity.require(self.language_model.identity)
        return Evaluator(self.language_model, self.activations, info, self.config.evaluate, seed=self.config.seed)

    def evaluate(self) -> None:
        """dictionary + test documents -> metrics, and with the receipts of its labels evaluation.html."""
        spec = self.spec
        self.evidence.write(
            "metrics", metrics_table(spec.name, self.evaluator().metrics(self.dictionary(), spec.places))
        )
        write_evaluation(self)

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
                done = ["built anew"]
            else:
                done = FeatureStore.sync(path, folders, on_step=on_step)
        if embed_run(self):
            done += FeatureStore.sync(path, folders)
        return done

    def save_evidence(self, table: str, rows: pa.Table, what: str) -> None:
        """Write an evidence table that no stage makes, its hash taken under the name `what`.

        To be called within `locked`; the store is brought up to date by `saeql store`.
        """
        with recorded(self.path, what):
            self.evidence.write(table, rows)

    def save_comparison(self, tables: dict[str, pa.Table]) -> bool:
        """Write the evidence tables `COMPARISON_TABLES` and bring the store up to date with them, where it is built.

        Returns whether it is. To be called within `locked`.
        """
        with recorded(self.path, "compare"):
            for name in COMPARISON_TABLES:
                self.evidence.write(name, tables[name])
            is_built = "store" in self.finished()
            if is_built:
                FeatureStore.sync(self.path / "features.duckdb", [self.evidence, *more_evidence(self.path)])
        return is_built

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
    def locked(self, comm: Comm = ALONE, *, shared: bool = False) -> Iterator[None]:
        """Hold this run against other writers; the first rank holds it for all.

        `shared`: only against those that want it for themselves.
        Raises RunError at once where another process does, naming its host and pid.
        """
        with ExitStack() as held:
            comm.on_first(lambda: self._lock(held, shared))
            yield

    def _lock(self, held: ExitStack, shared: bool) -> None:
        try:
            held.enter_context(hold(self.path / ".lock", shared=shared))
        except LockedError as error:
            raise RunError(f"{self.path} is {error}") from None

    def _require_inputs(self, stage: str) -> None:
        if stage == "harvest":
            self._require_own_activations()
        self._stages.require_inputs(stage)

    def _require_own_activations(self) -> None:
        if self.activations.is_symlink():
            raise RunError(
                f"{self.path} reads the activations of another run, {self.activations.resolve().parent}: harvest there"
            )

    def _mark_stale(self, stage: str) -> None:
        self._stages.mark_stale(stage)
        if STAGES.index(stage) < STAGES.index("index"):
            remove_folder(self.path / INDEX_WORK)
        if stage == "harvest":
            for folder in (self.path, self.path / SWEEP_FOLDER):
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)


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
