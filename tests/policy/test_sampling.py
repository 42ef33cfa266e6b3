import itertools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import counts, fits, nucleus_by_hand, rows_of
from scipy import stats

from lever_jax import sampling
from lever_jax.errors import InputError
from lever_jax.masking import MASKED
from lever_jax.parallel import over_queries
from lever_jax.policy import Policy, pointer_log_probs
from lever_jax.types import SOURCES

DRAWS = 50_000
MASKS = ["111111", "011011", "000110"]


def as_masks(*rows):
    return jnp.array([[bit == "1" for bit in row] for row in rows])


def draw(sampler, table, params, mask, key=None, **options):
    """One query's draw from the table policy, compiled as users would."""
    keys = {} if key is None else {"key": key}
    run = lambda params, mask, keys: sampler(  # noqa: E731
        table.policy, None, encoding=params, mask=mask, **keys, **options
    )
    return jax.jit(run)(jnp.asarray(params), mask, keys)


SEQUENTIAL = {
    "temperature 1": (sampling.sample_temperature, {}, lambda logits: logits),
    "temperature 0.5": (sampling.sample_temperature, {"temperature": 0.5}, lambda x: x / 0.5),
    "temperature 3": (sampling.sample_temperature, {"temperature": 3.0}, lambda x: x / 3.0),
    "top_p": (sampling.sample_top_p, {}, nucleus_by_hand(0.9)),
    "top_p 0.5": (sampling.sample_top_p, {"p": 0.5}, nucleus_by_hand(0.5)),
    "top_p 1": (sampling.sample_top_p, {"p": 1.0}, lambda logits: logits),
}


