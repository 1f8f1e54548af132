"""Hostile requests and hostile stores: nothing runs, nothing leaks, and the browser still answers."""

import http.client
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pyarrow as pa
import pytest
from browser_server import TOKEN, Browser, assert_inert, served

from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore

#: What tokens, labels and titles of the store say, and what each would do where it is not kept as text.
TEXT_HARM = {
    "<script>window.pwn = 1</script>": "run a script",
    "<img src=x onerror=window.pwn=1>": "run a script when an image fails",
    '"><svg onload=window.pwn=1>': "end an attribute and run a script",
    "' onmouseover='window.pwn=1": "add a handler to an element",
    "</mark></p></main><script>window.pwn=1</script>": "end the elements around it and run a script",
    "javascript:window.pwn=1": "run a script where it becomes an address",
    "{{ 7 * 191 }}": "run as a template of the server",
    "{% include '/etc/passwd' %}": "show a file of the server",
    "${7*191} #{7*191} <%= 7*191 %>": "run in templates of other kinds",
    "\u202eevil\u202c": "reorder the text that follows",
    "\u2066a\u2069\u200f\u200e": "reorder, isolated and by marks",
    "\x00\x1b[31m\x07": "cut a text, and colour and ring a terminal",
    "\u2028\u2029\ufeff\u00ad": "end a line of a script, and hide in a word",
    "&lt;script&gt;": "become a tag where it is unescaped twice",
    "<!--#exec cmd='id'-->": "run a command by a server's includes",
    "]]><script>window.pwn=1</script>": "end a block of data and run a script",
    "<style>@import '//evil.example';</style>": "fetch a style sheet from elsewhere",
    "<meta http-equiv=refresh content='0;url=//evil.example'>": "lead the reader elsewhere",
    "<base href='//evil.example/'>": "make every link lead elsewhere",
    "a" * 3000: "push a page wider than any screen",
    "=cmd|' /C calc'!A0": "run a program from a CSV in a spreadsheet",
    "\ud7ff\uf8ff\U000e0001": "look like nothing, or like another text",
}
TEXTS = list(TEXT_HARM)
HIDDEN = "\u202e\u202c\u2066\u2069\u200f\u200e\x00\x1b\x07\u2028\u2029\ufeff\u00ad\U000e0001"


@pytest.fixture(scope="module")
def hostile_store(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store all of whose texts are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny_run / "evidence", folder / "evidence")
    evidence = Evidence(folder / "evidence")
    for table, column in (("vocabulary", "token"), ("documents", "title"), ("labels", "label"), ("labels", "kind")):
        rows = evidence.read(table)
        texts = [TEXTS[n % len(TEXTS)] for n in range(rows.num_rows)]
        evidence.write(table, rows.set_column(rows.column_names.index(column), column, pa.array(texts)))
    return FeatureStore.build(folder / "features.duckdb", [evidence])


@pytest.fixture(scope="module")
def browser(hostile_store: Path) -> Iterator[Browser]:
    with served(hostile_store) as found:
        yield found


def check_shown(text: str) -> None:
    page = assert_inert(text)
    assert not set(page.text) & set(HIDDEN)
    assert "1337" not in page.text.replace("window.pwn=1", "")  # 7 * 191, were a template run


@pytest.mark.parametrize("feature", range(0, 96, 8))
def test_texts_of_the_store_stay_texts(browser: Browser, feature: int) -> None:
    answer = browser.ask(f"/features/{feature}")
    assert answer.status == 200
    check_shown(answer.text)
    found = browser.ask(f"/api/v1/features/{feature}")  # JSON holds them as they are
    assert found.headers["content-type"] == "application/json"
    assert all(token in TEXTS for a in found.json["activations"] for token in a["tokens"])


@pytest.mark.parametrize(
    "path",
    ["/", "/features", "/features?sort=label", "/features?q=script", "/features?q=window&by=words", "/compare",
     "/sql?q=SELECT+*+FROM+features", "/sql?q=SELECT+label,+feature+FROM+features+LIMIT+20"],
)  # fmt: skip
def test_lists_of_hostile_texts_stay_texts(browser: Browser, path: str) -> None:
    answer = browser.ask(path, token=True)
    assert answer.status == 200
    check_shown(answer.text)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_typed_stays_text(browser: Browser, text: str) -> None:
    """Every field of an address comes back as text, or not at all."""
    for path, field in (
        ("/features", "q"), ("/features", "kind"), ("/features", "where"), ("/features", "sort"), ("/features", "by"),
        ("/features", "page"), ("/features", "dictionary"), ("/", "dictionary"), ("/sql", "q"), ("/compare", "other"),
        ("/prompt", "text"), ("/steer", "prompt"), ("/steer", "features"), ("/features/1", "split"), ("/", "token"),
    ):  # fmt: skip
        answer = browser.ask(f"{path}?{urlencode({field: text})}")
        assert answer.status in (200, 400, 401, 404), (path, field, answer.text)
        assert_inert(answer.text)
        assert "root:" not in answer.text and "Traceback" not in answer.text


