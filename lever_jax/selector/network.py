"""The network of the selector.

A set encoder lets the query and the candidates look at each other, once. A state then remembers
what has been picked, and at every shot all candidates are compared with it. Beside that path
through the encoder there are two short ones, from which a few hundred queries already teach
something: a bilinear form of the projected query and candidate ("this colour goes with that
language"), and the similarity of their parts; the state decides at every shot how much of each to
use. Nothing depends on how many shots there are. What the options mean stands in `SelectorConfig`.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lever_jax.errors import InputError
from lever_jax.policy import Params, Policy
from lever_jax.selector.config import SelectorConfig
from lever_jax.selector.set_encoder import Block, scale_part, standardise
from lever_jax.types import CandidatePool

MAX_LOG_SCALE = 3.0
"""The learned inverse temperature stays within exp(-3) and exp(3), so it cannot run away."""

REPEL = -2.0
"""Where the coefficient of diversity begins: softplus(-2) = 0.13 nats, little beside the logits."""

SMALL = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
"""For the last layers before the logits: an untrained selector is close to uniform."""


class Encoding(NamedTuple):
    """What is computed once a query, w being the width and P the number of parts.

    Attributes:
      start: [w] state before the first pick.
      query: [w] the query's side of the bilinear form.
      keys: [K, 2w + P] what each candidate is compared by: key for the state, its side of the
        bilinear form, similarity of each part.
      inputs: [K, n w] what each candidate does to the state, by history: n = 0 for none, 2 for gate
        (gate, value), 3 for gru (reset, keep, new), 2 for attention (key, value).
      directions: [K, w] unit vectors whose products are the similarities that diversity reads.
    """

    start: jax.Array
    query: jax.Array
    keys: jax.Array
    inputs: jax.Array
    directions: jax.Array | None = None


class State(NamedTuple):
    """What is known of the picks so far; only what the options need.

    Attributes:
      vector: [w] what candidates are compared with.
      order: [K] int32, which pick a candidate was, from 1; 0 if it was not. History attention.
      closest: [K] largest cosine similarity to a pick, -1 before the first. Diversity.
    """

    vector: jax.Array
    order: jax.Array | None = None
    closest: jax.Array | None = None


def make_selector(
    config: SelectorConfig, parts: Mapping[str, tuple[int, int]], embedding_dim: int
) -> tuple[Callable[[jax.Array], Params], Policy]:
    """Builds a selector.

    Args:
      config: its size and options.
      parts: column range [lo, hi) of each part of an embedding, such as image, question, answer.
        Parts are scaled on their own; a part that is all zero, as a query's answer, says nothing.
      embedding_dim: D.

    Returns:
      init (key -> params) and the policy, both pure.
    """
    for name, (lo, hi) in parts.items():
        if not 0 <= lo < hi <= embedding_dim:
            raise InputError(
                f"part {name!r} spans columns {lo} to {hi} of embeddings that have "
                f"{embedding_dim}; give 0 <= lo < hi <= {embedding_dim}"
            )
    if not parts:
        raise InputError("no parts of the embeddings are named; give at least one column range")
    module = _Selector(config, tuple((name, *span) for name, span in sorted(parts.items())))

    def apply(method, params, *args, **options):
        # TF32 would round the same sums differently in sampling and in training.
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, *args, method=method, **options)

    def encode(params, query, pool, key=None):
        if key is None:
            return apply("encode", params, query, pool)
        return apply("encode", params, query, pool, training=True, rngs={"dropout": key})

    def init(key):
        pool = CandidatePool(jnp.zeros((2, embedding_dim)), jnp.ones(2, bool))
        with jax.default_matmul_precision("highest"):
            return module.init(key, jnp.zeros(embedding_dim), pool)["params"]

    policy = Policy(
        encode=encode,
        start=lambda params, encoding: module.first_state(encoding),
        logits=lambda params, encoding, state: apply("logits", params, encoding, state),
        update=lambda params, encoding, state, action: apply(
            "update", params, encoding, state, action
        ),
        stops=config.stop,
        dropout=config.dropout > 0,
    )
    return init, policy


class _Selector(nn.Module):
    config: SelectorConfig
    parts: tuple[tuple[str, int, int], ...]

    def setup(self):
        config, width = self.config, self.config.width
        self.project = [nn.Dense(width, name=f"project_{name}") for name, _, _ in self.parts]
        self.role = self.param("role", nn.initializers.normal(0.5), (2, width))
        self.blocks = [
            Block(config.heads, config.dropout, name=f"block_{i}") for i in range(config.layers)
        ]
        self.norm = nn.LayerNorm()
        self.direct_query = nn.Dense(width, kernel_init=SMALL)
        self.direct_key = nn.Dense(width)
        self.start = nn.Dense(width)
        self.gate = nn.Dense(width, kernel_init=SMALL)
        self.weigh = nn.Dense(len(self.parts), kernel_init=SMALL)
        self.log_scale = self.param("log_scale", nn.initializers.zeros, ())
        self._set_up_score(width)
        self._set_up_history(width)
        if config.diversity:
            self.repel = self.param("repel", nn.initializers.constant(REPEL), ())
        if config.stop:
            self.end = nn.Dense(1, kernel_init=SMALL)

    def _set_up_score(self, width):
        score = self.config.pointer_score
        if score == "bilinear":
            self.point = nn.Dense(width, use_bias=False, kernel_init=SMALL)
            return
        self.key = nn.Dense(width)
        self.point = nn.Dense(width, **({"kernel_init": SMALL} if score == "dot" else {}))
        if score == "additive":
            self.blend = nn.Dense(1, use_bias=False, kernel_init=SMALL)

    def _set_up_history(self, width):
        history = self.config.history
        if history == "none":
            return
        self.inputs = nn.Dense((3 if history == "gru" else 2) * width)
        self.recur = nn.Dense(
            (3 if history == "gru" else 1) * width,
            use_bias=False,
            kernel_init=nn.initializers.orthogonal(column_axis=0),
        )
        if history == "attention":
            self.ask = nn.Dense(width)
            self.fade = self.param("fade", nn.initializers.zeros, (self.config.heads,))

    def __call__(self, query, pool):
        """Touches every parameter, for init."""
        encoding = self.encode(query, pool)
        state = self.update(encoding, self.first_state(encoding), jnp.int32(0))
        return self.logits(encoding, state)

    def encode(self, query, pool, training=False):
        mask = pool.mask
        seen = jnp.concatenate([jnp.ones(1, bool), mask])
        rows = jnp.concatenate([query[None], pool.embeddings])  # [1 + K, D]
        scaled = [scale_part(rows[:, lo:hi], seen) for _, lo, hi in self.parts]  # [1 + K, 2d] each
        tokens = sum(project(x) for project, x in zip(self.project, scaled))  # [1 + K, w]
        relative = [x[:, x.shape[1] // 2 :] for x in scaled]
        similarity = jnp.stack([standardise(x[1:] @ x[0], mask) for x in relative], axis=-1)

        read = tokens + self.role[(jnp.arange(len(rows)) > 0).astype(jnp.int32)]
        for block in self.blocks:
            read = block(read, seen, training)
        read = self.norm(read)
        key = read[1:] if self.config.pointer_score == "bilinear" else self.key(read[1:])
        keys = [key, self.direct_key(tokens[1:]), similarity]
        return Encoding(
            start=jnp.tanh(self.start(read[0])),
            query=self.direct_query(tokens[0]),
            keys=jnp.concatenate(keys, axis=-1),
            inputs=read[1:, :0] if self.config.history == "none" else self.inputs(read[1:]),
            directions=_unit(tokens[1:]) if self.config.diversity else None,
        )

    def first_state(self, encoding):
        """The state before the first pick."""
        size = encoding.keys.shape[0]
        return State(
            vector=encoding.start,
            order=jnp.zeros(size, jnp.int32) if self.config.history == "attention" else None,
            closest=jnp.full(size, -1.0) if self.config.diversity else None,
        )

    def logits(self, encoding, state):
        config, vector = self.config, state.vector
        root = math.sqrt(config.width)
        direct = encoding.query * (1.0 + self.gate(vector))
        if config.pointer_score == "additive":
            own, short = encoding.keys[:, : config.width], encoding.keys[:, config.width :]
            scores = self.blend(jnp.tanh(own + self.point(vector)))[:, 0]
            scores += short @ jnp.concatenate([direct / root, self.weigh(vector)])
        else:
            pointer = jnp.concatenate([self.point(vector), direct]) / root
            scores = encoding.keys @ jnp.concatenate([pointer, self.weigh(vector)])
        scale = jnp.exp(jnp.clip(self.log_scale, -MAX_LOG_SCALE, MAX_LOG_SCALE))
        logits = scale * scores
        if config.diversity:
            logits -= nn.softplus(self.repel) * state.closest
        return jnp.concatenate([logits, self.end(vector)]) if config.stop else logits

    def update(self, encoding, state, action):
        if self.config.stop:  # Whatever follows the end, it is not read.
            action = jnp.minimum(action, encoding.keys.shape[0] - 1)
        if self.config.diversity:
            similarity = encoding.directions @ encoding.directions[action]
            state = state._replace(closest=jnp.maximum(state.closest, similarity))
        history = self.config.history
        if history == "none":
            return state
        if history == "attention":
            return self._attend(encoding, state, action)
        vector = state.vector
        if history == "gate":
            gate, value = jnp.split(encoding.inputs[action], 2)
            gate = nn.sigmoid(gate + self.recur(vector))
            return state._replace(vector=vector + gate * jnp.tanh(value))
        reset, keep, new = jnp.split(encoding.inputs[action], 3)
        reset_state, keep_state, new_state = jnp.split(self.recur(vector), 3)
        keep = nn.sigmoid(keep + keep_state)
        new = jnp.tanh(new + nn.sigmoid(reset + reset_state) * new_state)
        return state._replace(vector=keep * vector + (1.0 - keep) * new)

    def _attend(self, encoding, state, action):
        size, heads = encoding.keys.shape[0], self.config.heads
        last = jnp.max(state.order) + 1
        order = jnp.where(jnp.arange(size) == action, last, state.order)
        keys, values = jnp.split(encoding.inputs.reshape(size, 2 * heads, -1), 2, axis=1)
        asked = self.ask(encoding.start).reshape(heads, -1)
        scores = jnp.einsum("hd,khd->hk", asked, keys) / math.sqrt(asked.shape[-1])
        scores -= nn.softplus(self.fade)[:, None] * (last - order)
        weights = jax.nn.softmax(jnp.where(order > 0, scores, jnp.finfo(scores.dtype).min), axis=-1)
        found = jnp.einsum("hk,khd->hd", weights, values).reshape(-1)
        return state._replace(vector=encoding.start + self.recur(found), order=order)


def _unit(rows):
    """Rows [K, w] at length 1."""
    return rows * jax.lax.rsqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True) + 1e-6)
