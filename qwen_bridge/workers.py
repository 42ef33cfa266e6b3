"""Builds a worker's scorer from plain settings: dataset, checkpoint, prompts, scorer.

The settings are the same words as the driver's flags, so an error that is found here names the
flag. Everything that decides a score is in the worker's `hello`, which becomes the fingerprint
of the store.
"""

import os

import torch
from transformers.utils import logging

from qwen_bridge.embedder import Embedder, Encoder, QwenEncoder
from qwen_bridge.encoders import load_encoder
from qwen_bridge.errors import InputError
from qwen_bridge.free_memory import free_memory
from qwen_bridge.loading import LoadedModel, load_model
from qwen_bridge.memory import cache_budgets, forward_bound
from qwen_bridge.placement import check_device, is_dealt
from qwen_bridge.prompts import PromptBuilder, PromptTemplate
from qwen_bridge.scorer import PromptScorer, ReferenceScorer
from qwen_bridge.segments import SegmentFactory
from qwen_bridge.shape import ModelShape
from qwen_bridge.trie_scorer import BATCH_TOKENS, TrieScorer
from qwen_bridge.vision import VisionCache
from qwen_bridge.vqa.examples import Dataset
from qwen_bridge.vqa.sources import open_dataset

SCORERS = ("trie", "reference")


def build(settings: dict, dataset: Dataset | None = None) -> tuple[PromptScorer, dict]:
    """Makes a scorer.

    Args:
      settings: `dataset` as for `open_dataset`; `model`, `device` (`auto`, `cpu`, `cuda`,
        `cuda:N`), `dtype` (`auto`, `float32`, `bfloat16`), `min_pixels`, `max_pixels`, `adapter`
        as for `load_model`; `prompt_style`, `instruction`; `scorer` (`trie` or `reference`),
        `answer_weight`, `gt_prob`, `max_new_tokens`, `batch_tokens`; `cache_mib` and
        `vision_cache_mib`, `auto` for a share of what the device has free; `encoder` (`qwen`,
        `clip`, `siglip`) and `encoder_model`, the folder of the latter two.
      dataset: opened already; else the one that the settings name.

    Returns:
      The scorer, and what identifies its scores: model, prompt_template, generation, dataset,
      metric; `encoder`, which identifies its embeddings; and `device`, where it computes and how.

    Raises:
      InputError: something in the settings cannot be used.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads := int(os.environ.get("OMP_NUM_THREADS", 0)):
        torch.set_num_threads(threads)
    if dataset is None:
        dataset = open_dataset(settings["dataset"])
    device = pick_device(settings["device"])
    dtype = settings["dtype"]
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    loaded = load_model(
        settings["model"],
        device=device,
        dtype=dtype,
        min_pixels=settings["min_pixels"],
        max_pixels=settings["max_pixels"],
        adapter=settings["adapter"],
    )
    template = PromptTemplate(settings["prompt_style"], settings["instruction"])
    builder = PromptBuilder(loaded.tokenizer, template)
    prefix_bytes, feature_bytes = _budgets(loaded, settings)
    vision = VisionCache(
        loaded.model.model.visual,
        loaded.image_processor,
        dataset.load_image,
        cache_bytes=feature_bytes,
    )
    qwen = QwenEncoder(loaded.model, builder, vision, loaded.fingerprint)
    encoder: Encoder = qwen
    if settings["encoder"] != "qwen":
        encoder = load_encoder(
            settings["encoder"], settings["encoder_model"], dataset.load_image, device
        )
    common = {
        "answer_weight": settings["answer_weight"],
        "gt_prob": settings["gt_prob"],
        "max_new_tokens": settings["max_new_tokens"],
    }
    parts = (
        loaded,
        dataset,
        SegmentFactory(builder, vision),
        Embedder(encoder, qwen),
    )
    if settings["scorer"] == "trie":
        scorer: PromptScorer = TrieScorer(
            *parts,
            batch_tokens=settings["batch_tokens"],
            cache_bytes=prefix_bytes,
            **common,
        )
    elif settings["scorer"] == "reference":
        scorer = ReferenceScorer(*parts, **common)
    else:
        raise InputError(f"--scorer={settings['scorer']} is not one of {', '.join(SCORERS)}")
    hello = {
        "model": loaded.fingerprint,
        "prompt_template": template.hash,
        "generation": f"greedy, at most {settings['max_new_tokens']} tokens, no penalty",
        "dataset": dataset.fingerprint,
        "metric": f"answer_weight={settings['answer_weight']} gt_prob={settings['gt_prob']}",
        "encoder": encoder.fingerprint,
        "device": f"{device}, {dtype}",
    }
    return scorer, hello


def _budgets(loaded: LoadedModel, settings: dict) -> tuple[int, int]:
    """Bytes of cached prefixes and of cached image features: as asked, or by what is free."""
    device, dtype = loaded.model.device, loaded.model.dtype
    asked = [settings[name] for name in ("cache_mib", "vision_cache_mib")]
    prefix, features = (None if mib == "auto" else mib << 20 for mib in asked)
    forward = forward_bound(
        ModelShape.from_config(loaded.model.config.to_dict()),
        batch_tokens=settings["batch_tokens"] or BATCH_TOKENS[device.type],
        value_bytes=dtype.itemsize,
    )
    return cache_budgets(
        free_memory(device, dealt=is_dealt(settings["device"])),
        forward,
        prefix=prefix,
        features=features,
        gpu=device.type == "cuda",
    )


def pick_device(name: str) -> str:
    """The torch device of a flag `--device`; `auto` and `cuda` deal the GPUs to workers in turn.

    Raises:
      InputError: it is no device, or there is no such GPU.
    """
    check_device(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError(
            f"--device={name}: this torch ({torch.__version__}) sees no GPU; look at nvidia-smi, "
            "install the CUDA build of torch, or use --device=cpu"
        )
    count = torch.cuda.device_count()
    if is_dealt(name):  # The bridge numbers its workers.
        return f"cuda:{int(os.environ.get('QWEN_BRIDGE_WORKER', 0)) % count}"
    if int(name.removeprefix("cuda:")) >= count:
        raise InputError(f"--device={name}: there are {count} GPUs, the first is cuda:0")
    return name
