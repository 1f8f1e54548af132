"""Several real processes train one dictionary together, and get what one process gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saeql.sae import model
from saeql.sae.architectures import build
from saeql.sae.checkpoint import checkpoints
from saeql.sae.comm import ALONE, Comm, CommError, join
from saeql.sae.config import DictionaryConfig
from saeql.sae.files import load_dictionary, save_dictionary

#: What does not learn, and where rows start.
FROZEN = ("topk+decoder+random", "batchtopk+encoder+random", "topk+soft_decoder+random_covariance")
WORKER = Path(__file__).parent / "rank_worker.py"


def run(
    folder: Path, names: list[str], *, ranks: int = 1, shards: int = 1, stop: int = 0, reshard: bool = False
) -> subprocess.CompletedProcess[str]:
    """Train in as many processes as there are ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(WORKER), str(folder), str(shards), str(stop),
               "reshard" if reshard else "exact", *names]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / name / "weights.safetensors"), json.loads((folder / name / "log.json").read_text())


def assert_same(one: Path, other: Path, name: str, *, tolerance: float = 1e-5) -> None:
    (weights, log), (expected, expected_log) = outcome(one, name), outcome(other, name)
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            weights[key], tensor, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{name} {k}: {m}"
        )
    assert len(log["lines"]) == len(expected_log["lines"])
    for line, expected_line in zip(log["lines"], expected_log["lines"], strict=True):
        for key in ("fvu", "l0", "dead_share", "auxk_loss", "lr", "step"):
            assert line[key] == pytest.approx(expected_line[key], rel=1e-4), key


@pytest.mark.parametrize("form", ["autoencoder", "transcoder"])
def test_ranks_start_and_load_their_latents_of_what_one_process_has(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, d_in, d_out = DictionaryConfig(d_sae=200, k=4, form=form), 24, 24 if form == "autoencoder" else 17
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(200, d_out, generator=generator)  # at once
    monkeypatch.setattr(model, "_DRAWN_NUMBERS", 32 * d_in)  # in seven blocks, none of which ends with a rank's latents
    whole = build(config, d_in, d_out, seed=5)
    assert whole.W_dec.equal(drawn / drawn.norm(dim=1, keepdim=True))
    if form == "transcoder":
        drawn = torch.randn(200, d_in, generator=generator)
        assert whole.W_enc.equal(0.3 * (drawn / drawn.norm(dim=1, keepdim=True)))
    save_dictionary(whole, tmp_path)
    for size in (4, 2):
        for rank in range(size):
            comm, own = Comm(feature_rank=rank, feature_size=size), slice(rank * 200 // size, (rank + 1) * 200 // size)
            for part in (build(config, d_in, d_out, seed=5, comm=comm), load_dictionary(tmp_path, comm)):
                assert part.d_sae == 200 // size and part.comm is comm
                for name, tensor in whole.state_dict().items():
                    assert part.state_dict()[name].equal(tensor[own] if name in whole.by_latent else tensor), name
    for source in (lambda comm: build(config, d_in, d_out, comm=comm), lambda comm: load_dictionary(tmp_path, comm)):
        with pytest.raises(CommError, match="d_sae 200 is not a multiple of the 3 feature shards"):
            source(Comm(feature_size=3))
        with pytest.raises(CommError, match=r"dictionary.k 4 is more than the 2 latents of a shard"):
            source(Comm(feature_size=100))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(folder, ["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated", *FROZEN])
    assert done.returncode == 0, done.stderr[:3000]
    assert outcome(folder, "topk")[1]["lines"][-1]["auxk_loss"] > 0
    return folder


@pytest.mark.parametrize(
    ("ranks", "shards", "names"),
    [
        pytest.param(2, 1, ["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated", *FROZEN], id="2 data"),
        pytest.param(2, 2, ["topk", "batchtopk", *FROZEN], id="2 feature", marks=pytest.mark.full),
        pytest.param(4, 2, ["topk", "batchtopk", *FROZEN], id="2 data x 2 feature"),
        pytest.param(4, 4, ["topk"], id="4 feature", marks=pytest.mark.full),
    ],
)
def test_ranks_learn_what_one_process_learns(ranks: int, shards: int, names: list[str], alone: Path, tmp_path: Path):
    done = run(tmp_path, names, ranks=ranks, shards=shards)
    assert done.returncode == 0, done.stderr[:3000]
    for name in names:
        assert_same(tmp_path, alone, name)


def test_a_stopped_training_goes_on_bit_for_bit_and_on_other_ranks_only_if_asked(alone: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    done = run(whole, ["topk"], ranks=2, shards=2)
    assert done.returncode == 0, done.stderr[:3000]
    stopped = tmp_path / "stopped"
    assert run(stopped, ["topk"], ranks=2, shards=2, stop=25).returncode != 0
    assert [p.name for p in sorted((stopped / "topk/checkpoints").iterdir())] == ["step-00000020", "step-00000025"]
    copies = {name: tmp_path / name for name in ("one", "refused")}
    for copy in copies.values():
        subprocess.run(["cp", "-r", stopped, copy], check=True)
    done = run(stopped, ["topk"], ranks=2, shards=2)
    assert done.returncode == 0, done.stderr[:3000]
    resumed, expected = outcome(stopped, "topk")[0], outcome(whole, "topk")[0]
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)

    refused = run(copies["refused"], ["topk"])
    assert refused.returncode != 0
    assert "cannot go on bit for bit from 1 x 2 to 1 x 1 ranks" in refused.stderr and "--reshard" in refused.stderr
    done = run(copies["one"], ["topk"], reshard=True)
    assert done.returncode == 0, done.stderr[:3000]
    weights, log = outcome(copies["one"], "topk")
    assert log["resharded"] == ["step 25: from 1 x 2 to 1 x 1 ranks (data x feature)"]
    for key, tensor in expected.items():  # the rows are the same: only sums are made in another order
        torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-5)
    part = next((stopped / "topk/checkpoints/step-00000050").glob("*.safetensors"))
    damaged = bytearray(part.read_bytes())
    damaged[-5] ^= 1
    part.write_bytes(damaged)
    done = run(stopped, ["topk"], ranks=2, shards=2)
    assert done.returncode != 0 and f"{part.name} does not match its hash" in done.stderr


def test_ranks_whose_rows_end_at_different_steps_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROWS_END", "30")  # of the second rank; the first one has rows for 35 steps
    done = run(tmp_path, ["topk"], ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("TrainingError: the rows end after step 30 of train.num_steps 50") == 2
    assert checkpoints(tmp_path / "topk/checkpoints")[-1].name == "step-00000030"


def test_the_kth_largest_by_histograms():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator).relu()
    expected = values.sort(descending=True).values
    for k in (1, 2, 100, 2000):
        assert ALONE.kth_largest(values, k) == expected[k - 1]
    assert ALONE.kth_largest(values, 5001) == 0 and ALONE.kth_largest(torch.zeros(4), 2) == 0


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(CommError, match="feature_shards 3 does not divide the 1 ranks; start them with torchrun"):
        join(torch.device("cpu"), 3)
