"""Device memory of one worker, from the shape of the network and the sizes of its batches.

Also how much of it the caches may have: what is free once the model is loaded, less what the
largest forward pass takes, shared out. Measured memory comes from `free_memory.py`.
"""

import math

from qwen_bridge.cost import PromptLengths
from qwen_bridge.shape import ModelShape
from qwen_bridge.trie import KEYS_PER_TOKEN

BATCH_PATCHES = 16_384  # patches of a forward of the vision tower, see VisionCache
CONTEXT_BYTES = 1 << 30  # CUDA context, libraries and the allocator's slack
# Logits are held for so many predicted tokens at a time, see TrieScorer.
HEAD_ROWS = 512

# Of the memory that the caches get, the prefixes' part: an image's features take an eighth of
# what its keys and values take, and fewer images than prefixes are in use.
PREFIX_SHARE = 0.8
# Free memory that is never planned with: fragments, and whoever else uses the device.
SLACK = 0.1
# Where a forward pass might take nearly all that is free, caches get this share nevertheless:
# few prompts are that long, and batches are halved when memory runs out.
LEAST_SHARE = 0.25
# Tokens of the longest rows that the bound of a forward allows for; only its mask depends on them.
_LONG_ROW = 4096

CPU_CAP = 1 << 30  # a cache on a CPU, where nobody asked for more
CPU_SHARE = 1 / 8  # of what is free, for each cache


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
    tokens, prefix = max(batch_tokens, own), lengths.prefix(shots)
    most = min(batch_tokens / own, KEYS_PER_TOKEN * batch_tokens / (prefix + own))
    rows = max(1, math.floor(most))
    # Prefixes are gathered side by side, and copied once more as the row's own keys are appended.
    keys = rows * (2 * prefix + own) * shape.kv_values * value_bytes
    layer = tokens * 3 * (shape.hidden + shape.intermediate) * value_bytes
    mask = rows * own * (prefix + own) * (1 + value_bytes)
    # Logits, in float32 once more, their log-sum-exp's workspace, and a copy without the target.
    logits = min(rows * lengths.branch_rows, HEAD_ROWS) * shape.vocabulary * (value_bytes + 12)
    vision = BATCH_PATCHES * (6 * shape.vision.hidden + 3 * shape.vision.intermediate)
    return {
        "weights": float(shape.parameters * value_bytes),
        "prefix_cache": float(cache_bytes),
        "image_features": float(feature_bytes),
        "forward": max(keys + mask + max(layer, logits), float(vision * value_bytes)),
        "context": float(CONTEXT_BYTES),
    }


def forward_bound(shape: ModelShape, *, batch_tokens: int, value_bytes: int) -> float:
    """Bytes that a forward of the fast scorer takes at most, whatever the prompts look like.

    A batch is bounded by its tokens n and by `KEYS_PER_TOKEN` n keys (`trie.token_batches`); a
    single prompt that is longer than that goes alone and may take more.

    Args:
      shape: the network.
      batch_tokens: n.
      value_bytes: of a number, 2 in bfloat16 and 4 in float32.
    """
    keys = KEYS_PER_TOKEN * batch_tokens
    # Gathered, once more with the rows' own keys, and one layer repeated for every query head.
    held = keys * (2 * shape.kv_values + 2 * shape.heads * shape.head_dim) * value_bytes
    layer = batch_tokens * 3 * (shape.hidden + shape.intermediate) * value_bytes
    mask = batch_tokens * _LONG_ROW * (1 + value_bytes)
    logits = HEAD_ROWS * shape.vocabulary * (value_bytes + 12)
    vision = BATCH_PATCHES * (6 * shape.vision.hidden + 3 * shape.vision.intermediate)
    return float(max(held + mask + max(layer, logits), vision * value_bytes))


def cache_budgets(
    free: float,
    forward: float,
    *,
    prefix: int | None = None,
    features: int | None = None,
    gpu: bool = True,
) -> tuple[int, int]:
    """Bytes that cached prefixes and cached image features may take.

    Args:
      free: bytes that this worker may still take.
      forward: bytes of its largest forward pass, see `forward_bound`.
      prefix: as the user says; None for a share of what is free.
      features: likewise.
      gpu: whether the memory is a GPU's; a CPU's is shared with everything else, so that a
        cache there gets `CPU_SHARE` of what is free and at most `CPU_CAP`.
    """
    if not gpu:
        share = int(min(CPU_SHARE * free, CPU_CAP))
        return (share if prefix is None else prefix, share if features is None else features)
    room = int(max((1 - SLACK) * free - forward, LEAST_SHARE * free))
    if features is None:
        features = int((1 - PREFIX_SHARE) * room)
        if prefix is not None:  # What the user has fixed for one, the other one does without.
            features = min(features, max(0, room - prefix))
    return (max(0, room - features) if prefix is None else prefix), features
