"""The pool search against exhaustive scoring, and stopped in the middle."""

import contextlib
import itertools

import numpy as np
import pytest
from fake import FakeEnvironment, worth

from lever_jax.errors import InputError
from lever_jax.search import CONSTRUCTIONS, SCORES, extend, search_pools, search_targets


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
    for options in ({}, {"score": "gain"}):
        world = make_world(environment=FakeEnvironment(failing={1001}), name=str(options))
        found = search_pools(
            world.queries, np.arange(3), world.service, shots=2, beam=4, label="x", **options
        )
        assert [len(pointers) > 0 for pointers, _ in found] == [True, False, True]


def test_left_and_right_construction_by_hand():
    pointers, additions = np.array([[4, 1], [1, 4]], np.int32), np.array([4, 7])
    assert extend(pointers, additions, "left").tolist() == [[7, 4, 1], [7, 1, 4]]
    assert extend(pointers, additions, "right").tolist() == [[4, 1, 7], [1, 4, 7]]
    both = [[4, 1, 7], [7, 4, 1], [1, 4, 7], [7, 1, 4]]
    assert extend(pointers, additions, "both").tolist() == both
    shared = extend(np.array([[1, 2], [2, 3]], np.int32), np.array([1, 3]), "both")
    assert shared.tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]  # 123 is both 12+3 and 1+23.
    assert extend(pointers[:0], additions, "both").shape == (0, 3)


@pytest.mark.parametrize("construction", ["left", "right", "both"])
def test_a_search_is_the_plain_beam_search_of_its_definition(make_world, construction):
    world = make_world()
    shots, beam = 3, 3
    options = {"shots": shots, "beam": beam, "label": "x", "construction": construction}
    found = search_pools(world.queries, np.arange(12), world.service, **options)
    for row, (pointers, values) in enumerate(found):
        query, pool = int(world.queries.query_ids[row]), world.queries.pool_ids[row]

        def value(pointer, query=query, pool=pool):
            return worth(query, pool[list(pointer)])

        singles = sorted(range(8), key=lambda a: -value((a,)))[:beam]
        kept = [(a,) for a in singles]
        for _ in range(2, shots + 1):
            left = [(a, *p) for p in kept for a in singles if a not in p]
            right = [(*p, a) for p in kept for a in singles if a not in p]
            grown = {"left": left, "right": right, "both": left + right}[construction]
            # As here, the order among equals is that of first appearance.
            first = extend(np.array(kept, np.int32), np.array(singles), construction).tolist()
            assert sorted(map(list, set(grown))) == sorted(first)
            ranked = sorted(map(tuple, first), key=lambda p: -value(p))
            kept = ranked[:beam]
        assert [tuple(p) for p in pointers.tolist()] == ranked
        np.testing.assert_array_equal(values, np.float32([value(p) for p in ranked]))


def test_a_gain_is_what_the_demonstrations_add(make_world):
    world = make_world()
    rows = np.arange(12)
    plain = search_pools(world.queries, rows, world.service, shots=2, beam=8, label="x")
    gains = search_pools(
        world.queries, rows, world.service, shots=2, beam=8, label="x", score="gain"
    )
    for (pointers, values), (same, gain) in zip(plain, gains):
        np.testing.assert_array_equal(pointers, same)
        np.testing.assert_allclose(gain, values - 0.05, atol=1e-6)  # worth(query, ()) is 0.05.
    assert min(gain.min() for _, gain in gains) < 0  # Two demonstrations worth 0.
    assert world.service.counts.scored == len(set(world.environment.scored))


