"""Beams and RL data of others as training groups of this run.

Labels that were computed elsewhere (another model, prompt or metric) never enter the store, where
they would be taken for ours: the file that holds them stays beside it, and its pointers are
trained on and nothing else. A query of the file brings its own candidate pool, the one that its
pointers were mined with; only where the file has none the run's pool takes its place.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from lever_jax.errors import InputError
from lever_jax.mining import RewardConfig, group_batch
from lever_jax.pooled import Embedded, PooledQueries
from lever_jax.rl_json_fields import Candidate, QueryEntry
from lever_jax.scoring import columns
from lever_jax.training import GroupBatch, PoolTable

PARTIAL = "--import_partial leaves out, and counts, what does not fit"


@dataclasses.dataclass(frozen=True)
class RunExamples:
    """What the ids of a run mean; imported data must mean the same.

    Attributes:
      queries: training query id -> (image key, question).
      held_out: ids of the evaluation queries.
      bank: demonstration id -> image key.
      pools: training query id -> demonstration ids of the run's pool, or None while unknown.
      broken: image keys that cannot be read, as far as that is known.
    """

    queries: dict[int, tuple[str, str]]
    held_out: frozenset[int]
    bank: dict[int, str]
    pools: Callable[[int], Sequence[int]] | None = None
    broken: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class ImportedData:
    """Imported pointers that fit a run, as columns in the order of the file.

    Attributes:
      queries: int64 [Q] the file's queries that have any pointer here.
      pools: for each, its demonstration ids; None while the run's pool is not known.
      query_ids: int64 [n] of each pointer.
      pointers: int64 [n, S] demonstration ids.
      scores: float32 [n] each: gt_prob, accuracy, similarity, ...; NaN where the file has none.
      log_probs: float32 [n] `logprob_score`, nats; NaN where the file has none.
      beam_scores: float64 [n] `beam_score`, else `logprob_score`; NaN where the file has none.
      kept: bool [n] False where the file says that a pointer was dropped from its group.
      left_out: reason -> how many queries, demonstrations or pointers were left out for it.
    """

    queries: np.ndarray
    pools: list[tuple[int, ...] | None]
    query_ids: np.ndarray
    pointers: np.ndarray
    scores: dict[str, np.ndarray]
    log_probs: np.ndarray
    beam_scores: np.ndarray
    kept: np.ndarray
    left_out: Counter


def fit_to_run(
    entries: Iterable[QueryEntry], run: RunExamples, *, shots: int, partial: bool, place: str
) -> ImportedData:
    """Checks the queries of a file against a run and gathers their pointers.

    Always left out and counted, as they say nothing about a prompt: pointers that could not be
    evaluated, the second of two equal pointers, and queries, candidates and pointers with an image
    that cannot be read. Everything else that does not fit is an error,
    or is left out and counted with `partial`: queries that are not training queries of the run,
    demonstrations that are not in its bank or show the query's own image, pointers outside of
    their pool, pointers of another length than S. A question that differs from the run's is always
    an error, because then the ids mean other things.

    Args:
      entries: as `rl_json.read_rl_json` yields them.
      run: what the ids mean.
      shots: S.
      partial: leave out what does not fit.
      place: the file, for messages.

    Raises:
      InputError: names the file, the query and the mend.
    """
    left_out: Counter = Counter()

    def misfit(entry: QueryEntry, kind: str, why: str) -> None:
        if not partial:
            raise InputError(f"{place}, query {entry.query_id}: {why}; or {PARTIAL}")
        left_out[kind] += 1

    queries, pools, blocks = [], [], [_columns([], shots)]
    for entry in entries:
        if entry.query_id not in run.queries:
            misfit(entry, *_stranger(entry.query_id, run))
            continue
        image, question = run.queries[entry.query_id]
        _check_question(entry, question, place)
        if image in run.broken:
            left_out["queries whose image cannot be read"] += 1
            continue
        pool = _fitting_pool(entry, run, misfit, left_out)
        fitting = _fitting_pointers(entry, pool, run, shots, misfit, left_out)
        if fitting:
            queries.append(entry.query_id)
            pools.append(pool)
            blocks.append(_columns(fitting, shots))
    ids, pointers, scores, log_probs, beam_scores, kept = zip(*blocks)
    return ImportedData(
        queries=np.array(queries, np.int64),
        pools=pools,
        query_ids=np.concatenate(ids),
        pointers=np.concatenate(pointers),
        scores={name: np.concatenate([block[name] for block in scores]) for name in scores[0]},
        log_probs=np.concatenate(log_probs),
        beam_scores=np.concatenate(beam_scores),
        kept=np.concatenate(kept),
        left_out=left_out,
    )


def _columns(candidates: list[Candidate], shots: int) -> tuple:
    """Some pointers as arrays: fifty thousand queries of records would fill the memory."""
    records = [candidate.record for candidate in candidates]
    order = [c.log_prob if c.beam_score is None else c.beam_score for c in candidates]
    return (
        np.array([record.query_id for record in records], np.int64),
        np.array([r.pointer for r in records], np.int64).reshape(len(records), shots),
        columns(records),
        np.array([candidate.log_prob for candidate in candidates], np.float32),
        np.array(order, np.float64),
        np.array([candidate.kept is not False for candidate in candidates], bool),
    )


def _stranger(query_id: int, run: RunExamples) -> tuple[str, str]:
    if query_id in run.held_out:
        return (
            "evaluation queries",
            "it is an evaluation query of this run, and training on it would spoil the evaluation: "
            "remove it from the file, or evaluate on other queries",
        )
    return (
        "queries of other data",
        "it is not a training query of this run: raise --num_queries or name the files that the "
        "queries come from",
    )


def _check_question(entry: QueryEntry, ours: str, place: str) -> None:
    theirs = entry.description.get("question")
    if isinstance(theirs, str) and _words(theirs) != _words(ours):
        raise InputError(
            f"{place}, query {entry.query_id}: its question is {theirs!r} in the file and {ours!r} "
            "in this run's data, so the ids mean other examples; use the data that it was made from"
        )


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _fitting_pool(
    entry: QueryEntry, run: RunExamples, misfit, left_out: Counter
) -> tuple[int, ...] | None:
    """The candidate pool of a query: the file's, else the run's, None if that is not known."""
    if entry.pool is None:
        return None if run.pools is None else tuple(run.pools(entry.query_id))
    image, pool = run.queries[entry.query_id][0], []
    for demo_id in entry.pool:
        if demo_id not in run.bank:
            misfit(
                entry,
                "candidates not in the bank",
                f"demonstration {demo_id} of its pool is not in this run's bank: name the files "
                "that the demonstrations come from",
            )
        elif run.bank[demo_id] == image:
            misfit(
                entry,
                "candidates on the query's own image",
                f"demonstration {demo_id} of its pool shows the query's own image, whose answer "
                "may give the query's away: remove it",
            )
        elif run.bank[demo_id] in run.broken:
            left_out["candidates whose image cannot be read"] += 1
        else:
            pool.append(demo_id)
    return tuple(pool)


def _fitting_pointers(
    entry: QueryEntry, pool, run: RunExamples, shots: int, misfit, left_out: Counter
) -> list[Candidate]:
    """The evaluated pointers of a query that can be trained on, each once."""
    allowed = run.bank if pool is None else frozenset(pool)
    image = run.queries[entry.query_id][0]
    fitting: dict[tuple[int, ...], Candidate] = {}
    for candidate in entry.candidates:
        pointer = candidate.record.pointer
        outside = [i for i in pointer if i not in allowed or run.bank[i] == image]
        if candidate.record.eval_failed is not None:
            left_out["pointers that could not be evaluated"] += 1
        elif any(run.bank.get(i) in run.broken for i in pointer):
            left_out["pointers with an image that cannot be read"] += 1
        elif pointer in fitting:
            left_out["pointers that are there twice"] += 1
        elif len(pointer) != shots:
            misfit(
                entry,
                "pointers of another length",
                f"pointer {list(pointer)} has {len(pointer)} demonstrations and this run trains "
                f"with {shots}: set --train_shots",
            )
        elif outside:
            misfit(
                entry,
                "pointers outside of their pool",
                f"demonstration {outside[0]} of pointer {list(pointer)} is not in "
                f"{'the bank' if pool is None else 'its candidate pool'}: add candidate_pool_ids "
                "to the file, or use the data that it was made from",
            )
        else:
            fitting[pointer] = candidate
    return list(fitting.values())


def pooled(data: ImportedData, queries: PooledQueries, bank: Embedded) -> PooledQueries:
    """The imported queries with their pools, over the embeddings of the run.

    Args:
      data: with every pool known.
      queries: the run's training queries; all of `data`'s are among them.
      bank: the run's demonstrations.

    Returns:
      Q queries in the order of `data.queries`, pools padded to the largest.
    """
    used = np.unique(np.concatenate([np.asarray(pool, np.int64) for pool in data.pools]))
    row_of = {demo_id: row for row, demo_id in enumerate(used.tolist())}
    width = max(map(len, data.pools), default=1)
    pool_ids = np.full((len(data.pools), width), -1, np.int64)
    rows = np.zeros(pool_ids.shape, np.int32)
    for own, own_rows, pool in zip(pool_ids, rows, data.pools, strict=True):
        own[: len(pool)] = pool
        own_rows[: len(pool)] = [row_of[demo_id] for demo_id in pool]
    where = {query_id: row for row, query_id in enumerate(queries.query_ids.tolist())}
    at = jnp.asarray([where[query_id] for query_id in data.queries.tolist()], jnp.int32)
    table = queries.table._replace(
        queries=queries.table.queries[at],
        bank=np.asarray(bank.embeddings[rows_of(bank.ids, used)]),
        rows=jnp.asarray(rows),
        mask=jnp.asarray(pool_ids >= 0),
        query_ids=queries.table.query_ids[at],
    )
    return dataclasses.replace(queries, query_ids=data.queries, pool_ids=pool_ids, table=table)


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` stands in `ids`, which holds all of them, each once."""
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids, wanted, sorter=order)]


