"""A local transformers model as a judge, and how likely it finds a text: no endpoint, no cost."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ..model_config import ModelConfig
from ..models import LanguageModel, cache_folder, load_model
from ..progress import OnProgress
from ..text_cache import TextCache
from .config import JudgeConfig, JudgeError
from .questions import Answer, Capabilities, Question, Spent, silent

NAMESPACE = "judge 1"
_FIRST_TOKENS = 20
#: A beginning that was read already is used while it is this much of what a batch has in common.
_WORTH_READING = 0.7


@dataclass(frozen=True)
class _Beginning:
    """Tokens that questions begin with, and what the model's layers made of them."""

    tokens: list[int]
    cache: DynamicCache  # one sequence

    def keys_and_values(self, num: int) -> DynamicCache | None:
        """For `num` sequences, to be gone on from; None where there is nothing."""
        if not self.tokens:
            return None
        copy = deepcopy(self.cache)
        copy.batch_repeat_interleave(num)
        return copy


class LocalJudge:
    """Answers questions in batches, taking the likeliest token each time; answers are kept as those of endpoints."""

    counts_exactly = True
    capabilities = Capabilities(chances=True, schema=False)

    def __init__(self, lm: LanguageModel, *, batch_questions: int = 8, cache: Path | None = None):
        """Raises JudgeError where `lm` does not write text."""
        if not lm.is_causal or lm.truncated:
            raise JudgeError(f"{lm.identity.model_name} cannot judge: that takes a whole model that predicts tokens")
        self.lm, self.batch_questions, self.spent = lm, batch_questions, Spent()
        self.name = lm.identity.model_name.replace("embedded:", "").rstrip("/").rsplit("/", 1)[-1]
        self.identity = f"local {lm.identity.model_sha256} {lm.identity.tokenizer_sha256} {lm.model.dtype}"
        self._beginning = _Beginning([], DynamicCache(config=lm.model.config))
        self._cache = TextCache(cache or cache_folder() / "answers.sqlite", NAMESPACE)

    @classmethod
    def load(cls, config: JudgeConfig, cache: Path | None = None) -> "LocalJudge":
        """The model of `judge.local`. Raises ModelError where it cannot be had, JudgeError where it cannot judge."""
        lm = load_model(ModelConfig(name=config.local, device=config.device, hook_point="resid_post.0"))
        return cls(lm, batch_questions=config.batch_questions, cache=cache)

    def known(self, questions: Sequence[Question]) -> list[Answer | None]:
        """Answers from earlier commands, None where there is none."""
        keys = [question.key(self.identity) for question in questions]
        found = self._cache.get(keys)
        return [Answer.from_bytes(found[key]) if key in found else None for key in keys]

    def count_tokens(self, question: Question) -> int:
        """Tokens of the question as the model reads it."""
        return len(self._tokens(question))

    def ask(self, questions: Sequence[Question], on_progress: OnProgress = silent) -> list[Answer]:
        """Answers in the order of the questions; one that does not fit into the model's context has `failure` set."""
        keys = [question.key(self.identity) for question in questions]
        answers = {key: Answer.from_bytes(data) for key, data in self._cache.get(keys).items()}
        todo = {key: question for key, question in zip(keys, questions, strict=True) if key not in answers}
        total = len(answers) + len(todo)
        self.spent.cached += len(answers)
        on_progress(len(answers), total)
        for batch in self._batches(todo, answers):
            fresh = dict(zip([key for key, _, _ in batch], self._answer(batch), strict=True))
            self._cache.put({key: answer.to_bytes() for key, answer in fresh.items()})
            answers |= fresh
            for answer in fresh.values():
                self.spent.asked += 1
                self.spent.prompt_tokens += answer.prompt_tokens
                self.spent.completion_tokens += answer.completion_tokens
            on_progress(len(answers), total)
        return [answers[key] for key in keys]

    def _batches(self, todo: dict[str, Question], answers: dict[str, Answer]) -> Iterator[list]:
        """Questions of like length together, with their tokens; those that are too long are answered as failed."""
        limit = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        fitting = []
        for key, question in todo.items():
            tokens = self._tokens(question)
            if len(tokens) + question.max_tokens > limit:
                answers[key] = Answer(failure=f"{len(tokens):,} tokens are more than the model reads ({limit:,})")
                self.spent.failed += 1
            else:
                fitting.append((key, question, tokens))
        fitting.sort(key=lambda item: (item[1].max_tokens, item[2]))  # those that begin alike come together
        batch: list = []
        for item in fitting:
            if batch and (len(batch) == self.batch_questions or batch[0][1].max_tokens != item[1].max_tokens):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _tokens(self, question: Question) -> list[int]:
        tokenizer = self.lm.tokenizer
        messages = [asdict(m) for m in question.messages]
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        names = {"system": "", "user": "", "assistant": ""}
        return tokenizer("\n\n".join(names[m["role"]] + m["content"] for m in messages) + "\n")["input_ids"]

    @torch.no_grad()
    def _answer(self, batch: list[tuple[str, Question, list[int]]]) -> list[Answer]:
        tokens = [tokens for _, _, tokens in batch]
        read = self._read_already(tokens)
        ids, mask = _padded(tokens, self._padding, len(read.tokens))
        device = self.lm.input_device
        output: Any = self.lm.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=read.keys_and_values(len(tokens)),
            max_new_tokens=batch[0][1].max_tokens,
            do_sample=False,
            pad_token_id=self._padding,
            output_scores=True,
            return_dict_in_generate=True,
        )
        first = torch.log_softmax(output.scores[0].float(), dim=-1)  # [B, vocabulary]
        chances, likeliest = first.topk(min(_FIRST_TOKENS, first.shape[1]), dim=-1)
        answers = []
        for n, (_, question, own) in enumerate(batch):
            written = output.sequences[n, ids.shape[1] :].tolist()
            ends = [i for i, token in enumerate(written) if token in self._ends]
            written = written[: ends[0]] if ends else written
            pairs = zip(self.lm.token_texts(likeliest[n].tolist()), chances[n].tolist(), strict=True)
            answers.append(
                Answer(
                    self.lm.tokenizer.decode(written, skip_special_tokens=True),
                    tuple(pairs) if question.wants_chances else (),
                    len(own),
                    len(written) + bool(ends),
                )
            )
        return answers

    def _read_already(self, tokens: list[list[int]]) -> "_Beginning":
        """What all of `tokens` begin with, as the model has read it: the last beginning, or one read now."""
        if not getattr(self.lm.model, "_supports_default_dynamic_cache", lambda: False)():
            return self._beginning  # a model that keeps another kind of state reads all of it every time
        known = self._beginning.tokens
        shortest = min(tokens, key=len)
        shared = 0
        while shared < len(shortest) - 1 and all(own[shared] == shortest[shared] for own in tokens):
            shared += 1
        fits = len(known) <= shared and shortest[: len(known)] == known
        if not fits or len(known) < _WORTH_READING * shared:
            cache = DynamicCache(config=self.lm.model.config)
            if shared:
                ids = torch.tensor([shortest[:shared]], device=self.lm.input_device)
                self.lm.model(input_ids=ids, past_key_values=cache)
            self._beginning = _Beginning(shortest[:shared], cache)
        return self._beginning

    @torch.no_grad()
    def surprise(self, texts: Sequence[str], given: str) -> np.ndarray:
        """[n] mean nats a token of each text that follows `given`; NaN for a text without tokens.

        A text that follows another is tokenised by itself, so that its tokens are the same whatever is given.
        """
        tokenizer = self.lm.tokenizer
        before = tokenizer(given, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
            before = [self.lm.bos_id, *before]
        own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        out = np.full(len(texts), np.nan)
        order = sorted((n for n in range(len(texts)) if own[n] and before), key=lambda n: len(own[n]))
        device = self.lm.input_device
        for start in range(0, len(order), self.batch_questions):
            some = order[start : start + self.batch_questions]
            ids, mask = _padded([before + own[n] for n in some], self._padding)
            ids, mask = ids.to(device), mask.to(device)
            logits = self.lm.model(input_ids=ids, attention_mask=mask).logits[:, len(before) - 1 : -1]
            target, counts = ids[:, len(before) :], mask[:, len(before) :].to(logits.device)
            nats = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), target.to(logits.device).flatten(), reduction="none"
            ).view(target.shape)
            out[some] = ((nats * counts).sum(1) / counts.sum(1)).cpu().numpy()
        return out

    @property
    def _padding(self) -> int:
        tokenizer = self.lm.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.lm.separator_id

    @property
    def _ends(self) -> set[int]:
        ends = self.lm.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {end for end in (*ends, self.lm.tokenizer.eos_token_id) if end is not None}

    def close(self) -> None:
        """Let go of the cache."""
        self._cache.close()


def _padded(lists: Sequence[list[int]], padding: int, shared: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, mask), each [B, T]; padded behind, or else between the `shared` first tokens and the rest."""
    width = max(len(tokens) for tokens in lists)
    ids = torch.full((len(lists), width), padding, dtype=torch.long)
    mask = torch.zeros((len(lists), width), dtype=torch.long)
    for n, tokens in enumerate(lists):
        head = len(tokens) if shared is None else shared
        for place, part in ((slice(0, head), tokens[:head]), (slice(width - len(tokens) + head, width), tokens[head:])):
            if part:
                ids[n, place] = torch.tensor(part, dtype=torch.long)
                mask[n, place] = 1
    return ids, mask
