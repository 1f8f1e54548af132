"""Training metrics: always `metrics.jsonl`, and wandb, trackio or tensorboard where asked for."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from saeql.sae.config import ConfigError, suggestion

from .atomic import write_whole

REPORT_TO = ("none", "wandb", "trackio", "tensorboard")


class MetricsLog:
    """Appends one JSON line per call, and hands the same numbers to a tracker.

    Raises ConfigError for an unknown tracker or one that is not installed.
    """

    def __init__(self, path: Path, report_to: str = "none", *, run_name: str, config: dict[str, Any]):
        if report_to not in REPORT_TO:
            raise ConfigError(f"--report-to must be one of {', '.join(REPORT_TO)}{suggestion(report_to, REPORT_TO)}")
        self.path = path
        self._send, self._finish = _tracker(report_to, path.parent, run_name, config)

    def __call__(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        self._send(numbers, line["step"])

    def keep_until(self, step: int) -> None:
        """Drop lines after `step`: what a killed run logged beyond its last checkpoint is learnt again."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _tracker(
    name: str, folder: Path, run_name: str, config: dict[str, Any]
) -> tuple[Callable[[dict[str, Any], int], None], Callable[[], None]]:
    """Functions that send one line of numbers and that end the tracker's run."""
    if name == "none":
        return lambda numbers, step: None, lambda: None
    try:
        if name == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

            def write(numbers: dict[str, Any], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            return write, writer.close
        tracker = importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"--report-to {name} needs the package: pip install 'saeql[{name}]'") from None
    tracker.init(project="saeql", name=run_name, config=config)
    return lambda numbers, step: tracker.log(numbers, step=step), tracker.finish
