"""The pointer selector: a small network that reads a query and its pool, and points.

A set encoder lets the query and the candidates look at each other, once. A recurrent state then
remembers what has been picked, and how much, and turns at every shot into one vector that all
candidates are compared with. Beside that path through the encoder there are two short ones, from
which a few hundred queries already teach something: a bilinear form of the projected query and
candidate ("this colour goes with that language"), and the similarity of their parts; the state
decides at every shot how much of each to use. Nothing depends on how many shots there are.

The only file that knows Flax.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lever_jax.errors import InputError
from lever_jax.policy import Params, Policy
from lever_jax.types import CandidatePool

MAX_LOG_SCALE = 3.0
"""The learned inverse temperature stays within exp(-3) and exp(3), so it cannot run away."""

SMALL = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
"""For the last layers before the logits: an untrained selector is close to uniform."""


@dataclasses.dataclass(frozen=True)
class SelectorConfig:
    """Size of the selector; it goes into checkpoints.

    Attributes:
      width: of tokens and state; a multiple of `heads`.
      layers: self-attention blocks of the set encoder; 0 leaves only the short paths.
      heads: of each block.
    """

    width: int = 64
    layers: int = 1
    heads: int = 4

    def __post_init__(self):
        for name, least in (("width", 1), ("layers", 0), ("heads", 1)):
            if getattr(self, name) < least:
                raise InputError(f"selector {name}={getattr(self, name)}; give {least} or more")
        if self.width % self.heads:
            raise InputError(
                f"selector width={self.width} is not a multiple of heads={self.heads}; "
                f"try {self.heads * -(-self.width // self.heads)}"
            )


class Encoding(NamedTuple):
    """What is computed once a query, w being the width and P the number of parts.

    Attributes:
      start: [w] state before the first pick.
      query: [w] the query's side of the bilinear form.
      keys: [K, 2w + P] what each candidate is compared by: key for the state, its side of the
        bilinear form, similarity of each part.
      inputs: [K, 3w] what each candidate does to the state: the input half of a GRU.
    """

    start: jax.Array
    query: jax.Array
    keys: jax.Array
    inputs: jax.Array


def make_selector(
    config: SelectorConfig, parts: Mapping[str, tuple[int, int]], embedding_dim: int
) -> tuple[Callable[[jax.Array], Params], Policy]:
    """Builds a selector.

    Args:
      config: its size.
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

    def apply(method, params, *args):
        # TF32 would round the same sums differently in sampling and in training.
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, *args, method=method)

    def init(key):
        pool = CandidatePool(jnp.zeros((2, embedding_dim)), jnp.ones(2, bool))
        with jax.default_matmul_precision("highest"):
            return module.init(key, jnp.zeros(embedding_dim), pool)["params"]

    policy = Policy(
        encode=lambda params, query, pool: apply("encode", params, query, pool),
        start=lambda params, encoding: encoding.start,
        logits=lambda params, encoding, state: apply("logits", params, encoding, state),
        update=lambda params, encoding, state, action: apply(
            "update", params, encoding, state, action
        ),
    )
    return init, policy


