"""What steering with features does to their concepts, at many strengths, beside every other direction that could do it.

`h' = h + strength c v` at every test token, c the median norm at the hook point. The own shift of a concept is
D = E[log p'(S) - log p(S)] over test positions, S its measured words: none of them chose a feature or made a direction
of the concept. Directions are compared where the KL divergence from the model's own predictions is `KL_BUDGET`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from saeql.sae.metrics import Estimate

from ..output_effects import Effects
from ..progress import progress
from .dose_response import KL_BUDGET, Curve, RandomCurves, ReadOut, points, read_out, trend
from .effect_config import EffectConfig
from .effect_passes import EffectPasses
from .effect_results import GROUPS, PROMPT, SELF, EffectStudy, GroupEffect, MethodEffect, SubjectEffect
from .effect_subjects import Asked, Ground, subjects_of
from .effect_texts import StudyTexts, prompts_of, study_texts
from .kept_passes import KeptPasses
from .rival_directions import OWN_METHODS

if TYPE_CHECKING:
    from ..run import Run


def measure_effects(
    run: "Run", asked: Asked, config: EffectConfig | None = None, kept: KeptPasses | None = None
) -> EffectStudy:
    """Measure steering effects of a run's features or of vectors on its test text.

    `kept` holds what is measured on the way; the caller removes it once the study is written.

    Raises SteerError for what cannot be measured, ModelError for an encoder.
    """
    ground = Ground(run, config or EffectConfig(), kept)
    with progress("choose", None, "passes") as advance:
        subjects = subjects_of(ground, asked, advance.to)
    passes = EffectPasses(ground, subjects)
    passes.run()
    prompts = prompts_of(passes)
    made = _read_all(passes, prompts)
    texts = study_texts(passes, [{m: e.read for m, e in own.methods.items()} for own in made], prompts)
    return EffectStudy(
        model=ground.place.lm.identity.model_name,
        dictionary=run.spec.name,
        hook_points=tuple(ground.place.writes),
        config=ground.config,
        subjects=tuple(_with_texts(i, own, texts) for i, own in enumerate(made)),
        n=passes.n,
        num_documents=passes.documents.num,
        num_others=int(passes.others.sum(1).max(initial=0)),
        is_chosen=not (asked.features or asked.search or asked.where or asked.vectors),
        has_own_words=not asked.words,
        plain_texts=texts.plain,
        left_out=tuple(sorted(set(asked.features) - {s.feature for s in subjects})),
    )


def _with_texts(i: int, effect: SubjectEffect, texts: StudyTexts) -> SubjectEffect:
    methods = {m: replace(e, texts=texts.scores.get((i, m))) for m, e in effect.methods.items()}
    return replace(effect, methods=methods, plain_hit_rate=texts.plain_hits[i] if texts.plain_hits else None)


def _read_all(passes: EffectPasses, prompts: Sequence[list[int] | None]) -> list[SubjectEffect]:
    found = []
    with progress("prompts", len(prompts), "prompts") as advance:
        for i, prompt in enumerate(prompts):
            found.append(_subject_effect(passes, i, None if prompt is None else passes.of_prompt(prompt)))
            advance(1)
    return found


def _subject_effect(passes: EffectPasses, i: int, prompted: Effects | None) -> SubjectEffect:
    groups, randoms = _groups(passes, i)
    methods: dict[str, MethodEffect] = {}
    for method in (SELF, *OWN_METHODS):
        curve = passes.curve(i, (i, method, 0))
        if curve is not None:
            methods[method] = _method(passes, curve, randoms)
    methods["pca"] = _better_sign(passes, i, randoms)
    if prompted is not None:
        methods[PROMPT] = MethodEffect(_read_prompt(passes, i, prompted))
    own = passes.curve(i, (i, SELF, 0))
    assert own is not None
    winner, lead = _winner(passes, {m: e.read for m, e in methods.items()})
    return SubjectEffect(
        passes.subjects[i], methods, groups, trend(own, passes.groups), winner, lead, plain_hit_rate=None
    )


def _method(passes: EffectPasses, curve: Curve, randoms: RandomCurves) -> MethodEffect:
    return MethodEffect(
        read_out(curve, passes.documents, passes.n, randoms), points(curve, passes.documents, passes.n, randoms)
    )


def _groups(passes: EffectPasses, i: int) -> tuple[dict[str, GroupEffect], RandomCurves]:
    """Directions about nothing on a subject's concept; the isotropic ones once more for z."""
    found, curves_of = {}, {}
    for method in GROUPS:
        curves = [c for key in passes.keys(method) if (c := passes.curve(i, key)) is not None]
        own = passes.documents.means(np.stack([c.own for c in curves]))  # [B, R, A]
        kl = passes.documents.means(np.stack([c.kl for c in curves]))
        together = curves_of[method] = RandomCurves(curves[0].strengths, own, kl)
        found[method] = GroupEffect(
            together.strengths[1:],
            own[0].mean(0)[1:],
            own[0].std(0, ddof=1)[1:],
            kl[0].mean(0)[1:],
            together.mean_at_budget(),
            len(curves),
        )
    return found, curves_of["random"]


def _better_sign(passes: EffectPasses, i: int, randoms: RandomCurves) -> MethodEffect:
    """The principal component in the direction that raises the concept more on the very text that is reported."""
    found = []
    for key in passes.keys("pca"):
        curve = passes.curve(i, key)
        assert curve is not None
        found.append(_method(passes, curve, randoms))
    return max(found, key=lambda e: e.read.own.value)


def _read_prompt(passes: EffectPasses, i: int, effects: Effects) -> ReadOut:
    """What a prompt does, at the cost that it has."""
    documents, n = passes.documents, passes.n
    shifts = effects.shifts[0]  # [S, W]
    own = documents.means(shifts[i])
    return ReadOut(
        reached=False,
        strength=float("nan"),
        kl=float(effects.kl[0].mean()),
        own=documents.estimate(own, n),
        others=documents.estimate(documents.means(passes.other_shift(i, shifts)), n),
        ce=documents.estimate(documents.means(effects.ce[0]), n),
        z=None,
        z_equal_kl=None,
        wrong_way=float((shifts[i] < 0).mean()),
        area=None,
        draws=own,
    )


def _winner(passes: EffectPasses, reads: Mapping[str, ReadOut]) -> tuple[str, Estimate]:
    """The method with the largest own shift within the budget, and the subject's lead over the best other one."""
    within = {m: r for m, r in reads.items() if r.reached or r.kl <= KL_BUDGET}
    winner = max(within, key=lambda m: within[m].own.value)
    best = max((m for m in within if m != SELF), key=lambda m: within[m].own.value)
    return winner, passes.documents.estimate(within[SELF].draws - within[best].draws, passes.n)
