"""The command that shows a store in the web browser: serve."""

from typing import Annotated

from cyclopts import Parameter

from .common import StorePath


def serve(
    run: StorePath,
    *,
    port: Annotated[int, Parameter(help="Port; 0 takes a free one.")] = 7860,
    host: Annotated[str, Parameter(help="Address to listen at. Anything but 127.0.0.1 lets other machines read.")] = (
        "127.0.0.1"
    ),
    allow_host: Annotated[
        list[str] | None, Parameter(help="A further name by which browsers may call this server.", negative="")
    ] = None,
    token: Annotated[
        str | None, Parameter(help="What a browser needs to run models and SQL. Default: a new one each time.")
    ] = None,
    memory: Annotated[
        str | None, Parameter(help="Memory of the engine for pages. Default: a tenth of the store, 100MB at least.")
    ] = None,
    open: Annotated[bool, Parameter(help="Open the address in this machine's web browser.", negative="")] = False,
) -> None:
    """Show features in the web browser: lists and search, a page a feature, prompts, steering, SQL.

    Example: saeql serve runs/demo
    """
    from ..browser.serve import serve_store

    serve_store(run, port=port, host=host, hosts=tuple(allow_host or ()), token=token, open_browser=open, memory=memory)
