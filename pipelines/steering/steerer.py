"""The steerer: a model with features of a dictionary changed, as a context or while it writes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from saeql.sae.hooks import edit as edit_activations
from saeql.sae.model import SparseAutoencoder

from ..models import LanguageModel, ModelIdentity
from .change import Change, PlacedEdit
from .edits import LATENT_MODES, Edit, FeatureScale, SteerError
from .positions import Place, followed
from .vectors import SteeringVector

#: What `generate` does unless told otherwise: the likeliest token, with repetition held down as small models need it.
WRITING: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.2}

_SILENT = FeatureScale(0.0, 0.0)


class Steerer:
    """Generates text with features of a dictionary changed.

    `writes` are the hook points that the dictionary writes, with their widths, `median_norms` those of activations
    there, `scales` what features do on training documents.
    Raises ModelMismatch where the dictionary belongs to another model, unless `allow_mismatch`.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        dictionary: SparseAutoencoder,
        identity: ModelIdentity,
        *,
        writes: Mapping[str, int],
        median_norms: Mapping[str, float],
        scales: Mapping[int, FeatureScale],
        allow_mismatch: bool = False,
    ):
        mine = replace(language_model.identity, hook_point=identity.hook_point)
        identity.require(mine, allow_mismatch=allow_mismatch)
        language_model.require_whole("steering")
        self.lm, self.dictionary = language_model, dictionary.to(language_model.device)
        self.writes, self.median_norms, self.scales = writes, median_norms, scales

    @contextmanager
    def applied(
        self, edits: Sequence[Edit], *, keep_error: bool = True, only: Sequence[bool] | None = None
    ) -> Iterator[None]:
        """Apply edits to every forward pass of the model inside the block; afterwards the model is as it was.

        `keep_error` leaves what the dictionary does not reconstruct in place; False puts its reconstruction, changed,
        in place of the activations at every token that an edit touches. `only` says which texts of a batch are changed,
        None all of them.
        Raises SteerError for an edit that cannot be made.
        """
        for change in edits:
            self._check(change)
        if not keep_error and self.dictionary.config.form != "autoencoder":
            raise SteerError(f"a {self.dictionary.config.form} does not reconstruct what it reads: leave keep_error on")
        made = [change for change in edits if change.amount != 0]
        with ExitStack() as stack:
            if made:
                place = stack.enter_context(followed(self.lm.model))
                place.only = None if only is None else torch.tensor(only, dtype=torch.bool)
                for hook_point, change in self._changes(made, place, keep_error=keep_error):
                    stack.enter_context(edit_activations(self.lm.model, hook_point, change, self.lm.device))
            yield

    def _changes(self, edits: list[Edit], place: Place, *, keep_error: bool) -> Iterator[tuple[str, Change]]:
        """The change at every hook point that an edit writes."""
        reads = self.dictionary if not keep_error or any(e.mode in LATENT_MODES for e in edits) else None
        for hook_point, own in self.placed(edits).items():
            is_written = hook_point in self.writes
            yield hook_point, Change(own, reads if is_written else None, place, keep_error=keep_error or not is_written)

    def placed(self, edits: Sequence[Edit]) -> dict[str, list[PlacedEdit]]:
        """Edits with what they need, by hook point. Raises SteerError for an edit that cannot be made."""
        found: dict[str, list[PlacedEdit]] = {}
        for change in edits:
            self._check(change)
            for hook_point, one in self._placed(change):
                found.setdefault(hook_point, []).append(one)
        return found

    def _placed(self, change: Edit) -> Iterator[tuple[str, PlacedEdit]]:
        """An edit with its direction at each hook point that it writes."""
        if not isinstance(change.feature, int):
            for hook_point, row in change.feature.rows.items():
                norm = change.feature.median_norms.get(hook_point, self.median_norms.get(hook_point, 0.0))
                yield hook_point, PlacedEdit(change, row.to(self.lm.device).float(), _SILENT, norm)
            return
        start, scale = 0, self.scales.get(change.feature, _SILENT)
        for hook_point, width in self.writes.items():
            row = self.dictionary.W_dec[change.feature, start : start + width].detach().float()
            yield hook_point, PlacedEdit(change, row, scale, self.median_norms[hook_point])
            start += width

    def _check(self, change: Edit) -> None:
        change.check()
        form, d_sae = self.dictionary.config.form, self.dictionary.d_sae
        if not isinstance(change.feature, int):
            self._check_vector(change, change.feature)
            return
        if not 0 <= change.feature < d_sae:
            raise SteerError(f"no feature {change.feature}: this dictionary has features 0 to {d_sae - 1}")
        if change.mode in LATENT_MODES and form != "autoencoder":
            raise SteerError(
                f"a {form} does not read where it writes: mode {change.mode} needs an autoencoder, use add"
            )
        needs_scale = change.mode == "clamp" or (change.mode == "add" and change.unit == "p99")
        if needs_scale and self.scales.get(change.feature, _SILENT).p99 <= 0:
            raise SteerError(
                f"feature {change.feature} never fired on training documents: it has no p99 to go by; "
                "use add with unit norm"
            )

    def _check_vector(self, change: Edit, vector: SteeringVector) -> None:
        mine = self.lm.identity
        if vector.model_sha256 and vector.model_sha256 != mine.model_sha256:
            raise SteerError(f"{change.target} was made with {vector.model_name}, which is not {mine.model_name}")
        for hook_point, row in vector.rows.items():
            width = self.writes.get(hook_point) or self.lm.model.config.get_text_config().hidden_size
            if len(row) != width:
                raise SteerError(f"{change.target} is {len(row)} wide at {hook_point}, the model {width}")
            known = hook_point in vector.median_norms or hook_point in self.median_norms
            if not known and (change.mode in ("replace", "cap") or (change.mode == "add" and change.unit == "norm")):
                raise SteerError(
                    f"{change.target} does not say how large activations are at {hook_point}: use unit raw"
                )

    def generate(self, prompt: str, edits: Sequence[Edit] = (), *, keep_error: bool = True, **options: Any) -> str:
        """Continuation of one prompt (without the prompt itself) under `edits`; [] gives the baseline."""
        return self.generate_all([prompt], edits, keep_error=keep_error, **options)[0]

    @torch.no_grad()
    def generate_all(
        self,
        prompts: Sequence[str],
        edits: Sequence[Edit] = (),
        *,
        keep_error: bool = True,
        only: Sequence[bool] | None = None,
        **options: Any,
    ) -> list[str]:
        """Continuations of several prompts in one batch under `edits`, without the prompts themselves.

        `only` says which of them are changed, None all: a baseline can be written in the batch of what it is for.
        `options` go to `generate` of transformers as they are (a `streamer` too), over `WRITING`.
        Raises SteerError for an encoder, which writes no text (`applied` works on it), and for a prompt that does not
        fit the model's context together with what is to be written.
        """
        if not self.lm.is_causal:
            raise SteerError(f"{self.lm.identity.model_name} is an encoder and writes no text: use Steerer.applied")
        options = {**WRITING, **options}
        rows = [[self.lm.bos_id, *self.lm.tokenizer(p, add_special_tokens=False)["input_ids"]] for p in prompts]
        longest = max(len(row) for row in rows)
        self._check_length(longest, options["max_new_tokens"])
        pad = self.lm.separator_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.lm.input_device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        with self.applied(edits, keep_error=keep_error, only=only):
            output = self.lm.model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)
        return self.lm.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        context = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and prompt_tokens + new_tokens > context:
            raise SteerError(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit the model's context of "
                f"{context}"
            )
