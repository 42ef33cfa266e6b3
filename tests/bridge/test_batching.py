"""Every row travels once, what belongs together stays together, results find their way back."""

import numpy as np
import pytest

from qwen_bridge.batching import (
    assemble_answer,
    assemble_embed,
    assemble_score,
    home_worker,
    plan_batches,
)
from qwen_bridge.protocol import EmbedBatch, failed_answer, failed_score


def plan(queries, affinity, size):
    batches = plan_batches(np.array(queries), np.array(affinity), size)
    return [(batch.rows.tolist(), batch.key) for batch in batches]


def test_by_hand():
    # Query 8 appears first and does not fit beside query 5; 5 and 6 fit together.
    assert plan([8, 5, 8, 6, 5], [8, 5, 8, 6, 5], 3) == [([0, 2], 8), ([1, 4, 3], 5)]
    # One key of four rows in batches of three: its queries stay whole.
    assert plan([1, 2, 1, 2, 3], [7, 7, 7, 7, 9], 3) == [([0, 2], 7), ([1, 3], 7), ([4], 9)]
    # A query larger than a batch is cut evenly.
    assert plan([1] * 5, [1] * 5, 4) == [([0, 1, 2], 1), ([3, 4], 1)]
    assert plan([4], [-3], 1) == [([0], -3)]


@pytest.mark.parametrize("seed", range(20))
def test_any_plan(seed):
    rng = np.random.default_rng(seed)
    n, size = int(rng.integers(1, 200)), int(rng.integers(1, 20))
    queries = rng.integers(0, 30, n)
    affinity = queries % 7
    batches = plan_batches(queries, affinity, size)
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == list(range(n))
    for batch in batches:
        assert 1 <= len(batch.rows) <= size
        assert batch.key == affinity[batch.rows[0]]
    for labels in (affinity, queries):
        in_order = labels[rows]
        changes = int((np.diff(in_order) != 0).sum())
        assert changes == len(np.unique(labels)) - 1  # each label is one run
        for label in np.unique(labels):
            holding = [b for b in batches if (labels[b.rows] == label).any()]
            if (labels == label).sum() <= size:
                assert len(holding) == 1


def test_home_is_stable_and_spread():
    homes = np.array([home_worker(key, 4) for key in range(1000)])
    assert (np.bincount(homes, minlength=4) > 200).all()
    for workers in range(1, 30):  # A worker that joins takes its share, and nothing else moves.
        before = np.array([home_worker(key, workers) for key in range(300)])
        after = np.array([home_worker(key, workers + 1) for key in range(300)])
        moved = before != after
        assert (after[moved] == workers).all()
        assert 0 < moved.mean() < 2.0 / (workers + 1)
    assert [home_worker(key, 1) for key in (-5, 0, 2**63 - 1)] == [0, 0, 0]


def test_embeddings_are_put_together_with_their_reasons():
    pieces = [
        (np.array([2, 0]), EmbedBatch(np.array([[1, 2], [0, 4]], np.float32), {1: "gone"})),
        (np.array([1]), EmbedBatch(np.array([[5, 6]], np.float32))),
    ]
    whole = assemble_embed(3, 2, pieces)
    assert whole.embeddings.tolist() == [[0, 4], [5, 6], [1, 2]]
    assert whole.reasons == {0: "gone"}


def test_assembly_takes_the_widest_and_keeps_reasons():
    narrow = failed_score(1, "why")
    wide = failed_score(2, "x")
    wide.reasons.clear()
    wide.gt_prob[:] = 0.25, 0.75
    object.__setattr__(wide, "answer_log_probs", np.array([[-1, -2], [-3, -4]], np.float32))
    wide.texts[:] = "a", "b"
    whole = assemble_score(3, [(np.array([2, 0]), wide), (np.array([1]), narrow)])
    assert whole.gt_prob[[0, 2]].tolist() == [0.75, 0.25]
    assert whole.answer_log_probs.tolist() == [[-3, -4], [-np.inf] * 2, [-1, -2]]
    assert whole.texts == ["b", "", "a"]
    assert whole.reasons == {1: "why"}
    assert assemble_answer(2, [(np.array([1, 0]), failed_answer(2, "y"))]).reasons == {
        0: "y",
        1: "y",
    }
    assert len(assemble_score(0, [])) == len(assemble_answer(0, [])) == 0
