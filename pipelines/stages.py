"""The stages of a run: their order, what each reads, and which are finished (stages.json)."""

import json
import time
from pathlib import Path
from typing import Any

from saeql.sae.config import suggestion

from .atomic import write_whole

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


def check_stages(stages: tuple[str, ...]) -> None:
    """Raises RunError at a name that is no stage."""
    for stage in stages:
        if stage not in STAGES:
            raise RunError(f"no stage {stage!r}: there is {', '.join(STAGES)}{suggestion(stage, STAGES)}")


class StageRecord:
    """What is finished in a run directory."""

    def __init__(self, run: Path):
        self._run, self._file = run, run / "stages.json"

    def finished(self) -> dict[str, dict[str, Any]]:
        """Finished stages with their seconds and time of completion."""
        return json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}

    def is_finished_after(self, stage: str) -> bool:
        """Whether a stage that comes later is finished."""
        return any(STAGES.index(name) > STAGES.index(stage) for name in self.finished())

    def require_inputs(self, stage: str) -> None:
        """Raises RunError where a stage that this one reads from is not finished."""
        finished = self.finished()
        missing = [name for name in _NEEDS.get(stage, ()) if name not in finished]
        if missing:
            raise RunError(
                f"{self._run}: {stage} reads what {missing[0]} makes, which is missing or out of date: "
                f"`saeql {missing[0]} {self._run}` first"
            )

    def mark_stale(self, stage: str) -> None:
        """This stage and those after it are not finished any more."""
        first = STAGES.index(stage)
        self._write({name: value for name, value in self.finished().items() if STAGES.index(name) < first})

    def mark_finished(self, stage: str, seconds: float) -> None:
        """The stage is finished now, and took so long."""
        record = {"seconds": round(seconds, 1), "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._write({**self.finished(), stage: record})

    def _write(self, finished: dict[str, dict[str, Any]]) -> None:
        write_whole(self._file, json.dumps(finished, indent=2) + "\n")
