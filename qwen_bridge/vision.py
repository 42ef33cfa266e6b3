"""The vision tower: pixels to features, many images in one pass.

Transformers runs SDPA attention over windows in a Python loop; here windows of equal length are
one batch, which is the same arithmetic. Features of images in use are kept under a byte budget.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from qwen_bridge.errors import InputError
from qwen_bridge.recent import RecentlyUsed


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
    """

    __slots__ = ("grid", "tokens")

    def __init__(self, tokens: torch.Tensor, grid: tuple[int, int]):
        self.tokens, self.grid = tokens, grid

    @property
    def bytes(self) -> int:
        """Memory of the tokens."""
        return self.tokens.numel() * self.tokens.element_size()


def read_images(
    keys: Sequence[str], read: Callable[[str], Any]
) -> Iterator[tuple[str, Any, str | None]]:
    """Reads images on as many threads as torch may use, while the consumer is at work.

    Args:
      keys: image keys.
      read: reads one; pictures are decoded and scaled outside Python's lock.

    Yields:
      In the order of `keys`: (key, what `read` returned, None), or (key, None, the reason) where
      it cannot be read.
    """

    def attempt(key: str) -> tuple[str, Any, str | None]:
        try:
            return key, read(key), None
        except InputError as error:  # Names the file and the mend.
            return key, None, f"image {key}: {error}"
        except (OSError, ValueError) as error:
            return key, None, f"image {key}: {error}; mend the file or leave it out"

    threads = torch.get_num_threads()
    ahead = 2 * threads
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque(pool.submit(attempt, key) for key in keys[:ahead])
        for place in range(len(keys)):
            outcome = waiting.popleft().result()
            if place + ahead < len(keys):
                waiting.append(pool.submit(attempt, keys[place + ahead]))
            yield outcome


class VisionCache:
    """Runs images through the vision tower, and keeps what it said of those used last.

    Args:
      visual: the model's vision tower.
      image_processor: `Qwen2VLImageProcessorPil`.
      load_image: image key to PIL image.
      batch_patches: patches from which on a forward pass is full.
      cache_bytes: memory of the features kept from one request to the next.

    Attributes:
      batch_patches: as given; may be changed between requests.
      kept: the features kept, by image key.
    """

    def __init__(
        self,
        visual: nn.Module,
        image_processor,
        load_image: Callable[[str], Any],
        batch_patches: int = 16_384,
        cache_bytes: int = 2 << 30,
    ):
        self._visual, self._processor, self._load = visual, image_processor, load_image
        self.batch_patches = batch_patches
        self.kept = RecentlyUsed(cache_bytes)
        self._running = (0, 0)  # images and patches of the pass under way
        self._failed: dict[str, str] = {}

    def fetch(self, keys: Iterable[str]) -> tuple[dict[str, VisionFeatures], dict[str, str]]:
        """Returns features of the images `keys`, and a reason for each that has none."""
        keys = list(dict.fromkeys(keys))
        features = {key: found for key in keys if (found := self.kept.get(key)) is not None}
        failed = {key: self._failed[key] for key in keys if key in self._failed}
        missing = [key for key in keys if key not in features and key not in failed]
        merge = self._visual.spatial_merge_size
        for batch in self._batches(missing, failed):
            out = self._run(batch)
            counts = [len(pixels) // merge**2 for _, pixels, _ in batch]
            for (key, _, grid), tokens in zip(batch, out.pooler_output.split(counts)):
                # A copy, as a view would keep the whole batch alive.
                found = VisionFeatures(tokens.clone(), (grid[1] // merge, grid[2] // merge))
                features[key] = found
                self.kept.put(key, found, found.bytes)
        self._failed.update(failed)
        return features, failed

    def means(self, keys: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """Means over patches before the merger: float32 `[N, vision_hidden]`, and reasons by key.

        An image that cannot be read is zero and has a reason. Nothing is kept: an embedding is
        needed once, and a bank of images would fill any memory.
        """
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        means = np.zeros((len(row_of), self._visual.config.hidden_size), np.float32)
        failed: dict[str, str] = {}
        for batch in self._batches(list(row_of), failed):
            states = self._run(batch).last_hidden_state.split([len(p) for _, p, _ in batch])
            rows = [row_of[key] for key, _, _ in batch]
            means[rows] = torch.stack([h.float().mean(0) for h in states]).cpu().numpy()
        return means[[row_of[key] for key in keys]], failed

    def patches(self, key: str) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Reads one image: float32 `[patches, patch_dim]` pixels and its (t, h, w) patch grid.

        Raises:
          InputError, OSError, ValueError: the image cannot be read or processed.
        """
        processed = self._processor(images=[self._load(key)], return_tensors="np")
        pixels = np.asarray(processed["pixel_values"], np.float32)
        return pixels, tuple(int(g) for g in processed["image_grid_thw"][0])

    def shrink(self) -> bool:
        """Halves the passes from now on, if it was a pass of several images that just failed."""
        (images, patches), self._running = self._running, (0, 0)
        if images < 2:
            return False
        self.batch_patches = max(1, min(self.batch_patches, patches) // 2)
        return True

    def _batches(self, keys: list[str], failed: dict[str, str]) -> Iterator[list]:
        """Reads images and yields (key, pixels, grid) of as many as a forward pass takes."""
        batch, patches = [], 0
        for key, read, reason in read_images(keys, self.patches):
            if reason is not None:
                failed[key] = reason
                continue
            batch.append((key, *read))
            patches += len(read[0])
            if patches >= self.batch_patches:
                yield batch
                batch, patches = [], 0
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, batch: list):
        self._running = len(batch), sum(len(pixels) for _, pixels, _ in batch)
        parameter = next(self._visual.parameters())
        pixels = torch.from_numpy(np.concatenate([pixels for _, pixels, _ in batch]))
        grids = torch.tensor([grid for _, _, grid in batch], device=parameter.device)
        out = self._visual(pixels.to(parameter.device, parameter.dtype), grid_thw=grids)
        self._running = (0, 0)
        return out
