"""A small HTTP server that answers, refuses, breaks, hangs or passes requests on, and counts them: a fault injector."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What a request gets."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    drop: bool = False


def said(text: str, *, likeliest: list[tuple[str, float]] | None = None, tokens: tuple[int, int] = (10, 1)) -> Reply:
    """A chat completion."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if likeliest is not None:
        top = [{"token": t, "logprob": p} for t, p in likeliest]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return Reply(json.dumps({"choices": [choice], "usage": usage}).encode())


def refused(status: int, message: str, **headers: str) -> Reply:
    """An error as endpoints word it."""
    return Reply(json.dumps({"error": {"message": message}}).encode(), status, headers)


class EndpointServer:
    """Serves /v1/models and /v1/chat/completions on a free port; `answer(body, n)` says what the n-th question gets."""

    def __init__(self, answer: Callable[[dict, int], Reply], models: list[str] | None = None):
        self.questions: list[dict] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.authorization: set[str | None] = set()
        self.most_at_once = self._at_once = 0
        self._lock, outer = threading.Lock(), self
        listed = {"data": [{"id": name} for name in (models if models is not None else ["m"])]}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.authorization.add(self.headers["Authorization"])
                self._send(Reply(json.dumps(listed).encode()) if models != [] else refused(404, "no such address"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    n = len(outer.questions)
                    outer.questions.append(body)
                    outer.keys.append(self.headers["Idempotency-Key"])
                    outer.times.append(time.monotonic())
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    reply = answer(body, n)
                    time.sleep(reply.wait)
                finally:
                    with outer._lock:
                        outer._at_once -= 1
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                self.close_connection = reply.drop
                if reply.drop:
                    return
                try:
                    self.send_response(reply.status)
                    for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body)
                except OSError:  # who asked has left
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "EndpointServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, text: str) -> int:
        """How many requests held `text`."""
        return sum(text in json.dumps(body) for body in self.questions)


def passed_on(address: str) -> Callable[[dict, int], Reply]:
    """Every question goes on to the server at `address`."""

    def answer(body: dict, n: int) -> Reply:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return Reply(response.read())

    return answer