class _Selector(nn.Module):
    config: SelectorConfig
    parts: tuple[tuple[str, int, int], ...]

    def setup(self):
        width = self.config.width
        self.project = [nn.Dense(width, name=f"project_{name}") for name, _, _ in self.parts]
        self.role = self.param("role", nn.initializers.normal(0.5), (2, width))
        self.blocks = [
            _Block(self.config.heads, name=f"block_{i}") for i in range(self.config.layers)
        ]
        self.norm = nn.LayerNorm()
        self.direct_query = nn.Dense(width, kernel_init=SMALL)
        self.direct_key = nn.Dense(width)
        self.start = nn.Dense(width)
        self.key = nn.Dense(width)
        self.inputs = nn.Dense(3 * width)
        self.recur = nn.Dense(
            3 * width, use_bias=False, kernel_init=nn.initializers.orthogonal(column_axis=0)
        )
        self.point = nn.Dense(width, kernel_init=SMALL)
        self.gate = nn.Dense(width, kernel_init=SMALL)
        self.weigh = nn.Dense(len(self.parts), kernel_init=SMALL)
        self.log_scale = self.param("log_scale", nn.initializers.zeros, ())

    def __call__(self, query, pool):
        """Touches every parameter, for init."""
        encoding = self.encode(query, pool)
        state = self.update(encoding, encoding.start, jnp.int32(0))
        return self.logits(encoding, state)

    def encode(self, query, pool):
        mask = pool.mask
        seen = jnp.concatenate([jnp.ones(1, bool), mask])
        rows = jnp.concatenate([query[None], pool.embeddings])  # [1 + K, D]
        scaled = [_scale(rows[:, lo:hi], seen) for _, lo, hi in self.parts]  # [1 + K, 2d] each
        tokens = sum(project(x) for project, x in zip(self.project, scaled))  # [1 + K, w]
        relative = [x[:, x.shape[1] // 2 :] for x in scaled]
        similarity = jnp.stack([_standardise(x[1:] @ x[0], mask) for x in relative], axis=-1)

        read = tokens + self.role[(jnp.arange(len(rows)) > 0).astype(jnp.int32)]
        for block in self.blocks:
            read = block(read, seen)
        read = self.norm(read)
        keys = [self.key(read[1:]), self.direct_key(tokens[1:]), similarity]
        return Encoding(
            start=jnp.tanh(self.start(read[0])),
            query=self.direct_query(tokens[0]),
            keys=jnp.concatenate(keys, axis=-1),
            inputs=self.inputs(read[1:]),
        )

    def logits(self, encoding, state):
        width = self.config.width
        direct = encoding.query * (1.0 + self.gate(state))
        pointer = jnp.concatenate([self.point(state), direct]) / math.sqrt(width)
        pointer = jnp.concatenate([pointer, self.weigh(state)])
        scale = jnp.exp(jnp.clip(self.log_scale, -MAX_LOG_SCALE, MAX_LOG_SCALE))
        return scale * (encoding.keys @ pointer)

    def update(self, encoding, state, action):
        reset, keep, new = jnp.split(encoding.inputs[action], 3)
        reset_state, keep_state, new_state = jnp.split(self.recur(state), 3)
        keep = nn.sigmoid(keep + keep_state)
        new = jnp.tanh(new + nn.sigmoid(reset + reset_state) * new_state)
        return keep * state + (1.0 - keep) * new


class _Block(nn.Module):
    """Pre-norm self-attention over a masked set [N, w]."""

    heads: int

    @nn.compact
    def __call__(self, tokens, mask):
        width = tokens.shape[-1]
        normed = nn.LayerNorm()(tokens)
        attend = nn.MultiHeadDotProductAttention(num_heads=self.heads, attention_fn=_attention)
        tokens = tokens + attend(normed, mask=mask[None, None, :])
        hidden = nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(tokens)))
        return tokens + nn.Dense(width)(hidden)


def _attention(query, key, value, *, mask, **_):
    """Attention of [N, heads, d] over the keys that the mask [1, 1, N] leaves, heads first.

    On a CPU Flax's own takes four times as long under `vmap`: its products have the heads between
    the two axes that they run over.
    """
    query, key, value = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))
    scores = jnp.einsum("hqd,hkd->hqk", query / math.sqrt(query.shape[-1]), key)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.swapaxes(jnp.einsum("hqk,hkd->hqd", weights, value), 0, 1)


def _scale(rows, seen):
    """One part of the query and the candidates [1 + K, d] as the network wants it, [1 + K, 2d].

    Each row twice, with a mean square of 1: as it is, and relative to the mean of the pool, because
    the embeddings of a VLM differ little from each other beside what they have in common. Rows that
    are zero, or not `seen` [1 + K], are zero.
    """
    rows = jnp.where(seen[:, None], rows, 0.0)
    mean = jnp.sum(rows[1:], axis=0) / jnp.maximum(jnp.sum(seen[1:]), 1)
    empty = jnp.all(rows == 0.0, axis=-1, keepdims=True)
    relative = jnp.where(empty, 0.0, rows - mean)
    size = jnp.mean(jnp.square(rows), axis=-1, keepdims=True)
    # Differences within rounding are not blown up to a mean square of 1.
    spread = jnp.mean(jnp.square(relative), axis=-1, keepdims=True) + 1e-6 * size
    parts = [rows * jax.lax.rsqrt(size + 1e-12), relative * jax.lax.rsqrt(spread + 1e-12)]
    return jnp.concatenate(parts, axis=-1)


def _standardise(x, mask):
    """[K] with mean 0 and variance 1 over the candidates; 0 for padding and where all are equal."""
    count = jnp.maximum(jnp.sum(mask), 1)
    x = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x)) / count + 1e-6)
