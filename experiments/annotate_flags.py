"""Writes what a plan says into the comments of the flag files.

    python -m experiments.annotate_flags [--flag_files=experiments/flags]

Run it after a change of the flag files, of the cost model or of how many prompts a phase asks; a
test holds the comments to what `--plan` prints today. Images of the usual size are assumed, so
that the comments do not depend on whose images lie about.
"""

import pathlib
import sys

from absl import flags
from absl.testing import flagsaver

from experiments import cli
from experiments.plan import make_plan
from experiments.plan_tables import summary
from lever_jax.errors import InputError

FLAG_FILES = flags.DEFINE_string(
    "flag_files", str(pathlib.Path(__file__).parent / "flags"), "Folder of the flag files."
)
FIRST = "# What `--plan` says (python -m experiments.annotate_flags writes these lines):"
_MARK = "#   "


def main():
    files = sorted(pathlib.Path(FLAG_FILES.value).glob("*.flags"))
    if not files:
        raise InputError(f"--flag_files={FLAG_FILES.value} holds no *.flags")
    for file in files:
        file.write_text(annotated(file))
        print(file)


def annotated(file: pathlib.Path) -> str:
    """The flag file's text with the comment that its plan gives today, at its end."""
    text = file.read_text()
    kept = text[: text.index(FIRST)] if FIRST in text else text
    with flagsaver.flagsaver():
        flags.FLAGS([sys.argv[0], f"--flagfile={file}"])
        lines = summary(make_plan(look=False))
    return "\n".join([kept.rstrip(), FIRST, *(_MARK + line for line in lines)]) + "\n"


if __name__ == "__main__":
    cli.run(main)
