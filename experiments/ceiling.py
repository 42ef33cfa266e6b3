"""What the pools could give: an extra search on a sample of queries, and the noise of labels."""

from typing import Any

import numpy as np

from experiments import configs, settings
from experiments.progress import bar, note
from experiments.session import Session
from experiments.stored import CEILING, as_json, write_picks
from lever_jax.diagnostics.spread import label_noise
from lever_jax.scoring import columns
from lever_jax.search import search_pools

_WIDER, _ANSWERED, _RESCORED = 2, 16, 4


def search_ceiling(session: Session, stage: str, count: int) -> dict[str, Any]:
    """Searches the pools of a sample of training queries, wider than the warm-up did.

    Every single demonstration is scored, the best are combined with twice --warmup_beam, and the
    16 pointers of highest gt_prob of each query are answered; the best accuracy counts. Scores go
    through the store, so that the same search again costs nothing; four of each query's prompts
    are scored a second time past the store, for the noise of labels.

    Args:
      session: of the run.
      stage: mining stage that the result is held against.
      count: queries to search, drawn by --seed; all if there are fewer.

    Returns:
      What it wrote to ceiling.json in the workdir: stage, beam, found (query_id, accuracy) and
      rescored, see `spread.label_noise`.
    """
    queries, service = session.train, session.service
    rng = np.random.default_rng([settings.SEED.value, 6])
    rows = np.sort(rng.permutation(len(queries))[:count])
    shots = configs.training_shots()
    label, beam = f"ceiling of {len(rows)} queries", _WIDER * settings.WARMUP_BEAM.value
    found = search_pools(
        queries,
        rows,
        service,
        shots=shots,
        beam=beam,
        label=label,
        shorter=session.policy.stops,
    )
    chosen = [pointers[:_ANSWERED] for pointers, _ in found]
    owner = np.repeat(rows, list(map(len, chosen)))
    ids = queries.demo_ids(owner, np.concatenate([*chosen, np.zeros((0, shots), np.int32)]))
    scores = columns(service.verify(queries.query_ids[owner], ids, label=label))
    best = np.array([_highest(scores["accuracy"][owner == row]) for row in rows])
    if np.isfinite(best).any():
        note(f"{label}: best accuracy {np.nanmean(best):.3f}")
    place = np.concatenate([np.arange(len(own)) for own in chosen]) if chosen else owner
    again = place < _RESCORED
    content = {
        "stage": stage,
        "beam": beam,
        "found": as_json(queries.query_ids[rows], best),
        "rescored": _rescore(session, queries.query_ids[owner][again], ids[again], scores, again),
    }
    write_picks(session.workdir / CEILING, content)
    return content


def _highest(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else np.nan


def _rescore(session: Session, query_ids, ids, scores, again) -> dict[str, Any] | None:
    """Label noise: the same prompts scored and answered again, in other batches."""
    second = {name: np.full(len(query_ids), np.nan) for name in ("gt_prob", "accuracy")}

    def land(name):
        def put(rows, batch):
            values = np.asarray(getattr(batch, name), float).copy()
            values[list(batch.reasons)] = np.nan
            second[name][rows] = values
            advance(len(rows))

        return put

    environment = session.environment
    with bar("label noise: score and answer again", 2 * len(query_ids)) as advance:
        environment.score(query_ids, ids, land("gt_prob"))
        environment.answer(query_ids, ids, land("accuracy"))
    pairs = {name: np.column_stack([scores[name][again], second[name]]) for name in second}
    return label_noise(query_ids, pairs["accuracy"], pairs["gt_prob"])
