"""Learning curves of a run from its metrics.jsonl, of the trainings that it ended with."""

import json
import pathlib
from typing import Any

from experiments import settings
from lever_jax.errors import InputError


def learning_curves(
    workdir: pathlib.Path, recipes: dict[str, str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl by phase, in order of steps.

    Rows of a training that another one replaced are left out: of each phase those count that have
    the recipe of its checkpoint or, without one, of its last row. A step that was done twice,
    after a stop, counts once, as it was done last.

    Args:
      workdir: of the run.
      recipes: phase to the recipe that counts; only these phases are read then.

    Raises:
      InputError: a line is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return {}
    rows: dict[str, list[dict[str, Any]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # The run is writing it, or was stopped while it did.
                continue
            raise InputError(f"{path}, line {number} is damaged; remove that line") from None
        rows.setdefault(row["phase"], []).append(row)
    if recipes is not None:
        return {name: _of_recipe(rows.get(name, []), recipe) for name, recipe in recipes.items()}
    return {
        phase: _of_recipe(rows[phase], _recipe(workdir, phase, rows[phase]))
        for phase in settings.PHASES
        if phase in rows
    }


def _recipe(workdir: pathlib.Path, phase: str, rows: list[dict[str, Any]]) -> str:
    from lever_jax import checkpoint  # Orbax takes seconds to import

    path = workdir / "checkpoints" / phase
    recipe = checkpoint.read_metadata(path)["recipe"] if checkpoint.exists(path) else None
    known = {row.get("recipe") for row in rows}
    return recipe if recipe in known else rows[-1].get("recipe")


def _of_recipe(rows: list[dict[str, Any]], recipe: str) -> list[dict[str, Any]]:
    by_step = {row["step"]: row for row in rows if row.get("recipe") == recipe}
    return [by_step[step] for step in sorted(by_step)]
