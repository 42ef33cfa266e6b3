"""Restores the selectors of a run in a new process and evaluates them; compares two runs.

    python -m experiments.evaluate --workdir=runs/digits [--phase=rce|grpo] [--shots=1,2,4]
        [--decodings=greedy,beam,rerank,oracle_rerank,shuffled] [--plan]
    python -m experiments.evaluate --workdir=runs/a --compare=runs/b [--out=FILE]

The flags of the run are adopted from the workdir; those given here win. Prompts that the run has
scored are read from its store, others are scored now and added to it. The result is eval.json and
picks.jsonl; an evaluation of other phases, shots or decodings than the run's goes to files of its
own, such as eval_rce_shots-3.json and picks_rce_shots-3.jsonl. `--compare` needs no VLM: it reads
the picks of both runs.
"""

import pathlib

from absl import flags

from experiments import cli, configs, phases, plan, run_folder, settings
from experiments.compare import compare_runs, picks_of
from experiments.grpo import BEST
from experiments.output import check_out, write_out
from experiments.progress import note, stage
from experiments.session import open_session
from experiments.tables import print_evaluation
from lever_jax.errors import InputError

PHASE = flags.DEFINE_enum(
    "phase",
    None,
    (*settings.PHASES, BEST),
    "Evaluate this phase only; default all. grpo_best: GRPO's state whose draws gained most.",
)
OUT = flags.DEFINE_string(
    "out", None, "JSON file of the result; default WORKDIR/eval.json, or eval_WHAT_DIFFERS.json."
)
PICKS = flags.DEFINE_string(
    "picks",
    None,
    "File of every pick; default WORKDIR/picks.jsonl, or picks_WHAT_DIFFERS.jsonl. With --compare: "
    "the picks of this run.",
)
COMPARE = flags.DEFINE_string(
    "compare", None, "Compare the run's picks with this run's: its workdir or picks file; no VLM."
)


def main():
    workdir = pathlib.Path(settings.WORKDIR.value)
    check_out(OUT.value)
    if COMPARE.value:
        if settings.PLAN.value:
            raise InputError("--plan: --compare needs no VLM, there is nothing to plan")
        if (workdir / "flags.txt").exists():
            run_folder.adopt_flags(workdir)
        ours = picks_of(PICKS.value, "picks") if PICKS.value else picks_of(workdir, "workdir")
        theirs = picks_of(COMPARE.value, "compare")
        compare_runs(ours, theirs, settings.METRIC.value, OUT.value)
        return
    check_out(PICKS.value, "picks")
    run_folder.adopt_flags(workdir)
    configs.check()
    wanted = wanted_phases(workdir)
    if settings.PLAN.value:
        return plan.show("evaluate", selectors=len(wanted))
    stage(f"open: {workdir}")
    with open_session(workdir) as session:
        selectors = {name: phases.restore_phase(session, name) for name in wanted}
        note(f"restored {', '.join(wanted) or 'nothing'}")
        stage("evaluate: every method on held-out queries")
        # A part of the evaluation, or another one, does not overwrite the run's own.
        different = [PHASE.value] if PHASE.value else []
        name = "_".join(["", *different, *run_folder.evaluation_changes(workdir)])
        picks = pathlib.Path(PICKS.value or workdir / f"picks{name}.jsonl")
        out = OUT.value or str(workdir / f"eval{name}.json")
        result = phases.evaluate_phases(session, selectors, picks)
        write_out(out, result)
        print_evaluation(result)
        note(f"written to {out} and {picks}")


def wanted_phases(workdir: pathlib.Path) -> list[str]:
    """Names of the checkpoints to evaluate.

    Raises:
      InputError: --phase names one that is not there.
    """
    finished = phases.finished_phases(workdir)
    name = PHASE.value
    if not name:
        return finished
    if name not in finished and not (name == BEST and phases.best_of_grpo(workdir, finished)):
        raise InputError(
            f"--phase={name}: {workdir} has no such checkpoint; it has "
            f"{', '.join(finished) or 'none'}"
        )
    return [name]


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
