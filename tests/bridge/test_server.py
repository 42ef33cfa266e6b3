"""The worker answers every request once and outlives errors and garbage."""

import os
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import trivial_scorer

from qwen_bridge.arena import Arena
from qwen_bridge.channel import Channel, PeerGone
from qwen_bridge.errors import InputError
from qwen_bridge.messages import (
    NO_JOB,
    Failure,
    Hello,
    Request,
    Result,
    Settings,
    Shutdown,
    decode,
    encode,
)
from qwen_bridge.protocol import (
    MAX_FRAME_BYTES,
    read_arrays,
    request_arrays,
    result_arrays,
    write_arrays,
)
from qwen_bridge.server import load_factory, serve

SLOTS, SLOT_BYTES = 2, 1 << 14
FACTORY = "trivial_scorer:build"


class Driver:
    """The driver's end of a server that runs in a thread of this process."""

    def __init__(self):
        self.arena = Arena.create(SLOTS, SLOT_BYTES)
        self.channel, self._theirs = Channel.pair()
        self._thread = threading.Thread(target=self._serve, args=(os.dup(self.arena.fd),))
        self._thread.start()

    def _serve(self, arena_fd):
        try:
            self.code = serve(self._theirs, arena_fd)
        except PeerGone:
            self.code = None

    def ask(self, message):
        self.channel.send(encode(message), 5)
        return decode(self.channel.receive(5))

    def greet(self, settings=None):
        hello = self.ask(Settings(FACTORY, settings or {}, SLOTS, SLOT_BYTES))
        assert isinstance(hello, Hello)
        return hello.hello

    def score(self, job=0, slot=0, queries=(3, 4), pointers=((1, 2), (7, -1))):
        queries, pointers = np.array(queries), np.array(pointers)
        specs = request_arrays("score", len(queries), pointers.shape[1])
        arrays = {"queries": queries, "pointers": pointers}
        write_arrays(self.arena.view(slot), specs, arrays)
        return self.ask(Request("score", job, slot, len(queries), pointers.shape[1], ""))

    def close(self):
        self.channel.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._theirs.close()
        self.arena.close()


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setenv("QWEN_BRIDGE_FACTORIES", "trivial_scorer")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    driver = Driver()
    yield driver
    driver.close()


def test_score_through_a_slot(driver):
    hello = driver.greet({"hello": {"dataset": "abc"}})
    assert (hello["embedding_dim"], hello["dataset"]) == (6, "abc")
    result = driver.score(job=5, slot=1)
    assert isinstance(result, Result)
    assert (result.job, result.slot, result.rows, result.reasons) == (5, 1, 2, [])
    arrays = read_arrays(driver.arena.view(1), result_arrays("score", 2, result.columns))
    expected = trivial_scorer.hashed([3, 4], [1, 7], [2, -1])
    np.testing.assert_array_equal(arrays["gt_prob"], expected)


def test_shutdown(driver):
    driver.greet()
    driver.channel.send(encode(Shutdown()), 5)
    driver._thread.join(5)
    assert driver.code == 0


def test_an_exception_is_reported_and_survived(driver):
    driver.greet({"faults": [{"fault": "raise", "query": 9}, {"fault": "wrong_shape", "query": 8}]})
    failure = driver.score(job=1, queries=(9, 1))
    assert (failure.job, failure.type) == (1, "ZeroDivisionError")
    assert failure.message == "a bug in the scorer"
    assert not failure.retryable
    assert "injection.py" in failure.detail
    failure = driver.score(job=2, queries=(8, 1))
    assert (failure.type, failure.job) == ("ProtocolError", 2)
    assert "must be float of shape" in failure.message
    assert isinstance(driver.score(job=3), Result)


def test_nonsense_in_a_slot_is_reported(driver):
    driver.greet()
    failure = driver.score(pointers=((-1, 2), (7, -1)))
    assert (failure.type, failure.job) == ("ProtocolError", 0)
    assert "-1 only pads on the right" in failure.message
    assert "slot 7" in driver.ask(Request("score", 1, 7, 2, 2, "")).message
    assert "past the" in driver.ask(Request("score", 2, 0, 4000, 2, "")).message
    assert isinstance(driver.score(), Result)


