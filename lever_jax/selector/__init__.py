"""The pointer selector: a small network that reads a query and its pool, and points.

The only package that knows Flax; what the others see is `lever_jax.policy.Policy`.
"""

from lever_jax.selector.config import HISTORIES, POINTER_SCORES, SIZE, SelectorConfig
from lever_jax.selector.network import MAX_LOG_SCALE, make_selector

__all__ = [
    "HISTORIES",
    "MAX_LOG_SCALE",
    "POINTER_SCORES",
    "SIZE",
    "SelectorConfig",
    "make_selector",
]
