"""Labels that say what a feature does to predictions, `raises " bank", " river"`: written, read, and related tokens."""

import json

import numpy as np
import torch

from .models import LanguageModel
from .predicates import quoted
from .token_classes import word_of

_RAISES = "raises "


def raises_label(texts: list[str]) -> str:
    """The label of tokens that a feature makes likelier."""
    return _RAISES + ", ".join(quoted(t) for t in texts)


def raised_texts(label: str) -> list[str]:
    """Inverse of `raises_label`. Raises ValueError for a label of another kind."""
    decoder, found, at = json.JSONDecoder(), [], len(_RAISES)
    try:
        if not label.startswith(_RAISES):
            raise ValueError
        while True:
            text, at = decoder.raw_decode(label, at)
            found.append(text)
            if at == len(label):
                return found
            at = label.index(", ", at) + 2
    except ValueError:
        raise ValueError(f"not a label of tokens that a feature raises: {label!r}") from None


class TokenTexts:
    """The text of every token of a model that its unembedding gives a logit."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        size = min(len(lm.tokenizer), lm.model.get_output_embeddings().weight.shape[0])
        self.texts = lm.token_texts(list(range(size)))
        special = set(lm.tokenizer.all_special_ids)
        #: [V] whether a label can show it: not special, no piece of a character, not blank
        self.readable = np.array(
            [i not in special and "\ufffd" not in t and bool(t.strip()) for i, t in enumerate(self.texts)]
        )
        self.words = [word_of(t) or t.strip() for t in self.texts]
        self._rows: torch.Tensor | None = None
        self._ids: dict[str, list[int]] = {}
        for i, text in enumerate(self.texts):
            self._ids.setdefault(text, []).append(i)

    def ids(self, texts: list[str]) -> list[int]:
        """Ids of all tokens that have one of the texts."""
        return [i for text in texts for i in self._ids.get(text, ())]

    def shown(self, ids: np.ndarray, num: int) -> list[str]:
        """Texts of the first `num` readable ones of `ids`, none twice."""
        known = [int(i) for i in ids if i < len(self.texts) and self.readable[i]]
        return list(dict.fromkeys(self.texts[i] for i in known))[:num]

    @torch.no_grad()
    def related(self, ids: list[int], read: list[int], num: int, among: np.ndarray) -> list[int]:
        """The `num` readable ones of the token ids `among` nearest to `ids` whose words are none of `ids` and `read`.

        What a label's tokens mean, without the tokens that the label was read from: by cosine of centred embedding rows
        with the mean of those of `ids`.
        """
        if self._rows is None:
            self._rows = centred_embedding(self.lm)
        rows = self._rows
        candidates = torch.from_numpy(among).long()
        near = rows[candidates.to(rows.device)] @ rows[ids].mean(0)
        nearest = candidates[near.argsort(descending=True).cpu()].tolist()
        taken = {self.words[i] for i in (*ids, *read) if i < len(self.words)}
        found: list[int] = []
        for token in nearest:
            if token < len(self.texts) and self.readable[token] and self.words[token] not in taken:
                found.append(token)
            if len(found) == num:
                break
        return found


def centred_embedding(lm: LanguageModel) -> torch.Tensor:
    """[V, d] float32 unit rows of the token embedding with its mean taken off; tied to the unembedding or not."""
    rows = lm.model.get_input_embeddings().weight.detach().float()
    return torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
