"""Ctrl-C finishes the batch in hand, a second one stops at once; both leave a job to go on with."""

import json
import random
import signal
import subprocess
import sys
import time

import mining_job
import pytest
from leaks import workers

from lever_jax.store import Store, StoreError

SEED, QUERIES = 17, 9


def interrupted(command, presses, wait, begun):
    """Runs a command until `begun` is printed, then presses Ctrl-C; returns what was printed.

    Args:
      command: of the process.
      presses: once, or twice: the second as soon as the first was heard.
      wait: returns when the first one is to come.
      begun: what stands in the line after which `wait` is called.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if begun in line:
                break
        wait()
        pressed, seen = time.monotonic(), []
        process.send_signal(signal.SIGINT)
        if presses == 2:  # The first one has to have been heard, or the two are one.
            for line in process.stderr:
                seen.append(line)
                if "finishing the" in line:
                    break
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        return process.returncode, "".join(seen) + errors, time.monotonic() - pressed


def lines_of(log):
    """What the workers have written down so far."""
    return log.read_text().splitlines() if log.exists() else []


def stored(folder):
    """How many scores a job that is running has committed."""
    try:
        with Store.open(folder / "store.sqlite", None, read_only=True) as store:
            return store.counts()["scores"]
    except StoreError:  # There is no file yet, or nothing in it.
        return 0


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_a_mining_job(tmp_path, story, presses):
    (tmp_path / "whole").mkdir()
    mining_job.run(tmp_path / "whole", QUERIES, {})
    folder, log = tmp_path / "stopped", tmp_path / "served"
    folder.mkdir()
    # A batch takes so long that Ctrl-C surely comes in the middle of one of each worker.
    settings = {"delay_s": 1.0 if presses == 1 else 60.0, "log": str(log)}
    script = str(mining_job.__file__)
    command = [sys.executable, script, str(folder), str(QUERIES), json.dumps(settings)]

    def wait():
        if presses == 2:
            time.sleep(1.5)
        until = time.monotonic() + 60.0
        while presses == 1 and stored(folder) < 2 * mining_job.BATCH:
            assert time.monotonic() < until, "the job has stored nothing"
            time.sleep(0.01)

    _, errors, seconds = interrupted(command, presses, wait, "mining")
    assert "KeyboardInterrupt" in errors
    served = [json.loads(line)["prompts"] for line in lines_of(log)]
    prompts = {(q, tuple(pointer)) for batch in served for q, *pointer in batch}
    records, _ = mining_job.content(folder)
    if presses == 1:  # What both workers were at when it came was finished, and is kept, too.
        assert "finishing the 16 prompts in hand" in errors
        assert len(served) >= 4
        assert prompts <= set(records)
    else:
        assert seconds < 30.0
        assert not records
    _, counts = mining_job.run(folder, QUERIES, {})
    assert mining_job.content(folder) == mining_job.content(tmp_path / "whole")
    assert counts["duplicate_scores"] == counts["duplicate_answers"] == 0
    story.append(f"Ctrl-C x{presses}: {len(records)} records kept, resumed to the same store")


@pytest.mark.faults
def test_ctrl_c_at_random_moments_of_the_real_entry_point(tmp_path, story, real_job):
    """Once or twice, from its first line to its end; then the same command goes on."""
    rng, codes = random.Random(SEED), []
    command = real_job.command(tmp_path / "stopped", "--score_batch=16")
    for life in range(8):
        seconds = rng.uniform(0.0, 12.0)
        code, errors, _ = interrupted(
            command, 1 + life % 2, lambda seconds=seconds: time.sleep(seconds), "== open"
        )
        assert code in (130, 0), errors
        codes.append(code)
        assert not workers()
    real_job.finish(command)
    real_job.compare(tmp_path / "stopped")
    assert 130 in codes
    story.append(f"experiments.mine: {codes.count(130)} x Ctrl-C (seed {SEED}), resumed: equal")
