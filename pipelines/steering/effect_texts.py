"""Texts written under the directions of an effect study at its budget, under a prompt, and by the model as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..progress import progress
from .dose_response import ReadOut
from .effect_passes import EffectPasses
from .effect_results import PROMPT, SELF
from .effect_subjects import Subject
from .sampled_texts import TextScores, losses_of, scores, write_texts

#: Methods that write.
WRITERS = (SELF, "diff_mean", "unembedding", PROMPT)


@dataclass(frozen=True)
class StudyTexts:
    """Scores by subject and method; those of the model as it is, and how often it writes of each subject."""

    scores: Mapping[tuple[int, str], TextScores]
    plain: TextScores | None
    plain_hits: tuple[float, ...]


def prompts_of(passes: EffectPasses) -> list[list[int] | None]:
    """Token ids of "Write about X." for every subject, X five of its choosing words; None where it has none."""
    tokenizer, out = passes.ground.place.lm.tokenizer, []
    for subject in passes.subjects:
        words = [w for w in subject.concept.choosing_words if w.isalnum()][:5]
        text = f"Write about {', '.join(words)}.\n\n"
        out.append(tokenizer(text, add_special_tokens=False)["input_ids"] if words else None)
    return out


def study_texts(
    passes: EffectPasses, reads: Sequence[Mapping[str, ReadOut]], prompts: Sequence[list[int] | None]
) -> StudyTexts:
    """Continue the same openings of test text with every subject's writers at the strength of their read-out."""
    config, place = passes.ground.config, passes.ground.place
    if config.prompts == 0:
        return StudyTexts({}, None, ())
    at = np.unique(np.linspace(0, len(passes.windows) - 1, config.prompts).round().astype(int))
    openings = [passes.windows[i, : config.prompt_tokens].tolist() for i in at]
    head = int(openings[0][0] == place.lm.bos_id)
    still = place.offsets(torch.zeros(sum(place.writes.values())), 0.0)
    owners: list[tuple[int, str]] = []
    asked: list[list[int]] = []
    offsets: list[dict[str, torch.Tensor]] = []
    for i, own in enumerate(reads):
        for method in (m for m in WRITERS if m in own):
            prompt = prompts[i] if method == PROMPT else None
            added = still if prompt else place.offsets(passes.directions[(i, method, 0)], own[method].strength)
            for opening in openings:
                owners.append((i, method))
                asked.append([*opening[:head], *prompt, *opening[head:]] if prompt else opening)
                offsets.append(added)
    owners += [(-1, "")] * len(openings)
    asked += openings
    offsets += [still] * len(openings)
    stacked = {name: torch.stack([o[name] for o in offsets]) for name in place.writes}
    with progress("texts", len(asked), "texts") as advance:
        texts = write_texts(
            place.lm, asked, stacked, new_tokens=config.new_tokens, seed=config.seed, on_progress=advance.to
        )
    losses = losses_of(place.lm, openings * (len(asked) // len(openings)), texts)
    return _scored(owners, texts, losses, passes.subjects)


def _scored(
    owners: Sequence[tuple[int, str]], texts: Sequence[list[int]], losses: np.ndarray, subjects: Sequence[Subject]
) -> StudyTexts:
    by_owner: dict[tuple[int, str], list[int]] = {}
    for n, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(n)

    def score(owner: tuple[int, str], tokens: Sequence[int]) -> TextScores:
        mine = by_owner[owner]
        return scores([texts[n] for n in mine], losses[mine], tokens)

    plain = (-1, "")
    return StudyTexts(
        {owner: score(owner, subjects[owner[0]].concept.measured) for owner in by_owner if owner != plain},
        score(plain, ()),
        tuple(score(plain, s.concept.measured).hit_rate for s in subjects),
    )
