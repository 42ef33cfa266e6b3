"""What a finished run left in its workdir, read without a VLM: rows for the figures, and picks.

Files beside the store that this module reads: health.json (which stage was measured),
training_picks.json (accuracies of each selector's picks on the training queries) and ceiling.json
(what a search with extra budget found).
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from experiments import configs
from experiments.output import whole_file
from lever_jax.diagnostics import Candidates, Picks
from lever_jax.errors import InputError
from lever_jax.mining import mined_candidates
from lever_jax.store import Store
from qwen_bridge.vqa.examples import Dataset

TRAINING_PICKS = "training_picks.json"
CEILING = "ceiling.json"
_UNTRAINED = ("warm-up", "the untrained selector")


@dataclasses.dataclass(frozen=True)
class StoredQueries:
    """Queries with their pools as the store has them.

    Attributes:
      query_ids: int64 [Q].
      pool_ids: int64 [Q, K] demonstration ids, -1 where there is none.
    """

    query_ids: np.ndarray
    pool_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunData:
    """Rows of a run for the figures.

    Attributes:
      candidates: of the stage that was measured.
      picks: of the selector that mined, None where unknown.
      trained: of the last selector trained on the data, None where unknown.
      trained_name: its name.
      ceiling: of a search with extra budget, None if there was none.
      rescored: label noise that was measured with it, or None.
      stage: name of the mining stage.
    """

    candidates: Candidates
    picks: Picks | None
    trained: Picks | None
    trained_name: str | None
    ceiling: Picks | None
    rescored: dict[str, Any] | None
    stage: str


def measured_stage(store: Store, workdir: pathlib.Path, wanted: str | None = None) -> str:
    """The mining stage that is named, else the one last measured, else the only one.

    Raises:
      InputError: nothing was mined, or the stage is not one of the store's.
    """
    names, health, asked = store.proposal_stages(), workdir / "health.json", wanted
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None and health.exists():
        wanted = json.loads(health.read_text(encoding="utf-8")).get("stage")
    if wanted in names:
        return wanted
    if not names:
        raise InputError(f"{workdir} has mined nothing yet; run experiments.mine there first")
    raise InputError(f"--stage={asked or ''} is not one of {', '.join(names)} of {workdir}")


def read_run(workdir: pathlib.Path, dataset: Dataset) -> RunData:
    """Reads what a run mined and picked; its flags are adopted already.

    Raises:
      InputError: nothing was mined, or the store is of other data than the flags name.
    """
    path = workdir / "store.sqlite"
    if not path.is_file():
        raise InputError(f"--workdir={workdir} has no store yet; run experiments.mine there first")
    with Store.open(path, read_only=True) as store:
        if store.fingerprint["dataset"] != dataset.fingerprint:
            raise InputError(
                f"{workdir} was mined on other data than its flags name now; put the files back "
                "as they were"
            )
        stage = measured_stage(store, workdir)
        query_ids = np.sort(store.proposed_queries(stage))
        pool_ids = store.get_pools(query_ids)[0]
        candidates = mined_candidates(
            stage,
            StoredQueries(query_ids, pool_ids),
            store,
            configs.reward_config(),
            configs.mining_config(),
        )
    types = {example.id: example.answer_type for example in dataset.train}
    if any(types.values()):
        asked = [types.get(query_id, "") for query_id in candidates.query_id.tolist()]
        candidates = candidates._replace(answer_type=np.array(asked, str))
    kept = _read(workdir / TRAINING_PICKS)
    before = next((kept[name] for name in _UNTRAINED if name in kept), None)
    after = [name for name in kept if name not in _UNTRAINED]
    ceiling = _read(workdir / CEILING)
    if ceiling and ceiling["stage"] != stage:
        ceiling = {}
    return RunData(
        candidates=candidates,
        picks=_picks(before),
        trained=_picks(kept[after[-1]]) if after else None,
        trained_name=after[-1] if after else None,
        ceiling=_picks(ceiling.get("found")),
        rescored=ceiling.get("rescored"),
        stage=stage,
    )


def keep_training_picks(
    workdir: pathlib.Path, name: str, query_ids: np.ndarray, accuracy: np.ndarray
) -> None:
    """Adds the picks of a selector to training_picks.json: {NAME: {"query_id", "accuracy"}}.

    A selector that is before all others starts the file anew, so that picks of an earlier training
    do not stay beside those of this one.
    """
    path = workdir / TRAINING_PICKS
    kept = {} if name in _UNTRAINED else _read(path)
    kept.pop(name, None)
    if name == "RCE":
        kept.pop("GRPO", None)
    write_picks(path, {**kept, name: as_json(query_ids, accuracy)})


def as_json(query_ids: np.ndarray, accuracy: np.ndarray) -> dict[str, list]:
    """One accuracy a query as it stands in these files; null where there is none."""
    known = [None if math.isnan(a) else a for a in np.asarray(accuracy, float).tolist()]
    return {"query_id": np.asarray(query_ids).tolist(), "accuracy": known}


def write_picks(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes one of these files, whole."""
    with whole_file(path) as write:
        write(json.dumps(content, allow_nan=False) + "\n")


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it and train again") from None


def _picks(content: dict[str, list] | None) -> Picks | None:
    if content is None:
        return None
    return Picks(np.array(content["query_id"], np.int64), np.array(content["accuracy"], float))
