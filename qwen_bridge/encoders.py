"""CLIP and SigLIP as encoders, from a local folder as Hugging Face publishes them.

`--encoder=clip|siglip --encoder_model=FOLDER`. The folder needs `config.json`, safetensors
weights, `preprocessor_config.json` and `tokenizer.json`; nothing is downloaded and no code of
the folder is run. Vectors are the towers' own outputs in the space that images and texts share,
in float32 on any device: embeddings decide pools, and a second of GPU time is not worth rounding.
"""

import dataclasses
import json
import pathlib
import re
import string
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from qwen_bridge.embedder import Encoder, encoder_fingerprint, in_batches
from qwen_bridge.errors import InputError
from qwen_bridge.gpu_settings import set_for_scoring
from qwen_bridge.identity import checkpoint_digest
from qwen_bridge.loading import UNUSABLE
from qwen_bridge.vision import read_images

_BATCH = 64  # images or texts of a forward pass


@dataclasses.dataclass(frozen=True)
class _Architecture:
    config: type
    model: type
    processor: type


# By `model_type` of config.json. SigLIP 2 at one resolution is "siglip"; NaFlex is "siglip2".
_ARCHITECTURES = {
    "clip": {"clip": _Architecture(CLIPConfig, CLIPModel, CLIPImageProcessorPil)},
    "siglip": {
        "siglip": _Architecture(SiglipConfig, SiglipModel, SiglipImageProcessorPil),
        "siglip2": _Architecture(Siglip2Config, Siglip2Model, Siglip2ImageProcessorPil),
    },
}


