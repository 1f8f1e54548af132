"""Hashes of files, and where in a file the damage is.

Beside the SHA-256 of the whole file stands the CRC-32 of each of its blocks. A block that differs names its bytes;
where a single byte was changed, the two CRC-32 name that byte.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 2**20
_PIECE_BYTES = 2**24
_POLYNOMIAL = 0xEDB88320


@dataclass(frozen=True)
class FileHash:
    """What a file's content was."""

    bytes: int
    sha256: str  # of the whole file
    block_bytes: int
    block_crc32: list[int]  # one a block of block_bytes, the last may be shorter


def hash_file(path: Path, block_bytes: int = BLOCK_BYTES) -> FileHash:
    """Read a file once."""
    digest, blocks, total = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            digest.update(block)
            blocks.append(zlib.crc32(block))
            total += len(block)
    return FileHash(total, digest.hexdigest(), block_bytes, blocks)


def find_damage(path: Path, expected: FileHash) -> str | None:
    """What is wrong with a file, with its bytes; None where it is what it was."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected.bytes:
        what = "truncated" if size < expected.bytes else "too long"
        return f"{path} is {what}: it ends at byte {size}, not {expected.bytes}"
    found = hash_file(path, expected.block_bytes)
    if found == expected:
        return None
    if len(found.block_crc32) != len(expected.block_crc32) or found.block_crc32 == expected.block_crc32:
        return f"{path}: its recorded hashes contradict each other, the record is damaged"
    if found.sha256 == expected.sha256:
        return f"{path} is whole, but the record of its blocks is damaged"
    pairs = zip(found.block_crc32, expected.block_crc32, strict=True)
    bad = [number for number, (now, then) in enumerate(pairs) if now != then]
    if len(bad) == 1 and (place := _changed_byte(path, expected, bad[0], found.block_crc32[bad[0]])) is not None:
        offset, now, then = place
        return f"{path} differs at byte {offset}: it is {now:#04x}, it was {then:#04x}"
    ranges = ", ".join(f"{start} to {stop - 1}" for start, stop in _ranges(bad, expected))
    return f"{path} differs in bytes {ranges}"


def _ranges(blocks: Sequence[int], expected: FileHash) -> list[tuple[int, int]]:
    """Byte ranges [start, stop) of the ascending `blocks`, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        start, stop = block * expected.block_bytes, min((block + 1) * expected.block_bytes, expected.bytes)
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return ranges


def _changed_byte(path: Path, expected: FileHash, block: int, crc32: int) -> tuple[int, int, int] | None:
    """(offset, value now, value then) of the only byte that changed in a block; None where more did."""
    start = block * expected.block_bytes
    length = min(expected.block_bytes, expected.bytes - start)
    for place, mask in single_byte_changes(crc32 ^ expected.block_crc32[block], length):
        with path.open("rb") as file:
            file.seek(start + place)
            now = file.read(1)[0]
        if _sha256_with(path, start + place, now ^ mask) == expected.sha256:
            return start + place, now, now ^ mask
    return None


def single_byte_changes(difference: int, length: int) -> list[tuple[int, int]]:
    """(place, xor mask) of every one-byte change of a block of `length` that changes its CRC-32 by `difference`.

    CRC-32 is linear: a change of mask m leaves table[m] in the register, and every later byte takes one step of the
    register whatever it is. Those steps can be undone one by one.
    """
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    masks = {value: mask for mask, value in enumerate(table) if mask}
    by_top = {value >> 24: number for number, value in enumerate(table)}
    found, register = [], difference
    for place in range(length - 1, -1, -1):
        if register in masks:
            found.append((place, masks[register]))
        number = by_top[register >> 24]
        register = ((register ^ table[number]) << 8) | number
    return found


def _sha256_with(path: Path, offset: int, value: int) -> str:
    """SHA-256 of a file with one byte replaced."""
    digest, start = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            if start <= offset < start + len(piece):
                changed = bytearray(piece)
                changed[offset - start] = value
                piece = bytes(changed)
            digest.update(piece)
            start += len(piece)
    return digest.hexdigest()
