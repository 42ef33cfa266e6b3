"""The real entry point on the embedded model, while its worker or it itself is killed."""

import os
import random
import signal
import subprocess
import time

import pytest
from leaks import ports, workers

SEED, WORKER_KILLS, DRIVER_KILLS = 23, 6, 5

pytestmark = pytest.mark.faults


def test_kills_of_the_worker(tmp_path, story, real_job, monkeypatch):
    rng, killed = random.Random(SEED), 0
    # Each request takes longer, so that the job outlasts the kills.
    monkeypatch.setenv("LEVER_FAULTS", "slow=1")
    command = real_job.command(
        tmp_path / "killed", "--factory=faults.injection:build", "--score_batch=8"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        for line in job.stdout:
            if "== mine" in line:
                break
        while killed < WORKER_KILLS and job.poll() is None:
            time.sleep(rng.uniform(3.0, 9.0))
            for worker in workers():
                os.kill(worker, signal.SIGKILL)
                killed += 1
        assert job.wait(timeout=300) == 0
    assert killed == WORKER_KILLS, "the job was over before the killing was"
    real_job.compare(tmp_path / "killed")
    story.append(f"experiments.mine: {killed} worker kills (seed {SEED}): store equal")


def test_kills_of_the_driver(tmp_path, story, real_job):
    rng = random.Random(SEED)
    command = real_job.command(tmp_path / "killed", "--score_batch=8")
    for _ in range(DRIVER_KILLS):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
            for line in job.stdout:
                if "== open" in line:
                    break
            time.sleep(rng.uniform(2.0, 14.0))
            job.kill()
        deadline = time.monotonic() + 10
        while workers():
            assert time.monotonic() < deadline, "a worker outlived its driver"
            time.sleep(0.05)
    real_job.finish(command)
    real_job.compare(tmp_path / "killed")
    story.append(f"experiments.mine: {DRIVER_KILLS} driver kills (seed {SEED}): store equal")


def test_a_run_under_a_hail_of_faults(tmp_path, story, real_job, monkeypatch):
    """The command line of the README: what is injected shows in no record."""
    log = tmp_path / "injected"
    monkeypatch.setenv(
        "LEVER_FAULTS",
        f"crash=0.03,crash_before=0.02,crash_after=0.02,hang=0.01,slow=0.05,nan=0.02,"
        f"wrong_shape=0.02,wrong_rows=0.02,out_of_memory=0.05,lost_device=0.01,seed=3,log={log}",
    )
    command = real_job.command(
        tmp_path / "hail", "--factory=faults.injection:build", "--score_batch=16", "--deadline_s=60"
    )
    real_job.finish(command)
    real_job.compare(tmp_path / "hail")
    injected = log.read_text().count('"fault"')
    assert injected > 5
    story.append(f"experiments.mine: {injected} faults of ten kinds: store equal")


def test_a_run_listens_on_no_port(tmp_path, story, real_job):
    command = real_job.command(tmp_path / "run")
    seen = looks = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None:
            pids = {job.pid, *workers()}
            seen = max(seen, len(pids))
            looks += 1
            assert not ports(*pids)
            time.sleep(0.2)
        assert job.returncode == 0
    assert seen == 2
    story.append(f"experiments.mine: no port in {looks} looks at driver and worker")
