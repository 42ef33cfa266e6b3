"""The vision tower: pixels to features, each image once.

Transformers runs SDPA attention over windows in a Python loop; here windows of equal length are
one batch, which is the same arithmetic. Features are cached by image key in memory.
"""

import collections
import itertools

import numpy as np
import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from qwen_bridge.errors import InputError


class EqualWindowAttention(nn.Module):
    """Vision self-attention in which windows of equal length are one batch.

    Takes the place of the model's own module and holds that module's weights under the same
    names; the outputs agree to float rounding (asserted in tests).
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads = attention.num_heads

    def forward(self, hidden_states, cu_seqlens, position_embeddings, **unused):
        """Attends within windows: `[L, hidden]` to `[L, hidden]`."""
        del unused  # max_seqlen, which only flash attention needs
        length = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1)
        query, key, value = qkv.unbind(1)  # [L, heads, head_dim]
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        bounds = cu_seqlens.tolist()
        windows = collections.defaultdict(list)
        for low, high in itertools.pairwise(bounds):
            if high > low:
                windows[high - low].append(low)
        if len(windows) == 1:
            size = next(iter(windows))
            out = _attend(query, key, value, size)
        else:
            out = torch.empty_like(query)
            for size, starts in windows.items():
                rows = torch.tensor(starts)[:, None] + torch.arange(size)[None]
                rows = rows.reshape(-1).to(query.device)
                out[rows] = _attend(query[rows], key[rows], value[rows], size)
        return self.proj(out.reshape(length, -1))


def _attend(query, key, value, size):
    """Full attention inside consecutive windows of `size`: `[L, heads, head_dim]` each."""
    shape = (-1, size, *query.shape[1:])
    query, key, value = (x.reshape(shape).transpose(1, 2) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(-1, *out.shape[1:2], out.shape[-1])


def batch_equal_windows(visual: nn.Module) -> None:
    """Makes the vision tower attend over equal windows in batches, in place."""
    for block in visual.blocks:
        block.attn = EqualWindowAttention(block.attn)


class VisionFeatures:
    """What the vision tower says of one image.

    Attributes:
      tokens: `[h * w, hidden]` merged tokens, as they enter the language model.
      grid: (h, w) in merged tokens.
      mean: `[vision_hidden]` mean over patches before the merger, float32, for retrieval.
    """

    __slots__ = ("grid", "mean", "tokens")

    def __init__(self, tokens, grid, mean):
        self.tokens, self.grid, self.mean = tokens, grid, mean


class VisionCache:
    """Runs each image through the vision tower once.

    Args:
      visual: the model's vision tower.
      image_processor: `Qwen2VLImageProcessorPil`.
      load_image: image key to PIL image.
      batch_patches: patches a forward pass holds at most.
    """

    def __init__(self, visual, image_processor, load_image, batch_patches: int = 16_384):
        self._visual, self._processor, self._load = visual, image_processor, load_image
        self._batch_patches = batch_patches
        self._features: dict[str, VisionFeatures] = {}
        self._failed: dict[str, str] = {}

    def fetch(self, keys) -> tuple[dict[str, VisionFeatures], dict[str, str]]:
        """Returns features of the images `keys`, and a reason for each that has none."""
        missing = [
            k for k in dict.fromkeys(keys) if k not in self._features and k not in self._failed
        ]
        pending, patches = [], 0
        for key in missing:
            try:
                pixels, grid = self.patches(key)
            except (InputError, OSError, ValueError) as error:
                self._failed[key] = f"image {key}: {error}"
                continue
            pending.append((key, pixels, grid))
            patches += len(pixels)
            if patches >= self._batch_patches:
                self._encode(pending)
                pending, patches = [], 0
        if pending:
            self._encode(pending)
        features = {k: self._features[k] for k in keys if k in self._features}
        return features, {k: self._failed[k] for k in keys if k in self._failed}

    def patches(self, key: str) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Reads one image: float32 `[patches, patch_dim]` pixels and its (t, h, w) patch grid.

        Raises:
          InputError, OSError, ValueError: the image cannot be read or processed.
        """
        processed = self._processor(images=[self._load(key)], return_tensors="np")
        pixels = np.asarray(processed["pixel_values"], np.float32)
        return pixels, tuple(int(g) for g in processed["image_grid_thw"][0])

    @torch.inference_mode()
    def _encode(self, pending) -> None:
        parameter = next(self._visual.parameters())
        pixels = torch.from_numpy(np.concatenate([p for _, p, _ in pending]))
        grids = torch.tensor([grid for _, _, grid in pending], device=parameter.device)
        out = self._visual(pixels.to(parameter.device, parameter.dtype), grid_thw=grids)
        merge = self._visual.spatial_merge_size
        counts = [len(p) for _, p, _ in pending]
        means = torch.stack([h.float().mean(0) for h in out.last_hidden_state.split(counts)])
        tokens = out.pooler_output.split([c // merge**2 for c in counts])
        for (key, _, grid), token, mean in zip(pending, tokens, means.cpu().numpy()):
            size = (grid[1] // merge, grid[2] // merge)
            self._features[key] = VisionFeatures(token, size, mean)
