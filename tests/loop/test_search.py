"""The pool search against exhaustive scoring."""

import itertools

import numpy as np
from fake import FakeEnvironment, worth

from lever_jax.search import search_pools


def test_a_wide_search_finds_the_best_pointer(make_world):
    world = make_world()
    rows = np.array([0, 3, 7])
    found = search_pools(world.queries, rows, world.service, shots=2, beam=8, label="x")
    for row, (pointers, values) in zip(rows, found):
        pool, query = world.queries.pool_ids[row], world.queries.query_ids[row]
        every = {p: worth(query, pool[list(p)]) for p in itertools.permutations(range(8), 2)}
        assert len(pointers) == len(every)
        assert values[0] == np.float32(max(every.values()))
        assert (np.diff(values) <= 0).all()
        for pointer, value in zip(pointers, values):
            assert value == np.float32(every[tuple(pointer)])


def test_a_narrow_search_spends_little_and_never_repeats_a_demonstration(make_world):
    world = make_world()
    rows = np.arange(4)
    found = search_pools(world.queries, rows, world.service, shots=3, beam=3, label="x")
    # 8 singles; then at most 3 x 3 x 2 extensions a level.
    assert world.service.counts.scored <= 4 * (8 + 18 + 18)
    for pointers, _ in found:
        assert pointers.shape[1] == 3
        assert all(len(set(p)) == 3 for p in pointers.tolist())


def test_a_query_that_cannot_be_scored_finds_nothing(make_world):
    world = make_world(environment=FakeEnvironment(failing={1001}))
    found = search_pools(world.queries, np.arange(3), world.service, shots=2, beam=4, label="x")
    assert [len(pointers) > 0 for pointers, _ in found] == [True, False, True]
