"""How an entry point ends: its exit code, one line, and nothing that it waits for."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from experiments import cli

ROOT = pathlib.Path(__file__).parents[2]

RUN = """
import threading, time
from experiments import cli
from lever_jax.errors import InputError
from qwen_bridge.errors import InputError as BridgeInputError, WorkerError

def main():
    print("begun")
    {body}

cli.run(main)
"""


def end_of(body):
    """Runs a main with this body: exit code, lines of stdout and of stderr, seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(body=body)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - started
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), seconds


def test_jax_leaves_the_gpu_to_the_vlm_unless_the_user_says_otherwise(monkeypatch):
    names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in (*names, "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    cli.share_gpu()
    assert [os.environ.get(name) for name in names] == ["false", None]  # with both JAX has no GPU
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    cli.share_gpu()
    assert [os.environ.get(name) for name in names] == ["false", "0.3"]
    for name in names:
        monkeypatch.setenv(name, "own")
    cli.share_gpu()
    assert [os.environ.get(name) for name in names] == ["own", "own"]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("pass", 0, None),
        ("raise InputError('--tau=0 is wrong')", 2, "error: --tau=0 is wrong"),
        ("raise BridgeInputError('no image')", 2, "error: no image"),
        ("raise WorkerError('it died')", 1, "error: it died; what was finished is kept"),
    ],
)
def test_an_end_has_a_code_and_one_line(body, code, words):
    ended, printed, said, _ = end_of(body)
    assert (ended, printed) == (code, ["begun"])
    assert (said == []) if words is None else (len(said) == 1 and said[0].startswith(words))


def test_ctrl_c_waits_for_no_thread():
    """XLA cannot be stopped while it compiles, and nobody will run what it makes."""
    sleeping = "threading.Thread(target=time.sleep, args=(60,)).start(); raise KeyboardInterrupt"
    ended, printed, said, seconds = end_of(sleeping)
    assert (ended, printed) == (130, ["begun"])
    assert said == ["stopped; what was finished is kept, and the same command goes on from there"]
    assert seconds < 45
