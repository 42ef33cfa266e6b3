"""What a worker of the embedded model is built from; tests change what they are about."""

SETTINGS = {
    "dataset": {"kind": "digits", "seed": 0, "bank": 300, "train": 40, "eval": 60},
    "model": "",
    "adapter": "",
    "device": "cpu",
    "dtype": "float32",
    "min_pixels": None,
    "max_pixels": None,
    "prompt_style": "chat",
    "instruction": "",
    "scorer": "trie",
    "answer_weight": "count3",
    "gt_prob": "product",
    "max_new_tokens": 10,
    "cache_mib": 64,
    "vision_cache_mib": 64,
    "encoder": "qwen",
    "encoder_model": "",
    "batch_tokens": 4096,
}
