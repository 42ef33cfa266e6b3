"""Networks with random weights, for measuring speed without a download.

How long a forward pass takes depends on shapes, not on what the weights say: the published 3B and
7B shapes are here as they are, and a small one in the 3B model's proportions for the CPU. The
tokenizer is that of the embedded checkpoint; the vocabulary keeps its published size, because the
language head's work does.
"""

import math

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from qwen_bridge.gpu_settings import set_for_scoring
from qwen_bridge.hub import TINY_QWEN
from qwen_bridge.loading import LoadedModel
from qwen_bridge.shape import PUBLISHED, ModelShape, VisionShape
from qwen_bridge.vision import batch_equal_windows

_3B = PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct"]
_WIDTH, _DEPTH = 8, 4  # how much narrower and shallower `tiny` is than 3B
# A layer's work falls by _WIDTH^2 and there are _DEPTH times fewer; the head's falls by _WIDTH and
# by the vocabulary. So this vocabulary keeps the head's share of the work.
_TINY = ModelShape(
    layers=_3B.layers // _DEPTH,
    hidden=_3B.hidden // _WIDTH,
    # Half the heads, twice as wide: the softmax of very narrow heads would outweigh their products.
    heads=_3B.heads // 2,
    kv_heads=_3B.kv_heads // 2,
    head_dim=2 * _3B.head_dim // _WIDTH,
    intermediate=_3B.intermediate // _WIDTH,
    vocabulary=_3B.vocabulary // (_WIDTH * _DEPTH),
    tied=_3B.tied,
    vision=VisionShape(
        depth=_3B.vision.depth // _DEPTH,
        hidden=_3B.vision.hidden // _WIDTH,
        heads=_3B.vision.heads // 4,
        intermediate=round(_3B.vision.intermediate / _WIDTH),
        out=_3B.hidden // _WIDTH,
        full_attention=_3B.vision.full_attention // _DEPTH,
    ),
)
SHAPES = {
    "tiny": _TINY,
    "3b_random": _3B,
    "7b_random": PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"],
}
_CONTEXT = 128_000  # tokens, as published
# Enlarged head rows of the digits, so that greedy answers of random weights have a text.
_DIGIT_GAIN = 6.0


def random_model(name: str, *, device: str, dtype: torch.dtype, seed: int) -> LoadedModel:
    """Makes a network with random weights, directly on its device and in its data type.

    Args:
      name: of `SHAPES`.
      device: torch device.
      dtype: of the weights.
      seed: of the weights.
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN, local_files_only=True)
    processor = Qwen2VLImageProcessorPil.from_pretrained(
        TINY_QWEN, local_files_only=True, min_pixels=28**2, max_pixels=1 << 30
    )
    set_for_scoring(device)
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            _config(SHAPES[name], tokenizer), dtype=dtype, attn_implementation="sdpa"
        )
    model.eval().requires_grad_(False)
    digits = tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
    model.lm_head.weight[digits] *= _DIGIT_GAIN
    batch_equal_windows(model.model.visual)
    return LoadedModel(model, tokenizer, processor, f"{name}, seed {seed}")


def _config(shape: ModelShape, tokenizer) -> Qwen2_5_VLConfig:
    special = tokenizer.added_tokens_encoder
    vision = shape.vision
    # Of a head's pairs of numbers a quarter turns with time, the rest with row and column.
    pairs = shape.head_dim // 2
    sections = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    between = vision.depth // vision.full_attention
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": _CONTEXT,
            "rms_norm_eps": 1e-6,
            # Keeps the variance from layer to layer; at 2048 it is the published 0.02.
            "initializer_range": 1 / math.sqrt(shape.hidden),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": sections,
            },
            "bos_token_id": None,
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_heads": vision.heads,
            "out_hidden_size": vision.out,
            "fullatt_block_indexes": list(range(between - 1, vision.depth, between)),
            "window_size": vision.window,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
            "initializer_range": 1 / math.sqrt(vision.hidden),
        },
        initializer_range=1 / math.sqrt(shape.hidden),
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
    )
