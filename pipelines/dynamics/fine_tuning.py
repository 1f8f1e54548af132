"""Fine-tuning of a small model on text, with checkpoints on the way: what dynamics looks at.

All weights learn, by AdamW with a linear warm-up over the first tenth and a linear decay to nothing, on windows of the
text in a shuffled order. Learning is in float32; checkpoints are in the precision that the configuration names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..model_config import ModelConfig
from ..models import LanguageModel, load_model
from ..text_sources import SourceConfig, read_rows


class FineTuneError(ValueError):
    """A model cannot be fine-tuned on this text."""


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned."""

    steps: int = 200
    checkpoints: int = 2
    """Written at even distances, the last one at the end; beside step 0, which is the model as it was."""
    batch_windows: int = 8
    context_tokens: int = 128
    learning_rate: float = 5e-5
    seed: int = 0


def fine_tune(
    model: ModelConfig,
    source: str,
    out: Path,
    options: FineTuning,
    *,
    text_column: str = "text",
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> list[Path]:
    """Checkpoints as folders of transformers, `out/step-0` and on; `on_step` is called with step and loss in nats.

    Raises FineTuneError where there is less text than one batch, or a checkpoint is there already.
    """
    if options.steps < 1 or not 1 <= options.checkpoints <= options.steps:
        raise FineTuneError(f"{options.checkpoints} checkpoints do not fit {options.steps} steps")
    lm = load_model(replace(model, dtype="float32", truncate=False, hook_point="resid_pre.0", more_hook_points=()))
    lm.require_whole("fine-tuning")
    windows = _windows(lm, source, text_column, options)
    wanted = {round(options.steps * n / options.checkpoints) for n in range(options.checkpoints + 1)}
    saved = [_save(lm, model, out / "step-0")]
    net: Any = lm.model
    net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(windows), generator=generator)
    for step in range(1, options.steps + 1):
        at = [(step - 1) * options.batch_windows + n for n in range(options.batch_windows)]
        ids = windows[order[[n % len(windows) for n in at]]].to(lm.input_device)
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device))
        share = min(step / max(options.steps // 10, 1), 1.0) * (1 - (step - 1) / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * share
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, float(loss.detach()))
        if step in wanted:
            saved.append(_save(lm, model, out / f"step-{step}"))
    return saved


def _windows(lm: LanguageModel, source: str, text_column: str, options: FineTuning) -> torch.Tensor:
    """[W, T] the text as packed windows, each behind a BOS."""
    ids: list[int] = []
    for row in read_rows(SourceConfig(source=source, text_column=text_column)):
        text = (row.fields or {}).get(text_column)
        if isinstance(text, str):
            ids += [*lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], lm.separator_id]
    room = options.context_tokens - 1
    num = len(ids) // room
    if num < options.batch_windows:
        raise FineTuneError(f"{source} has {len(ids)} tokens, less than one batch of {options.batch_windows} x {room}")
    body = torch.tensor(ids[: num * room]).view(num, room)
    return torch.cat([torch.full((num, 1), lm.bos_id), body], dim=1)


def _save(lm: LanguageModel, model: ModelConfig, folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        raise FineTuneError(f"{folder} is there already: name another folder")
    dtype = torch.float32 if model.dtype == "float32" else torch.bfloat16
    state = {name: tensor.to(dtype) for name, tensor in lm.model.state_dict().items()}
    before = lm.model.config.dtype
    lm.model.config.dtype = dtype
    lm.model.save_pretrained(folder, state_dict=state)
    lm.model.config.dtype = before
    lm.tokenizer.save_pretrained(folder)
    return folder
