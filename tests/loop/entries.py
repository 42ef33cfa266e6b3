"""Runs import and export with flags, as the command line does, in one fresh process.

Every start of Python with JAX costs seconds, so the tests give one process many commands.
"""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

_DRIVER = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from experiments import export, import_rl
from lever_jax.errors import InputError
from qwen_bridge.errors import InputError as BridgeInputError

entries = {"export": export, "import_rl": import_rl}
results = []
for name, *arguments in json.load(sys.stdin):
    with flagsaver.flagsaver(), contextlib.redirect_stdout(sys.stderr):
        try:
            flags.FLAGS([name, *arguments])
            entries[name].main()
            results.append("")
        except (InputError, BridgeInputError) as error:
            results.append(f"error: {error}")
print(json.dumps(results))
"""


def run_commands(*commands: tuple[str, ...]) -> list[str]:
    """Runs commands (entry point, flags...) one after another; the error of each, or ""."""
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps([list(map(str, command)) for command in commands]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
