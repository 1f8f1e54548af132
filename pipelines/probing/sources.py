"""What one command line asks for, put together: the text, its tasks, and everything that a case can be shown as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from saeql.sae.architectures import architecture
from saeql.sae.architectures.jumprelu import JumpReluAutoencoder
from saeql.sae.config import DictionaryConfig
from saeql.sae.match_rates import match_rates
from saeql.sae.model import SparseAutoencoder

from ..fixed_dictionaries import firing_rates
from ..harvest import open_source
from ..models import LanguageModel, ModelError, load_model
from .activations import ModelRows, RowSource, StoredRows, TokenEmbeddings, without_massive
from .labelled_windows import labelled_tasks
from .plans import ProbeSettings, TaskPlan, plan_task, rows_of
from .planted_tasks import PLANTED, chosen_concepts, planted_names, planted_tasks
from .representations import (
    ACTS,
    EMBEDDINGS,
    LATENTS,
    RANDOM_LATENTS,
    RANDOMISED,
    TOKENS,
    OfRows,
    Representations,
    dense_rows,
    latent_rows,
    token_rows,
)
from .suite import TaskResult, probe_task
from .task_files import FILES, read_labelled
from .tasks import LEVELS, Task, TaskError
from .text import ProbedText, run_text

if TYPE_CHECKING:
    from ..run import Run

#: Stored rows that the thresholds of random latents are set on, in blocks.
RATE_BLOCKS, BLOCK_ROWS = 64, 64


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to probe."""

    task: str = PLANTED
    """A file, one of the planted concepts, or all of them."""
    level: str = "document"
    """Of a file's labels: token or document."""
    hook_point: str = ""
    """Unset: what the run's dictionary reads."""
    text_column: str = "text"
    label_column: str = "label"
    randomised: bool = False
    """Also probe the same model with its weights drawn anew, which takes a forward pass over the text."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise TaskError(f"level must be one of {', '.join(LEVELS)}; got {self.level!r}")


@dataclass(frozen=True)
class Prepared:
    """Tasks as they were drawn, and what their cases can be shown as."""

    plans: list[TaskPlan]
    not_measured: list[TaskResult]  # tasks with too few cases
    shown: Representations
    hook_point: str
    notes: list[str]  # what is left out, and why

    def probed(self, settings: ProbeSettings, on_task: Callable[[int], None] = lambda n: None) -> list[TaskResult]:
        """Every task's probes; `on_task(1)` is called after each. Those that could not be measured come last."""
        results = []
        for plan in self.plans:
            results.append(probe_task(plan, self.shown, self.hook_point, settings))
            on_task(1)
        return results + self.not_measured


def prepare(run: "Run", asked: Asked, settings: ProbeSettings) -> Prepared:
    """Read the task, draw its cases, and open or compute their activations.

    Raises TaskError where the task cannot be read or has too few cases, RunError before the harvest, HookPointError
    where the model has no such hook point, ModelError where the model is needed and cannot be had.
    """
    reads = run.spec.reads
    hook_points = (asked.hook_point,) if asked.hook_point else reads
    place = " + ".join(hook_points)
    text, tasks, stored = _text_and_tasks(run, asked, hook_points)
    plans, not_measured = _planned(tasks, place, settings)
    source: RowSource = stored or ModelRows(
        _model(run, hook_points), hook_points, text, rows_of(text, plans, twins=True)
    )
    of_rows: dict[str, OfRows] = {ACTS: dense_rows(source), TOKENS: token_rows(text)}
    notes = []
    if hook_points != reads:
        notes.append(f"no latents: the run's dictionary reads {' + '.join(reads)}")
    elif not run.dictionary_path.exists():
        notes.append(f"no latents: {run.path} has no dictionary yet")
    else:
        dictionary = run.dictionary()
        of_rows[LATENTS] = latent_rows(source, dictionary)
        of_rows[RANDOM_LATENTS] = latent_rows(source, _random_dictionary(run, dictionary, settings.seed))
    try:
        of_rows[EMBEDDINGS] = dense_rows(TokenEmbeddings(run.language_model, text))
    except ModelError as error:  # stored activations need no model
        notes.append(f"no token embeddings: {error}")
    if asked.randomised:
        of_rows[RANDOMISED] = dense_rows(
            ModelRows(_redrawn(run, hook_points, settings.seed), hook_points, text, rows_of(text, plans, twins=False))
        )
    return Prepared(plans, not_measured, Representations(text, of_rows), place, notes)


