"""The forward pass over windows: what it reads, and that it goes on with smaller batches where memory runs out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import Run, load_config
from saeql.pipelines.forward import ForwardPass, is_out_of_memory, stored_dtype
from saeql.pipelines.models import LanguageModel, ModelConfig, ModelError, load_model
from saeql.sae.hooks import HookPointError

PLACES = ["resid_post.0", "mlp_out.1"]


@pytest.fixture(scope="module")
def lm(tiny_model_folder: Path) -> LanguageModel:
    return load_model(ModelConfig(name=str(tiny_model_folder), hook_point="resid_post.1", dtype="float32"))


def windows(lm: LanguageModel, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, len(lm.tokenizer), (count, 16)).astype(np.int32)


def room_for(lm: LanguageModel, most: int):
    """From now on the model's first layer asks for an exabyte where a batch has more than `most` windows."""

    def ask(_module: torch.nn.Module, args: tuple) -> None:
        if len(args[0]) > most:
            torch.empty(2**60, dtype=torch.uint8)

    return lm.model.model.layers[0].register_forward_pre_hook(ask)


def test_what_is_read_is_what_the_model_says(lm: LanguageModel):
    ids = windows(lm, 6)
    with ForwardPass(lm, PLACES) as forward:
        found = forward.run(ids)
    with torch.no_grad():
        states = lm.model(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(found["resid_post.0"].values, states[1].numpy(), rtol=1e-5, atol=1e-6)
    for rows in found.values():
        assert rows.values.dtype == np.float32 and rows.values.shape == (6, 16, 32)
        np.testing.assert_allclose(rows.norms, np.linalg.norm(rows.values, axis=-1), rtol=1e-5)


def test_bfloat16_comes_as_its_bits(tiny_model_folder: Path):
    lm = load_model(ModelConfig(name=str(tiny_model_folder), hook_point="resid_post.1", dtype="bfloat16"))
    with ForwardPass(lm, ["resid_post.0"]) as forward:
        rows = forward.run(windows(lm, 2))["resid_post.0"]
    assert stored_dtype(lm) == "bfloat16" and rows.values.dtype == np.uint16
    acts = torch.from_numpy(rows.values).view(torch.bfloat16)
    torch.testing.assert_close(acts.float().norm(dim=-1), torch.from_numpy(rows.norms))


def test_no_memory_halves_the_batch_and_the_smaller_one_is_kept(lm: LanguageModel, capsys: pytest.CaptureFixture[str]):
    ids, sizes = windows(lm, 13), []
    with ForwardPass(lm, PLACES) as forward:
        whole = forward.run(ids)
    counter = lm.model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    limit = room_for(lm, 3)
    try:
        with ForwardPass(lm, PLACES) as forward:
            halved = forward.run(ids)
            assert (forward.max_windows, forward.num_halvings) == (3, 2)
            again = list(forward.over([ids[:4], ids[4:]], lambda batch: batch))
    finally:
        limit.remove()
        counter.remove()
    assert sizes == [13, 6, 3, 3, 3, 3, 1, 3, 1, 3, 3, 3]
    assert "memory ran out on 13 windows of 16 tokens; going on with 6 at once" in capsys.readouterr().err
    for name in PLACES:
        joined = np.concatenate([found[name].values for _, found in again])
        for values in (halved[name].values, joined):
            np.testing.assert_allclose(values, whole[name].values, rtol=1e-5, atol=1e-6)
        assert halved[name].norms.shape == (13, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_without_memory_halves_and_two_streams_give_the_same(tiny_model_folder: Path):
    config = ModelConfig(name=str(tiny_model_folder), hook_point="resid_post.1", dtype="float32", device="cuda")
    lm, limit = load_model(config), []

    def ask(_module: torch.nn.Module, args: tuple) -> None:
        if len(args[0]) > 3:
            limit.append(torch.empty(2**50, dtype=torch.uint8, device="cuda"))

    ids = windows(lm, 13)
    with ForwardPass(lm, PLACES) as forward:
        whole = forward.run(ids)
    hook = lm.model.model.layers[0].register_forward_pre_hook(ask)
    try:
        with ForwardPass(lm, PLACES, stream_of_its_own=True) as forward:
            halved = list(forward.over([ids[:7], ids[7:]], lambda batch: batch))
    finally:
        hook.remove()
    assert forward.max_windows == 3 and not limit
    for name in PLACES:
        joined = np.concatenate([found[name].values for _, found in halved])
        np.testing.assert_allclose(joined, whole[name].values, rtol=1e-4, atol=1e-5)


def test_no_memory_for_one_window_names_the_setting(lm: LanguageModel):
    limit = room_for(lm, 0)
    try:
        with ForwardPass(lm, PLACES) as forward, pytest.raises(ModelError, match=r"lower harvest\.context_tokens"):
            forward.run(windows(lm, 4))
    finally:
        limit.remove()


def test_other_errors_pass_and_hooks_go(lm: LanguageModel):
    def num_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

    before = num_hooks()
    with pytest.raises(IndexError), ForwardPass(lm, PLACES) as forward:
        assert num_hooks() > before
        forward.run(np.full((1, 4), 10**6, np.int32))
    assert num_hooks() == before
    with pytest.raises(HookPointError), ForwardPass(lm, ["resid_post.9"]):
        pass
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))


def test_a_harvest_that_runs_out_of_memory_stores_the_same_and_says_so(
    tiny_config: Path, tiny_run: Path, tmp_path: Path
):
    whole = Run.open(tiny_run)
    run = Run.create(tmp_path / "run", replace(load_config(tiny_config), model=whole.config.model))
    limit = room_for(run.language_model, 3)
    try:
        info = run.harvest()
    finally:
        limit.remove()
    assert info.num_batch_halvings == 2 and whole.harvest_info.num_batch_halvings == 0
    from saeql.pipelines.harvest import shard_folder
    from saeql.store.shards import ShardReader

    mine, theirs = (ShardReader(shard_folder(r.activations, "resid_post.1", "train")) for r in (run, whole))
    for shard in range(len(theirs)):
        np.testing.assert_allclose(mine.acts(shard), theirs.acts(shard), rtol=1e-5, atol=1e-6)
