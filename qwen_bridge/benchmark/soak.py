"""Whether memory stays flat: many candidates in a row, every query with a pool of its own."""

from collections.abc import Callable

import numpy as np

from qwen_bridge.benchmark import clock
from qwen_bridge.benchmark.workload import Workload
from qwen_bridge.trie_scorer import TrieScorer

WARM_UP = 0.25  # share of the candidates after which memory should not grow any more
GROWTH = 0.05  # share of memory that fragmentation may add after that


def soak(
    workload: Workload,
    *,
    batch_tokens: int | None,
    cache_bytes: int,
    advance: Callable[[int], None],
) -> dict:
    """Scores every query's candidates in turn, and notes the memory after each.

    Args:
      workload: with a pool per query.
      batch_tokens: tokens of a forward pass; None by device.
      cache_bytes: budget of cached prefixes, and of pictures' features.
      advance: called with the number of candidates done.

    Returns:
      `candidates`, `memory_bytes` (pairs of candidates done and bytes held), `growth` of the
      largest memory after the warm-up over the largest before, `flat`, and `evictions`.
    """
    # Both caches are full early, so that what grows later is a leak.
    parts = workload.parts_of(workload.loaded, vision_bytes=cache_bytes)
    scorer = TrieScorer(*parts, batch_tokens=batch_tokens, cache_bytes=cache_bytes)
    device = workload.loaded.model.device
    every = workload.prompts()
    held, done = [], 0
    for query in range(workload.config.queries):
        rows = np.flatnonzero(every.queries == query)
        batch = scorer.score(every.queries[rows], every.pointers[rows])
        assert not batch.reasons, batch.reasons
        done += len(rows)
        held.append((done, clock.memory(device)))
        advance(len(rows))
    warm = [bytes for count, bytes in held if count <= WARM_UP * done]
    later = [bytes for count, bytes in held if count > WARM_UP * done]
    growth = max(later) / max(warm, default=held[0][1]) - 1
    return {
        "candidates": done,
        "memory_bytes": [list(pair) for pair in held],
        "growth": growth,
        "flat": growth <= GROWTH,
        "evictions": scorer.cache.evictions,
    }