def check_sequential(table, name, draws):
    sampler, options, adjust = SEQUENTIAL[name]
    params, masks = table.params(seed=4), as_masks(*MASKS)
    run = jax.vmap(
        lambda key, mask: sampler(
            table.policy, None, key, jnp.asarray(params), mask, num=draws, shots=2, **options
        )
    )
    rollouts = jax.jit(run)(jax.random.split(jax.random.key(0), len(MASKS)), masks)
    assert rollouts.mask.all()
    for mask, pointers, log_probs in zip(masks, rollouts.pointers, rollouts.log_probs):
        expected = table.enumerate(params, np.asarray(mask), adjust=adjust)
        assert fits(counts(pointers), expected) > 0.001
        for pointer, log_prob in zip(pointers[:200].tolist(), log_probs[:200].tolist()):
            np.testing.assert_allclose(log_prob, np.log(expected[tuple(pointer)]), atol=1e-5)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sequential_samplers_against_enumeration(table, name):
    check_sequential(table, name, DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sequential_samplers_against_enumeration_with_many_draws(table, name):
    check_sequential(table, name, 200_000)


def check_uniform(table, sampler, draws, num):
    masks = as_masks(*MASKS)
    run = lambda key, mask: sampler(key, mask, num=num, shots=2)  # noqa: E731
    run = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(0, 0)))
    keys = jax.random.split(jax.random.key(1), (len(MASKS), draws // num))
    for mask, rollouts in zip(masks, rows_of(run(keys, masks))):
        expected = table.enumerate(np.zeros((2, 7, 6)), np.asarray(mask))
        found = rollouts.mask
        assert fits(counts(rollouts.pointers[found]), expected) > 0.001
        last = rollouts.pointers[:, -1][found[:, -1]]  # each row on its own, too
        assert fits(counts(last), expected) > 0.001
        np.testing.assert_allclose(rollouts.log_probs[found], -math.log(len(expected)), rtol=1e-6)


UNIFORM = ["sample_uniform", "sample_uniform_distinct"]


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_against_enumeration(table, name):
    check_uniform(table, getattr(sampling, name), DRAWS, num=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_against_enumeration_with_many_draws(table, name):
    check_uniform(table, getattr(sampling, name), 200_000, num=1)


@pytest.mark.parametrize(("candidates", "shots", "num"), [(6, 2, 30), (6, 2, 45), (4, 4, 24)])
def test_uniform_distinct_enumerates_a_small_pool(candidates, shots, num):
    mask = jnp.arange(9) < candidates
    rollouts = sampling.sample_uniform_distinct(jax.random.key(0), mask, num=num, shots=shots)
    total = math.perm(candidates, shots)
    np.testing.assert_array_equal(rollouts.mask, np.arange(num) < total)
    assert set(counts(rollouts.pointers[:total])) == set(
        itertools.permutations(range(candidates), shots)
    )


def check_stochastic_beam(table, draws):
    """The first two rows are two draws without replacement, in order."""
    params, masks = table.params(seed=5), as_masks(*MASKS)
    run = lambda key, mask: sampling.stochastic_beam_search(  # noqa: E731
        table.policy, None, key, jnp.asarray(params), mask, num=2, shots=2
    )
    run = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(0, 0)))
    keys = jax.random.split(jax.random.key(2), (len(MASKS), draws))
    for mask, drawn in zip(masks, rows_of(run(keys, masks))):
        p = table.enumerate(params, np.asarray(mask))
        rollouts = drawn.rollouts
        # Where there are but two pointers, the second is what the first leaves.
        pairs = {a + b: p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(p, 2)}
        assert rollouts.mask.all()
        assert fits(counts(rollouts.pointers[:, 0]), p) > 0.001
        assert fits(counts(rollouts.pointers.reshape(draws, 4)), pairs) > 0.001
        for pointer, log_prob in zip(rollouts.pointers[:100, 1].tolist(), rollouts.log_probs[:, 1]):
            np.testing.assert_allclose(log_prob, np.log(p[tuple(pointer)]), atol=1e-5)
        # Perturbed log-probabilities are Gumbels around the pointers' own: the largest of all is a
        # standard Gumbel, whatever the policy.
        assert stats.kstest(drawn.perturbed[:, 0], stats.gumbel_r.cdf).pvalue > 0.001


def test_stochastic_beam_against_enumeration(table):
    check_stochastic_beam(table, DRAWS)


@pytest.mark.slow
def test_stochastic_beam_against_enumeration_with_many_draws(table):
    check_stochastic_beam(table, 200_000)


def test_inclusion_weights_estimate_without_bias(table):
    params, mask = table.params(seed=6, scale=2.0), jnp.ones(6, bool)
    p = table.enumerate(params, np.asarray(mask))
    worth = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def estimate(key):
        beam = sampling.stochastic_beam_search(
            table.policy, params, key, jnp.asarray(params), mask, num=4, shots=2
        )
        log_probs = beam.rollouts.log_probs
        weights = jnp.exp(log_probs - sampling.inclusion_log_probs(log_probs, beam.threshold))
        pointers = beam.rollouts.pointers
        return jnp.sum(weights * jnp.asarray(worth)[pointers[:, 0], pointers[:, 1]])

    estimates = np.asarray(estimate(jax.random.split(jax.random.key(3), 20_000)), np.float64)
    exact = sum(worth[pointer] * probability for pointer, probability in p.items())
    error = estimates.std(ddof=1) / math.sqrt(len(estimates))
    assert abs(estimates.mean() - exact) < 4 * error


def test_inclusion_probability_is_certain_where_everything_was_drawn(table):
    params, mask = table.params(seed=6, candidates=3), jnp.ones(3, bool)
    beam = draw(
        sampling.stochastic_beam_search, table, params, mask, jax.random.key(0), num=8, shots=2
    )
    np.testing.assert_array_equal(beam.rollouts.mask, np.arange(8) < 6)
    assert len(counts(beam.rollouts.pointers[:6])) == 6
    assert beam.threshold == MASKED
    log_probs = beam.rollouts.log_probs[:6]
    np.testing.assert_allclose(sampling.inclusion_log_probs(log_probs, beam.threshold), 0.0)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(), 1.0, rtol=1e-5)


def test_inclusion_probability_far_from_the_threshold():
    gaps = jnp.array([-40.0, -15.0, -1.0, 0.0, 5.0, 80.0])
    expected = np.log(-np.expm1(-np.exp(np.asarray(gaps, np.float64)[:5])))
    inclusion = sampling.inclusion_log_probs(gaps, jnp.zeros(()))
    np.testing.assert_allclose(inclusion[:5], expected, atol=1e-6, rtol=1e-5)
    assert inclusion[5] == 0.0


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_beams_for_every_prefix_are_exact(table, shots):
    """Then beam search is the list of all pointers, in order."""
    params, masks = table.params(seed=7, shots=shots), as_masks(*MASKS)
    run = lambda mask: sampling.beam_search(  # noqa: E731
        table.policy, None, jnp.asarray(params), mask, num=130, shots=shots
    )
    for mask, rollouts in zip(masks, rows_of(jax.jit(jax.vmap(run))(masks))):
        expected = table.enumerate(params, np.asarray(mask))
        ordered = sorted(expected, key=expected.get, reverse=True)
        np.testing.assert_array_equal(rollouts.mask, np.arange(130) < len(expected))
        found = len(expected)
        assert list(map(tuple, rollouts.pointers[:found].tolist())) == ordered
        log_probs = np.log([expected[pointer] for pointer in ordered])
        np.testing.assert_allclose(rollouts.log_probs[:found], log_probs, atol=1e-5)


