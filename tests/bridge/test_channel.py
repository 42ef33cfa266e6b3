"""Frames arrive whole or not at all, every wait ends, and a dead peer is noticed at once."""

import os
import random
import signal
import socket
import struct
import threading
import time

import pytest

from qwen_bridge.channel import (
    Channel,
    DeadlineExceeded,
    PeerGone,
    StreamBroken,
    wait_readable,
)
from qwen_bridge.protocol import MAX_FRAME_BYTES, ProtocolError


@pytest.fixture
def pair(nothing_left):
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def raw(nothing_left):
    """A channel and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def frame(body: bytes) -> bytes:
    return b"QwB1" + struct.pack("<I", len(body)) + body


def test_round_trip_in_order(pair):
    ours, theirs = pair
    bodies = [b"", b"x", bytes(range(256)) * 10]
    for body in bodies:
        ours.send(body, 1)
    assert [theirs.receive(1) for _ in bodies] == bodies
    theirs.send(b"back", 1)
    assert ours.receive(1) == b"back"
    assert ours.receive_ready() == []


def test_largest_frame_through_a_small_buffer(pair):
    ours, theirs = pair
    body = os.urandom(MAX_FRAME_BYTES)
    sender = threading.Thread(target=ours.send, args=(body, 20))
    sender.start()
    assert theirs.receive(20) == body
    sender.join()
    with pytest.raises(ProtocolError, match="limit"):
        ours.send(body + b"x", 1)


def test_bytes_one_by_one(raw):
    channel, theirs = raw
    for byte in frame(b"slow") + frame(b"drip")[:-1]:
        assert channel.receive_ready() in ([], [b"slow"])
        theirs.send(bytes([byte]))
    with pytest.raises(DeadlineExceeded):
        channel.receive(0.02)
    theirs.send(b"p")
    assert channel.receive(1) == b"drip"


def test_deadlines(pair):
    ours, _ = pair
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="send"):
        ours.receive(0.05)
    assert 0.04 < time.monotonic() - started < 20
    with pytest.raises(DeadlineExceeded, match="take"):
        ours.send(bytes(MAX_FRAME_BYTES), 0.05)


def test_a_send_cut_short_leaves_whole_frames(pair):
    ours, theirs = pair
    body = os.urandom(MAX_FRAME_BYTES)
    with pytest.raises(DeadlineExceeded):
        ours.send(body, 0.0)
    sender = threading.Thread(target=ours.send, args=(b"next", 20))
    sender.start()
    assert theirs.receive(20) == body
    assert theirs.receive(20) == b"next"
    sender.join()


def test_peer_gone(pair):
    ours, theirs = pair
    theirs.send(b"last words", 1)
    theirs.close()
    assert ours.receive_ready() == [b"last words"]
    with pytest.raises(PeerGone):
        ours.receive_ready()
    with pytest.raises(PeerGone):
        ours.receive(5)
    with pytest.raises(PeerGone):
        ours.send(b"?", 5)


def test_peer_gone_in_the_middle(raw):
    channel, theirs = raw
    theirs.send(frame(b"unfinished")[:-1])
    theirs.close()
    with pytest.raises(PeerGone, match="in the middle"):
        channel.receive(5)


def test_peer_process_killed(pair):
    ours, theirs = pair
    child = os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)
    theirs.close()  # The child never had it: descriptors are not inherited unless passed.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    started = time.monotonic()
    with pytest.raises(PeerGone):
        ours.receive(60)
    assert time.monotonic() - started < 20


def test_too_long_a_frame_is_skipped(raw):
    channel, theirs = raw
    length = 2 * MAX_FRAME_BYTES

    def talk():
        theirs.sendall(b"QwB1" + struct.pack("<I", length) + bytes(length) + frame(b"after"))

    sender = threading.Thread(target=talk)
    sender.start()
    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
        channel.receive(5)
    assert channel.receive(5) == b"after"
    sender.join()


def test_no_frame_at_all(raw):
    channel, theirs = raw
    theirs.send(b"GET / HTTP/1.1\r\n")
    for _ in range(2):
        with pytest.raises(StreamBroken, match="GET "):
            channel.receive(5)


@pytest.mark.parametrize("seed", range(5))
def test_any_split_gives_the_same_frames(raw, seed):
    channel, theirs = raw
    rng = random.Random(seed)
    bodies = [rng.randbytes(rng.choice([0, 1, 7, 300, 5000])) for _ in range(40)]
    stream = b"".join(map(frame, bodies))
    received = []
    while stream:
        size = rng.choice([1, 3, 11, 900, 20000])
        theirs.sendall(stream[:size])
        stream = stream[size:]
        received += channel.receive_ready()
    assert received == bodies


def test_wait_readable(pair):
    ours, theirs = pair
    assert wait_readable([ours, theirs], 0.01) == set()
    ours.send(b"x", 1)
    assert wait_readable([ours, theirs], 1) == {theirs.fileno()}


def test_a_signal_that_ends_no_wait_is_heard_all_the_same(pair):
    """One that another thread takes; one just before the wait looks the same from there."""
    ours, _ = pair
    sender = threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    sender.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait_readable([ours], 60.0)
    assert time.monotonic() - started < 30.0
    sender.join()


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 0.05, 0.45])
def test_turns_last_as_long_as_one_wait(pair, timeout_s):
    started = time.monotonic()
    assert wait_readable(pair, timeout_s) == set()
    assert time.monotonic() - started > timeout_s - 0.002