def imported_groups(data: ImportedData, queries: PooledQueries, reward: RewardConfig) -> GroupBatch:
    """The answered pointers as groups for RCE; rows are those of `queries`, from `pooled`.

    Raises:
      InputError: nothing was answered, or the reward reads a score that some answered pointer
        does not have.
    """
    answered = np.isfinite(data.scores["accuracy"]) & data.kept
    if not answered.any():
        raise InputError(
            "--rce_data: no imported pointer has a vqa_acc_score, which RCE needs; beams without "
            "labels are for --warmup=import"
        )
    rewards = reward.of({**data.scores, "shots": np.sum(data.pointers >= 0, axis=1)})
    lacking = answered & ~np.isfinite(rewards)
    if lacking.any():
        missing = [n for n in ("gt_prob", "similarity") if np.isnan(data.scores[n][lacking]).any()]
        raise InputError(
            f"--reward_mode={reward.mode}: {lacking.sum():,} of {answered.sum():,} imported "
            f"pointers have an accuracy but not the {' and '.join(missing)} that it reads; use "
            "--reward_mode=hard_plus_soft --similarity_weight=0, or add them to the file"
        )
    return group_batch(
        queries,
        data.query_ids[answered],
        data.pointers[answered],
        rewards[answered],
        data.log_probs[answered],
    )


