"""The options of the selector: what each computes, by plain NumPy, and what all must keep."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import checkpoint
from lever_jax.errors import InputError
from lever_jax.masking import MASKED
from lever_jax.policy import pointer_log_probs, sequence_log_probs
from lever_jax.sampling import sample_temperature
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.types import CandidatePool

SMALL = SelectorConfig(width=16, heads=2)
OPTIONS = {
    "none": {"history": "none"},
    "gate": {"history": "gate"},
    "attention": {"history": "attention"},
    "bilinear": {"pointer_score": "bilinear"},
    "additive": {"pointer_score": "additive"},
    "diversity": {"diversity": True},
    "stop": {"stop": True},
    "many": {
        "history": "attention", "pointer_score": "additive", "diversity": True, "stop": True,
        "layers": 2, "dropout": 0.3,
    },
}  # fmt: skip
# All pointers of three shots, and those that end before.
EVERY = np.array(
    [
        (*picks, *[-1] * (3 - size))
        for size in (3, 2, 1)
        for picks in itertools.permutations(range(6), size)
    ],
    np.int32,
)


def make(parts, **options):
    """A selector with these options, and parameters with strong opinions."""
    init, policy = make_selector(dataclasses.replace(SMALL, **options), parts, 12)
    params, rng = jax.jit(init)(jax.random.key(0)), np.random.default_rng(1)
    return policy, jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params
    )


@pytest.fixture(scope="module", params=OPTIONS)
def option(request, parts):
    """policy, params, and read: a gradient, and log pi [B, 156] of every pointer."""
    policy, params = make(parts, **OPTIONS[request.param])

    @jax.jit
    def read(params, queries, pools):
        def total(params):
            one = lambda query, pool: sequence_log_probs(policy, params, query, pool, EVERY)  # noqa: E731
            log_probs, steps = jax.vmap(one)(queries, pools)
            entropy = -jnp.sum(jnp.exp(steps) * steps)
            return entropy + jnp.sum(jnp.where(log_probs > MASKED / 2, log_probs, 0.0)), log_probs

        return jax.grad(total, has_aux=True)(params)

    return policy, params, read


def test_pointers_sum_to_one_and_gradients_are_finite(option, batch):
    policy, params, read = option
    queries, pools = batch
    gradient, log_probs = read(params, queries, pools)
    whole = slice(4) if policy.stops else slice(3)  # one candidate, three shots
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1)[whole], 1.0, rtol=1e-5)
    for row in range(4):
        ended = EVERY == -1
        wanted = (np.asarray(pools.mask)[row][EVERY] | ended).all(-1)
        wanted &= policy.stops | ~ended.any(-1)
        np.testing.assert_array_equal(log_probs[row] > MASKED / 2, wanted)
    equals = CandidatePool(jnp.ones((4, 6, 12)) * 7.3, pools.mask)
    for leaves in (gradient, read(params, jnp.zeros((4, 12)), equals)[0]):
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(leaves))
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient)), "unused"


def test_neither_padding_nor_neighbours_change_anything(option, batch):
    _, params, read = option
    queries, pools = batch
    before = read(params, queries, pools)[1]
    garbage = jnp.pad(pools.embeddings, ((0, 0), (0, 3), (0, 0)), constant_values=np.nan)
    padded = CandidatePool(garbage, jnp.pad(pools.mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(read(params, queries, padded)[1], before, rtol=1e-5, atol=2e-5)
    order = jnp.array([0, 3, 3, 2])
    others = jax.tree.map(lambda x: x[order], (queries, pools))
    np.testing.assert_array_equal(read(params, *others)[1][0], before[0])


def test_behaviour_log_probs_are_those_the_loss_computes(option, batch):
    policy, params, _ = option

    @jax.jit
    @jax.vmap
    def draw(key, query, pool):
        encoding = policy.encode(params, query, pool)
        drawn = sample_temperature(policy, params, key, encoding, pool.mask, num=24, shots=3)
        again = sequence_log_probs(policy, params, query, pool, drawn.pointers)[0]
        return drawn, again

    drawn, again = draw(jax.random.split(jax.random.key(5), 4), *batch)
    np.testing.assert_array_equal(drawn.mask.all(-1), [True, True, True, policy.stops])
    np.testing.assert_allclose(again, drawn.log_probs, atol=1e-5)
    ended = (np.asarray(drawn.pointers) == -1).any(-1) & np.asarray(drawn.mask)
    assert ended.any() == policy.stops


# --- what each option computes, after picks 4 and 1 -----------------------------------------------


def dense(params, name, x):
    return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name].get("bias", 0.0))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def vector_by_hand(history, params, encoding):
    start, inputs = np.asarray(encoding.start), np.asarray(encoding.inputs)
    if history == "none":
        return start
    if history == "gate":
        for pick in (4, 1):
            gate, value = inputs[pick, :16], inputs[pick, 16:]
            start = start + sigmoid(gate + dense(params, "recur", start)) * np.tanh(value)
        return start
    if history == "gru":
        for pick in (4, 1):
            own, back = np.split(inputs[pick], 3), np.split(dense(params, "recur", start), 3)
            reset, keep = sigmoid(own[0] + back[0]), sigmoid(own[1] + back[1])
            start = keep * start + (1 - keep) * np.tanh(own[2] + reset * back[2])
        return start
    found, asked = [], dense(params, "ask", start)
    for head in range(2):
        own = slice(8 * head, 8 * head + 8)
        fade = np.log1p(np.exp(params["fade"][head]))
        scores = [asked[own] @ inputs[pick, :16][own] / np.sqrt(8) for pick in (4, 1)]
        weights = softmax(np.array([scores[0] - fade, scores[1]]))  # 4 is one pick older
        found.append(weights @ inputs[[4, 1], 16:][:, own])
    return start + dense(params, "recur", np.concatenate(found))


def logits_by_hand(config, params, encoding):
    vector = vector_by_hand(config.history, params, encoding)
    keys = np.asarray(encoding.keys)
    own, direct, similarity = keys[:, :16], keys[:, 16:32], keys[:, 32:]
    point = dense(params, "point", vector)
    if config.pointer_score == "additive":
        scores = dense(params, "blend", np.tanh(own + point))[:, 0]
    else:
        scores = own @ point / 4
    scores = scores + direct @ (encoding.query * (1 + dense(params, "gate", vector))) / 4
    scores = scores + similarity @ dense(params, "weigh", vector)
    scores = np.exp(params["log_scale"]) * scores
    if config.diversity:
        rows = np.asarray(encoding.directions)
        cosine = rows @ rows[[4, 1]].T / np.linalg.norm(rows, axis=1)[:, None]
        scores = scores - np.log1p(np.exp(params["repel"])) * cosine.max(1)
    return np.append(scores, dense(params, "end", vector)) if config.stop else scores


@pytest.mark.parametrize("name", ["default", *OPTIONS])
def test_logits_by_hand(name, parts, batch):
    options = OPTIONS.get(name, {})
    policy, params = make(parts, **options)
    query, pool = jax.tree.map(lambda x: x[0], batch)

    @jax.jit
    def run():
        encoding = policy.encode(params, query, pool)
        state = policy.start(params, encoding)
        for pick in (4, 1):
            state = policy.update(params, encoding, state, jnp.int32(pick))
        pointers = jnp.array([[4, 1, 0]])
        steps = pointer_log_probs(policy, params, encoding, pool.mask, pointers)[1]
        return encoding, policy.logits(params, encoding, state), steps[0, 2]

    encoding, logits, last = run()
    config = dataclasses.replace(SMALL, **options)
    params = jax.tree.map(np.asarray, params)
    wanted = logits_by_hand(config, params, encoding)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    left = np.array([0, 2, 3, 5] + [6] * config.stop)
    np.testing.assert_allclose(np.exp(np.asarray(last)[left]), softmax(wanted[left]), atol=1e-5)


def test_bilinear_keys_are_what_the_encoder_read_and_directions_are_unit(parts, batch):
    """So the score is s . W r: no projection of the candidate beside the one matrix."""
    policy, params = make(parts, pointer_score="bilinear", diversity=True)
    assert "key" not in params
    assert set(params["point"]) == {"kernel"}
    query, pool = jax.tree.map(lambda x: x[0], batch)
    encoding = jax.jit(policy.encode)(params, query, pool)
    np.testing.assert_allclose(np.linalg.norm(encoding.directions, axis=1), 1.0, atol=1e-5)


# --- what must stay as it was ---------------------------------------------------------------------


def test_parameters_of_the_default_are_those_of_earlier_checkpoints(parts):
    init, policy = make_selector(SMALL, parts, 12)
    shapes = jax.eval_shape(init, jax.random.key(0))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    layers = {"direct_key": 16, "direct_query": 16, "gate": 16, "inputs": 48, "key": 16}
    layers |= {"point": 16, "start": 16, "weigh": 3}
    wanted = {f"{name}/kernel": (16, size) for name, size in layers.items()}
    wanted |= {f"{name}/bias": (size,) for name, size in layers.items()}
    wanted |= {"recur/kernel": (16, 48), "role": (2, 16), "log_scale": ()}
    for part in ("image", "question", "answer"):
        wanted |= {f"project_{part}/kernel": (8, 16), f"project_{part}/bias": (16,)}
    block = {"Dense_0": ((16, 32), 32), "Dense_1": ((32, 16), 16)}
    for name, (kernel, bias) in block.items():
        wanted |= {f"block_0/{name}/kernel": kernel, f"block_0/{name}/bias": (bias,)}
    heads = {"query": ((16, 2, 8), (2, 8)), "key": ((16, 2, 8), (2, 8))}
    heads |= {"value": ((16, 2, 8), (2, 8)), "out": ((2, 8, 16), (16,))}
    for name, (kernel, bias) in heads.items():
        place = f"block_0/MultiHeadDotProductAttention_0/{name}"
        wanted |= {f"{place}/kernel": kernel, f"{place}/bias": bias}
    for place in ("norm", "block_0/LayerNorm_0", "block_0/LayerNorm_1"):
        wanted |= {f"{place}/scale": (16,), f"{place}/bias": (16,)}
    assert names == wanted
    assert not policy.stops
    assert not policy.dropout


def test_recipes_of_the_default_are_those_of_earlier_runs():
    assert SelectorConfig().recipe() == {"width": 64, "layers": 1, "heads": 4}
    changed = SelectorConfig(stop=True, dropout=0.1, history="none")
    assert changed.recipe() == {
        "width": 64, "layers": 1, "heads": 4, "history": "none", "stop": True, "dropout": 0.1,
    }  # fmt: skip


def test_no_option_fits_the_parameters_of_another(parts, tmp_path):
    """By the config with its reason, and by the leaves where there is no config."""
    saved = checkpoint.save(tmp_path / "default", make(parts)[1], {})
    for options in OPTIONS.values():
        config = dataclasses.replace(SMALL, **options)
        with pytest.raises(InputError, match=r"with (\w+)=\w+, not \1=\w+; use the flags"):
            config.check_same({"width": 16, "layers": 1, "heads": 2}, "somewhere")
        init, _ = make_selector(config, parts, 12)
        with pytest.raises(InputError, match="another architecture"):
            checkpoint.restore(saved, jax.eval_shape(init, jax.random.key(0)))
    dataclasses.replace(SMALL, dropout=0.2).check_same(dataclasses.asdict(SMALL), "somewhere")


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_only_with_a_key(parts, batch):
    plain, params = make(parts)
    policy, same = make(parts, dropout=0.5)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, same)))
    query, pool = jax.tree.map(lambda x: x[0], batch)
    ours, theirs = (jax.jit(each.encode)(params, query, pool) for each in (plain, policy))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    encode = jax.jit(lambda key: policy.encode(params, query, pool, key).inputs)
    runs = [np.asarray(encode(jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 0.01
    assert np.isfinite(runs[2]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": "lstm"}, "history=lstm is not one of none, gate, gru, attention"),
        ({"pointer_score": "cosine"}, "pointer_score=cosine is not one of dot, bilinear, additive"),
        ({"dropout": 1.0}, "dropout=1.0; give 0 or more and less than 1"),
        ({"dropout": 0.1, "layers": 0}, "of the set encoder, which --layers=0 leaves out"),
    ],
)
def test_options_that_cannot_be_built(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SelectorConfig(), **change)