REQUESTS: dict[str, bytes] = {
    "another host": b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "a host that ends like ours": b"GET / HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n",
    "a host with our name as user": b"GET / HTTP/1.1\r\nHost: 127.0.0.1@evil.example\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "an address with a host": b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "another origin": b"GET /features HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://evil.example\r\n\r\n",
    "no origin at all": b"GET /features HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: null\r\n\r\n",
    "another port's page": b"GET /features HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1:1\r\n\r\n",
    "a page of another site": b"GET /api/v1/features HTTP/1.1\r\nHost: 127.0.0.1\r\nSec-Fetch-Site: cross-site\r\n"
    b"Sec-Fetch-Mode: no-cors\r\n\r\n",
    "a form of another site": b"POST /api/v1/sql HTTP/1.1\r\nHost: 127.0.0.1\r\nSec-Fetch-Site: cross-site\r\n"
    b"Sec-Fetch-Mode: navigate\r\nContent-Length: 0\r\n\r\n",
    "a path out of the files": b"GET /static/../../settings.py HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "the same, written otherwise": b"GET /static/%2e%2e%2f%2e%2e%2fsettings.py HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "with backslashes": b"GET /static/..\\settings.py HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "an absolute file": b"GET /static//etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a zero byte": b"GET /static/browser.css%00.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a feature that is a path": b"GET /features/..%2f..%2fetc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a feature that is SQL": b"GET /features/1;DROP%20TABLE%20x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a huge feature": b"GET /features/99999999999999999999 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a negative feature": b"GET /features/-1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "digits of another script": b"GET /features/%D9%A1%D9%A2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "broken UTF-8": b"GET /features?q=%ff%fe%ed%a0%80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a header split": b"GET /?token=x%0d%0aSet-Cookie:a=b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a redirect elsewhere": b"GET //evil.example/?token=" + TOKEN.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a length that is no number": b"POST /api/v1/sql HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
    "a length and chunks": b"POST /api/v1/sql HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a method of its own": b"BREW /features HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "an endless header": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    "an upgrade": b"GET /features HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\nOrigin: http://evil.example\r\n\r\n",
}


#: What each would do to a server that minded it not.
REQUEST_HARM = {
    "another host": "let a page whose name points here read all of it",
    "a host that ends like ours": "the same, past a check of the end of the name",
    "a host with our name as user": "the same, past a check of its beginning",
    "two hosts": "pass by the first, be served as the second",
    "no host": "pass a check that only looks at names given",
    "an address with a host": "be taken for a request to somebody else",
    "another origin": "let a foreign page read features",
    "no origin at all": "let a page in a sandbox read features",
    "another port's page": "let another program of this machine read features",
    "a page of another site": "put an answer of the API into a foreign page",
    "a form of another site": "run SQL by a form on a foreign page",
    "a path out of the files": "show the server's own sources",
    "the same, written otherwise": "the same, past a check before decoding",
    "with backslashes": "the same, on Windows",
    "an absolute file": "show the users of the machine",
    "a zero byte": "end a name before its check does",
    "a feature that is a path": "read a folder as a feature",
    "a feature that is SQL": "drop a table",
    "a huge feature": "overflow a number",
    "a negative feature": "read from the end of a column",
    "digits of another script": "be a number for one check and text for the next",
    "broken UTF-8": "end the request in a stack trace",
    "a header split": "set a cookie of the attacker's",
    "a redirect elsewhere": "send the reader, and the token, to another host",
    "a length that is no number": "end the request in a stack trace",
    "a length and chunks": "hide a second request in the first",
    "a method of its own": "reach a page past checks by method",
    "TRACE": "echo the cookie to a script",
    "no HTTP": "end the server's parser",
    "an endless header": "fill its memory",
    "an upgrade": "open a socket from a foreign page",
}


@pytest.mark.parametrize("what", REQUESTS)
def test_hostile_requests_are_refused(browser: Browser, what: str) -> None:
    with socket.create_connection(("127.0.0.1", browser.port), timeout=10) as connection:
        try:
            connection.sendall(REQUESTS[what])
            if what == "no HTTP":
                connection.shutdown(socket.SHUT_WR)
            said = connection.recv(65536)
        except ConnectionError:
            said = b""  # it hung up
    if what == "broken UTF-8":
        assert said.startswith(b"HTTP/1.1 200")
    else:
        assert said == b"" or said.split(b" ")[1][:1] == b"4", said
    assert b"location: //" not in said.lower() and b"a=b" not in said
    assert b"root:" not in said and b"Traceback" not in said and b"class Limits" not in said
    assert browser.ask("/features").status == 200


