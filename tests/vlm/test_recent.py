"""A dictionary under a byte budget, against a list that is searched."""

import numpy as np

from qwen_bridge.recent import RecentlyUsed


def test_it_forgets_what_was_used_longest_ago():
    cache = RecentlyUsed(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    assert (cache.bytes, cache.evictions, len(cache)) == (8, 1, 2)


def test_what_is_larger_than_the_budget_is_not_kept_and_costs_nobody_else():
    cache = RecentlyUsed(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 11)
    assert ("a" in cache, "b" in cache) == (True, False)
    cache.put("a", 3, 11)
    assert (cache.get("a"), cache.bytes) == (None, 0)


def test_random_use_against_a_list():
    rng = np.random.default_rng(0)
    cache, budget = RecentlyUsed(30), 30
    model = []  # (key, value, size), least recently used first
    for step in range(3000):
        key = int(rng.integers(12))
        if rng.random() < 0.5:
            size = int(rng.integers(0, 14))
            cache.put(key, step, size)
            model = [entry for entry in model if entry[0] != key] + [(key, step, size)]
            while sum(entry[2] for entry in model) > budget:
                model.pop(0)
        else:
            hit = [entry for entry in model if entry[0] == key]
            assert cache.get(key) == (hit[0][1] if hit else None)
            model = [entry for entry in model if entry[0] != key] + hit
        assert cache.bytes == sum(entry[2] for entry in model) <= budget
        assert len(cache) == len(model)
