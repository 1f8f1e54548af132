"""The judge of a run, by its configuration."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .config import JudgeConfig, JudgeError
from .questions import Judge

if TYPE_CHECKING:
    from ..run import Run
    from .local import LocalJudge

#: One judge for all scorers and explainers of a run, so that `judge.max_total_tokens` caps what they spend together.
_judges: "WeakKeyDictionary[Run, dict[JudgeConfig, Judge]]" = WeakKeyDictionary()


def judge_of(run: "Run") -> Judge:
    """The judge that `run` names: an endpoint, which is not reached before the first question, or a local model.

    Raises JudgeError where there is none, ModelError where a local one cannot be loaded.
    """
    config = run.config.judge
    known = _judges.setdefault(run, {})
    if config not in known:
        if config.base_url:
            from .endpoint import Endpoint

            known[config] = Endpoint(config)
        elif config.local:
            known[config] = local_model_of(run)
        else:
            raise JudgeError(
                "this needs a language model: set judge.base_url (an endpoint) or "
                'judge.local = "embedded:smollm2-135m-instruct" (docs/language_models.md)'
            )
    return known[config]


def local_model_of(run: "Run") -> "LocalJudge":
    """The model of `judge.local`, or the run's own where that is not set; one that is loaded already is used again.

    Raises ModelError where it cannot be loaded, JudgeError where it writes no text.
    """
    from .local import LocalJudge

    config, own = run.config.judge, run.config.model
    is_own = config.local in ("", own.name) and config.device in ("auto", own.device) and not own.quantization
    if is_own:
        return LocalJudge(run.language_model, batch_questions=config.batch_questions)
    return LocalJudge.load(config)
