"""Device memory of one worker, from the shape of the network and the sizes of its batches."""

import math

from qwen_bridge.cost import PromptLengths
from qwen_bridge.shape import ModelShape

BATCH_PATCHES = 16_384  # patches of a forward of the vision tower, see VisionCache
CONTEXT_BYTES = 1 << 30  # CUDA context, libraries and the allocator's slack


def worker_memory(
    shape: ModelShape,
    lengths: PromptLengths,
    *,
    shots: int,
    batch_tokens: int,
    cache_bytes: int,
    feature_bytes: int,
    value_bytes: int,
) -> dict[str, float]:
    """Bytes that a worker of the fast scorer holds at its peak, by part.

    Args:
      shape: the network.
      lengths: of the prompt's parts.
      shots: demonstrations of the longest prompts.
      batch_tokens: tokens of a forward of the language model.
      cache_bytes: budget of cached prefixes.
      feature_bytes: budget of cached image features.
      value_bytes: of a number, 2 in bfloat16 and 4 in float32.

    Returns:
      `weights`, `prefix_cache`, `image_features`, `forward` (activations, gathered prefixes,
      mask, logits: the larger of the language model's and the vision tower's), `context`.
    """
    own = lengths.query + lengths.branch_tokens
    rows = max(1, math.floor(batch_tokens / own))
    tokens, prefix = max(batch_tokens, own), lengths.prefix(shots)
    # Prefixes are gathered side by side, and copied once more as the row's own keys are appended.
    keys = rows * (2 * prefix + own) * shape.kv_values * value_bytes
    layer = tokens * 3 * (shape.hidden + shape.intermediate) * value_bytes
    mask = rows * own * (prefix + own) * (1 + value_bytes)
    # Logits, in float32 once more, their log-sum-exp's workspace, and a copy without the target.
    logits = rows * lengths.branch_rows * shape.vocabulary * (value_bytes + 12)
    vision = BATCH_PATCHES * (6 * shape.vision.hidden + 3 * shape.vision.intermediate)
    return {
        "weights": float(shape.parameters * value_bytes),
        "prefix_cache": float(cache_bytes),
        "image_features": float(feature_bytes),
        "forward": max(keys + mask + max(layer, logits), float(vision * value_bytes)),
        "context": float(CONTEXT_BYTES),
    }
