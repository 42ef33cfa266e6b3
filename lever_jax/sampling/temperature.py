"""Independent draws from the policy, sharpened or flattened by a temperature."""

import jax

from lever_jax.masking import masked_log_softmax
from lever_jax.policy import Encoding, Params, Policy
from lever_jax.sampling.sequential import draw_sequentially
from lever_jax.types import Rollouts, source_index


def sample_temperature(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    *,
    num: int,
    shots: int,
    temperature: float | jax.Array = 1.0,
) -> Rollouts:
    """Independent pointers, every pick from softmax(logits / temperature) over what is left.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.
      temperature: > 0; at 1 this is the policy itself, as on-policy training wants.

    Returns:
      Rollouts [num]; log_probs are those at the temperature.
    """

    def behaviour(logits, available):
        return masked_log_softmax(logits / temperature, available)

    return draw_sequentially(
        policy,
        params,
        key,
        encoding,
        mask,
        num=num,
        shots=shots,
        behaviour=behaviour,
        source=source_index("sample"),
    )