BODIES: dict[str, bytes] = {
    "no JSON": b"<xml/>",
    "a list": b"[1]",
    "nothing": b"",
    "a deep one": b"[" * 20_000,
    "a number that is none": b'{"query": "SELECT 1", "max_rows": NaN}',
    "a huge number": b'{"query": "SELECT 1", "max_rows": 1e999}',
    "a key of its own": b'{"query": "SELECT 1", "__class__": "x"}',
    "lone surrogates": b'{"query": "SELECT \'\\ud800\'"}',
    "two statements": b'{"query": "SELECT 1; DROP TABLE features"}',
    "a file": b'{"query": "SELECT * FROM read_csv(\'/etc/passwd\')"}',
    "an attachment": b'{"query": "ATTACH \'/tmp/x.db\'"}',
    "settings": b'{"query": "SELECT * FROM duckdb_settings()"}',
    "a bomb": b'{"query": "SELECT repeat(\'x\', 4000000000)"}',
    "many rows": b'{"query": "SELECT * FROM range(100000000000) a, range(1000000) b"}',
}


BODY_HARM = {
    "no JSON": "reach another parser",
    "a list": "be taken for fields",
    "nothing": "end in a stack trace",
    "a deep one": "exhaust the parser's stack",
    "a number that is none": "pass a comparison with a limit",
    "a huge number": "ask for all rows there are",
    "a key of its own": "set what no caller may set",
    "lone surrogates": "end in a stack trace when it is encoded",
    "two statements": "drop a view after a harmless statement",
    "a file": "show the users of the machine",
    "an attachment": "write a file",
    "settings": "tell where files of this machine lie",
    "a bomb": "fill the memory by one call that cannot be interrupted",
    "many rows": "fill memory and time",
}


@pytest.mark.parametrize("what", BODIES)
def test_hostile_bodies_are_refused(browser: Browser, what: str) -> None:
    answer = browser.ask("/api/v1/sql", BODIES[what], token=True)
    if what == "many rows":  # the first of them
        assert answer.status == 200 and answer.json["truncated"]
    else:
        assert answer.status in (400, 413, 422) and set(answer.json) == {"error"}, answer.text
    assert "root:" not in answer.text and str(browser.site.settings.store.parent) not in answer.text
    assert browser.ask("/features").status == 200


def test_more_than_forty_inputs_are_hostile_each_in_its_own_way() -> None:
    assert REQUEST_HARM.keys() == REQUESTS.keys() and BODY_HARM.keys() == BODIES.keys()
    inputs = [*TEXT_HARM, *REQUESTS.values(), *BODIES.values()]
    harms = [*TEXT_HARM.values(), *REQUEST_HARM.values(), *BODY_HARM.values()]
    assert len(set(inputs)) == len(inputs) == len(harms) == 67 and all(harms)


def test_two_hundred_requests_at_once_are_answered_or_refused(browser: Browser) -> None:
    paths = ["/features?page=1", "/features/7", "/api/v1/features/3", "/features?q=river", "/"]
    connections = [socket.create_connection(("127.0.0.1", browser.port), timeout=60) for _ in range(200)]
    said = []
    try:
        for n, connection in enumerate(connections):  # all are there before the first is read
            connection.sendall(f"GET {paths[n % 5]} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        for connection in connections:
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            said.append(b"".join(parts))
    finally:
        for connection in connections:
            connection.close()
    answers = [whole.split(b" ")[1] for whole in said]
    assert set(answers) <= {b"200", b"429"} and b"200" in answers, set(answers)
    for whole in said:
        head, _, body = whole.partition(b"\r\n\r\n")
        assert b"Traceback" not in body and (b" 429 " not in head or b"retry-after: 1" in head.lower())
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
        assert len(body) == length  # nothing was cut off
    assert browser.ask("/features/7").status == 200
    with browser.site.open.reading():
        assert browser.site.open._readers == 1  # none was left behind


def test_the_token_is_told_nowhere(browser: Browser) -> None:
    for path in ("/", "/features", "/sql", "/api/v1/openapi.json", "/static/browser.js", "/nothing"):
        answer = browser.ask(path, token=True)
        assert TOKEN not in answer.text and TOKEN not in str(answer.headers), path


def test_a_client_that_reads_slowly_does_not_stop_others(browser: Browser) -> None:
    slow = [socket.create_connection(("127.0.0.1", browser.port), timeout=10) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(b"GET /features/1 HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")  # and never more
        assert browser.ask("/features").status == 200
    finally:
        for connection in slow:
            connection.close()


def test_forwarded_names_count_for_nothing(browser: Browser) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", browser.port, timeout=10)
    connection.putrequest("GET", "/", skip_host=True)
    connection.putheader("Host", "evil.example")
    connection.putheader("X-Forwarded-Host", "127.0.0.1")
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()