def imported_targets(data: ImportedData, queries: PooledQueries, count: int) -> GroupBatch:
    """The best pointers of each query to imitate; rows are those of `queries`, from `pooled`.

    A target's weight is its `vqa_gt_prob` if every pointer of the query has one, else its
    `vqa_acc_score` if every pointer has one; pointers of weight 0 are not imitated. Where nothing
    says how good the pointers of a query are, the `count` best by beam score, or the first of the
    file if there is no beam score either, weigh the same.

    Raises:
      InputError: some pointers of a query have a score and others have not.
    """
    weights = np.full(len(data.query_ids), np.nan)
    order = np.argsort(data.query_ids, kind="stable")
    starts = np.flatnonzero(np.diff(data.query_ids[order], prepend=-1))
    for own in np.split(order, starts[1:]):
        worth = _worth(data, own)
        best = own[np.argsort(-_or_zero(data.beam_scores[own]), kind="stable")]
        worth_of = dict(zip(own.tolist(), worth.tolist(), strict=True))
        ranked = sorted(best.tolist(), key=lambda i: -worth_of[i])
        for i in [i for i in ranked if worth_of[i] > 0][:count]:
            weights[i] = worth_of[i]
    rows = np.flatnonzero(np.isfinite(weights))
    return group_batch(
        queries, data.query_ids[rows], data.pointers[rows], weights[rows], data.log_probs[rows]
    )