def test_only_pointers_that_help_are_imitated():
    def some(*values):
        pointers = np.array([[i, i + 1] for i in range(len(values))], np.int32).reshape(-1, 2)
        return pointers, np.array(values, np.float32)

    found = [some(0.5, 0.25, 0.1), some(0.2, 0.0, -0.3), some(-0.1, -0.2), some()]
    groups = search_targets(np.array([4, 7, 8, 9]), found, 2, shots=2)
    assert groups.query_rows.tolist() == [4, 7]
    assert groups.mask.tolist() == [[True, True], [True, False]]
    assert groups.pointers.tolist() == [[[0, 1], [1, 2]], [[0, 1], [0, 0]]]
    assert groups.rewards.tolist() == [[0.5, 0.25], [np.float32(0.2), 0.0]]
    nothing = search_targets(np.array([8]), found[2:3], 2, shots=3)
    assert (nothing.query_rows.shape, nothing.pointers.shape) == ((0,), (0, 2, 3))


def test_unknown_choices_are_refused(make_world):
    world = make_world()
    for name in ("score", "construction"):
        with pytest.raises(InputError, match=f"--search_{name}=up is not one of"):
            search_pools(
                world.queries, [0], world.service, shots=1, beam=1, label="x", **{name: "up"}
            )


@pytest.mark.parametrize("stop_after", [0, 9, 20])
def test_a_stopped_search_goes_on_and_scores_nothing_twice(make_world, stop_after):
    options = {"shots": 3, "beam": 3, "label": "x", "score": "gain", "chunk": 4}
    whole = make_world(name="whole")
    expected = search_pools(whole.queries, np.arange(12), whole.service, **options)

    world = make_world(environment=FakeEnvironment(stop_after=stop_after, stop_in_all=True))
    with pytest.raises(KeyboardInterrupt):
        search_pools(world.queries, np.arange(12), world.service, **options)
    before = list(world.environment.scored)
    assert len(before) > 0 or stop_after == 0

    # A new process: another service and another VLM over the file that was left.
    world.store.close()
    again = make_world()
    assert again.store.counts()["scores"] == len(before)
    found = search_pools(again.queries, np.arange(12), again.service, **options)
    assert not set(before) & set(again.environment.scored)
    assert sorted(before + again.environment.scored) == sorted(whole.environment.scored)
    assert again.store.counts()["duplicate_scores"] == 0
    for (pointers, values), (p, v) in zip(found, expected):
        np.testing.assert_array_equal(pointers, p)
        np.testing.assert_array_equal(values, v)


@pytest.mark.parametrize("chunk", [5, 100])
def test_chunks_change_nothing_but_what_is_in_memory(make_world, chunk, monkeypatch):
    whole, parts = make_world(name="whole"), make_world(name="parts")
    options = {"shots": 2, "beam": 4, "label": "x"}
    expected = search_pools(whole.queries, np.arange(12), whole.service, **options)
    longest = []
    score = parts.service.score

    def watched(query_ids, pointers, **more):
        longest.append(len(query_ids))
        return score(query_ids, pointers, **more)

    monkeypatch.setattr(parts.service, "score", watched)
    found = search_pools(parts.queries, np.arange(12), parts.service, chunk=chunk, **options)
    assert max(longest) == min(chunk, 12) * 12  # 8 singles, then 4 x 3 pairs.
    for (pointers, values), (p, v) in zip(found, expected):
        np.testing.assert_array_equal(pointers, p)
        np.testing.assert_array_equal(values, v)


@pytest.mark.parametrize("failing", [frozenset(), frozenset({1001, 1004})])
def test_one_bar_over_the_whole_search_ends_full(make_world, failing):
    world = make_world(environment=FakeEnvironment(failing=failing))
    bars = []

    @contextlib.contextmanager
    def bar(label, total):
        steps = []
        bars.append((label, total, steps))
        yield steps.append

    world.service.progress = bar
    for shots, score, construction in itertools.product((1, 2, 3, 4), SCORES, CONSTRUCTIONS):
        options = {"shots": shots, "beam": 3, "score": score, "construction": construction}
        before = world.service.counts.asked
        search_pools(
            world.queries, np.arange(12), world.service, label="search", chunk=5, **options
        )
        ((label, total, steps),) = bars
        assert label == "search"
        assert sum(steps) == total
        assert min(steps) >= 0
        if not failing and (shots < 3 or construction != "both"):
            assert total == world.service.counts.asked - before
        bars.clear()
