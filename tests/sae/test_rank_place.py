"""What launchers say about a process."""

import pytest

from saeql.sae.rank_place import RankPlace, first_host, rank_place


def test_torchrun_says_it_all():
    found = rank_place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"})
    assert found == RankPlace(3, 8, 1)


def test_a_task_of_srun_is_a_rank_and_a_batch_script_is_not():
    step = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "41234",
            "SLURM_STEP_NODELIST": "gpu[007-012,020]"}  # fmt: skip
    found = rank_place(step)
    assert (found.rank, found.size, found.local_rank) == (5, 8, 1)
    assert dict(found.rendezvous) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": "21234",
    }  # fmt: skip
    assert dict(rank_place({**step, "MASTER_PORT": "1"}).rendezvous)["MASTER_PORT"] == "1"
    assert rank_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == RankPlace()
    assert rank_place({}) == RankPlace()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-012,020]", "gpu007"), ("a1,b[2-3]", "a1"), ("n[01-02].cluster", "n01.cluster"), ("host-3", "host-3")],
)
def test_first_host(nodes: str, first: str):
    assert first_host(nodes) == first
