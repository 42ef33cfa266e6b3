"""Cuts a call into batches and puts the batches' results back into the caller's order.

Prompts that share something a worker caches (a candidate pool, a query) should lie side by side
and go to one worker; the caller says what is shared by a key for each prompt, the *affinity*.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen_bridge.protocol import (
    JUDGED,
    AnswerBatch,
    EmbedBatch,
    ScoreBatch,
    empty_answer,
    empty_score,
)

_MASK = 0xFFFFFFFFFFFFFFFF


class Batch(NamedTuple):
    """Rows of a call that travel together, and the affinity key that chooses their worker."""

    rows: np.ndarray
    key: int


def plan_batches(queries: np.ndarray, affinity: np.ndarray, batch_size: int) -> list[Batch]:
    """Batches of at most `batch_size` rows that hold every row once.

    Rows of one key, and within it rows of one query, lie side by side, in order of first
    appearance. A key's rows are spread over several batches only where one cannot hold them, and
    then none of these batches holds another key; likewise for queries within a key.
    """
    key_rank, query_rank = _first_seen_rank(affinity), _first_seen_rank(queries)
    order = np.lexsort((query_rank, key_rank))
    batches = []
    for packed in _pack(_runs(order, key_rank), batch_size):
        if len(packed) <= batch_size:
            batches.append(packed)
            continue
        for part in _pack(_runs(packed, query_rank), batch_size):
            pieces = -(-len(part) // batch_size)
            batches.extend(np.array_split(part, pieces))
    return [Batch(rows, int(affinity[rows[0]])) for rows in batches]


def home_worker(key: int, workers: int) -> int:
    """The worker that prompts of this key prefer: the same one in every call.

    When a worker joins, one key in `workers` moves, to the new one, and the others find their
    prefixes where they were. Source: Lamping & Veach, A fast, minimal memory, consistent hash
    algorithm, 2014.
    """
    state, home, next_home = key & _MASK, 0, 0
    while next_home < workers:
        home = next_home
        state = state * 2862933555777941757 + 1 & _MASK
        next_home = int((home + 1) * (2**31 / ((state >> 33) + 1)))
    return home


def assemble_embed(
    rows: int, dim: int, pieces: Sequence[tuple[np.ndarray, EmbedBatch]]
) -> EmbedBatch:
    """One `EmbedBatch` of [rows, dim] in the caller's order."""
    whole = EmbedBatch(np.full((rows, dim), np.nan, np.float32))
    for where, batch in pieces:
        whole.embeddings[where] = batch.embeddings
        _put_reasons(whole, where, batch)
    return whole


def assemble_score(rows: int, pieces: Sequence[tuple[np.ndarray, ScoreBatch]]) -> ScoreBatch:
    """One `ScoreBatch` in the caller's order; `answer_log_probs` is as wide as the widest."""
    columns = max((batch.answer_log_probs.shape[1] for _, batch in pieces), default=0)
    whole = empty_score(rows, columns, {})
    for where, batch in pieces:
        whole.answer_log_probs[where, : batch.answer_log_probs.shape[1]] = batch.answer_log_probs
        for name in ("gt_prob", "certified", "margin", *JUDGED):
            getattr(whole, name)[where] = getattr(batch, name)
        _put_words(whole, where, batch)
    return whole


def assemble_answer(rows: int, pieces: Sequence[tuple[np.ndarray, AnswerBatch]]) -> AnswerBatch:
    """One `AnswerBatch` in the caller's order."""
    whole = empty_answer(rows, {})
    for where, batch in pieces:
        for name in JUDGED:
            getattr(whole, name)[where] = getattr(batch, name)
        _put_words(whole, where, batch)
    return whole


def _put_words(whole, where: np.ndarray, batch) -> None:
    for row, text in zip(where.tolist(), batch.texts):
        whole.texts[row] = text
    _put_reasons(whole, where, batch)


def _put_reasons(whole, where: np.ndarray, batch) -> None:
    for position, why in batch.reasons.items():
        whole.reasons[int(where[position])] = why


def _first_seen_rank(values: np.ndarray) -> np.ndarray:
    """[n] rank of each value by where it first appears."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _runs(rows: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """`rows` cut where their label changes."""
    return np.split(rows, np.flatnonzero(np.diff(label[rows])) + 1)


def _pack(runs: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """Neighbouring runs joined up to `limit` rows; a longer run stays alone."""
    packed, open_runs, size = [], [], 0
    for run in runs:
        if open_runs and size + len(run) > limit:
            packed.append(np.concatenate(open_runs))
            open_runs, size = [], 0
        open_runs.append(run)
        size += len(run)
    if open_runs:
        packed.append(np.concatenate(open_runs))
    return packed
