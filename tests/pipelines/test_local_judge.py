"""A local transformers model as a judge, against the same model asked by hand."""

import math

import numpy as np
import pytest
import torch

from saeql.pipelines.language_models.config import JudgeConfig, JudgeError
from saeql.pipelines.language_models.local import LocalJudge
from saeql.pipelines.language_models.questions import Message, Question
from saeql.pipelines.model_config import ModelConfig
from saeql.pipelines.models import load_model


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(ModelConfig(name=str(tiny_model_folder), hook_point="resid_post.0", dtype="float32"))


@pytest.fixture
def judge(model, tmp_path):
    return LocalJudge(model, batch_questions=3, cache=tmp_path / "answers.sqlite")


def ask(text: str, tokens: int = 1, **options) -> Question:
    return Question((Message("user", text),), tokens, **options)


ALIKE = "walking and talking of seven green houses"
TEXTS = ["the river", "the river and the blue house of stone", "music", "Paris runs quickly", f"{ALIKE} and",
         f"{ALIKE} and music of the river", f"{ALIKE} river of stone", f"{ALIKE} and the", "seven"]  # fmt: skip


def test_first_tokens_are_the_models_own_whatever_they_are_batched_with(judge, model):
    answers = judge.ask([ask(text, wants_chances=True) for text in TEXTS])
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = model.tokenizer(text + "\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = torch.log_softmax(model.model(ids).logits[0, -1], -1).topk(20)
        np.testing.assert_allclose([p for _, p in answer.first_tokens], expected.values, atol=1e-4)
        assert answer.prompt_tokens == ids.shape[1] == judge.count_tokens(ask(text))
        assert answer.text == model.token_texts([int(expected.indices[0])])[0]


def test_longer_answers_are_greedy_and_end_with_the_end_of_text(judge, model):
    (answer,) = judge.ask([ask("the blue house", tokens=6)])
    ids = model.tokenizer("the blue house\n")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    written = ids[-6:]
    written = written[: written.index(2)] if 2 in written else written
    assert answer.text == model.tokenizer.decode(written, skip_special_tokens=True)


def test_answers_are_kept(judge, model, tmp_path, monkeypatch):
    questions = [ask(text, wants_chances=True) for text in TEXTS]
    first = judge.ask([*questions, questions[0]])
    assert (judge.spent.asked, judge.spent.cached) == (len(TEXTS), 0) and first[0] == first[-1]
    again = LocalJudge(model, cache=tmp_path / "answers.sqlite")
    monkeypatch.setattr(again, "_answer", lambda batch: pytest.fail("asked again"))
    assert again.known(questions) == again.ask(questions) == first[:-1]
    assert again.spent.cached == len(TEXTS)
    assert again.known([ask("something else")]) == [None]


def test_a_question_that_is_too_long_fails_alone(judge):
    answers = judge.ask([ask("river " * 400), ask("river")])
    assert "more than the model reads (256)" in answers[0].failure and not answers[1].failure
    assert (judge.spent.asked, judge.spent.failed) == (1, 1)


def test_surprise_is_the_cross_entropy_of_the_text_alone(judge, model):
    found = judge.surprise([" river", " the blue house of green stone", "", " music"], "walking and talking:")
    for text, value in zip([" river", " the blue house of green stone", "", " music"], found, strict=True):
        before = [1, *model.tokenizer("walking and talking:", add_special_tokens=False)["input_ids"]]
        own = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not own:
            assert math.isnan(value)
            continue
        with torch.no_grad():
            logits = model.model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
        assert value == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(own))), abs=1e-4)


def test_models_that_cannot_judge(tmp_path, tiny_model_folder):
    truncated = load_model(ModelConfig(name=str(tiny_model_folder), hook_point="resid_post.0", truncate=True))
    with pytest.raises(JudgeError, match="cannot judge: that takes a whole model"):
        LocalJudge(truncated, cache=tmp_path / "answers.sqlite")
    with pytest.raises(ValueError, match="no embedded model"):
        LocalJudge.load(JudgeConfig(local="embedded:nothing"), tmp_path / "answers.sqlite")
