"""BlockShuffle: every row once an epoch, mixed, and resumable from three numbers."""

import numpy as np
import pytest

from saeql.sae.stream import BlockShuffle, Cursor


def visited(shuffle: BlockShuffle, epoch: int) -> list[int]:
    out: list[int] = []
    for group in range(shuffle.num_groups):
        rows = np.concatenate([np.arange(a, b) for a, b in shuffle.blocks(epoch, group)])
        out += rows[shuffle.rows(epoch, group, len(rows))].tolist()
    return out


@pytest.mark.parametrize(("num_rows", "block", "group"), [(1000, 10, 100), (1003, 7, 50), (5, 10, 100), (64, 64, 1)])
def test_every_row_once_an_epoch(num_rows: int, block: int, group: int):
    shuffle = BlockShuffle(num_rows, block, group, seed=3)
    for epoch in (0, 1):
        assert sorted(visited(shuffle, epoch)) == list(range(num_rows))
    sizes = {len(shuffle.blocks(0, g)) for g in range(shuffle.num_groups)}
    assert max(sizes) == shuffle.blocks_per_group and max(sizes) - min(sizes) <= 1  # no short last one


def test_epochs_differ_and_seeds_differ_but_the_same_is_the_same():
    a, b = BlockShuffle(500, 10, 100, seed=1), BlockShuffle(500, 10, 100, seed=2)
    assert visited(a, 0) == visited(BlockShuffle(500, 10, 100, seed=1), 0)
    assert visited(a, 0) != visited(a, 1)
    assert visited(a, 0) != visited(b, 0)


def test_rows_of_one_document_do_not_stay_together():
    # 100 documents of 100 rows in a row; a batch of 100 shuffled rows must come from many of them
    shuffle = BlockShuffle(10_000, 100, 5_000, seed=0)
    order = np.array(visited(shuffle, 0)).reshape(-1, 100) // 100
    distinct = np.array([len(set(batch)) for batch in order])
    # independent draws from the 50 documents in memory give 50 (1 - (1 - 1/50)^100) = 43.4
    assert distinct.mean() == pytest.approx(43.4, abs=1.5)


def test_cursor_round_trip_and_version():
    cursor = Cursor(2, 5, 1024)
    assert Cursor.from_state(cursor.state()) == cursor
    with pytest.raises(ValueError, match="version 7"):
        Cursor.from_state({**cursor.state(), "version": 7})


def test_no_rows():
    with pytest.raises(ValueError, match="no rows"):
        BlockShuffle(0, 10, 10, seed=0)


def test_a_cursor_keeps_the_place_that_its_source_needs():
    cursor = Cursor(1, 2, 3, {"corpus": {"next_row": 7}})
    assert Cursor.from_state(cursor.state()) == cursor
    assert "place" not in Cursor(1, 2, 3).state() and Cursor.from_state(Cursor(1, 2, 3).state()).place is None
