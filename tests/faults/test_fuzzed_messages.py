"""A worker that is sent malformed and oversized messages: alive, prompt, and no fatter.

The worker is a process of its own, as in a run; only the driver's end is ours.
"""

import random
import secrets

import msgpack
import numpy as np
import pytest
from leaks import alive, resident_kib

from qwen_bridge.messages import (
    MAX_DEPTH,
    Failure,
    Hello,
    Request,
    Result,
    Settings,
    decode,
    encode,
)
from qwen_bridge.protocol import MAX_FRAME_BYTES, MAX_ROWS, request_arrays, write_arrays
from qwen_bridge.worker_process import WorkerProcess, worker_environment

SLOTS, SLOT_BYTES, PATIENCE_S = 2, 1 << 14, 20.0
GOOD = encode(Request("score", 1, 0, 2, 2, ""))
JUNK = (None, True, -1, 0, 1 << 40, -(1 << 63), 0.5, float("nan"), "", "x" * 100, b"x", [], {},
        [[[]]], {"a": {"b": []}}, "embed", "answer", "\udc80")  # fmt: skip


def frame(body):
    return b"QwB1" + len(body).to_bytes(4, "little") + bytes(body)


def random_bytes(rng):
    return frame(rng.randbytes(rng.randrange(300)))


def cut(rng):
    return frame(GOOD[: rng.randrange(len(GOOD))])


def flipped(rng):
    body = bytearray(GOOD)
    for _ in range(rng.randint(1, 4)):
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return frame(body)


def trailing(rng):
    return frame(GOOD + rng.randbytes(rng.randint(1, 9)))


def oversized(rng):
    length = MAX_FRAME_BYTES + rng.choice((1, 1000, 1 << 20))
    return b"QwB1" + length.to_bytes(4, "little") + bytes(length)


def as_large_as_can_be(rng):
    return frame(rng.choice((b"\x93", b"\xc4", b"\xdd", b"a")) * MAX_FRAME_BYTES)


def nested(rng):
    """Deeper than msgpack's own stack, or than ours; lists or maps."""
    depth = rng.choice((MAX_DEPTH + 1, 500, 1000, 100_000))
    opening = rng.choice((b"\x91", b"\x81\xa1a"))
    return frame(opening * depth + b"\xc0")


def lying_lengths(rng):
    """A list, map, text or binary that claims to hold up to 2^32 items."""
    kind = rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"))
    return frame(
        kind + rng.choice((0xFFFFFFFF, 0x7FFFFFFF, 1 << 20)).to_bytes(4, "big") + b"x" * 20
    )


def other_fields(rng):
    """A well-formed map whose fields are of other kinds, missing, or too many."""
    fields = msgpack.unpackb(GOOD)
    for _ in range(rng.randint(1, 3)):
        how, name = rng.randrange(3), rng.choice(list(fields) or ["tag"])
        if how == 0:
            fields[name] = rng.choice(JUNK)
        elif how == 1:
            fields.pop(name, None)
        else:
            fields[rng.choice(("x", "settings", "y" * 50))] = rng.choice(JUNK)
    return frame(msgpack.packb(fields, unicode_errors="surrogatepass"))


def other_request(rng):
    """A request that is well-formed and asks for what is not there."""
    verb = rng.choice(("embed", "score", "answer"))
    kind = "bank" if verb == "embed" else ""
    shots = 0 if verb == "embed" else rng.randint(1, 64)
    rows = rng.randint(1, MAX_ROWS)
    return frame(
        encode(Request(verb, rng.randrange(1 << 62), rng.randrange(64), rows, shots, kind))
    )


def out_of_order(rng):
    settings = Settings("os:system", {"a": "b"}, SLOTS, SLOT_BYTES)
    hello = Hello({"embedding_dim": 3, "parts": {}})
    return frame(encode(rng.choice((settings, hello, Failure(1, "x", "y", True, "")))))


KINDS = (random_bytes, cut, flipped, trailing, oversized, as_large_as_can_be, nested,
         lying_lengths, other_fields, other_request, out_of_order)  # fmt: skip
# By chance these are good ones, or ask for what is there.
MAY_BE_GOOD = (flipped, other_fields, other_request)


class Driver:
    """The driver's end of a worker process."""

    def __init__(self):
        settings = Settings("trivial_scorer:build", {}, SLOTS, SLOT_BYTES)
        self.worker = WorkerProcess(settings, worker_environment(0, 1, 1))
        assert isinstance(decode(self.worker.channel.receive(PATIENCE_S)), Hello)

    def post(self, data):
        """Sends raw bytes; whoever receives may be slower than we are."""
        sock = self.worker.channel._sock
        sock.settimeout(PATIENCE_S)
        sock.sendall(data)
        sock.setblocking(False)

    def reply(self):
        return decode(self.worker.channel.receive(PATIENCE_S))

    def score(self, job):
        """A good request between the bad ones."""
        arrays = {"queries": np.array([3, 4]), "pointers": np.array([[1, 2], [7, -1]])}
        write_arrays(self.worker.arena.view(1), request_arrays("score", 2, 2), arrays)
        self.worker.send(Request("score", job, 1, 2, 2, ""))
        return self.reply()


@pytest.mark.parametrize("messages", [400, pytest.param(5000, marks=pytest.mark.faults)])
def test_hostile_messages(story, messages):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    driver, sizes = Driver(), []
    arrays = {"queries": np.array([3, 4]), "pointers": np.array([[1, 2], [7, -1]])}
    write_arrays(driver.worker.arena.view(0), request_arrays("score", 2, 2), arrays)
    try:
        for number in range(messages):
            kind = KINDS[number % len(KINDS)]
            driver.post(kind(rng))
            reply, fitting = driver.reply(), Failure | Result if kind in MAY_BE_GOOD else Failure
            assert isinstance(reply, fitting), f"seed {seed}, message {number}: {reply}"
            if number % 20 == 0:
                result = driver.score(number)
                assert isinstance(result, Result), f"seed {seed}, message {number}: {result}"
                sizes.append(resident_kib(driver.worker.pid))
        assert alive(driver.worker.pid)
        # Medians of the second and of the last fifth: after a message of a million items the
        # allocator holds on to some of it for a while.
        fifth = len(sizes) // 5
        warm = int(np.median(sizes[fifth : 2 * fifth]))
        grown = int(np.median(sizes[-fifth:])) - warm
        assert grown < 0.05 * warm + 1024, f"seed {seed}: {grown} KiB more than {warm}"
    finally:
        driver.worker.put_away(0.0)
    story.append(
        f"{messages} hostile messages (seed {seed}): no crash, no hang, RSS {warm} KiB {grown:+d}"
    )
