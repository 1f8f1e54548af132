"""Shards: what goes in comes out bit for bit, and damage is named."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeql.store import shards
from saeql.store.integrity import BLOCK_BYTES
from saeql.store.manifest import MANIFEST
from saeql.store.shards import ShardError, ShardReader, ShardWriter, Windows

T, D = 6, 10


def windows(count: int, dtype: str = "bfloat16", seed: int = 0, d_in: int = D, context_tokens: int = T) -> Windows:
    """Random windows; the float32 acts include the values that a lossy round trip changes."""
    random = np.random.default_rng(seed)
    shape = (count, context_tokens, d_in)
    if dtype == "bfloat16":
        acts: Any = random.integers(0, 2**16, shape, dtype=np.uint16)
    else:
        acts = random.standard_normal(shape, dtype=np.float32)
        acts.reshape(-1)[:5] = [np.nan, np.inf, -0.0, 1e-45, np.finfo(np.float32).max]
    ids = random.integers(0, 50_000, (2, count, context_tokens)).astype(np.int32)
    norms = random.random((count, context_tokens), dtype=np.float32)
    return Windows(acts, ids[0], ids[1], np.arange(count, dtype=np.int32) + 1000 * seed, norms)


def append(writer: ShardWriter, batch: Windows) -> None:
    writer.append(**{f.name: getattr(batch, f.name) for f in fields(batch)})


def write(folder: Path, count: int = 23, **options: Any) -> Windows:
    """`count` windows in shards of 8, appended 5 at a time."""
    options = {
        "d_in": D,
        "context_tokens": T,
        "attributes": {"hook_point": "layer 3"},
        "windows_per_shard": 8,
        **options,
    }
    dtype = options.get("dtype", "bfloat16")
    batch = windows(count, dtype, d_in=options["d_in"], context_tokens=options["context_tokens"])
    with ShardWriter(folder, **options) as writer:
        for start in range(0, count, 5):
            append(writer, batch.slice(start, start + 5))
    return batch


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [1, 8, 23, 24])
def test_round_trip_is_exact(tmp_path: Path, dtype: str, count: int) -> None:
    batch = write(tmp_path, count, dtype=dtype)
    reader = ShardReader(tmp_path)
    assert [r.windows for r in reader.records] == [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    assert (reader.num_windows, reader.num_rows, reader.dtype) == (count, count * T, dtype)
    every = range(len(reader))
    acts = np.concatenate([reader.acts(s) for s in every])
    assert acts.dtype == batch.acts.dtype and acts.tobytes() == batch.acts.tobytes()
    for name in ("token_ids", "document_ids", "norms", "window_ids"):
        read = np.concatenate([getattr(reader, name)(s) for s in every])
        assert read.tobytes() == getattr(batch, name).tobytes()
    assert reader.positions(0).tolist() == [*range(T)] * reader.records[0].windows
    assert reader.verify() == sum(f.stat().st_size for f in tmp_path.glob("*.h5"))


def test_acts_are_mapped_and_read_only(tmp_path: Path) -> None:
    batch = write(tmp_path)
    reader = ShardReader(tmp_path)
    assert not reader.acts(1).flags.owndata and not reader.acts(1).flags.writeable
    np.testing.assert_array_equal(reader.rows(1, 3, 40), batch.acts[8:16].reshape(-1, D)[3:40])
    with pytest.raises(ShardError, match="has 48 rows"):
        reader.rows(1, 40, 49)


def test_attributes_and_logical_type_are_kept(tmp_path: Path) -> None:
    write(tmp_path)
    record = ShardReader(tmp_path).records[0]
    assert record.attributes == {"hook_point": "layer 3"}
    assert json.loads((tmp_path / MANIFEST).read_text().splitlines()[0])["dtype"] == "bfloat16"
    with shards.h5py.File(tmp_path / record.file) as file:
        assert file["acts"].attrs["logical_dtype"] == "bfloat16"


def test_a_writer_goes_on_after_the_published_shards(tmp_path: Path) -> None:
    write(tmp_path, 8)
    write(tmp_path, 8)
    write(tmp_path, 8, prefix="shard-1")
    files = [r.file for r in ShardReader(tmp_path).records]
    assert files == ["shard-00000.h5", "shard-00001.h5", "shard-1-00000.h5"]


def test_what_the_manifest_does_not_list_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 16)
    manifest = tmp_path / MANIFEST
    first, second = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(first + second[: len(second) // 2])
    assert [r.file for r in ShardReader(tmp_path).records] == ["shard-00000.h5"]
    write(tmp_path, 8)
    assert [r.file for r in ShardReader(tmp_path).records] == ["shard-00000.h5", "shard-00001.h5"]
    ShardReader(tmp_path).verify()


def test_no_shards_and_damaged_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no published shards"):
        ShardReader(tmp_path)
    write(tmp_path, 8)
    manifest = tmp_path / MANIFEST
    line = manifest.read_text()
    for bad in ("not json\n", "[]\n", '{"file": "a"}\n', line.replace("shard-00000.h5", "../x.h5")):
        manifest.write_text(line + bad)
        with pytest.raises(ShardError, match="line 2 is not a shard record"):
            ShardReader(tmp_path)


def test_a_flipped_byte_is_named_with_its_range(tmp_path: Path) -> None:
    write(tmp_path, 40, d_in=6000, context_tokens=64, windows_per_shard=20)
    path = tmp_path / "shard-00001.h5"
    whole = path.read_bytes()
    assert len(whole) > 3 * BLOCK_BYTES
    data = bytearray(whole)
    data[BLOCK_BYTES + 17] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"shard-00001.h5 differs at byte {BLOCK_BYTES + 17}: it is 0x"):
        ShardReader(tmp_path).verify()
    data[BLOCK_BYTES + 18] ^= 1
    data[-1] ^= 1
    path.write_bytes(data)
    last = len(data) // BLOCK_BYTES * BLOCK_BYTES
    with pytest.raises(
        ShardError, match=rf"bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES - 1}, {last} to {len(data) - 1}: harvest"
    ):
        ShardReader(tmp_path).verify()


def test_truncation_gives_both_sizes(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00002.h5"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    reader = ShardReader(tmp_path)
    for call in (reader.verify, lambda: reader.acts(2), lambda: reader.token_ids(2)):
        with pytest.raises(
            ShardError, match=rf"shard-00002.h5 is truncated: {size - 100} bytes, the manifest says {size}"
        ):
            call()
    assert len(reader.acts(0)) == 8 * T
    path.unlink()
    with pytest.raises(ShardError, match=r"shard-00002.h5 is missing"):
        reader.verify()


def test_wrong_shapes_and_types_are_refused(tmp_path: Path) -> None:
    good = windows(3)
    with ShardWriter(tmp_path, d_in=D, context_tokens=T, attributes={}) as writer:
        with pytest.raises(ShardError, match=r"acts is float32 .* takes uint16 \[3, 6, 10\]"):
            append(writer, windows(3, "float32"))
        with pytest.raises(ShardError, match="token_ids is int64"):
            writer.append(good.acts, good.token_ids.astype(np.int64), good.document_ids, good.window_ids, good.norms)
        with pytest.raises(ShardError, match="norms"):
            writer.append(good.acts, good.token_ids, good.document_ids, good.window_ids, good.norms[:2])
    with pytest.raises(ShardError, match="not 'float16'"):
        ShardWriter(tmp_path, d_in=D, context_tokens=T, attributes={}, dtype="float16")
    with pytest.raises(ShardError, match="prefix"):
        ShardWriter(tmp_path, d_in=D, context_tokens=T, attributes={}, prefix="../x")


def test_an_error_in_the_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, d_in=D, context_tokens=T, attributes={}, windows_per_shard=2)
    append(writer, windows(2))
    (tmp_path / "shard-00001.h5").mkdir()  # the second shard cannot take its name
    append(writer, windows(2))
    with pytest.raises(OSError, match=r"shard-00001.h5"):
        for _ in range(10_000):
            append(writer, windows(2))
    with pytest.raises(OSError, match=r"shard-00001.h5"):
        writer.close()
    assert [r.file for r in ShardReader(tmp_path).records] == ["shard-00000.h5"]
    assert not list(tmp_path.glob("*.tmp.*"))
    assert not any(t.name == "shard-writer" and t.is_alive() for t in threading.enumerate())


def test_an_exception_in_the_block_publishes_no_half_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, d_in=D, context_tokens=T, attributes={}, windows_per_shard=4)
    with pytest.raises(KeyError), writer:
        append(writer, windows(6))
        raise KeyError
    assert [r.windows for r in ShardReader(tmp_path).records] == [4]


KILLED = """
import sys
import numpy as np
from saeql.store.shards import ShardWriter
writer = ShardWriter(sys.argv[1], d_in=64, context_tokens=16, attributes={}, windows_per_shard=16)
ids = np.zeros((16, 16), np.int32)
while True:
    acts = np.random.randint(0, 2**16, (16, 16, 64), np.uint16)
    writer.append(acts, ids, ids, ids[0], ids.astype(np.float32))
    print("appended", flush=True)
"""


def test_a_killed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    for lines in (3, 9, 20):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
        reader = ShardReader(tmp_path)
        reader.verify()
        for shard in range(len(reader)):
            assert reader.acts(shard).shape == (256, 64)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_an_os_error_and_publishes_nothing(small_disk: Path) -> None:
    batch = windows(64, d_in=600, context_tokens=16)
    writer = ShardWriter(small_disk, d_in=600, context_tokens=16, attributes={}, windows_per_shard=64)
    append(writer, batch)
    with pytest.raises(OSError, match="no space left") as caught:
        append(writer, batch)
        append(writer, batch)
        writer.close()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(small_disk / "shard-00001.h5")
    with pytest.raises(OSError, match="no space left"):
        writer.close()
    assert sorted(f.name for f in small_disk.iterdir()) == [MANIFEST, "shard-00000.h5"]
    reader = ShardReader(small_disk)
    disk = os.statvfs(small_disk)
    assert (disk.f_blocks - disk.f_bfree) * disk.f_frsize < reader.verify() + 100_000  # the space was given back
    np.testing.assert_array_equal(reader.acts(0), batch.acts.reshape(-1, 600))
