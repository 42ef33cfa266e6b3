"""Entry points in processes of their own, without the seconds that imports take.

One process has imported what all of them need, and has not begun to use JAX; it forks for each
command. What differs from `python -m` is only that the modules are there already. `entries` runs
many commands of import and export faster still, but in one process.
"""

import atexit
import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile

from main_job import ROOT

_SERVER = """
import importlib, json, os, pathlib, runpy, sys, warnings
import jinja2, qwen_bridge.client, qwen_bridge.vqa.sources, rich.progress, scipy.stats
for file in sorted(pathlib.Path("lever_jax").rglob("*.py")):
    importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
for line in sys.stdin:
    entry, flags, out, err = json.loads(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of every fork; its threads do not run yet.
        pid = os.fork()
    if pid == 0:
        os.setsid()
        for number, path in enumerate((os.devnull, out, err)):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.argv[1:] = flags
        runpy.run_module(f"experiments.{entry}", run_name="__main__", alter_sys=True)
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def run(entry: str, *flags, timeout_s: float = 400.0) -> subprocess.CompletedProcess:
    """Runs an entry point with flags, waits for it, and returns what it printed.

    Raises:
      TimeoutError: it took longer, and is killed with all of its session.
    """
    flags = list(map(str, flags))
    with tempfile.TemporaryDirectory(prefix="lever_warm_") as folder:
        out, err = (pathlib.Path(folder, name) for name in ("out", "err"))
        out.touch()
        err.touch()
        server = _server()
        server.stdin.write(json.dumps([entry, flags, str(out), str(err)]).encode() + b"\n")
        pid = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], timeout_s)[0]:
            os.killpg(pid, signal.SIGKILL)
            server.stdout.readline()
            raise TimeoutError(f"{entry} {flags} took more than {timeout_s} s: {err.read_text()}")
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([entry, *flags], code, out.read_text(), err.read_text())


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # Else `select` would not see a line that came together with another.
    )
    atexit.register(server.stdin.close)  # It ends with its input.
    return server
