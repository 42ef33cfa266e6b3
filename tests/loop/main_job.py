"""The main job, small, as a user runs it: a process of its own."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "--num_queries=40 --num_eval=30 --bank_size=200 --pool_size=12 --warmup_queries=15 "
    "--warmup_beam=3 --warmup_epochs=4 --proposals=24 --quotas=beam:6,sample:8,retrieval:2 "
    "--verify_best=4 --verify_low=3 --rce_epochs=4 --grpo_epochs=1 --grpo_queries=20 "
    "--verify_uniform=3 --group_size=4 --batch_queries=10 --oracle_beam=3 --random_seeds=1 "
    "--force_grpo"
).split()


def run(entry, *flags, timeout=400):
    """Runs an entry point and waits for it."""
    command = [sys.executable, "-m", f"experiments.{entry}", *flags]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
