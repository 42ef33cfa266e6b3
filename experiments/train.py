"""The main job: mines data, checks its health, trains the selector, evaluates it.

    python -m experiments.train --flagfile=grpo.flags

Phases, in order; each is skipped where an earlier run in the same workdir finished it:
  1. open    dataset, VLM workers, store, embeddings, pools
  2. warm-up VLM-guided search of some pools, then supervised training   (--warmup=none skips it)
  3. mine    two stages: score many proposals, answer the few that matter
  4. health  is the data worth training on? GRPO does not start if not   (--force_grpo overrides)
  5. RCE     reward-weighted cross-entropy on the mined groups
  6. GRPO    on-policy, through the same two stages
  7. evaluate every method on held-out queries: eval.json and the table; then report.html
"""

import contextlib
import time

import numpy as np

from experiments import cli, configs, imported, phases, plan, run_folder, settings
from experiments.metrics import MetricsLog
from experiments.progress import note, stage
from experiments.reporting import report_run
from experiments.session import open_session
from experiments.tables import print_evaluation, print_health


def main():
    started = time.monotonic()
    configs.check()
    if settings.PLAN.value:
        return plan.show()
    workdir = run_folder.make_workdir()
    imported.check_flags(workdir)
    stage(f"open: {workdir}")
    with open_session(workdir) as session, contextlib.closing(MetricsLog(workdir)) as log:
        run_folder.save_flags(workdir)
        selectors, current, health = make_data(session, log)
        gaps = {"mining": health["headroom"]} if health and health["headroom"] is not None else {}

        ready = settings.FORCE_GRPO.value or (health and health["ready"])
        programs = None
        if settings.GRPO_EPOCHS.value and ready:
            programs = phases.compile_grpo(session, current)  # While RCE trains.

        stage(f"RCE: reward-weighted cross-entropy, data: {settings.RCE_DATA.value}")
        trained = phases.train_rce(session, current, log)
        if trained is not None:
            current = selectors["rce"] = trained
            print_headroom(session, health, current, "RCE", gaps)

        if settings.GRPO_EPOCHS.value == 0:
            note("GRPO is left out: --grpo_epochs=0")
        elif programs is not None:
            stage("GRPO: on-policy, through the same two stages")
            trained = phases.train_grpo(session, current, log, programs)
            if trained is not None:
                selectors["grpo"] = trained
                print_headroom(session, health, trained, "GRPO", gaps)
        else:
            verdict = health["verdict"] if health else "nothing was mined, so nothing was checked"
            note(f"GRPO is not started: {verdict}; --force_grpo starts it all the same")

        stage("evaluate: every method on held-out queries")
        result = phases.evaluate_phases(session, selectors)
        phases.write_json(workdir / "eval.json", result)
        print_evaluation(result)
        print_costs(session, time.monotonic() - started)
    report_run(workdir, session.dataset)


def make_data(session, log):
    """Phases 2 to 4; returns the selectors so far, the last of them, and the health figures.

    With --rce_data=import there are no health figures: nothing is mined.
    """
    selectors = {}
    current = phases.fresh(session)
    if settings.WARMUP.value != "none":
        what = "search some pools" if settings.WARMUP.value == "search" else "read imported data"
        stage(f"warm-up: {what}, imitate the best pointers")
        current = selectors["warmup"] = phases.warm_up(session, current, log)
    if settings.RCE_DATA.value == "import":
        note("nothing is mined and no health is checked: --rce_data=import")
        return selectors, current, None

    stage("mine: score proposals, answer the best and some low ones")
    phases.mine_data(session, current)

    stage("health: is the data worth training on?")
    name = "warm-up" if selectors else "the untrained selector"
    health = phases.check_health(session, current, name)
    print_health(health)
    return selectors, current, health


def print_headroom(session, health, selector, name: str, gaps: dict[str, float]) -> None:
    """Prints how far the picks on training queries are from the best mined pointers.

    Beside it stand the gaps of the selectors before: a gap that stays says that training does not
    use the data, a gap near zero that there is nothing better in the data to learn from.
    """
    if health is None:
        return
    picks = phases.training_picks(session, selector, name)
    oracle = health["oracle_in_data"]
    if oracle is None or not np.isfinite(picks).any():
        note(f"training queries after {name}: no answered pick to compare with the mined data")
        return
    before = ", ".join(f"{earlier} {gap:+.3f}" for earlier, gap in gaps.items())
    gaps[name] = oracle - float(np.nanmean(picks))
    note(
        f"training queries after {name}: model_pick {oracle - gaps[name]:.3f}, oracle_in_data "
        f"{oracle:.3f}, gap {gaps[name]:+.3f} (before: {before or 'unknown'})"
    )


def print_costs(session, seconds: float) -> None:
    """Prints what was computed, and that nothing was computed twice."""
    counts, stored = session.service.counts, session.store.counts()
    busy = sum(session.environment.stats["busy_s"])
    note(
        f"{counts.asked:,} prompts asked for: {counts.scored:,} scored, {counts.verified:,} "
        f"answers certified by their scores, {counts.generated:,} generated, "
        f"{stored['duplicate_scores']} scored twice"
    )
    note(
        f"{seconds:.0f} s in all, the VLM busy for {busy:.0f} s; everything is in {session.workdir}"
    )


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
