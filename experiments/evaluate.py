"""Restores the selectors of a run in a new process and evaluates them.

    python -m experiments.evaluate --workdir=runs/digits [--phase=rce|grpo] [--shots=1,2,4]

The flags of the run are adopted from the workdir; those given here win. Prompts that the run has
scored are read from its store, others are scored now and added to it.
"""

import pathlib

from absl import flags

from experiments import cli, phases, settings
from experiments.progress import note, stage
from experiments.session import open_session
from experiments.tables import print_evaluation
from lever_jax.errors import InputError

PHASE = flags.DEFINE_enum("phase", None, settings.PHASES, "Evaluate this phase only; default all.")
OUT = flags.DEFINE_string(
    "out", None, "JSON file of the result; default WORKDIR/eval.json, or eval_PHASE.json."
)


def main():
    workdir = pathlib.Path(settings.WORKDIR.value)
    settings.adopt_flags(workdir)
    settings.check()
    stage(f"open: {workdir}")
    with open_session(workdir) as session:
        finished = phases.finished_phases(session)
        wanted = [PHASE.value] if PHASE.value else finished
        for name in wanted:
            if name not in finished:
                raise InputError(
                    f"--phase={name}: {workdir} has no such checkpoint; it has "
                    f"{', '.join(finished) or 'none'}"
                )
        selectors = {name: phases.restore_phase(session, name) for name in wanted}
        note(f"restored {', '.join(wanted) or 'nothing'}")
        stage("evaluate: every method on held-out queries")
        result = phases.evaluate_phases(session, selectors)
        # A part of the phases does not overwrite the whole run's table.
        name = f"eval_{PHASE.value}.json" if PHASE.value else "eval.json"
        out = pathlib.Path(OUT.value) if OUT.value else workdir / name
        phases.write_json(out, result)
        print_evaluation(result)
        note(f"written to {out}")


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
