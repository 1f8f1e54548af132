"""The `saeql` command: names the commands, turns what a user can mend into one line and an exit code."""

import errno
import sys
import traceback
from importlib.metadata import version
from typing import NoReturn

import cyclopts
from cyclopts import App

from saeql.sae.rank_place import RankPlace, rank_place

from .commands.attribution import why
from .commands.comparison import compare
from .commands.control import control
from .commands.dynamics import dynamics
from .commands.editing import edit
from .commands.effects import effect
from .commands.exchange import export, import_
from .commands.guarding import guard
from .commands.jobs import config, demo, hooks, plan, run, submit
from .commands.judging import judge
from .commands.probing import probe
from .commands.pruning import prune
from .commands.questions import search, show, sql
from .commands.serving import serve
from .commands.stages import evaluate, harvest, index, label, report, store, train, verify
from .commands.steering import steer, vector
from .commands.tokens import tokens
from .stopping import EXIT_STOPPED, Stopped, asked, listen

_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),  # full, over the quota or the limit of a file, failing
    *(errno.EACCES, errno.EROFS, errno.ESTALE),  # not ours to write, or gone
)

app = App(
    name="saeql",
    help="Sparse autoencoders you can query and act on: harvest, train, explain, SQL, steer.\n\n"
    "Start with `saeql demo`: a real model and real text, no network.",
    version_flags=["--version"],
    version=lambda: version("saeql"),
    help_format="plaintext",
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)
for _command in (
    *(demo, run, plan, harvest, train, submit, index, label, evaluate, store, report, verify),
    *(serve, search, show, sql, steer, vector, effect, why, edit, prune, guard, dynamics),
    *(compare, control, probe, tokens, judge, export, hooks, config),
):
    app.command(_command)
app.command(import_, name="import")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> None:
    """Entry point. What a user can mend ends in one line on stderr and exit code 2, everything else in a traceback.

    Exit code 75: the process was asked to stop, and the work goes on where the command is given again.
    """
    place = rank_place()
    if argv is None:  # as a program of its own
        listen()
    try:
        app(argv)
    except BaseException as error:
        code = _exit_code(error, place)
        if code is None and place.size == 1:
            raise
        if code is None:
            traceback.print_exc()
            code = 1
        _end(code, place)


def _exit_code(error: BaseException, place: RankPlace) -> int | None:
    """Tell what ended the command in one line; None for a fault of saeql's own."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        print("saeql: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):
        return 0
    if isinstance(error, Stopped):
        if place.rank == 0:
            print(f"saeql: {error}; it goes on from here when it is started again", file=sys.stderr)
        return EXIT_STOPPED
    if (
        asked() and place.size == 1 and isinstance(error, Exception)
    ):  # a library's own words for having been interrupted
        print(f"saeql: stopped ({_one_line(error)})", file=sys.stderr)
        return EXIT_STOPPED
    # every exception class that saeql defines is a message to its user
    is_ours = type(error).__module__.startswith("saeql.") or isinstance(error, cyclopts.CycloptsError)
    is_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
    is_disk = is_disk or "No space left on device" in str(error)  # libraries that hide the number
    if not is_ours and not is_disk:
        return None
    if type(error).__name__ != "FirstRankError":  # which the first rank tells itself
        who = f"rank {place.rank} of {place.size}: " if place.size > 1 else ""
        print(f"saeql: {who}{_one_line(error)}", file=sys.stderr)
    return 2


def _end(code: int, place: RankPlace) -> NoReturn:
    if place.size > 1 and code:
        from .ranks import end_rank

        end_rank(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
