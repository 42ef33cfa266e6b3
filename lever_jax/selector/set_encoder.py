"""What the selector reads its tokens from: scaled embeddings and a set encoder over them."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Pre-norm self-attention over a masked set [N, w].

    Attributes:
      heads: of the attention.
      dropout: share of what each half adds to the tokens that is left out in training.
    """

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens, mask, training=False):
        drop = nn.Dropout(self.dropout, deterministic=not training)
        width = tokens.shape[-1]
        normed = nn.LayerNorm()(tokens)
        attend = nn.MultiHeadDotProductAttention(num_heads=self.heads, attention_fn=_attention)
        tokens = tokens + drop(attend(normed, mask=mask[None, None, :]))
        hidden = nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(tokens)))
        return tokens + drop(nn.Dense(width)(hidden))


def _attention(query, key, value, *, mask, **_):
    """Attention of [N, heads, d] over the keys that the mask [1, 1, N] leaves, heads first.

    On a CPU Flax's own takes four times as long under `vmap`: its products have the heads between
    the two axes that they run over.
    """
    query, key, value = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))
    scores = jnp.einsum("hqd,hkd->hqk", query / math.sqrt(query.shape[-1]), key)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.swapaxes(jnp.einsum("hqk,hkd->hqd", weights, value), 0, 1)


def scale_part(rows, seen):
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


def standardise(x, mask):
    """[K] with mean 0 and variance 1 over the candidates; 0 for padding and where all are equal."""
    count = jnp.maximum(jnp.sum(mask), 1)
    x = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x)) / count + 1e-6)
