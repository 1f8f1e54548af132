"""Progress bars with rate and remaining time, on stderr; silent where stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

#: Called with units done and units in all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Advance:
    """Moves a bar: `advance(n)` by n units, `advance.to(done, total)` to a place, with the total as now known."""

    by: Callable[[int], None]
    to: OnProgress

    def __call__(self, n: int) -> None:
        self.by(n)


@contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar for `total` units (None where unknown) for the length of the block; a block that ends well fills it."""
    if not sys.stderr.isatty():
        yield Advance(lambda n: None, lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: "object") -> Text:
            speed = getattr(task, "finished_speed", None) or getattr(task, "speed", None)
            return Text(f"{speed:,.0f} {unit}/s" if speed else f"- {unit}/s", style="cyan")

    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(label, total=total)
        yield Advance(lambda n: bar.advance(task, n), lambda done, total: bar.update(task, completed=done, total=total))
        done = int(bar.tasks[0].completed)
        bar.update(task, completed=done, total=done)