class ContrastiveEncoder(Encoder):
    """An image tower and a text tower that were trained to agree.

    Args:
      model: `CLIPModel`, `SiglipModel` or `Siglip2Model`.
      processor: its image processor (PIL, no torchvision).
      tokens_of: tokenises texts into lists of ids that the text tower takes.
      collate: pads lists of ids to the text tower's inputs.
      load_image: image key to PIL image.
      fingerprint: see `Encoder`.
    """

    def __init__(
        self,
        model,
        processor,
        tokens_of: Callable[[Sequence[str]], list[list[int]]],
        collate: Callable[[list[list[int]]], dict[str, torch.Tensor]],
        load_image: Callable,
        fingerprint: str,
    ):
        self._model, self._processor, self._load = model, processor, load_image
        self._tokens_of, self._collate = tokens_of, collate
        self.fingerprint = fingerprint
        config = model.config
        if isinstance(model, CLIPModel):
            self.image_dim = self.text_dim = config.projection_dim
        else:
            self.image_dim = config.vision_config.hidden_size
            self.text_dim = model.text_model.head.out_features

    @torch.inference_mode()
    def images(self, keys: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """See `Encoder.images`."""
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        out = np.zeros((len(row_of), self.image_dim), np.float32)
        unique, failed = list(row_of), {}
        for first in range(0, len(unique), _BATCH):
            batch = []
            for key, pixels, reason in read_images(unique[first : first + _BATCH], self._pixels):
                if reason is None:
                    batch.append((key, pixels))
                else:
                    failed[key] = reason
            if not batch:
                continue
            inputs = {
                name: torch.cat([pixels[name] for _, pixels in batch]).to(self._model.device)
                for name in batch[0][1]
            }
            pooled = self._model.get_image_features(**inputs).pooler_output
            out[[row_of[key] for key, _ in batch]] = pooled.float().cpu().numpy()
        return out[[row_of[key] for key in keys]], failed

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.texts`; a text beyond the model's context is cut, its end token kept."""
        return in_batches(self._run, self._tokens_of(texts), self.text_dim, _BATCH)

    @torch.inference_mode()
    def _run(self, tokens: list[list[int]]) -> np.ndarray:
        inputs = {name: ids.to(self._model.device) for name, ids in self._collate(tokens).items()}
        return self._model.get_text_features(**inputs).pooler_output.float().cpu().numpy()

    def _pixels(self, key: str) -> dict[str, torch.Tensor]:
        return dict(self._processor(images=[self._load(key)], return_tensors="pt"))


def load_encoder(kind: str, path: str, load_image: Callable, device: str) -> ContrastiveEncoder:
    """Loads CLIP or SigLIP.

    Args:
      kind: `clip` or `siglip`.
      path: the folder.
      load_image: image key to PIL image.
      device: torch device.

    Raises:
      InputError: the folder or a file in it is missing, broken or of another model.
    """
    folder = pathlib.Path(path)
    flag = f"--encoder_model={path}"
    if not path or not folder.is_dir():
        raise InputError(
            f"{flag} is not a folder; --encoder={kind} needs a local {kind} checkpoint"
        )
    for pattern, what in (
        ("config.json", "configuration"),
        ("*.safetensors", "weights"),
        ("tokenizer.json", "tokenizer"),
        ("preprocessor_config.json", "image processor settings"),
    ):
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{flag}: no {what} ({pattern}) in {folder}; take it from the published checkpoint"
            )
    try:
        name = json.loads((folder / "config.json").read_text()).get("model_type")
        architecture = _ARCHITECTURES[kind].get(name)
        if architecture is None:
            raise InputError(f"{flag}: config.json is of a {name} model, not of {kind}")
        model, report = architecture.model.from_pretrained(
            folder,
            config=architecture.config.from_pretrained(folder, local_files_only=True),
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        processor = architecture.processor.from_pretrained(folder, local_files_only=True)
        prepare = _clip_texts if kind == "clip" else _siglip_texts
        tokens_of, collate = prepare(folder, model.config.text_config)
    except InputError:
        raise
    except UNUSABLE as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"{flag} cannot be loaded: {line}") from error
    # Old CLIP folders hold the positions 0, 1, 2, ... as a weight.
    odd = [key for key in report["unexpected_keys"] if not key.endswith("position_ids")]
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"], *odd]))
    if wrong:
        raise InputError(
            f"{flag}: {len(wrong)} weights missing or misshapen or not of the architecture in "
            f"config.json: {wrong[0]}"
        )
    set_for_scoring(device)
    model.eval().requires_grad_(False).to(device)
    fingerprint = encoder_fingerprint(kind, checkpoint_digest(folder), processor.to_json_string())
    return ContrastiveEncoder(model, processor, tokens_of, collate, load_image, fingerprint)


def _clip_texts(folder: pathlib.Path, config):
    """CLIP's rule: start and end token, at most 77 tokens of which the last is the end."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    limit = config.max_position_embeddings

    def tokens_of(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]

    def collate(tokens: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, tokens))
        ids = torch.full((len(tokens), width), tokenizer.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.long)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    return tokens_of, collate


def _siglip_texts(folder: pathlib.Path, config):
    """SigLIP's rule: plain lower case, cut to 63 tokens, the end token, padded to 64.

    The text tower reads its last position, padding or not, so texts are always padded to its
    whole context; no mask is given, as none was in training. SigLIP 1 (a unigram vocabulary) also
    drops punctuation. Both rules are applied here, since not every published `tokenizer.json`
    holds them; where it does, applying them twice changes nothing.

    References: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343;
      Tschannen et al., SigLIP 2, arXiv:2502.14786.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None or pad is None:
        raise InputError(
            f"--encoder_model={folder}: tokenizer_config.json names no eos_token or no pad_token; "
            "take it from the published checkpoint"
        )
    limit = config.max_position_embeddings
    first_edition = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "Unigram"
    punctuation = str.maketrans("", "", string.punctuation)

    def plain(text: str) -> str:
        text = text.lower()
        if first_edition:
            text = re.sub(r"\s+", " ", text.translate(punctuation)).strip()
        return text

    def tokens_of(texts: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(
            [plain(text) for text in texts],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            verbose=False,
        )["input_ids"]
        return [[*ids[: limit - 1], end] for ids in encoded]

    def collate(tokens: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = torch.full((len(tokens), limit), pad)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = torch.tensor(row)
        return {"input_ids": ids}

    return tokens_of, collate
