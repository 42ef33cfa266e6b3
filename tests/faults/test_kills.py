"""kill -9 of workers and of the driver at random moments of one mining job changes nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mining_job
import pytest
from leaks import workers

from lever_jax.store import Store

JOB = Path(mining_job.__file__)
FULL = pytest.mark.faults
# Queries a kill, so that the job outlasts the kills.
QUERIES_A_KILL, DELAY_S, SEED = 3, 0.1, 11


def undisturbed(folder, queries):
    folder.mkdir()
    _, counts = mining_job.run(folder, queries, {})
    assert counts["duplicate_scores"] == counts["duplicate_answers"] == 0
    return mining_job.content(folder)


class Killer(threading.Thread):
    """Kills a worker, whichever and whatever it is at, so many times."""

    def __init__(self, kills, seed):
        super().__init__()
        self._left, self._random = kills, random.Random(seed)
        self.killed, self.stop = 0, False

    def run(self):
        while self._left and not self.stop:
            time.sleep(self._random.uniform(0.0, 1.0))
            victims = sorted(workers())
            if victims and not self.stop:
                try:
                    os.kill(self._random.choice(victims), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self._left -= 1
                self.killed += 1


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=FULL)])
def test_workers_killed_at_random_moments(tmp_path, story, kills):
    queries = QUERIES_A_KILL * kills
    expected = undisturbed(tmp_path / "whole", queries)
    (tmp_path / "killed").mkdir()
    killer = Killer(kills, SEED)
    log = tmp_path / "served"
    try:
        # From the first request on: before, a worker that ends is an error.
        threading.Thread(target=begin, args=(killer, log), daemon=True).start()
        settings = {"delay_s": DELAY_S, "log": str(log)}
        stats, counts = mining_job.run(tmp_path / "killed", queries, settings)
    finally:
        killer.stop = True
    killer.join()
    assert killer.killed == kills, "the job was over before the killing was"
    assert mining_job.content(tmp_path / "killed") == expected
    assert counts["duplicate_scores"] == counts["duplicate_answers"] == 0
    assert stats["prompts_given_up"] == 0
    story.append(
        f"{kills} worker kills (seed {SEED}), {stats['restarts']} restarts: "
        f"{len(expected[0])} records equal, 0 scored twice"
    )


def begin(killer, log):
    while not log.exists() and not killer.stop:
        time.sleep(0.01)
    killer.start()


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=FULL)])
def test_drivers_killed_at_random_moments(tmp_path, story, kills):
    """Nothing is scored again once it is durable: the workers write down all that they serve."""
    queries = QUERIES_A_KILL * kills
    expected = undisturbed(tmp_path / "whole", queries)
    folder, log = tmp_path / "killed", tmp_path / "served"
    folder.mkdir()
    rng, seen, again = random.Random(SEED), 0, 0
    durable = {"score": set(), "answer": set()}
    settings = json.dumps({"delay_s": DELAY_S, "log": str(log)})
    command = [sys.executable, str(JOB), str(folder), str(queries), settings]
    for life in range(kills + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            if life == kills:
                assert driver.stdout.read().split() == ["mining", "done"]
                assert driver.wait() == 0
            else:
                if rng.random() < 0.9:  # Else while it starts, or whatever it then is at.
                    assert driver.stdout.readline() == "mining\n"
                time.sleep(rng.uniform(0.0, 0.6))
                driver.kill()
                assert driver.wait() == -signal.SIGKILL, "the job was over before the killing was"
        gone()
        lines = log.read_text().splitlines() if log.exists() else []
        for line in map(json.loads, lines[seen:]):
            prompts = {(q, tuple(pointer)) for q, *pointer in line["prompts"]}
            again += len(prompts & durable[line["verb"]])
        seen, durable = len(lines), stored(folder)
    assert mining_job.content(folder) == expected
    assert again == 0
    story.append(
        f"{kills} driver kills (seed {SEED}): {len(expected[0])} records equal, "
        f"{again} prompts of {seen} requests were durable"
    )


def gone():
    """Waits until the killed driver's workers are gone; they notice."""
    deadline = time.monotonic() + 10
    while workers():
        assert time.monotonic() < deadline, "a worker outlived its driver"
        time.sleep(0.01)


def stored(folder):
    """The prompts whose score, or answer, is durable."""
    if not (folder / "store.sqlite").exists():
        return {"score": set(), "answer": set()}
    with Store.open(folder / "store.sqlite", None, read_only=True) as store:
        records = list(store.iter_scores())
    return {
        "score": {(r.query_id, r.pointer) for r in records},
        "answer": {(r.query_id, r.pointer) for r in records if r.answered},
    }
