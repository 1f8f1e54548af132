"""Dictionaries that are not trained (`dictionary.freeze = "all"`): their thresholds, from the stored train rows."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from saeql.sae.architectures.jumprelu import JumpReluAutoencoder
from saeql.sae.comm import CommError
from saeql.sae.config import DictionaryConfig
from saeql.sae.files import SPARSITY_FILE, DictionaryError
from saeql.sae.match_rates import match_rates
from saeql.sae.trainer import Trainer
from saeql.store.manifest import MANIFEST

from .atomic import write_whole
from .dictionaries import DictionarySpec
from .harvest import open_source
from .progress import progress
from .stopping import asked, stopped

if TYPE_CHECKING:
    from .run import Run

#: Rows read at once.
_BATCH_TOKENS = 4096
#: Between two savings of an unfinished fit.
SAVE_SECONDS = 30.0


class ThresholdWork:
    """A fit of thresholds that is not finished, in a file beside the dictionary's; removed when it is.

    `key` names all that the thresholds depend on: a file of another key is not gone on with.
    """

    def __init__(self, file: Path, key: str):
        self.file, self.key, self._saved = file, key, time.monotonic()

    def load(self) -> dict[str, torch.Tensor] | None:
        """The state of the interrupted fit; None where there is none of this key."""
        if not self.file.exists():
            return None
        with safe_open(self.file, framework="pt") as opened:
            if (opened.metadata() or {}).get("key") != self.key:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def is_due(self) -> bool:
        """Every `SAVE_SECONDS`, and where the process was asked to stop."""
        return asked() or time.monotonic() - self._saved >= SAVE_SECONDS

    def save(self, state: dict[str, torch.Tensor]) -> None:
        """Raises Stopped once it is saved, where the process was asked to stop."""
        write_whole(self.file, save({name: t.contiguous() for name, t in state.items()}, {"key": self.key}))
        self._saved = time.monotonic()
        if asked():
            raise stopped(", thresholds half fitted")

    def remove(self) -> None:
        """The fit is finished, or is to be made anew."""
        self.file.unlink(missing_ok=True)


def fit_fixed(
    run: "Run",
    trainer: Trainer,
    specs: Sequence[DictionarySpec],
    folder: Path,
    device: torch.device,
    *,
    resume: bool = True,
) -> None:
    """Set the thresholds of those of `specs` that nothing is trained of; a trainer holds them, input measured.

    How far it is lies in `folder` meanwhile; with `resume` an interrupted fit goes on, to the same thresholds.
    Raises CommError with several ranks, DictionaryError where the dictionary that rates come from was not indexed,
    Stopped where the process was asked to stop.
    """
    learners = {learner.name: learner for learner in trainer.learners}
    for spec in specs:
        learner = learners[spec.name]
        if not learner.is_fixed:
            continue
        if trainer.comm.size > 1:
            raise CommError(f'{spec.name}: dictionary.freeze = "all" works in one process only')
        dictionary, scaling = learner.dictionary, trainer.scaling
        assert isinstance(dictionary, JumpReluAutoencoder) and scaling is not None
        widths = list(trainer.source.widths)
        source = open_source(run.activations, "train", run.harvest_info, widths, _BATCH_TOKENS, device)
        rates = firing_rates(spec.config)
        tensors = [*dictionary.state_dict().values(), rates, scaling.mean, scaling.scale]
        work = ThresholdWork(folder / f"thresholds.{spec.name}.safetensors", _key(run.activations, tensors))
        if not resume:
            work.remove()
        with progress("thresholds", None, "tok") as advance:

            def batches(source=source, learner=learner, scaling=scaling, advance=advance) -> Iterable[torch.Tensor]:
                for batch in source.batches():
                    yield scaling.apply(batch.acts)[:, learner.reads]
                    advance(len(batch.acts))

            match_rates(dictionary, rates, batches, source.num_rows, work)
        work.remove()


def _key(activations: Path, tensors: Iterable[torch.Tensor]) -> str:
    """What thresholds depend on: the rows, by the manifests of their shards; encoder, rates and scaling."""
    digest = hashlib.sha256(f"fit 1, {_BATCH_TOKENS} rows".encode())
    for manifest in sorted(activations.glob(f"*/train/{MANIFEST}")):
        digest.update(manifest.read_bytes())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def firing_rates(config: DictionaryConfig) -> torch.Tensor:
    """Share of rows on which every latent is to fire, [d_sae]: those of `rates_from`, else k / d_sae each.

    Of a dictionary of another size, as many of its rates are taken, evenly spaced in order of size.
    Raises DictionaryError where they are not known.
    """
    if not config.rates_from:
        return torch.full((config.d_sae,), config.k / config.d_sae)
    file = Path(config.rates_from) / SPARSITY_FILE
    if not file.exists():
        raise DictionaryError(
            f"dictionary.rates_from: {config.rates_from} has no {SPARSITY_FILE}, which `saeql index` writes"
        )
    # log10(density + 1e-10), as SAELens has it
    rates = (10 ** load_file(file)["sparsity"].double() - 1e-10).clamp(0, 1)
    rates = torch.where(rates < 1e-9, 0.0, rates)
    if len(rates) == config.d_sae:
        return rates
    at = torch.linspace(0, len(rates) - 1, config.d_sae, dtype=torch.float64).round().long()
    return rates.sort().values[at]
