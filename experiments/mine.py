"""Mines training data and says whether it is worth training on; trains no RCE, no GRPO.

    python -m experiments.mine --flagfile=grpo.flags

Does phases 1 to 4 of `experiments.train`; a later `train` in the same workdir goes on from there.
"""

import contextlib
import time

from experiments import cli, configs, imported, plan, run_folder, settings
from experiments.metrics import MetricsLog
from experiments.progress import stage
from experiments.session import open_session
from experiments.train import make_data, print_costs


def main():
    started = time.monotonic()
    configs.check()
    if settings.PLAN.value:
        return plan.show("mine")
    workdir = run_folder.make_workdir()
    imported.check_flags(workdir)
    stage(f"open: {workdir}")
    with open_session(workdir) as session, contextlib.closing(MetricsLog(workdir)) as log:
        run_folder.save_flags(workdir)
        make_data(session, log)
        print_costs(session, time.monotonic() - started)


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
