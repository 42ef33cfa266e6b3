"""Prefix levels and token batches: pure Python, against brute force."""

import numpy as np

from qwen_bridge.trie import levels, token_batches


def test_levels_by_hand():
    assert levels([(3, 5), (3, 7), (5, 3), (3, 5), ()]) == [
        [()],
        [(3,), (5,)],
        [(3, 5), (3, 7), (5, 3)],
    ]
    assert levels([(3, 5)], known={(), (3,)}) == [[], [], [(3, 5)]]
    assert levels([]) == []
    assert levels([(3,)], known={(), (3,)}) == []


def test_levels_hold_every_prefix_once():
    rng = np.random.default_rng(0)
    paths = [tuple(rng.integers(0, 4, rng.integers(0, 5)).tolist()) for _ in range(200)]
    found = [node for level in levels(paths) for node in level]
    assert len(found) == len(set(found))
    assert set(found) == {path[:d] for path in paths for d in range(len(path) + 1)}
    assert all(len(node) == d for d, level in enumerate(levels(paths)) for node in level)


def test_token_batches_hold_every_item_once_within_the_budget():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 120, 300).tolist()
    batches = token_batches(lengths, 512)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 512
    assert token_batches([900], 512) == [[0]]
    assert token_batches([], 512) == []
