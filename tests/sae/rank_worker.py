"""One rank of a training that test_ranks.py compares with that of one process. Run by torchrun."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from saeql.sae.architectures import build
from saeql.sae.comm import Comm, join
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.stream import ActivationBatch, Cursor
from saeql.sae.trainer import Trainer

D_IN, D_SAE, K, ROWS = 24, 64, 4, 48
CONFIG = TrainConfig(
    num_steps=50, batch_tokens=ROWS, lr=1e-2, warmup_steps=5, init_tokens=2 * ROWS, dead_after_tokens=6 * ROWS,
    log_every_steps=10, checkpoint_every_steps=20, matmul_dtype="float32", max_grad_norm=0.5, ema_decay=0.9,
)  # fmt: skip


class Rows:
    """The batch is a function of its number; a rank sees its part of it."""

    widths = {"here": D_IN}  # noqa: RUF012

    def __init__(self, comm: Comm):
        self.comm = comm
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=generator), dim=1)

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        number = cursor.offset if cursor else 0
        own, rank = ROWS // self.comm.data_size, self.comm.data_rank
        while number < int(os.environ.get("ROWS_END", "1000")) + 5 * (1 - self.comm.data_rank):
            generator = torch.Generator().manual_seed(1000 + number)
            chosen = torch.randint(0, 40, (ROWS, 3), generator=generator)
            weights = torch.rand(ROWS, 3, generator=generator) + 0.5
            acts = 7 + 3 * torch.einsum("nk,nkd->nd", weights, self.directions[chosen])
            acts += 0.01 * torch.randn(ROWS, D_IN, generator=generator)
            number += 1
            empty = torch.zeros(own, dtype=torch.int32)
            own_rows = acts[rank * own : (rank + 1) * own]
            yield ActivationBatch(own_rows, empty, empty, empty, empty, Cursor(0, 0, number))


def threads() -> list[str]:
    """Names of this process's threads."""
    return [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]


def train(architecture: str, folder: Path, comm: Comm, *, stop_at: int | None = None, reshard: bool = False) -> None:
    """Train, on from a checkpoint where `folder` has one; write the whole dictionary and the log lines."""
    dictionary = build(DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K), D_IN, seed=0, comm=comm)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:9] = dead[40:43] = True
    with torch.no_grad():
        dictionary.b_enc[dead[comm.shard(D_SAE)]] = -1e3  # dead for good, so that the auxiliary loss runs
    lines = []

    def stop(steps: int) -> None:
        if trainer.step == stop_at:
            trainer.save()
            os._exit(3)

    config = replace(CONFIG, feature_shards=comm.feature_size)
    trainer = Trainer(config, {"a": dictionary}, Rows(comm), folder=folder / "checkpoints", on_log=lines.append,
                      on_step=stop, comm=comm, reshard=reshard)  # fmt: skip
    trainer.resume()
    trainer.fit()
    whole = trainer.finish().get("a")
    if whole is not None:
        save_file({name: t.contiguous() for name, t in whole.state_dict().items()}, folder / "weights.safetensors")
        (folder / "log.json").write_text(json.dumps({"lines": lines, "resharded": trainer.resharded}))


if __name__ == "__main__":
    where, shards, stop_step, resharding, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = join(torch.device("cpu"), int(shards), timeout_seconds=60)
    for each in names:
        (Path(where) / each).mkdir(parents=True, exist_ok=True)
        train(each, Path(where) / each, ranks, stop_at=int(stop_step) or None, reshard=resharding == "reshard")
    ranks.close()
    assert ranks.size == 1 or not [t for t in threads() if "gloo" in t], threads()
