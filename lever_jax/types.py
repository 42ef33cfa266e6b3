"""The arrays that the policy half passes around, and the names of their axes.

Axes:
  B  queries of a batch; only callers have it, since every function here is for one query
  G  group: the pointers of one query
  W  beams
  K  candidate pool, padded by a mask
  S  shots: demonstrations of a prompt, in prompt order; the last stands next to the question
  D  embedding

An *action* is a position in the pool, in [0, K); a *pointer* is an ordered S-tuple of different
actions, with -1 in its last places where a policy that can stop ended it. Log-probabilities are in
nats.
"""

from typing import NamedTuple

import jax

from lever_jax.errors import InputError


class CandidatePool(NamedTuple):
    """The demonstrations that one query may choose from, most similar first.

    Attributes:
      embeddings: [K, D] float32. Rows where the mask is false are never read.
      mask: [K] bool, which rows are candidates; the rest is padding.
    """

    embeddings: jax.Array
    mask: jax.Array


class Rollouts(NamedTuple):
    """Pointers drawn for one query.

    Attributes:
      pointers: [G, S] int32 actions, -1 after the end; all -1 where the mask is false.
      log_probs: [G] float32, log-probability under the distribution that drew the pointer (see
        each sampler). `policy.pointer_log_probs` gives the policy's own for any pointer.
      sources: [G] int32, index into `SOURCES`.
      mask: [G] bool, which rows are pointers. All false where the pool has fewer than S candidates
        (none, for a policy that stops).
    """

    pointers: jax.Array
    log_probs: jax.Array
    sources: jax.Array
    mask: jax.Array


class QueryGroup(NamedTuple):
    """One query with its scored pointers: what the losses see.

    Attributes:
      query: [D] float32 embedding; its answer part is zero.
      pool: the candidates.
      pointers: [G, S] int32 actions.
      behaviour_log_probs: [G] float32, under the distribution that drew each pointer.
      rewards: [G] float32, any scale.
      mask: [G] bool, which rows count: padding and prompts that could not be scored do not.
    """

    query: jax.Array
    pool: CandidatePool
    pointers: jax.Array
    behaviour_log_probs: jax.Array
    rewards: jax.Array
    mask: jax.Array


def source_names(*, temperature: float = 1.0, top_p: float = 0.9) -> tuple[str, ...]:
    """Names of the proposal sources, with the settings they were drawn at.

    The order is stored with the data: append, never reorder.
    """
    return (
        "beam",
        f"sample(temp={float(temperature)})",
        f"top_p(p={float(top_p)})",
        "random",
        "retrieval",
        "local_search",
        "policy",
        "sbs",
    )


SOURCES = source_names()


def source_index(name: str) -> int:
    """Index into `SOURCES` of a source's name, with or without its settings in brackets."""
    names = [source.partition("(")[0] for source in SOURCES]
    short = name.partition("(")[0]
    if short not in names:
        raise InputError(f"unknown proposal source {name!r}; choose among {', '.join(names)}")
    return names.index(short)
