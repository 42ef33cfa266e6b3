"""Prompts made ready for the language model: expanded image tokens, relative positions, features.

A segment's content does not depend on where it stands, and its positions only by a shift, so
each demonstration is prepared once and reused in every prompt that shows it.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from qwen_bridge.positions import segment_positions
from qwen_bridge.prompts import PromptBuilder, PromptError, Segment
from qwen_bridge.recent import RecentlyUsed
from qwen_bridge.vision import VisionCache, VisionFeatures
from qwen_bridge.vqa.examples import Example

_PREPARED_BYTES = 128 << 20  # tokens and positions: some 12 kB a demonstration of 400 tokens


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedSegment:
    """One segment, ready to run after any prefix.

    Attributes:
      ids: int64 `[L]` token ids, the image expanded to its merged tokens.
      positions: int64 `[3, L]`, counted from the segment's start.
      advance: how far the position counter moves over the segment.
      image: `[h * w, hidden]` features of the image, or None.
      image_start: index of the first image token; 0 without an image.
    """

    ids: np.ndarray
    positions: np.ndarray
    advance: int
    image: torch.Tensor | None = None
    image_start: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class SegmentFactory:
    """Prepares segments for one model and one prompt template.

    What is kept of a segment is its tokens and positions; the features of its image belong to
    the vision cache and its budget.

    Args:
      builder: the prompt builder.
      vision: cache of image features.
    """

    def __init__(self, builder: PromptBuilder, vision: VisionCache):
        self.builder, self.vision = builder, vision
        self._prepared = RecentlyUsed(_PREPARED_BYTES)

    def images(self, examples: Iterable[Example]) -> "Images":
        """Runs the images of `examples` through the vision tower, together."""
        return Images(*self.vision.fetch([example.image for example in examples]))

    def prompt(self, demonstrations, query, images: "Images") -> list[PreparedSegment]:
        """Returns the prepared segments: system, one a demonstration, query.

        Args:
          demonstrations: examples in the order shown.
          query: the example to answer.
          images: of all of them, see `images`.

        Raises:
          PromptError: a text cannot be shown or an image cannot be read; names which.
        """
        return [self._prepare(s, images) for s in self.builder.segments(demonstrations, query)]

    def _prepare(self, segment: Segment, images: "Images") -> PreparedSegment:
        feature = None
        if segment.image is not None:
            if segment.image in images.failed:
                raise PromptError(images.failed[segment.image])
            feature = images.features[segment.image]
        found = self._prepared.get(segment)
        if found is None:
            found = self._expand(segment, feature)
            self._prepared.put(segment, found, found.ids.nbytes + found.positions.nbytes)
        return found if feature is None else dataclasses.replace(found, image=feature.tokens)

    def _expand(self, segment: Segment, feature: VisionFeatures | None) -> PreparedSegment:
        """The segment's tokens and positions, without its image's features."""
        ids, token = np.array(segment.ids, np.int64), self.builder.image_token
        if feature is None:
            positions, advance = segment_positions(ids, token, None, 0)
            return PreparedSegment(ids, positions, advance)
        start = int(np.flatnonzero(ids == token)[0])
        count = feature.grid[0] * feature.grid[1]
        ids = np.concatenate([ids[:start], np.full(count, token), ids[start + 1 :]])
        positions, advance = segment_positions(ids, token, feature.grid, 0)
        return PreparedSegment(ids, positions, advance, image_start=start)


class Images(NamedTuple):
    """The images of one request.

    Attributes:
      features: by image key.
      failed: the reason of each image that has none.
    """

    features: dict[str, VisionFeatures]
    failed: dict[str, str]
