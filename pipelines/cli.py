"""The `saeql` command: names the commands, turns what a user can mend into one line and an exit code."""

import errno
import sys
from importlib.metadata import version

import cyclopts
from cyclopts import App

from .commands.comparison import compare
from .commands.exchange import export, import_
from .commands.jobs import config, demo, hooks, plan, run
from .commands.questions import search, show, sql, steer
from .commands.stages import evaluate, harvest, index, label, report, store, train, verify

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
    *(demo, run, plan, harvest, train, index, label, evaluate, store, report, verify),
    *(search, show, sql, steer, compare, export, hooks, config),
):
    app.command(_command)
app.command(import_, name="import")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> None:
    """Entry point. What a user can mend ends in one line on stderr and exit code 2, everything else in a traceback."""
    try:
        app(argv)
    except cyclopts.CycloptsError as error:
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        print("saeql: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        # every exception class that saeql defines is a message to its user
        is_ours = type(error).__module__.startswith("saeql.")
        is_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        is_disk = is_disk or "No space left on device" in str(error)  # libraries that hide the number
        if not is_ours and not is_disk:
            raise
        sys.exit(_fail(error))


def _fail(error: BaseException) -> int:
    print(f"saeql: {_one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
