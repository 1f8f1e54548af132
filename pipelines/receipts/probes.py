"""C10, C11 and C12: the planted tasks probed on the run's own text, as `saeql probe` does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from .control import Labelled
from .receipt import Receipt

if TYPE_CHECKING:
    from ..run import Run


class PlantedProbes:
    """Selectivity against control tasks, permuted twins, and latents against dense and trivial baselines."""

    code: ClassVar[str] = "C10"
    name: ClassVar[str] = "probes of planted tasks, C11 and C12 too"
    tier: ClassVar[str] = "full"

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing of the run before it checks."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Writes the receipts beside those of other tasks, where `saeql probe` has its own; returns none itself."""
        from ..probing.plans import ProbeSettings
        from ..probing.probe_receipts import write_receipts
        from ..probing.sources import Asked, prepare

        settings = ProbeSettings()
        prepared = prepare(labelled.run, Asked(), settings)
        write_receipts(labelled.run, prepared.probed(settings))
        return ()
