"""An endpoint that is busy, broken, slow, refusing, gone or expensive: what a judge makes of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from saeql.pipelines.language_models.config import JudgeConfig, JudgeError
from saeql.pipelines.language_models.endpoint import Endpoint
from saeql.pipelines.language_models.questions import Message, Question
from saeql.pipelines.language_models.transport import retry_after
from saeql.sae.config import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from datetime import UTC

from endpoint_server import EndpointServer, Reply, refused, said

YES = [("Yes", -0.1), (" yes", -3.0), ("No", -2.5)]


def question(n: int, **options) -> Question:
    return Question((Message("user", f"question number {n}."),), 1, **options)


def endpoint(server: EndpointServer, folder: Path, **options) -> Endpoint:
    settings = {"backoff_seconds": 0.02, "timeout_seconds": 5.0, "max_tries": 4, **options}
    return Endpoint(JudgeConfig(base_url=server.url, **settings), folder / "answers.sqlite")


def is_probe(body: dict) -> bool:
    return body["messages"][0]["content"] == "Say yes."


def able(answer):
    """A server that can do all that is asked for, and answers questions by `answer(body, n)`."""

    def reply(body: dict, n: int) -> Reply:
        if not is_probe(body):
            return answer(body, n)
        return said('{"word": "k7qz"}') if "response_format" in body else said("Yes", likeliest=YES)

    return reply


def test_what_breaks_is_asked_again_with_the_same_key(tmp_path):
    faults = [
        refused(429, "slow down", **{"Retry-After": "1"}),
        refused(500, "oh"),
        Reply(b"<html>not JSON"),
        Reply(b'{"choices": [{"mess'),
        Reply(b"", drop=True),
        Reply(b"", wait=0.6),
    ]
    met: dict[str, int] = {}

    def answer(body: dict, n: int) -> Reply:
        number = int(body["messages"][0]["content"].split()[-1].rstrip("."))
        met[str(number)] = met.get(str(number), 0) + 1
        return faults[number] if met[str(number)] == 1 else said(f"answer {number}")

    with EndpointServer(able(answer)) as server:
        judge = endpoint(server, tmp_path, timeout_seconds=0.4, max_concurrency=1)
        answers = judge.ask([question(n) for n in range(len(faults))])
        assert [a.text for a in answers] == [f"answer {n}" for n in range(len(faults))]
        assert set(met.values()) == {2}
        keys = server.keys[2:]
        assert len(set(keys)) == len(faults) and keys[0::2] == keys[1::2]  # both tries of each are one request
        assert server.times[3] - server.times[2] >= 1.0  # Retry-After is longer than the backoff
        judge.close()


def test_an_answer_that_never_comes_is_a_failure_that_is_not_kept(tmp_path):
    healed = []

    def answer(body: dict, n: int) -> Reply:
        broken = "number 2." in body["messages"][0]["content"] and not healed
        return refused(503, "overloaded") if broken else said("fine")

    with EndpointServer(able(answer)) as server:
        judge = endpoint(server, tmp_path, max_tries=3)
        answers = judge.ask([question(n) for n in range(4)])
        assert [a.text for a in answers] == ["fine", "fine", "", "fine"]
        assert "503: overloaded, 3 times" in answers[2].failure
        assert (judge.spent.asked, judge.spent.failed) == (3, 1) and server.asked("number 2.") == 3
        healed.append(True)
        again = endpoint(server, tmp_path)
        assert [a.text for a in again.ask([question(n) for n in range(4)])] == ["fine"] * 4
        assert (again.spent.asked, again.spent.cached) == (1, 3)


def test_the_rest_is_not_tried_after_ten_failures(tmp_path):
    with EndpointServer(able(lambda body, n: refused(400, "context is too long"))) as server:
        judge = endpoint(server, tmp_path, max_concurrency=2)
        with pytest.raises(
            JudgeError, match=r"10 questions in a row failed; the last: .*context is too long.* .0 of 200 q"
        ):
            judge.ask([question(n) for n in range(200)])
        assert 10 <= server.asked("question number") <= 12


def test_no_more_questions_at_a_time_than_allowed(tmp_path):
    together = threading.Barrier(3, timeout=20)

    def answer(body: dict, n: int) -> Reply:
        together.wait()
        return said("fine")

    with EndpointServer(able(answer)) as server:
        endpoint(server, tmp_path, max_concurrency=3).ask([question(n) for n in range(30)])
        assert server.most_at_once == 3


def test_the_cap_is_never_passed_and_what_was_paid_is_kept(tmp_path):
    def answer(body: dict, n: int) -> Reply:
        size = sum(len(m["content"].encode()) for m in body["messages"])
        return said("fine", tokens=(size // 3, 1))  # dearer than a token for 4 bytes

    served = []

    def counted(body: dict, n: int) -> Reply:
        reply = able(answer)(body, n)
        usage = json.loads(reply.body)["usage"]
        served.append(usage["prompt_tokens"] + usage["completion_tokens"])
        return reply

    questions = [question(n) for n in range(60)]
    with EndpointServer(counted) as server:
        with pytest.raises(JudgeError, match=r"max_total_tokens = 300 is reached: .* \(\d+ of 60 questions were answ"):
            endpoint(server, tmp_path, max_total_tokens=300).ask(questions)
        assert 200 < sum(served) <= 300
        answered = server.asked("question number")
        assert 0 < answered < 60
        endpoint(server, tmp_path, max_total_tokens=10_000).ask(questions)
        assert server.asked("question number") == 60 and len(set(server.keys[2:])) == 60  # none is paid for twice
        with pytest.raises(JudgeError, match="max_total_tokens = 20 is too small for one question"):
            endpoint(server, tmp_path, max_total_tokens=20).ask([question(99)])


def test_time_that_ran_out_counts_as_spent(tmp_path):
    with EndpointServer(able(lambda body, n: Reply(b"{}", wait=0.3))) as server:
        judge = endpoint(server, tmp_path, timeout_seconds=0.1, max_total_tokens=250, max_tries=5)
        with pytest.raises(JudgeError, match="max_total_tokens = 250 is reached"):
            judge.ask([question(0)])
        assert server.asked("question number") < 5  # each try may have been charged


def test_what_an_endpoint_does_not_take_is_left_out(tmp_path):
    def answer(body: dict, n: int) -> Reply:
        if "max_tokens" in body:
            return refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return refused(400, "'temperature' does not support 0.0 with this model.")
        if "logprobs" in body or "response_format" in body:
            return refused(400, "unknown field")
        return said("No.")

    with EndpointServer(answer) as server:
        judge = endpoint(server, tmp_path)
        assert (judge.capabilities.chances, judge.capabilities.schema) == (False, False)
        (found,) = judge.ask([question(1, wants_chances=True, schema={"type": "object"})])
        assert (found.text, found.first_tokens) == ("No.", ())
        assert set(server.questions[-1]) == {"model", "messages", "max_completion_tokens", "stream"}
        before = len(server.questions)
        endpoint(server, tmp_path).ask([question(2)])
        assert len(server.questions) == before + 1  # what it can do is known by now


def test_a_server_that_ignores_wishes_cannot_do_them(tmp_path):
    with EndpointServer(lambda body, n: said("yes")) as server:  # neither probabilities nor JSON, and no refusal
        capabilities = endpoint(server, tmp_path).capabilities
        assert (capabilities.chances, capabilities.schema) == (False, False)
    with EndpointServer(able(lambda body, n: said("fine"))) as server:
        capabilities = endpoint(server, tmp_path).capabilities
        assert (capabilities.chances, capabilities.schema) == (True, True)
        thinking = endpoint(server, tmp_path, thinking_tokens=500)
        assert not thinking.capabilities.chances  # its first token is not its answer's
        thinking.ask([question(1)])
        assert server.questions[-1]["max_tokens"] == 501


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    with EndpointServer(able(lambda body, n: said("fine"))) as server:
        judge = endpoint(server, tmp_path, api_key_env="SOME_KEY")
        judge.ask([question(1)])
        assert server.authorization == {"Bearer sk-very-secret"}
        assert "secret" not in repr(judge.config) + judge.identity
    with EndpointServer(lambda body, n: refused(401, "bad key sk-very-secret")) as server:
        with pytest.raises(JudgeError) as caught:
            endpoint(server, tmp_path, api_key_env="SOME_KEY").ask([question(1)])
        assert "refuses the key in SOME_KEY" in str(caught.value) and "secret" not in str(caught.value)
        monkeypatch.delenv("SOME_KEY")
        with pytest.raises(JudgeError, match="SOME_KEY, which is not set"):
            endpoint(server, tmp_path, api_key_env="SOME_KEY")
    assert b"secret" not in (tmp_path / "answers.sqlite").read_bytes()


def test_models(tmp_path):
    with EndpointServer(able(lambda body, n: said("fine")), ["llama3:latest", "qwen"]) as server:
        with pytest.raises(JudgeError, match=r'has no model \'quen\'; did you mean "qwen"\?; it has: llama3:lat'):
            endpoint(server, tmp_path, model="quen").ask([question(1)])
        with pytest.raises(JudgeError, match=r"name one of the models of .* as judge.model; it has: llama3"):
            endpoint(server, tmp_path).ask([question(1)])
        endpoint(server, tmp_path, model="llama3").ask([question(1)])
        endpoint(server, tmp_path, model="qwen").ask([question(1)])
        assert server.asked("question number") == 2  # another model's answer is not taken
        assert [q["model"] for q in server.questions if not is_probe(q)] == ["llama3", "qwen"]
    with EndpointServer(able(lambda body, n: said("fine")), []) as server:  # no list at all
        with pytest.raises(JudgeError, match="does not list its models: name one"):
            endpoint(server, tmp_path).ask([question(1)])
        assert endpoint(server, tmp_path, model="any").ask([question(1)])[0].text == "fine"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:80", "must look like"),
        ("ftp://host/v1", "must look like"),
        ("http://", "must look like"),
        ("http://host:99999/v1", "must look like"),
        ("http://me:pass@host/v1", "must hold no user"),
        ("https://host/v1?key=1", "must hold no user"),
    ],
)
def test_bad_addresses(url, reason):
    with pytest.raises(ConfigError, match=reason):
        JudgeConfig(base_url=url)


def test_a_server_that_is_down_or_is_no_endpoint(tmp_path):
    with EndpointServer(able(lambda body, n: said("fine"))) as server:
        pass
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:\d+/v1: no connection .*; is it running\?"):
        endpoint(server, tmp_path).ask([question(1)])
    for reply, reason in (
        (refused(404, "what?"), "has no such model or address"),
        (refused(429, "quota", **{"Retry-After": "7200"}), r"asks to wait 7,200 s .*judge.max_wait_seconds = 300"),
    ):
        with (
            EndpointServer(able(lambda body, n, reply=reply: reply)) as server,
            pytest.raises(JudgeError, match=reason),
        ):
            endpoint(server, tmp_path).ask([question(1)])


def test_retry_after_is_seconds_or_a_date():
    from datetime import datetime, timedelta
    from email.utils import format_datetime

    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert 80 < retry_after({"retry-after": soon}) <= 90
    assert [retry_after({"retry-after": text}) for text in ("", "later", "-3", "nan")] == [0, 0, 0, 0]


ASKER = """
import sys
from pathlib import Path
from saeql.pipelines.language_models.config import JudgeConfig
from saeql.pipelines.language_models.endpoint import Endpoint
from saeql.pipelines.language_models.questions import Message, Question
judge = Endpoint(JudgeConfig(base_url=sys.argv[1], max_concurrency=2, timeout_seconds=60), Path(sys.argv[2]))
answers = judge.ask([Question((Message("user", f"Say the number {n}."),), 4) for n in range(12)])
print(judge.spent.asked, judge.spent.cached, sum(bool(a.text) for a in answers))
"""


def test_a_killed_run_asks_only_what_was_not_answered(tmp_path, llama):
    from endpoint_server import passed_on

    real, gate = passed_on(llama), []

    def answer(body: dict, n: int) -> Reply:
        if n >= 8 and not gate:  # two probes and six questions are answered, further ones wait
            time.sleep(60)
        return real(body, n)

    command = [sys.executable, "-c", ASKER]
    with EndpointServer(answer) as server:
        command += [server.url, str(tmp_path / "answers.sqlite")]
        with subprocess.Popen(command) as first:
            deadline = time.monotonic() + 60
            while len(server.questions) < 10 and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(first.pid, signal.SIGKILL)
        assert len(server.questions) == 10  # two were in flight
        gate.append(True)
        second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert second.stdout.split() == ["6", "6", "12"]
        assert len(server.questions) == 16
        again = [key for key in server.keys if server.keys.count(key) > 1]
        assert sorted(set(again)) == sorted(server.keys[8:10])  # which say that they are the same requests