def test_first_message_must_be_settings(driver):
    failure = driver.ask(Request("score", 1, 0, 2, 2, ""))
    assert failure.job == NO_JOB
    assert "settings was expected" in failure.message
    driver.greet()
    assert "request was expected" in driver.ask(Hello({"embedding_dim": 1, "parts": {}})).message


def test_an_arena_cut_otherwise(driver):
    failure = driver.ask(Settings(FACTORY, {}, SLOTS + 1, SLOT_BYTES))
    assert "not 3 slots" in failure.message


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_server_lives_on(driver, seed):
    """A few hundred malformed messages, each answered by one failure; work goes on between."""
    rng = random.Random(seed)
    driver.greet()
    good = encode(Request("score", 1, 0, 2, 2, ""))
    for number in range(100):
        body = bytearray(good)
        kind = rng.randrange(5)
        if kind == 0:
            body = rng.randbytes(rng.randrange(200))
        elif kind == 1:
            body = body[: rng.randrange(len(body))]
        elif kind == 2:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            body += rng.randbytes(rng.randint(1, 9))
        else:
            length = MAX_FRAME_BYTES + rng.randint(1, 1000)
            header = b"QwB1" + length.to_bytes(4, "little")
            sender = threading.Thread(
                target=driver.channel._sock.sendall, args=(header + bytes(length),)
            )
            driver.channel._sock.setblocking(True)
            sender.start()
            sender.join()
            driver.channel._sock.setblocking(False)
            assert "limit" in decode(driver.channel.receive(5)).message
            continue
        driver.channel.send(bytes(body), 5)
        assert isinstance(decode(driver.channel.receive(5)), Failure | Result)
        if number % 20 == 0:
            assert isinstance(driver.score(job=number), Result)


def test_broken_stream_ends_the_server(driver):
    driver.greet()
    driver.channel._sock.send(b"\x00" * 100)
    assert "cannot begin" in decode(driver.channel.receive(5)).message
    driver._thread.join(5)
    assert driver.code == 0


ELSEWHERE, FORM, NONE = "is neither in qwen_bridge nor", "is not of the form", "defines no such"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("os:system", ELSEWHERE),
        ("json:loads", ELSEWHERE),
        ("never_imported:build", ELSEWHERE),
        ("qwen_bridge:x", ELSEWHERE),
        ("qwen_bridge_evil.x:main", ELSEWHERE),
        ("qwen_bridge.client", FORM),
        ("qwen_bridge.client:weakref.finalize", FORM),
        ("qwen_bridge.server:_reply", FORM),
        ("qwen_bridge..server:main", FORM),
        ("", FORM),
        ("qwen_bridge.client:contextlib", NONE),
        ("qwen_bridge.worker_process:subprocess", NONE),
        ("qwen_bridge.server:encode", NONE),  # A function, but of another module.
        ("qwen_bridge.server:nothing", NONE),
        ("qwen_bridge.nowhere:build", "cannot be imported"),
    ],
)
def test_factories_from_elsewhere_are_refused(name, why, monkeypatch, tmp_path):
    monkeypatch.delenv("QWEN_BRIDGE_FACTORIES", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "never_imported.py").write_text("raise AssertionError")
    with pytest.raises(InputError, match=f"^--factory={re.escape(name)}.* {why}"):
        load_factory(name)


def test_bare_start_says_what_is_missing():
    command = [sys.executable, "-m", "qwen_bridge.server"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "--socket_fd" in done.stderr


def test_import_boundary():
    code = (
        "import sys, qwen_bridge.client, qwen_bridge.server\n"
        "names = {'jax', 'jaxlib', 'torch', 'transformers', 'lever_jax'} & set(sys.modules)\n"
        "assert not names, names"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)
