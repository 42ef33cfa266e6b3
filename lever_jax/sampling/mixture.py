"""Fills a group with different pointers from several sources."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lever_jax.errors import InputError
from lever_jax.masking import MASKED
from lever_jax.policy import Encoding, Params, Policy
from lever_jax.sampling.beam import beam_search
from lever_jax.sampling.similarity import similarity_order
from lever_jax.sampling.temperature import sample_temperature
from lever_jax.sampling.top_p import sample_top_p
from lever_jax.sampling.uniform import sample_uniform_distinct
from lever_jax.sampling.without_replacement import stochastic_beam_search
from lever_jax.types import SOURCES, Rollouts, source_index

MIXABLE = ("beam", "sample", "top_p", "random", "retrieval", "policy", "sbs")
"""The sources that need no scores, and can so be asked for in a mixture."""


def sample_mixture(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    *,
    num: int,
    shots: int,
    quotas: Mapping[str, int],
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array = 0.9,
) -> Rollouts:
    """A group of different pointers, so many from each source.

    Sources are taken in the order of `quotas`; a pointer keeps the source that came to it first.
    What duplicates leave open is filled with random pointers, until the group is full or every
    pointer of the pool is in it.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query. A source's draws do not depend on the other quotas.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      num: G, size of the group.
      shots: S.
      quotas: pointers asked from each source of `MIXABLE`; at most `num` together.
      temperature: of the source `sample`.
      top_p: of the source `top_p`.

    Returns:
      Rollouts [num], different pointers first, then rows whose mask is false. log_probs are those
      under the source: each sampler says which.
    """
    check_quotas(quotas, num)
    options = {"sample": {"temperature": temperature}, "top_p": {"p": top_p}}

    def draw(name, count):
        source = source_index(name)
        name = SOURCES[source].partition("(")[0]
        key_of_source = jax.random.fold_in(key, source)
        rows = {"num": count, "shots": shots}
        if name == "beam":
            return beam_search(policy, params, encoding, mask, **rows)
        if name == "retrieval":
            return similarity_order(mask, **rows)
        if name == "random":
            return sample_uniform_distinct(key_of_source, mask, **rows, shorter=policy.stops)
        if name == "sbs":
            drawn = stochastic_beam_search(policy, params, key_of_source, encoding, mask, **rows)
            return drawn.rollouts
        sampler = sample_top_p if name == "top_p" else sample_temperature
        options_of_source = options.get(name, {})
        drawn = sampler(policy, params, key_of_source, encoding, mask, **rows, **options_of_source)
        return drawn._replace(sources=jnp.full((count,), source, jnp.int32))

    drawn = [draw(name, count) for name, count in quotas.items() if count]
    # `num` different pointers are enough to fill any group, however many of them it already holds.
    spare_key = jax.random.fold_in(key, len(SOURCES))
    drawn.append(
        sample_uniform_distinct(spare_key, mask, num=num, shots=shots, shorter=policy.stops)
    )
    return distinct(jax.tree.map(lambda *xs: jnp.concatenate(xs), *drawn), num)


def distinct(rollouts: Rollouts, num: int, besides: Rollouts | None = None) -> Rollouts:
    """The first `num` different pointers of Rollouts [N], in their order; blank rows after them.

    None is one of `besides` [M], where given.
    """
    pointers, mask = rollouts.pointers, rollouts.mask
    same = jnp.all(pointers[:, None] == pointers[None], axis=-1) & mask[None]  # [N, N]
    again = jnp.any(jnp.tril(same, k=-1), axis=-1)
    if besides is not None:
        taken = jnp.all(pointers[:, None] == besides.pointers[None], axis=-1) & besides.mask
        again |= jnp.any(taken, axis=-1)
    kept = mask & ~again
    order = jnp.argsort(~kept, stable=True)[:num]
    kept = kept[order]
    return Rollouts(
        pointers=jnp.where(kept[:, None], pointers[order], -1),
        log_probs=jnp.where(kept, rollouts.log_probs[order], MASKED),
        sources=rollouts.sources[order],
        mask=kept,
    )


def scale_quotas(quotas: Mapping[str, int], num: int) -> dict[str, int]:
    """Quotas in the same proportions that sum to `num`, by largest remainder.

    >>> scale_quotas({"beam": 16, "sbs": 24, "random": 24}, 8)
    {'beam': 2, 'sbs': 3, 'random': 3}
    """
    total = sum(quotas.values())
    scaled = {name: count * num // total for name, count in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: -(quotas[name] * num % total))
    for name in by_remainder[: num - sum(scaled.values())]:
        scaled[name] += 1
    return scaled


def check_quotas(
    quotas: Mapping[str, int], num: int, *, sources: tuple[str, ...] = MIXABLE
) -> None:
    """Refuses quotas that no group of `num` pointers can have, with an InputError."""
    names = [SOURCES[source_index(name)].partition("(")[0] for name in quotas]
    for name, count in zip(names, quotas.values()):
        if name not in sources:
            raise InputError(
                f"proposal source {name!r} needs scored pointers; "
                f"a mixture draws from {', '.join(sources)}"
            )
        if count < 0:
            raise InputError(f"quota {count} of proposal source {name!r}; give 0 or more")
        if names.count(name) > 1:
            raise InputError(f"proposal source {name!r} has two quotas; give one")
    if sum(quotas.values()) > num:
        raise InputError(
            f"the quotas {dict(quotas)} ask for {sum(quotas.values())} pointers, "
            f"more than the {num} of a query; lower a quota or draw more (--proposals)"
        )