def _worth(data: ImportedData, own: np.ndarray) -> np.ndarray:
    """How good the pointers `own` of one query are, on one scale; ones where nothing says."""
    for name in ("gt_prob", "accuracy"):
        known = np.isfinite(data.scores[name][own])
        if known.all():
            return data.scores[name][own]
    labelled = np.isfinite(data.scores["gt_prob"][own]) | np.isfinite(data.scores["accuracy"][own])
    ranked = np.isfinite(data.beam_scores[own])
    if labelled.any() or (ranked.any() and not ranked.all()):
        what = "vqa_gt_prob or vqa_acc_score" if labelled.any() else "beam_score or logprob_score"
        raise InputError(
            f"imported query {data.query_ids[own[0]]}: some of its pointers have a {what} and "
            "others have not, so they cannot be ranked; give all of them the same one"
        )
    return np.ones(len(own))


def _or_zero(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values, nan=0.0)


def join(
    first: tuple[GroupBatch, PoolTable], second: tuple[GroupBatch, PoolTable]
) -> tuple[GroupBatch, PoolTable]:
    """Both sets of groups over one table, padded to the wider pool and the larger group."""
    (groups, table), (more, other) = first, second
    width = max(table.rows.shape[1], other.rows.shape[1])
    shifted = other.rows + np.int32(len(table.bank))
    joined = table._replace(
        queries=jnp.concatenate([table.queries, other.queries]),
        bank=jnp.concatenate([table.bank, other.bank]),
        rows=jnp.concatenate([_widen(table.rows, width), _widen(shifted, width)]),
        mask=jnp.concatenate([_widen(table.mask, width), _widen(other.mask, width)]),
        query_ids=jnp.concatenate([table.query_ids, other.query_ids]),
    )
    more = more._replace(query_rows=more.query_rows + np.int32(len(table.rows)))
    size = max(groups.mask.shape[1], more.mask.shape[1])
    # Neither was drawn without replacement, so there are no inclusion probabilities to join.
    names = [name for name in GroupBatch._fields if getattr(groups, name) is not None]
    arrays = {
        name: np.concatenate([_widen(getattr(one, name), size) for one in (groups, more)])
        for name in names
    }
    return GroupBatch(**arrays), joined


def _widen(array, size: int):
    """Pads the second axis with zeros to `size`; leaves a vector as it is."""
    if array.ndim == 1:
        return array
    pad = [(0, 0)] * array.ndim
    pad[1] = (0, size - array.shape[1])
    return (np if isinstance(array, np.ndarray) else jnp).pad(array, pad)