@pytest.mark.parametrize("width", [6, 10])
def test_beams_as_many_as_candidates_are_exact_for_two_shots(table, width):
    params, mask = table.params(seed=8), jnp.ones(6, bool)
    expected = table.enumerate(params, np.asarray(mask))
    ordered = sorted(expected, key=expected.get, reverse=True)[:width]
    rollouts = draw(sampling.beam_search, table, params, mask, num=width, shots=2)
    assert list(map(tuple, rollouts.pointers.tolist())) == ordered


def test_greedy_takes_the_best_pick_each_time(table):
    params = table.params(seed=9, shots=4)
    mask = as_masks("110111")[0]
    left, previous, expected = {0, 1, 3, 4, 5}, 6, []
    for step in range(4):
        row = params[step, previous]
        previous = max(left, key=row.__getitem__)
        left.remove(previous)
        expected.append(previous)
    rollouts = draw(sampling.beam_search, table, params, mask, num=1, shots=4)
    assert rollouts.pointers.tolist() == [expected]


def test_ties_go_to_the_candidate_that_stands_first(table):
    params, mask = np.zeros((2, 7, 6), np.float32), as_masks("011011")[0]
    rollouts = draw(sampling.beam_search, table, params, mask, num=4, shots=2)
    np.testing.assert_array_equal(rollouts.pointers, [[1, 2], [1, 4], [1, 5], [2, 1]])


@pytest.mark.parametrize("size", [1, 5, 64, 500])
def test_nucleus_is_that_of_a_sorted_list(size):
    rng = np.random.default_rng(size)
    for p in (0.1, 0.5, 0.9, 0.999, 1.0):
        probs = rng.dirichlet(np.full(size, 0.3)).astype(np.float32)
        log_probs = np.log(np.maximum(probs, 1e-30))
        probs = np.exp(log_probs).astype(np.float64)
        reached = np.array([probs[probs > own].sum() for own in probs])
        clear = np.abs(reached - p) > 1e-5  # Else rounding decides.
        inside = np.asarray(sampling.nucleus(log_probs, p))
        np.testing.assert_array_equal(inside[clear], (reached < p)[clear])


def test_nucleus_keeps_equals_together():
    log_probs = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2]))
    np.testing.assert_array_equal(sampling.nucleus(log_probs, 0.3), [True, False, False, False])
    np.testing.assert_array_equal(sampling.nucleus(log_probs, 0.5), [True] * 4)
    np.testing.assert_array_equal(sampling.nucleus(log_probs, 0.0), [True, False, False, False])


def test_similarity_order_puts_the_most_similar_last():
    rollouts = sampling.similarity_order(as_masks("110111")[0], num=5, shots=2)
    np.testing.assert_array_equal(rollouts.pointers, [[1, 0], [3, 1], [4, 3], [5, 4], [-1, -1]])
    np.testing.assert_array_equal(rollouts.mask, [True] * 4 + [False])
    np.testing.assert_array_equal(rollouts.log_probs[:4], 0.0)


