"""Folders as Hugging Face publishes CLIP and SigLIP, but small and with random weights."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

WORDS = "what colour is the cat a dog red black two how many are there".split()
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip_folder(folder, seed=0):
    """Laid out as openai/clip-vit-large-patch14: `size` a number, positions among the weights."""
    # CLIP's vocabulary: bytes, bytes that end a word, merges, start and end of text.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            symbols = ["".join(pair), *symbols[2:]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary |= {start: len(vocabulary), end: len(vocabulary) + 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=end, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]), (start, vocabulary[start]), trim_offsets=False
    )
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, **_TOWER}
    # eos_token_id 2 is what OpenAI's configuration says, and means "the largest id".
    config = CLIPConfig(
        text_config={**text, "eos_token_id": 2, "bos_token_id": vocabulary[start]},
        vision_config={"image_size": 32, "patch_size": 8, **_TOWER},
        projection_dim=20,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    _save(folder, model, tokenizer)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    names = {
        name: {"content": token, "__type": "AddedToken", **plain}
        for name, token in (("bos_token", start), ("eos_token", end), ("unk_token", end))
    }
    _write(
        folder,
        "tokenizer_config.json",
        {
            **names,
            "pad_token": end,
            "add_prefix_space": False,
            "errors": "replace",
            "do_lower_case": True,
            "name_or_path": "openai/clip-vit-base-patch32",
            "model_max_length": 77,
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
        },
    )
    _write(
        folder,
        "preprocessor_config.json",
        {
            "crop_size": 32,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 32,
        },
    )
    return model


def siglip_folder(folder, seed=0):
    """Laid out as google/siglip-base-patch16-224: a unigram vocabulary, `</s>` ends and pads."""
    folder.mkdir(exist_ok=True)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS), *_letters()]
    scores = [(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    # Beside it lies the SentencePiece file that it was made of, which nothing here can read.
    (folder / "spiece.model").write_bytes(b"not read")
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    names |= {"do_lower_case": True, "model_input_names": ["input_ids"], "model_max_length": 64}
    names |= {"sp_model_kwargs": {}, "additional_special_tokens": []}
    return _siglip(folder, SiglipConfig, SiglipModel, tokenizer, len(scores), seed, names)


def siglip2_folder(folder, seed=0, naflex=False):
    """Laid out as google/siglip2-base-patch16-224, or as -naflex: Gemma's BPE vocabulary."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *_letters()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # The published file pads by itself, which must not get in the way.
    tokenizer.enable_padding(length=64, pad_id=0, pad_token="<pad>")
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    names |= {"unk_token": "<unk>", "tokenizer_class": "GemmaTokenizer"}
    kinds = (Siglip2Config, Siglip2Model) if naflex else (SiglipConfig, SiglipModel)
    return _siglip(folder, *kinds, tokenizer, len(vocabulary), seed, names)


def _siglip(folder, config_type, model_type, tokenizer, size, seed, names):
    vision = {"patch_size": 8, **_TOWER}
    naflex = config_type is Siglip2Config
    vision |= {"num_patches": 16} if naflex else {"image_size": 32}
    config = config_type(
        text_config={"vocab_size": size, "max_position_embeddings": 8, **_TOWER},
        vision_config=vision,
    )
    torch.manual_seed(seed)
    model = model_type(config).eval()
    _save(folder, model, tokenizer)
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer", **names})
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    if naflex:
        settings |= {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8}
        settings |= {"max_num_patches": 16}
    else:
        settings |= {"image_processor_type": "SiglipImageProcessor"}
        settings |= {"size": {"height": 32, "width": 32}}
    _write(folder, "preprocessor_config.json", settings)
    return model


def _letters():
    return [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789?!,.")


def _save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def _write(folder, name, content):
    (folder / name).write_text(json.dumps(content))