def _text_and_tasks(
    run: "Run", asked: Asked, hook_points: tuple[str, ...]
) -> tuple[ProbedText, list[Task], StoredRows | None]:
    """The text, its tasks, and its stored activations where there are any at these hook points."""
    info, path = run.harvest_info, Path(asked.task).expanduser()
    if asked.task not in (PLANTED, *planted_names()) and (path.suffix in FILES or path.is_file()):
        documents = read_labelled(path, level=asked.level, text=asked.text_column, label=asked.label_column)
        corpus = run.config.corpus
        text, tasks = labelled_tasks(
            path,
            documents,
            _model(run, hook_points),
            corpus.split_shares(),
            context_tokens=info.context_tokens,
            has_bos=corpus.bos != "never",
        )
        return text, tasks, None
    concepts = chosen_concepts(asked.task)
    text, stored = run_text(run.evidence, run.path.name), None
    if all(name in info.widths for name in hook_points):
        stored = StoredRows(run.activations, info, hook_points, text)
        text = without_massive(text, stored)
    return text, planted_tasks(text, concepts), stored


def _planned(
    tasks: Sequence[Task], hook_point: str, settings: ProbeSettings
) -> tuple[list[TaskPlan], list[TaskResult]]:
    """Tasks that have enough cases, and those that have not. Raises TaskError where none has."""
    plans, not_measured, errors = [], [], []
    for task in tasks:
        try:
            plans.append(plan_task(task, settings))
        except TaskError as error:
            errors.append(error)
            not_measured.append(
                TaskResult(task.name, task.level, hook_point, task.unit, task.planted, not_measured=str(error))
            )
    if not plans:
        raise errors[0]
    return plans, not_measured


def _model(run: "Run", hook_points: tuple[str, ...]) -> LanguageModel:
    """The run's model, which must be the one that was harvested."""
    lm = run.language_model
    run.harvest_info.identity.at(hook_points).require(lm.identity.at(hook_points))
    return lm


def _redrawn(run: "Run", hook_points: tuple[str, ...], seed: int) -> LanguageModel:
    """The run's model up to the hook points, its weight matrices drawn anew and its embeddings kept."""
    config = replace(run.config.model, randomise="weights", randomise_seed=seed, truncate=True)
    return load_model(replace(config, hook_point=hook_points[0], more_hook_points=hook_points[1:]))


def _random_dictionary(run: "Run", dictionary: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """Random directions, as many as the dictionary has latents, each firing about as often as one of them does.

    Thresholds are set on `RATE_BLOCKS` evenly spaced blocks of stored train rows.
    """
    config = DictionaryConfig(
        architecture="jumprelu", d_sae=dictionary.d_sae, freeze="all", rates_from=str(run.dictionary_path)
    )
    made = architecture("jumprelu")(config, dictionary.d_in)
    assert isinstance(made, JumpReluAutoencoder)
    made.initialise(seed)
    source = open_source(run.activations, "train", run.harvest_info, run.spec.reads, BLOCK_ROWS)
    last = max(source.num_rows - BLOCK_ROWS, 0)
    starts = sorted({last * n // max(RATE_BLOCKS - 1, 1) for n in range(RATE_BLOCKS)})
    blocks = (range(start, min(start + BLOCK_ROWS, source.num_rows)) for start in starts)
    sample = torch.cat([batch.acts.float() for block in blocks for batch in source.in_order(block)])
    with torch.no_grad():
        made.b_dec.copy_(sample.mean(0))
    match_rates(made, firing_rates(config), lambda: iter([sample]), len(sample))
    return made
