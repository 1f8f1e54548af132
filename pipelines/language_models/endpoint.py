"""An OpenAI-compatible endpoint as a judge: who it is, what it can do, many questions at once, none paid for twice."""

import json
import queue
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from saeql.sae.config import suggestion

from ..progress import OnProgress
from ..text_cache import TextCache
from .budget import Budget
from .config import JudgeConfig, JudgeError
from .dialect import Dialect, find_dialect
from .questions import Answer, Capabilities, Question, Spent, silent
from .transport import Hopeless, Left, NoAnswer, Refused, Transport

NAMESPACE = "judge 1"
#: Questions in a row without answer after which the rest is not tried.
_GIVE_UP_AFTER = 10


class Endpoint:
    """Answers questions through `judge.base_url`. Connects on first use.

    Every answer is kept in a file the moment it arrives, before the same thread asks the next question: a run that was
    killed asks again only what was in flight, and says by Idempotency-Key that it is the same request.
    """

    counts_exactly = False

    def __init__(self, config: JudgeConfig, cache: Path | None = None):
        """Raises JudgeError where the key's variable is not set."""
        if cache is None:
            from ..models import cache_folder

            cache = cache_folder() / "answers.sqlite"
        self.config, self.spent = config, Spent()
        self._cache_path, self._cache = cache, TextCache(cache, NAMESPACE)
        self._transport = Transport(config, Budget(config.max_total_tokens))
        self._in_a_row = 0
        self._lock = threading.Lock()

    @cached_property
    def _served(self) -> dict[str, Any]:
        """What the endpoint says of the model: at least its id."""
        try:
            listed = self._transport.get("/models")
        except Refused as error:  # not all have a list
            if error.status not in (400, 404, 405, 501):
                raise
            listed = {}
        if not self.config.model and not listed:
            raise JudgeError(f"{self.config.base_url} does not list its models: name one as judge.model")
        return _choose(self.config, listed)

    @property
    def name(self) -> str:
        """The model's name, without folders."""
        return self._served["id"].replace("\\", "/").rsplit("/", 1)[-1]

    @property
    def identity(self) -> str:
        """Address, model and settings that answers depend on."""
        config = self.config
        return json.dumps([config.base_url.rstrip("/"), self._served, config.temperature, config.thinking_tokens])

    @cached_property
    def _dialect(self) -> Dialect:
        key = f"dialect {self.identity}"
        known = self._cache.get([key]).get(key)
        if known:
            return Dialect.from_bytes(known)
        found = find_dialect(self._transport.post, self._served["id"], self.config)
        self._cache.put({key: found.to_bytes()})
        return found

    @property
    def capabilities(self) -> Capabilities:
        """What the endpoint can do: found out by two short questions on first use.

        Raises JudgeError where it cannot be reached or answers nothing.
        """
        return self._dialect.capabilities

    def count_tokens(self, question: Question) -> int:
        """Estimated: a token for every 4 bytes, and 4 a message."""
        return -(-question.num_bytes // 4) + 4 * len(question.messages)

    def known(self, questions: Sequence[Question]) -> list[Answer | None]:
        """Answers from earlier commands, None where there is none."""
        keys = [question.key(self.identity) for question in questions]
        found = self._cache.get(keys)
        return [Answer.from_bytes(found[key]) if key in found else None for key in keys]

    def ask(self, questions: Sequence[Question], on_progress: OnProgress = silent) -> list[Answer]:
        """Answers in the order of the questions. A question that was not answered has `failure` set and is not kept.

        Raises JudgeError where the cap is reached, the endpoint is gone, or 10 questions in a row failed.
        """
        keys = [question.key(self.identity) for question in questions]
        answers = {key: Answer.from_bytes(data) for key, data in self._cache.get(keys).items()}
        todo = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        self.spent.cached += len(set(keys)) - len(todo)
        on_progress(len(answers), len(answers) + len(todo))
        if todo:
            _ = self._dialect  # found out once, not by every thread
            for key, answer in self._ask_all(todo):
                answers[key] = answer
                self.spent.asked += not answer.failure
                self.spent.failed += bool(answer.failure)
                self.spent.prompt_tokens += answer.prompt_tokens
                self.spent.completion_tokens += answer.completion_tokens
                on_progress(len(answers), len(set(keys)))
        return [answers[key] for key in keys]

    def _ask_all(self, todo: dict[str, Question]):
        """Yield (key, answer) as they come, from threads of which each asks one question at a time."""
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        come: queue.SimpleQueue = queue.SimpleQueue()
        for item in todo.items():
            waiting.put(item)
        threads = [
            threading.Thread(target=self._work, args=(waiting, come), daemon=True)
            for _ in range(min(self.config.max_concurrency, len(todo)))
        ]
        for thread in threads:
            thread.start()
        self._in_a_row = 0
        try:
            done = 0
            for _ in todo:
                key, answer = come.get()
                if isinstance(answer, BaseException):
                    self._transport.leave.set()
                    for thread in threads:  # what they asked is paid for: it is kept
                        thread.join()
                    if isinstance(answer, JudgeError):
                        raise JudgeError(f"{answer} ({done:,} of {len(todo):,} questions were answered)") from None
                    raise answer
                done += not answer.failure
                yield key, answer
        finally:  # also where the caller is interrupted
            self._transport.leave.set()
            while not waiting.empty():
                waiting.get()
            for thread in threads:
                thread.join(0.1)
            self._transport.leave.clear()

    def _work(self, waiting: queue.SimpleQueue, come: queue.SimpleQueue) -> None:
        cache = TextCache(self._cache_path, NAMESPACE)  # a connection belongs to its thread
        try:
            while not self._transport.leave.is_set():
                key, question = waiting.get_nowait()
                answer = self._answer(key, question)
                if not answer.failure:
                    cache.put({key: answer.to_bytes()})
                come.put((key, answer))
        except (queue.Empty, Left):
            pass
        except BaseException as error:
            come.put(("", error))
        finally:
            cache.close()

    def _answer(self, key: str, question: Question) -> Answer:
        body = self._dialect.request(question, self.config)
        most = self._dialect.most_tokens(question, self.config)
        try:
            reply = self._transport.post("/chat/completions", body, idempotency_key=key, most_tokens=most)
            answer = self._dialect.answer(reply, question)
        except Hopeless:
            raise
        except NoAnswer as error:
            if error.is_gone:
                raise
            answer = Answer(failure=str(error))
        except Refused as error:
            answer = Answer(failure=str(error))
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if answer.failure else 0
            if self._in_a_row >= _GIVE_UP_AFTER:
                self._cache_forget_dialect()
                raise JudgeError(f"{_GIVE_UP_AFTER} questions in a row failed; the last: {answer.failure}")
        return answer

    def _cache_forget_dialect(self) -> None:
        cache = TextCache(self._cache_path, NAMESPACE)
        cache.put({f"dialect {self.identity}": b""})
        cache.close()

    def close(self) -> None:
        """End the connections and let go of the cache."""
        self._transport.close()
        self._cache.close()


def _choose(config: JudgeConfig, listed: Any) -> dict[str, Any]:
    """What the endpoint says of the configured model, or of the only one that there is."""
    entries = listed.get("data", listed.get("models", [])) if isinstance(listed, dict) else listed
    entries = [e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)] if entries else []
    by_name = {name: entry for entry in entries for name in (*_aliases(entry), entry["id"])}
    names = [entry["id"] for entry in entries]
    if config.model:
        if names and config.model not in by_name:
            raise JudgeError(
                f"{config.base_url} has no model {config.model!r}{suggestion(config.model, names)}; it has: "
                f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            )
        facts = by_name.get(config.model, {})
        # what changes from start to start of the same server is no part of who it is
        return {k: v for k, v in facts.items() if k in _LASTING} | {"id": config.model}
    if len(names) != 1:
        some = f"it has: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "it lists none"
        raise JudgeError(f"name one of the models of {config.base_url} as judge.model; {some}")
    return {k: v for k, v in entries[0].items() if k in _LASTING}


_LASTING = ("id", "meta", "root", "owned_by")


def _aliases(entry: dict[str, Any]) -> list[str]:
    """Further names: llama.cpp's aliases; Ollama's name without its tag ":latest"."""
    aliases = entry.get("aliases")
    found = [a for a in aliases if isinstance(a, str)] if isinstance(aliases, list) else []
    return [*found, entry["id"].removesuffix(":latest")]
