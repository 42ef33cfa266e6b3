"""Ways to draw pointers from a policy and a pool.

Each function is for one query and returns `Rollouts`; lift it with `jax.vmap` and give every query
the key `fold_in(key, query_id)`, so that its draws do not depend on the batch it is in. The caller
encodes the query once and hands the encoding to as many samplers as it likes.
"""

from lever_jax.sampling.beam import beam_search
from lever_jax.sampling.exact import exact_beam, exact_entropy, exact_top_p, pair_log_probs
from lever_jax.sampling.local_search import local_search
from lever_jax.sampling.mixture import (
    MIXABLE,
    check_quotas,
    distinct,
    sample_mixture,
    scale_quotas,
)
from lever_jax.sampling.similarity import similarity_order
from lever_jax.sampling.temperature import sample_temperature
from lever_jax.sampling.top_p import nucleus, sample_top_p
from lever_jax.sampling.uniform import sample_uniform, sample_uniform_distinct
from lever_jax.sampling.without_replacement import (
    StochasticBeam,
    inclusion_log_probs,
    stochastic_beam_search,
)

__all__ = [
    "MIXABLE",
    "StochasticBeam",
    "beam_search",
    "check_quotas",
    "distinct",
    "exact_beam",
    "exact_entropy",
    "exact_top_p",
    "inclusion_log_probs",
    "local_search",
    "nucleus",
    "pair_log_probs",
    "sample_mixture",
    "sample_temperature",
    "sample_top_p",
    "sample_uniform",
    "sample_uniform_distinct",
    "scale_quotas",
    "similarity_order",
    "stochastic_beam_search",
]
