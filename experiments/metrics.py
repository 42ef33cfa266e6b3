"""Metrics of a run: one JSON line each in `metrics.jsonl`, and the same to TensorBoard."""

import json
import math
import pathlib
import sys
import time

from lever_jax.errors import InputError

# tensorboardX loads torch where there is one, for tensors that nobody gives it here: seconds at
# every start, and memory in a process that only ever uses JAX.
_HIDE = "torch" not in sys.modules
if _HIDE:
    sys.modules["torch"] = None
from tensorboardX import SummaryWriter  # noqa: E402

if _HIDE:
    del sys.modules["torch"]


class MetricsLog:
    """Appends metrics of a run.

    Args:
      workdir: folder of the run.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "metrics.jsonl"
        self._events = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, phase: str, recipe: str, step: int, metrics: dict) -> dict[str, float]:
        """Writes the metrics of one step of a phase.

        Args:
          phase: its name.
          recipe: of the phase, which tells the rows of one training from those of another.
          step: optimiser steps done.
          metrics: scalars by name.

        Returns:
          The metrics as plain floats.

        Raises:
          InputError: the loss is not finite; the run stops before a checkpoint is spoilt.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values.get("loss", 0.0)):
            raise InputError(
                f"{phase}, step {step}: the loss is {values['loss']}; lower "
                f"--{phase}_learning_rate, and look at the last lines of {self._path}"
            )
        labels = {"phase": phase, "recipe": recipe, "step": step, "time": round(time.time(), 3)}
        with self._path.open("a") as stream:
            stream.write(json.dumps({**labels, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{phase}/{name}", value, step)
        return values

    def close(self) -> None:
        """Flushes the event file."""
        self._events.close()
