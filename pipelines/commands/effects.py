"""The command that measures what steering does."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import RunPath, Search, Vectors, Where, refuse_ranks


def effect(
    run: RunPath,
    *,
    feature: Annotated[list[int] | None, Parameter(help="Feature id; as often as wanted.", negative="")] = None,
    search: Search = None,
    where: Where = None,
    top: Annotated[
        int | None,
        Parameter(help="Alone: the features with the best output scores on calibration text. Else see --search."),
    ] = None,
    words: Annotated[
        str | None,
        Parameter(
            help="Measure on these words (law,court,judge) instead of each feature's own; a --vector needs them. Every "
            "other one chooses and makes directions, the rest measure."
        ),
    ] = None,
    vector: Vectors = None,
    strengths: Annotated[
        str,
        Parameter(help="Comma-separated, in median activation norms, both signs.", allow_leading_hyphen=True),
    ] = "-0.3,-0.1,0.1,0.2,0.3,0.5",
    random: Annotated[int, Parameter(help="Random directions that z is about.")] = 32,
    tokens: Annotated[int, Parameter(help="Test tokens to measure on.")] = 512,
    texts: Annotated[int, Parameter(help="Openings that every method continues; 0: nothing is written.")] = 4,
    out: Annotated[Path | None, Parameter(help="Folder of effects.json and effects.png. Default: RUN/effects.")] = None,
    save: Annotated[
        bool, Parameter(help="Keep what was found of features, on their own words, in the run's evidence and store.")
    ] = True,
    seed: Annotated[int, Parameter(help="Of random directions, sampling and intervals.")] = 0,
    any_strength: Annotated[bool, Parameter(help="Allow strengths at which models only break.", negative="")] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """What steering with features does to the words they are about, beside every other direction that could do it.

    At several strengths and at one fixed cost (KL 0.3), against random directions, difference of means, logistic
    regression, the unembedding of the words, the best of many random rows and a plain prompt; says who won
    (docs/effects.md).

    Example: saeql effect runs/demo --top 20
    """
    from contextlib import nullcontext
    from json import dumps

    from saeql.sae.config import ConfigError

    from ..output import note
    from ..run import Run
    from ..steering.effect_config import EffectConfig
    from ..steering.effect_evidence import save_effects
    from ..steering.effect_report import print_study, study_dict, write_study
    from ..steering.kept_passes import EFFECT_WORK, KeptPasses
    from ..steering.vector_files import load_vector
    from ..verify import recorded

    refuse_ranks()
    try:
        given = tuple(float(part) for part in strengths.split(","))
    except ValueError:
        raise ConfigError(f"--strengths {strengths!r}: numbers with commas, such as -0.2,0.1,0.3") from None
    opened = Run.open(run)
    config = EffectConfig(
        strengths=given, random_directions=random, tokens=tokens, prompts=texts, seed=seed, any_strength=any_strength
    )
    kept = save and words is None and not vector
    folder = out or opened.path / "effects"
    with opened.locked() if kept or out is None else nullcontext():
        parts = KeptPasses(opened.path / EFFECT_WORK if kept or out is None else None)
        study = opened.effect(
            features=feature or (),
            search=search,
            where=where,
            top=top,
            words=tuple(w for w in (words or "").split(",") if w.strip()),
            vectors=[load_vector(file) for file in vector or ()],
            config=config,
            kept=parts,
        )
        with recorded(opened.path, "effect") if out is None else nullcontext():
            write_study(study, folder)
        if kept and not save_effects(opened, study):
            note(f"effects saved; the store takes them in with `saeql store {run}`")
        parts.remove()
    if json:
        print(dumps(study_dict(study), ensure_ascii=False))
    else:
        print_study(study, folder)
