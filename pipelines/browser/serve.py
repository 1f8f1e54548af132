"""`saeql serve`: a socket, a line that says where, and the server until it is stopped."""

import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..stores import store_path
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Server


class ServeError(ValueError):
    """The browser cannot be served."""


def serve_store(
    path: Path,
    *,
    port: int,
    host: str,
    hosts: tuple[str, ...],
    token: str | None,
    open_browser: bool,
    memory: str | None = None,
) -> None:
    """Serve the store at `path` until SIGINT or SIGTERM.

    Raises ServeError where a package is missing, the port is taken or the token is too short; StoreError and RunError
    where there is no store.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServeError(f"`saeql serve` needs {error.name}: pip install 'saeql[serve]'") from None
    from .app import create_app

    if token is not None and (len(token) < 12 or not token.isascii() or not token.isprintable()):
        raise ServeError("--token: at least 12 printable ASCII characters")
    if not 0 <= port < 65536:
        raise ServeError(f"--port {port}: ports are 0 to 65535")
    store = store_path(path)
    is_run = (path / "config.toml").is_file()
    listening = _listen(host, port)
    settings = Settings(
        store=store,
        run=path if is_run else None,
        shown=str(path),
        host=host,
        port=listening.getsockname()[1],
        hosts=hosts,
        token=token or secrets.token_urlsafe(24),
        memory_limit=memory or _engine_memory(store),
    )
    app = create_app(settings)
    with app.state.site.open.reading():
        pass  # or says what is wrong with the store
    name = f"[{host}]" if ":" in host else "127.0.0.1" if host in ("0.0.0.0", "") else host
    address = f"http://{name}:{settings.port}/?token={settings.token}"
    print(f"saeql: serving {path} at {address}", file=sys.stderr)
    print("saeql: the token lets a browser run models and SQL; Ctrl-C ends the server", file=sys.stderr, flush=True)
    if open_browser:
        import webbrowser

        webbrowser.open(address)
    uvicorn_server(app).run(sockets=[listening])


def _engine_memory(store: Path) -> str:
    """A tenth of the file, 100 MB at least: the system keeps the rest of it, if there is room."""
    size = store.stat().st_size if store.is_file() else sum(file.stat().st_size for file in store.iterdir())
    return f"{max(100, size // 10_000_000)}MB"


def uvicorn_server(app: "FastAPI") -> "Server":
    """The HTTP server around the application."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named as TCP, or asyncio lets answers wait for the acknowledgement of their first half
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ServeError(
            f"cannot listen at {host}:{port} ({error.strerror}): take another --port, or 0 for a free one"
        ) from None
    made.listen(128)
    return made
