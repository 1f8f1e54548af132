"""The judge of a run, by its configuration."""

from typing import TYPE_CHECKING

from .config import JudgeError
from .questions import Judge

if TYPE_CHECKING:
    from ..run import Run
    from .local import LocalJudge


def judge_of(run: "Run") -> Judge:
    """The judge that `run` names: an endpoint, which is not reached before the first question, or a local model.

    Raises JudgeError where there is none, ModelError where a local one cannot be loaded.
    """
    config = run.config.judge
    if config.base_url:
        from .endpoint import Endpoint

        return Endpoint(config)
    if not config.local:
        raise JudgeError(
            "this needs a language model: set judge.base_url (an endpoint) or judge.local = "
            '"embedded:smollm2-135m-instruct" (docs/language_models.md)'
        )
    return local_model_of(run)


def local_model_of(run: "Run") -> "LocalJudge":
    """The model of `judge.local`, or the run's own where that is not set; one that is loaded already is used again."""
    from .local import LocalJudge

    config, own = run.config.judge, run.config.model
    same = config.local in ("", own.name) and config.device in ("auto", own.device) and not own.quantization
    if same:
        return LocalJudge(run.language_model, batch_questions=config.batch_questions)
    return LocalJudge.load(config)
