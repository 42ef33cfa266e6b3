"""Shared memory is shared, has no name and fixed bounds; slots go round in one direction."""

import os
import tempfile

import numpy as np
import pytest

from qwen_bridge.arena import Arena, SlotState, SlotTable
from qwen_bridge.protocol import ProtocolError


def test_two_mappings_see_the_same_bytes(nothing_left):
    ours = Arena.create(3, 4096)
    theirs = Arena(os.dup(ours.fd), 3, 4096)
    ours.view(1)[:4] = b"here"
    assert bytes(theirs.view(1)[:4]) == b"here"
    assert bytes(theirs.view(0)[:4]) == bytes(theirs.view(2)[:4]) == bytes(4)
    ours.close()
    theirs.close()
    theirs.close()


def test_memory_is_all_there_and_cannot_shrink(nothing_left):
    arena = Arena.create(2, 8192)
    assert os.fstat(arena.fd).st_blocks * 512 >= 2 * 8192
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.release_fd()
    arena.view(1)[-1] = 1
    arena.close()


def test_without_memfd(nothing_left, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arena = Arena.create(2, 4096)
    arena.view(1)[:2] = b"ok"
    assert os.readlink(f"/proc/self/fd/{arena.fd}").startswith(f"{tmp_path}/")
    assert os.listdir(tmp_path) == []
    arena.close()


def test_wrong_size_and_wrong_slot(nothing_left):
    arena = Arena.create(2, 4096)
    with pytest.raises(ProtocolError, match="not 3 slots of 4096"):
        Arena(os.dup(arena.fd), 3, 4096)
    for slot in (-1, 2):
        with pytest.raises(ProtocolError, match="slot"):
            arena.view(slot)
    arena.close()


def test_close_with_a_view_held_elsewhere():
    arena = Arena.create(1, 4096)
    held = np.frombuffer(arena.view(0), np.uint8)
    arena.close()
    assert held.sum() == 0


def test_slots_go_round():
    slots = SlotTable(2)
    first = slots.take()
    assert slots.state(first) is SlotState.FILLED
    slots.send(first)
    assert slots.take() != first
    assert slots.num_free == 0
    with pytest.raises(RuntimeError, match="no slot is free"):
        slots.take()
    with pytest.raises(RuntimeError, match="SCORING"):
        slots.free(first)
    slots.land(first)
    with pytest.raises(RuntimeError, match="DONE"):
        slots.send(first)
    slots.free(first)
    assert slots.take() == first
    slots.free(first)
    assert slots.num_free == 1
