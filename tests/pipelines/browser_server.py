"""The browser as it is served, on a free port of this process, plain requests to it, and what a page may hold."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from saeql.pipelines.browser.app import create_app
from saeql.pipelines.browser.serve import uvicorn_server
from saeql.pipelines.browser.settings import Limits, Settings
from saeql.pipelines.browser.site import Site

TOKEN = "a-token-of-tests"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Browser:
    """A server that runs, with its `Site`."""

    port: int
    site: Site
    app: Any = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        token: bool = False,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        **fields: object,
    ) -> Answer:
        """GET, or POST of JSON (bytes as they are) where there is a body."""
        given = dict(headers or {})
        if token:
            given["Authorization"] = f"Bearer {TOKEN}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            query = f"?{urlencode(fields)}" if fields else ""
            connection.request(method or ("GET" if body is None else "POST"), path + query, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@contextmanager
def served(store: Path, run: Path | None = None, **limits: Any) -> Iterator[Browser]:
    """Serve a store, or a run, inside the block."""
    with socket.socket(proto=socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        port = listening.getsockname()[1]
        settings = Settings(store=store, run=run, shown="runs/demo", port=port, token=TOKEN, limits=Limits(**limits))
        app = create_app(settings)
        server = uvicorn_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Browser(port, app.state.site, app)
        finally:
            server.should_exit = True
            thread.join(20)


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def assert_inert(html: str) -> Page:
    """Nothing runs or is fetched from elsewhere: scripts and styles are files of this server, links stay here."""
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "style", "meta http-equiv"), tag
        assert tag != "script" or (attributes.get("src") or "").startswith("/static/")
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ("href", "src", "action"):
                assert re.match(r"/(?!/)|#|\?", value or ""), (tag, name, value)
    return page
