"""Damage is found and named by its bytes."""

import random
import zlib
from pathlib import Path

import pytest

from saeql.store.integrity import BLOCK_BYTES, find_damage, hash_file, single_byte_changes


@pytest.mark.parametrize("length", [1, 2, 300, 70_000])
def test_a_changed_byte_is_found_from_two_checksums(length: int):
    rng = random.Random(length)
    block = rng.randbytes(length)
    for place in {0, length - 1, rng.randrange(length)}:
        mask = rng.randrange(1, 256)
        changed = bytearray(block)
        changed[place] ^= mask
        assert (place, mask) in single_byte_changes(zlib.crc32(block) ^ zlib.crc32(bytes(changed)), length)


def test_damage_is_named(tmp_path: Path):
    whole = random.Random(0).randbytes(2 * BLOCK_BYTES + 1000)
    path = tmp_path / "file"
    path.write_bytes(whole)
    expected = hash_file(path)
    assert find_damage(path, expected) is None
    for place in (0, BLOCK_BYTES - 1, BLOCK_BYTES, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 0x40
        path.write_bytes(changed)
        assert find_damage(path, expected) == (
            f"{path} differs at byte {place}: it is {changed[place]:#04x}, it was {whole[place]:#04x}"
        )
    path.write_bytes(whole[:5] + b"##" + whole[7:])
    assert find_damage(path, expected) == f"{path} differs in bytes 0 to {BLOCK_BYTES - 1}"
    path.write_bytes(whole[:-7])
    assert find_damage(path, expected) == f"{path} is truncated: it ends at byte {len(whole) - 7}, not {len(whole)}"
    path.write_bytes(whole + b"x")
    assert "is too long" in str(find_damage(path, expected))
    path.unlink()
    assert find_damage(path, expected) == f"{path} is missing"
