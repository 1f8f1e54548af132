"""Frames between a console and its process: one byte of kind, eight of length, then that many bytes."""

import struct
from typing import BinaryIO

START, REQUEST = b"s", b"q"  # to the process, JSON
READY, ROWS, TABLE, ERROR = b"r", b"b", b"t", b"e"  # from it: nothing; a piece of an Arrow stream; JSON; JSON
HEADER = struct.Struct("<cQ")


def read_frame(file: BinaryIO) -> tuple[bytes, bytes]:
    """(kind, content) of the next frame. Raises EOFError at the end."""
    kind, length = HEADER.unpack(_exactly(file, HEADER.size))
    return kind, _exactly(file, length)


def write_frame(file: BinaryIO, kind: bytes, content: bytes) -> None:
    """Write one frame to an unbuffered file, whole."""
    for piece in (HEADER.pack(kind, len(content)), content):
        view = memoryview(piece)
        while view:
            view = view[file.write(view) :]


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data
