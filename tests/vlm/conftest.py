"""The embedded checkpoint in this process."""

import pytest

from qwen_bridge import workers

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


@pytest.fixture
def worker_settings():
    """The usual settings of a worker."""
    return dict(SETTINGS)


@pytest.fixture(scope="session")
def make_scorer():
    """Builds scorers from the usual settings with some changed; equal ones are shared."""
    built = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in built:
            built[key] = workers.build({**SETTINGS, **changes})[0]
        return built[key]

    return make
