"""Policies with an end: every sampler against the enumeration of pointers of every length."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import counts, fits, nucleus_by_hand, rows_of

from lever_jax import sampling
from lever_jax.masking import MASKED
from lever_jax.policy import Policy, pointer_log_probs
from lever_jax.types import SOURCES, Rollouts, source_index

K, S = 5, 3
MASKS = np.array([[bit == "1" for bit in row] for row in ("11111", "01101", "00010", "00000")])


class StopTable:
    """Logits [S, K + 1, K + 1] by step, previous action (K: none yet) and action (K: the end)."""

    policy = Policy(
        encode=lambda params, query, pool: params,
        start=lambda params, encoding: (jnp.int32(0), jnp.int32(encoding.shape[-1] - 1)),
        logits=lambda params, encoding, state: encoding[state[0], state[1]],
        update=lambda params, encoding, state, action: (state[0] + 1, jnp.int32(action)),
        stops=True,
    )

    @staticmethod
    def params(seed, candidates=K, shots=S):
        rng = np.random.default_rng(seed)
        return rng.normal(size=(shots, candidates + 1, candidates + 1)).astype(np.float32)

    @staticmethod
    def enumerate(params, mask, adjust=lambda logits: logits):
        """Probability of every pointer, -1 after its end."""
        logits = np.asarray(params, np.float64)
        shots, _, actions = logits.shape
        end, probabilities = actions - 1, {}

        def grow(pointer, probability, left, previous):
            if len(pointer) == shots or (previous == end and pointer):
                key = tuple(action for action in pointer if action != end)
                probabilities[key + (-1,) * (shots - len(key))] = probability
                return
            allowed = left + [end] * bool(pointer)
            adjusted = adjust(logits[len(pointer), previous][allowed])
            weights = np.exp(adjusted - adjusted.max()) if allowed else []
            for action, weight in zip(allowed, weights):
                rest = [other for other in left if other != action]
                grow((*pointer, action), probability * weight / weights.sum(), rest, action)

        grow((), 1.0, [k for k in range(end) if mask[k]], end)
        count = int(np.sum(mask[:end]))
        assert len(probabilities) == sum(math.perm(count, n) for n in range(1, shots + 1))
        return probabilities


EVERY = np.array(list(StopTable.enumerate(StopTable.params(0), MASKS[0])), np.int32)


def test_enumerated_pointers_have_their_probability():
    params = StopTable.params(seed=1)
    strange = np.array([[-1, 0, 1], [0, -1, 1], [0, 0, -1], [5, 0, 1], [0, 5, -1], [-1, -1, -1]])
    pointers = np.concatenate([EVERY, strange])
    table = jnp.asarray(params)
    read = jax.jit(lambda mask: pointer_log_probs(StopTable.policy, None, table, mask, pointers))
    for mask in MASKS:
        expected = StopTable.enumerate(params, mask)
        log_probs, steps = jax.tree.map(np.asarray, read(mask))
        wanted = [expected.get(tuple(p), 0.0) for p in pointers.tolist()]
        np.testing.assert_allclose(np.exp(log_probs), wanted, atol=1e-6)
        np.testing.assert_array_equal(log_probs[np.array(wanted) == 0], MASKED)
        assert steps.shape == (len(pointers), S, K + 1)
        if mask.any():
            np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=1e-5)
            np.testing.assert_allclose(np.exp(steps).sum(-1), 1.0, rtol=1e-5)
            np.testing.assert_array_equal(steps[:, 0, K], MASKED)


SEQUENTIAL = {
    "temperature": (sampling.sample_temperature, {"temperature": 2.0}, lambda logits: logits / 2),
    "top_p": (sampling.sample_top_p, {"p": 0.7}, nucleus_by_hand(0.7)),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sequential_samplers(name):
    sampler, options, adjust = SEQUENTIAL[name]
    params, draws = jnp.asarray(StopTable.params(seed=2)), 30_000
    run = lambda key, mask: sampler(  # noqa: E731
        StopTable.policy, None, key, params, mask, num=draws, shots=S, **options
    )
    drawn = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), len(MASKS)), MASKS)
    for mask, rollouts in zip(MASKS, rows_of(drawn)):
        assert (rollouts.mask == mask.any()).all()
        if mask.any():
            expected = StopTable.enumerate(params, mask, adjust)
            assert fits(counts(rollouts.pointers), expected) > 0.001
            for pointer, log_prob in zip(rollouts.pointers[:100].tolist(), rollouts.log_probs):
                np.testing.assert_allclose(log_prob, np.log(expected[tuple(pointer)]), atol=1e-5)


def test_beams_for_every_prefix_are_exact_and_greedy_is_greedy():
    params = StopTable.params(seed=3)
    run = lambda mask, num: sampling.beam_search(  # noqa: E731
        StopTable.policy, None, jnp.asarray(params), mask, num=num, shots=S
    )
    drawn = jax.jit(jax.vmap(lambda mask: run(mask, 90)))(MASKS)
    greedy = jax.jit(jax.vmap(lambda mask: run(mask, 1)))(MASKS)
    for row, (mask, rollouts) in enumerate(zip(MASKS, rows_of(drawn))):
        expected = StopTable.enumerate(params, mask) if mask.any() else {}
        ordered = sorted(expected, key=expected.get, reverse=True)
        np.testing.assert_array_equal(rollouts.mask, np.arange(90) < len(ordered))
        assert list(map(tuple, rollouts.pointers[rollouts.mask].tolist())) == ordered
        np.testing.assert_array_equal(rollouts.pointers[~rollouts.mask], -1)
        pointer, previous = [], K
        while mask.any() and len(pointer) < S and previous != -1:
            allowed = [k for k in range(K) if mask[k] and k not in pointer] + [K] * bool(pointer)
            best = max(allowed, key=params[len(pointer), previous].__getitem__)
            previous = -1 if best == K else best
            pointer.append(previous)
        assert greedy.pointers[row, 0].tolist() == pointer + [-1] * (S - len(pointer))


def test_stochastic_beam_draws_without_replacement():
    params, draws = jnp.asarray(StopTable.params(seed=4)), 30_000
    mask = MASKS[1]
    run = lambda key: sampling.stochastic_beam_search(  # noqa: E731
        StopTable.policy, None, key, params, mask, num=2, shots=S
    )
    drawn = jax.tree.map(
        np.asarray, jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), draws))
    )
    p = StopTable.enumerate(params, mask)
    pairs = {a + b: p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(p, 2)}
    assert fits(counts(drawn.rollouts.pointers[:, 0]), p) > 0.001
    assert fits(counts(drawn.rollouts.pointers.reshape(draws, 2 * S)), pairs) > 0.001
    worth = {pointer: np.sin(3 * i) for i, pointer in enumerate(p)}
    inclusion = sampling.inclusion_log_probs(drawn.rollouts.log_probs, drawn.threshold[:, None])
    weights = np.exp(drawn.rollouts.log_probs - np.asarray(inclusion), dtype=np.float64)
    values = np.array(
        [[worth[tuple(p)] for p in group] for group in drawn.rollouts.pointers.tolist()]
    )
    estimates = (weights * values).sum(1)
    exact = sum(worth[pointer] * probability for pointer, probability in p.items())
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(draws)


def test_the_joint_of_two_shots():
    params = StopTable.params(seed=5, shots=2)
    joint = jax.jit(
        lambda mask: sampling.pair_log_probs(StopTable.policy, None, jnp.asarray(params), mask)
    )
    for mask in MASKS[:3]:
        expected, wanted = StopTable.enumerate(params, mask), np.zeros((K, K + 1))
        for (first, second), probability in expected.items():
            wanted[first, second] = probability  # -1 is the last column
        found = joint(mask)
        np.testing.assert_allclose(np.exp(found), wanted, atol=1e-6)
        beam = sampling.exact_beam(found, num=30)
        ordered = sorted(expected, key=expected.get, reverse=True)
        pointers = np.asarray(beam.pointers)[np.asarray(beam.mask)]
        assert list(map(tuple, pointers.tolist())) == ordered
        entropy = -sum(p * np.log(p) for p in expected.values())
        np.testing.assert_allclose(sampling.exact_entropy(found), entropy, atol=1e-5)


def test_random_pointers_have_all_lengths_and_are_all_of_them():
    run = jax.jit(
        jax.vmap(
            lambda mask: sampling.sample_uniform_distinct(
                jax.random.key(0), mask, num=90, shots=S, shorter=True
            )
        )
    )
    for mask, rollouts in zip(MASKS, rows_of(run(MASKS))):
        every = StopTable.enumerate(StopTable.params(0), mask) if mask.any() else {}
        assert set(counts(rollouts.pointers[rollouts.mask])) == set(every)
        assert rollouts.mask.sum() == len(every)
        lengths = min(mask.sum(), S)
        for pointer, log_prob in zip(rollouts.pointers.tolist(), rollouts.log_probs):
            size = sum(action >= 0 for action in pointer)
            wanted = -math.log(lengths * math.perm(mask.sum(), size)) if size else MASKED
            np.testing.assert_allclose(log_prob, wanted, rtol=1e-5)
    few = sampling.sample_uniform_distinct(
        jax.random.key(0), jnp.asarray(MASKS[0]), num=6, shots=S, shorter=True
    )
    assert (np.asarray(few.pointers) >= 0).sum(1).tolist() == [3, 2, 1, 3, 2, 1]


def test_a_mixture_is_full_and_different_and_padding_changes_no_draw():
    params = StopTable.params(seed=6)
    padded = np.full((S, K + 3, K + 3), 9.0, np.float32)
    padded[:, :K, :K], padded[:, :K, -1] = params[:, :K, :K], params[:, :K, K]
    padded[:, -1, :K], padded[:, -1, -1] = params[:, K, :K], params[:, K, K]
    quotas = {"beam": 6, "sbs": 8, "sample": 6, "top_p": 4, "retrieval": 2, "random": 4}

    def mix(params, mask):
        return sampling.sample_mixture(
            StopTable.policy, None, jax.random.key(3), params, mask, num=90, shots=S, quotas=quotas
        )

    for mask in MASKS:
        rollouts = jax.jit(mix)(jnp.asarray(params), mask)
        every = StopTable.enumerate(params, mask) if mask.any() else {}
        found = np.asarray(rollouts.pointers)[np.asarray(rollouts.mask)]
        assert sorted(map(tuple, found.tolist())) == sorted(every)
        again = jax.jit(mix)(jnp.asarray(padded), np.pad(mask, (0, 2)))
        np.testing.assert_array_equal(rollouts.pointers, again.pointers)
        np.testing.assert_array_equal(rollouts.sources, again.sources)


def neighbours(pointer, candidates):
    """By hand: a pick replaced, any other order, one pick more at the end, or any one less."""
    picks = [action for action in pointer if action >= 0]
    found = set(itertools.permutations(picks))
    for new in set(candidates) - set(picks):
        found |= {(*picks[:i], new, *picks[i + 1 :]) for i in range(len(picks))}
        found |= {(*picks, new)} if len(picks) < S else set()
    found |= {(*picks[:i], *picks[i + 1 :]) for i in range(len(picks))} - {()}
    return {near + (-1,) * (S - len(near)) for near in found} - {tuple(pointer)}


@pytest.mark.parametrize("parent", [(2, -1, -1), (0, 3, -1), (4, 1, 0)])
def test_local_search_finds_the_neighbours_of_every_length(parent):
    params, mask = jnp.asarray(StopTable.params(seed=7)), jnp.asarray(MASKS[0])
    scored = Rollouts(
        jnp.array([parent, (-1, -1, -1)]),
        jnp.zeros(2),
        jnp.full(2, source_index("random")),
        jnp.array([True, False]),
    )
    run = lambda key: sampling.local_search(  # noqa: E731
        StopTable.policy, None, key, params, mask, scored, jnp.zeros(2), num=6
    )
    drawn = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 60))
    near = np.asarray(drawn.sources) == SOURCES.index("local_search")
    pointers = np.asarray(drawn.pointers)
    assert near.any(1).all()
    assert np.asarray(drawn.mask).all()
    assert set(map(tuple, pointers[near].tolist())) == neighbours(parent, range(K))
    for group in pointers:
        assert len({*map(tuple, group.tolist()), parent}) == 7
    expected = StopTable.enumerate(params, MASKS[0])
    for pointer, log_prob in zip(pointers[0][near[0]].tolist(), drawn.log_probs[0][near[0]]):
        np.testing.assert_allclose(log_prob, np.log(expected[tuple(pointer)]), atol=1e-5)
