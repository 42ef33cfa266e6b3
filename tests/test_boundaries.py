"""The two halves never import each other: asserted in fresh interpreters."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def modules(package):
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("lever_jax", ("torch", "transformers", "qwen_bridge")),
        ("qwen_bridge", ("jax", "flax", "optax", "orbax", "lever_jax")),
    ],
)
def test_import_boundary(package, forbidden):
    imports = "; ".join(f"import {name}" for name in modules(package))
    script = f"import sys; {imports}; print([m for m in {forbidden!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_datasets_and_metric_do_not_need_torch():
    script = (
        "import sys, qwen_bridge.vqa.sources, qwen_bridge.client; print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def test_the_job_itself_does_not_load_torch():
    """Workers do; tensorboardX would, too, for seconds at every start."""
    script = "import sys, experiments.train, tensorboardX; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