def everything(policy, params, key, encoding, mask, *, num, shots):
    """A mixture of all sources."""
    quotas = dict.fromkeys(sampling.MIXABLE, num // len(sampling.MIXABLE))
    return sampling.sample_mixture(
        policy, params, key, encoding, mask, num=num, shots=shots, quotas=quotas
    )


def samplers(policy, params, key, encoding, mask, *, num, shots):
    """The rollouts of every sampler, by name."""
    rows = {"num": num, "shots": shots}
    reads = {"encoding": encoding, "mask": mask, **rows}
    sbs = sampling.stochastic_beam_search(policy, params, key, **reads)
    return {
        "beam": sampling.beam_search(policy, params, **reads),
        "sample": sampling.sample_temperature(policy, params, key, **reads),
        "top_p": sampling.sample_top_p(policy, params, key, **reads),
        "random": sampling.sample_uniform(key, mask, **rows),
        "distinct": sampling.sample_uniform_distinct(key, mask, **rows),
        "retrieval": sampling.similarity_order(mask, **rows),
        "sbs": sbs.rollouts,
    }


def check_rollouts(rollouts, mask, shots):
    """Invariants of every sampler, for a batch [B, G] of rollouts."""
    assert rollouts.pointers.dtype == rollouts.sources.dtype == jnp.int32
    pointers, found, mask = (np.asarray(x) for x in (rollouts.pointers, rollouts.mask, mask))
    for row in range(len(mask)):
        assert found[row].any() == (mask[row].sum() >= shots)
        np.testing.assert_array_equal(pointers[row][~found[row]], -1)
        np.testing.assert_array_equal(rollouts.log_probs[row][~found[row]], MASKED)
        for pointer in pointers[row][found[row]]:
            assert len(set(pointer.tolist())) == shots
            assert mask[row][pointer].all()
    assert jnp.all(jnp.isfinite(rollouts.log_probs))


# A policy whose logits depend on the last pick: row a of a table [K, K] after action a.
LAST_PICK = Policy(
    encode=lambda params, query, pool: params,
    start=lambda params, encoding: encoding[0],
    logits=lambda params, encoding, state: state,
    update=lambda params, encoding, state, action: encoding[action],
)
SLOW_SHAPES = [pytest.param(*shape, marks=pytest.mark.slow) for shape in [(200, 3), (1024, 8)]]


def different_masks(candidates, shots):
    """Masks [5, K] of pools of all sizes; the last two have too few candidates, and none."""
    sizes = [candidates, candidates - 1, min(shots, candidates), min(shots - 1, candidates), 0]
    return sizes, (jnp.arange(candidates) < jnp.array(sizes)[:, None])[:, ::-1]


def check_all_different(rollouts, sizes, shots):
    for size, pointers, found in zip(sizes, rollouts.pointers, rollouts.mask):
        assert found.sum() == min(math.perm(size, shots), pointers.shape[0])
        assert len(counts(pointers[found])) == found.sum()


@pytest.mark.parametrize(
    ("candidates", "shots"), [(9, 8), pytest.param(3, 5, marks=pytest.mark.slow), *SLOW_SHAPES]
)
def test_every_sampler_for_any_shots_and_pool(candidates, shots):
    sizes, mask = different_masks(candidates, shots)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(candidates, candidates)), jnp.float32)

    @jax.jit
    @jax.vmap
    def draw_all(key, mask):
        return samplers(LAST_PICK, None, key, table, mask, num=16, shots=shots)

    @jax.jit
    @jax.vmap
    def recompute(mask, pointers):
        return pointer_log_probs(LAST_PICK, None, table, mask, pointers)[0]

    for name, rollouts in draw_all(jax.random.split(jax.random.key(0), 5), mask).items():
        check_rollouts(rollouts, mask, shots)
        if name in ("beam", "distinct", "sbs"):
            check_all_different(rollouts, sizes, shots)
        if name in ("beam", "sample", "sbs"):
            again = recompute(mask, rollouts.pointers)
            np.testing.assert_allclose(rollouts.log_probs, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("candidates", "shots"), [(6, 1), *SLOW_SHAPES])
def test_mixture_is_full_and_different_for_any_shots_and_pool(candidates, shots):
    sizes, mask = different_masks(candidates, shots)
    # So peaked that the policy draws the same pointer again and again.
    table = 30.0 * jnp.eye(candidates, k=1)

    @jax.jit
    @jax.vmap
    def mix(key, mask):
        return everything(LAST_PICK, None, key, table, mask, num=16, shots=shots)

    rollouts = mix(jax.random.split(jax.random.key(0), 5), mask)
    check_rollouts(rollouts, mask, shots)
    check_all_different(rollouts, sizes, shots)


