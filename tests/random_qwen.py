"""Writes a Qwen2.5-VL that is real in everything but size and knowledge.

The vocabulary (all 151,936 rows), the tokenizer, the image processor and the layout of
`config.json` are those of the published 3B checkpoint; widths and depths are small, and the
weights are random. It is what can be proven of a published checkpoint without its weights.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PUBLISHED = ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json")
LAYERS = 2


def write_checkpoint(folder: pathlib.Path, published: pathlib.Path, seed: int = 0) -> None:
    """Writes the checkpoint folder.

    Args:
      folder: an empty folder.
      published: holds `config_3b.json` and the tokenizer and preprocessor files.
      seed: of the weights.
    """
    for name in (*PUBLISHED, "chat_template.json"):
        shutil.copyfile(published / name, folder / name)
    config = json.loads((published / "config_3b.json").read_text())
    config |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": LAYERS,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},  # of 32 / 2 frequencies
        "torch_dtype": "float32",
    }
    config["vision_config"] |= {
        "depth": LAYERS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": config["hidden_size"],
        "fullatt_block_indexes": [LAYERS - 1],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    weights = dict(model.state_dict())
    del weights["lm_head.weight"]  # tied to the embedding
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
