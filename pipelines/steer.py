"""Steer: change a feature while the model writes.

- `add`: `h + S c d / |d|` at every position, with c the median norm of activations at the hook point, so that S is
  comparable between features (about 0.1 to 0.5 is useful; beyond 1 text falls apart);
- `clamp`: the feature's activation is set to S times its largest activation on training documents;
- `ablate`: the feature's activation is set to 0.

Clamp and ablate change only what the feature writes: `h + (new - old) d`, so that what the dictionary does not
reconstruct stays as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from saeql.sae.hooks import edit
from saeql.sae.model import SparseAutoencoder

from .models import LanguageModel, ModelIdentity

MODES = ("add", "clamp", "ablate")


class SteerError(ValueError):
    """An edit names an unknown mode or a feature that does not exist."""


@dataclass(frozen=True)
class Edit:
    """One change: `strength` is in units of the mode (see the module's text), and unused by `ablate`."""

    feature: int
    mode: str = "add"
    strength: float = 0.4


class Steerer:
    """Generates text with features of a dictionary changed.

    `writes` are the hook points that the dictionary writes, with their widths; `add` is in units of `median_norms`.
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
        max_activations: dict[int, float],
        allow_mismatch: bool = False,
    ):
        mine = replace(language_model.identity, hook_point=identity.hook_point)
        identity.require(mine, allow_mismatch=allow_mismatch)
        language_model.require_whole("steering")
        self.lm, self.dictionary = language_model, dictionary.to(language_model.device)
        self.writes, self.median_norms, self.max_activations = writes, median_norms, max_activations

    @contextmanager
    def applied(self, edits: list[Edit]) -> Iterator[None]:
        """Apply edits to every forward pass of the model inside the block, in order."""
        with ExitStack() as stack:
            for change in edits:
                self._check(change)
                start = 0
                for hook_point, width in self.writes.items():
                    row = self.dictionary.W_dec[change.feature, start : start + width].detach()
                    fn = self._function(change, row, self.median_norms[hook_point])
                    stack.enter_context(edit(self.lm.model, hook_point, fn, self.lm.device))
                    start += width
            yield

    def _check(self, change: Edit) -> None:
        config, d_sae = self.dictionary.config, self.dictionary.d_sae
        if change.mode not in MODES:
            raise SteerError(f"no steering mode {change.mode!r}: there is {', '.join(MODES)}")
        if not 0 <= change.feature < d_sae:
            raise SteerError(f"no feature {change.feature}: this dictionary has features 0 to {d_sae - 1}")
        if change.mode != "add" and config.form != "autoencoder":
            raise SteerError(
                f"a {config.form} does not read where it writes: mode {change.mode} needs an autoencoder, use add"
            )

    def _function(self, change: Edit, row: torch.Tensor, median_norm: float):
        if change.mode == "add":
            offset = change.strength * median_norm * row / row.norm()
            return lambda acts: acts + offset.to(acts.dtype)
        target = 0.0 if change.mode == "ablate" else change.strength * self._max_activation(change.feature)

        def set_activation(acts: torch.Tensor) -> torch.Tensor:
            flat = acts.reshape(-1, acts.shape[-1]).float()
            latents = self.dictionary.encode(flat)
            old = (latents.values * (latents.indices == change.feature)).sum(1)
            return (flat + (target - old)[:, None] * row).to(acts.dtype).reshape(acts.shape)

        return set_activation

    def _max_activation(self, feature: int) -> float:
        largest = self.max_activations.get(feature, 0.0)
        if largest <= 0:
            raise SteerError(
                f"feature {feature} never fired on training documents: it has no scale to clamp to; use add"
            )
        return largest

    @torch.no_grad()
    def generate(self, prompt: str, edits: list[Edit], *, max_new_tokens: int = 40) -> str:
        """Greedy continuation of `prompt` (without the prompt itself) under `edits`; [] gives the baseline.

        Raises SteerError for an encoder, which writes no text; `applied` works on it.
        """
        if not self.lm.is_causal:
            raise SteerError(f"{self.lm.identity.model_name} is an encoder and writes no text: use Steerer.applied")
        ids = [self.lm.bos_id, *self.lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        inputs = torch.tensor([ids], device=self.lm.input_device)
        with self.applied(edits):
            output = self.lm.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.2,
                pad_token_id=self.lm.separator_id,
            )
        return self.lm.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