@pytest.mark.parametrize("over", [jax.vmap, over_queries])
def test_results_do_not_depend_on_the_batch(selector, batch, over):
    """Bit by bit: with other neighbours, in another place, and whatever the padding of others.

    By `over_queries`, which splits batches, the size of the batch does not matter either.
    """
    policy, params = selector
    ids = jnp.array([11, 7, 3, 400])

    def one(query_id, query, pool):
        key = jax.random.fold_in(jax.random.key(9), query_id)
        encoding = policy.encode(params, query, pool)
        return everything(policy, params, key, encoding, pool.mask, num=16, shots=2)

    draw_all, (queries, pools) = jax.jit(over(one)), batch
    before = draw_all(ids, queries, pools)
    order = jnp.array([2, 2, 3, 0] * (5 if over is over_queries else 1))
    after = draw_all(ids[order], *jax.tree.map(lambda x: x[order], (queries, pools)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[order], new)


def test_results_do_not_depend_on_the_batch_as_users_compile_it():
    """The tests' own flags (see conftest.py) make other programs of the same functions."""
    test = f"{__file__}::{test_results_do_not_depend_on_the_batch.__name__}[over_queries]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_padding_changes_no_draw(table):
    params, mask = table.params(seed=10), jnp.ones(6, bool)
    padded = np.full((2, 10, 9), 3.0, np.float32)
    padded[:, :6, :6], padded[:, 9, :6] = params[:, :6], params[:, 6]

    @jax.jit
    def draw_all(encoding, mask):
        quotas = {"beam": 4, "sbs": 6, "sample": 6}  # and random ones to fill up
        options = {"num": 24, "shots": 2, "quotas": quotas}
        key = jax.random.key(4)
        return sampling.sample_mixture(table.policy, None, key, encoding, mask, **options)

    before = draw_all(jnp.asarray(params), mask)
    after = draw_all(jnp.asarray(padded), jnp.pad(mask, (0, 3)))
    np.testing.assert_array_equal(before.pointers, after.pointers)
    np.testing.assert_array_equal(before.sources, after.sources)
    np.testing.assert_allclose(before.log_probs, after.log_probs, atol=1e-6)


def test_more_independent_draws_only_append(table):
    params, mask, key = table.params(seed=10), jnp.ones(6, bool), jax.random.key(4)
    few, many = (
        draw(sampling.sample_temperature, table, params, mask, key, num=num, shots=2)
        for num in (4, 9)
    )
    np.testing.assert_array_equal(few.pointers, many.pointers[:4])


def test_mixture(table):
    params, mask = table.params(seed=12, candidates=7), jnp.ones(7, bool)
    quotas = {"beam": 5, "sbs": 6, "policy": 5, "top_p": 6, "retrieval": 2, "sample": 8}
    adjusts = {  # what each source makes of the logits
        "beam": lambda logits: logits,
        "sbs": lambda logits: logits,
        "policy": lambda logits: logits,
        "top_p": nucleus_by_hand(0.95),
        "sample": lambda logits: logits / 2.0,
        "random": np.zeros_like,
    }
    options = {"num": 34, "shots": 2, "quotas": quotas, "temperature": 2.0, "top_p": 0.95}
    rollouts = draw(sampling.sample_mixture, table, params, mask, jax.random.key(1), **options)

    # Full, all different, sources in the order of their quotas, then what fills up.
    assert rollouts.mask.all()
    assert len(counts(rollouts.pointers)) == 34
    names = [SOURCES[source].partition("(")[0] for source in rollouts.sources.tolist()]
    order = [*quotas, "random"]
    assert names == sorted(names, key=order.index)
    assert set(names) == set(order)
    assert names.count("beam") == 5
    assert all(names.count(name) <= quota for name, quota in quotas.items())

    # Log-probabilities are the source's own.
    expected = {
        name: table.enumerate(params, np.asarray(mask), adjust=adjust)
        for name, adjust in adjusts.items()
    }
    for name, pointer, log_prob in zip(names, rollouts.pointers.tolist(), rollouts.log_probs):
        wanted = 0.0 if name == "retrieval" else np.log(expected[name][tuple(pointer)])
        np.testing.assert_allclose(log_prob, wanted, atol=1e-5)


@pytest.mark.slow
def test_a_source_does_not_depend_on_the_other_quotas(table):
    params, mask, key = table.params(seed=11), jnp.ones(6, bool), jax.random.key(0)
    alone, mixed = (
        draw(sampling.sample_mixture, table, params, mask, key, num=10, shots=2, quotas=quotas)
        for quotas in ({"random": 4}, {"random": 4, "beam": 4})
    )
    np.testing.assert_array_equal(alone.pointers[:4], mixed.pointers[:4])


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"beam": 20, "sample": 5}, "ask for 25 pointers, more than the 16 of a query"),
        ({"local_search": 4}, "'local_search' needs scored pointers; a mixture draws from beam"),
        ({"beem": 4}, "unknown proposal source 'beem'"),
        ({"beam": -1}, "quota -1 of proposal source 'beam'"),
        ({"sample": 1, "sample(temp=1.0)": 1}, "'sample' has two quotas"),
    ],
)
def test_quotas_that_cannot_be_met(table, quotas, message):
    params, mask, key = table.params(seed=0), jnp.ones(6, bool), jax.random.key(0)
    with pytest.raises(InputError, match=message):
        draw(sampling.sample_mixture, table, params, mask, key, num=16, shots=2, quotas=quotas)


@pytest.mark.parametrize("num", [4, 7, 16, 64, 200])
def test_scaled_quotas_keep_their_shares(num):
    quotas = {"retrieval": 4, "beam": 16, "sbs": 24, "top_p": 8, "random": 4, "local_search": 8}
    scaled = sampling.scale_quotas(quotas, num)
    assert list(scaled) == list(quotas)
    assert sum(scaled.values()) == num
    for name, count in quotas.items():
        assert abs(scaled[name] - count * num / 64) < 1
    assert sampling.scale_quotas({"beam": 1, "sbs": 1}, 3) == {"beam": 2, "sbs": 1}
