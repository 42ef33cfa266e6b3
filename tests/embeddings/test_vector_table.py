"""Vectors on disk: found as they were put, whatever is killed, cut or flipped in between."""

import contextlib
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import zlib

import numpy as np
import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.vector_table import VectorTable

ROOT = pathlib.Path(__file__).parents[2]


def keyed(*numbers):
    return [int(number).to_bytes(16, "big") for number in numbers]


def vectors_of(*numbers, width=5):
    """What a test's vector of each number is."""
    return np.array([np.random.default_rng(int(n)).normal(size=width) for n in numbers], np.float32)


@pytest.fixture
def table(tmp_path):
    made = VectorTable(tmp_path / "deep" / "folder", "image", 5)
    yield made
    made.close()


def reopened(table):
    table.close()
    return VectorTable(table.path.parent, "image", 5)


def assert_holds(table, numbers):
    rows, damaged = table.find(keyed(*numbers))
    assert damaged == 0
    np.testing.assert_array_equal(table.data()[rows], vectors_of(*numbers))


def test_an_empty_table_finds_nothing(table):
    rows, damaged = table.find(keyed(1, 2))
    assert (rows.tolist(), damaged) == ([-1, -1], 0)
    assert table.find([])[0].shape == (0,)
    assert table.data().shape == (0, 5)


def test_what_was_appended_is_found_in_any_order_after_reopening(table):
    rng = np.random.default_rng(0)
    left = rng.permutation(200)
    while len(left):
        some, left = np.split(left, [rng.integers(1, 40)])
        table.append(keyed(*some), vectors_of(*some))
    table = reopened(table)
    asked = rng.integers(0, 200, 500)
    assert_holds(table, asked)
    assert isinstance(table.data(), np.memmap)
    assert not table.data().flags.writeable
    table.close()


def test_a_key_keeps_its_first_vector(table):
    table.append(keyed(1), vectors_of(1))
    table.append(keyed(1, 2), vectors_of(9, 2))
    assert_holds(table, [1, 2])


def test_arrays_read_before_stay_as_they_are_while_the_table_grows(table):
    table.append(keyed(1, 2), vectors_of(1, 2))
    before = table.data()
    table.append(keyed(3), vectors_of(3))
    np.testing.assert_array_equal(before, vectors_of(1, 2))
    assert len(table.data()) == 3


def test_rows_beyond_the_index_do_not_count(table):
    """Data reached the disk and the process died before the index did."""
    table.append(keyed(1), vectors_of(1))
    with table.path.open("ab") as file:
        file.write(vectors_of(7, 8).tobytes()[:-3])  # torn
    table = reopened(table)
    assert table.find(keyed(7, 8))[0].tolist() == [-1, -1]
    table.append(keyed(2, 3, 4), vectors_of(2, 3, 4))
    assert_holds(table, [1, 2, 3, 4])
    table.close()


def test_a_failed_write_leaves_no_row_behind(table, monkeypatch):
    table.append(keyed(1), vectors_of(1))
    write = os.pwrite

    def full(file, data, offset):
        write(file, data[:7], offset)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(InputError, match=r"No space left.*--embeddings_dir"):
            table.append(keyed(2), vectors_of(2))
    assert table.find(keyed(2))[0].tolist() == [-1]
    table.append(keyed(3), vectors_of(3))
    assert_holds(table, [1, 3])


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damaged_rows_are_reported_and_can_be_written_again(table, how):
    table.append(keyed(*range(10)), vectors_of(*range(10)))
    content = bytearray(table.path.read_bytes())
    if how == "flipped":
        content[4 * 20] ^= 1
        lost = [4]
    elif how == "cut":
        content = content[: 7 * 20 + 3]
        lost = [7, 8, 9]
    else:
        content, lost = bytearray(), list(range(10))
    table.path.write_bytes(content)
    rows, damaged = table.find(keyed(*range(10)))
    assert np.flatnonzero(rows < 0).tolist() == lost
    assert damaged == len(lost)
    assert table.find(keyed(*range(10)))[1] == 0  # they are out of the index
    table.append(keyed(*lost), vectors_of(*lost))
    assert_holds(table, range(10))


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "image.sqlite").write_bytes(b"this is no database, but long enough to be one" * 9)
    with pytest.raises(InputError, match=r"image.sqlite: embeddings cannot be kept there .*delete"):
        VectorTable(tmp_path, "image", 5)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--embeddings_dir"):
        VectorTable(tmp_path / "file", "image", 5)


def test_vectors_of_another_shape_are_a_bug(table):
    with pytest.raises(ValueError, match="width 5"):
        table.append(keyed(1), np.zeros((1, 4), np.float32))


# Appends ever new vectors, a line of output for each batch that is in.
WRITER = """
import pathlib, sys
sys.path.insert(0, {root!r})
import numpy as np
from qwen_bridge.vector_table import VectorTable
table = VectorTable(pathlib.Path({folder!r}), "image", 5)
for first in range({first}, {first} + 10**6, 3):
    numbers = range(first, first + 3)
    vectors = [np.random.default_rng(n).normal(size=5) for n in numbers]
    table.append([n.to_bytes(16, "big") for n in numbers], np.array(vectors, np.float32))
    print(first, flush=True)
"""


def test_two_writers_at_once_and_kill_9_lose_nothing_that_was_in(tmp_path):
    processes = []
    for first in (0, 10**6):
        script = WRITER.format(root=str(ROOT), folder=str(tmp_path), first=first)
        command = [sys.executable, "-c", script]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    done = [int(process.stdout.readline()) for process in processes for _ in range(10)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        done += map(int, process.stdout.read().split())
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    table = VectorTable(tmp_path, "image", 5)
    table.append(keyed(5 * 10**6), vectors_of(5 * 10**6))
    assert_holds(table, [5 * 10**6, *(first + i for first in done for i in range(3))])
    # Whatever else is in the index, from a batch that was in but not yet reported, is whole.
    with contextlib.closing(sqlite3.connect(tmp_path / "image.sqlite")) as index:
        rows = index.execute("SELECT row, checksum FROM vectors").fetchall()
    assert len(rows) >= 61
    assert all(zlib.crc32(table.data()[row]) == checksum for row, checksum in rows)
    table.close()
