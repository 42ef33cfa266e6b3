"""Prompts made ready for the language model: expanded image tokens, relative positions, features.

A segment's content does not depend on where it stands, and its positions only by a shift, so
each demonstration is prepared once and reused in every prompt that shows it.
"""

import dataclasses

import numpy as np
import torch

from qwen_bridge.positions import segment_positions
from qwen_bridge.prompts import PromptBuilder, PromptError, Segment
from qwen_bridge.vision import VisionCache


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

    Args:
      builder: the prompt builder.
      vision: cache of image features.
    """

    def __init__(self, builder: PromptBuilder, vision: VisionCache):
        self.builder, self.vision = builder, vision
        self._prepared: dict[Segment, PreparedSegment] = {}

    def prefetch(self, examples) -> None:
        """Runs the images of `examples` through the vision tower, together."""
        self.vision.fetch([example.image for example in examples])

    def prompt(self, demonstrations, query) -> list[PreparedSegment]:
        """Returns the prepared segments: system, one a demonstration, query.

        Raises:
          PromptError: a text cannot be shown or an image cannot be read; names which.
        """
        return [self._prepare(s) for s in self.builder.segments(demonstrations, query)]

    def _prepare(self, segment: Segment) -> PreparedSegment:
        found = self._prepared.get(segment)
        if found is None:
            found = self._prepared[segment] = self._expand(segment)
        return found

    def _expand(self, segment: Segment) -> PreparedSegment:
        ids, token = np.array(segment.ids, np.int64), self.builder.image_token
        if segment.image is None:
            positions, advance = segment_positions(ids, token, None, 0)
            return PreparedSegment(ids, positions, advance)
        features, failed = self.vision.fetch([segment.image])
        if failed:
            raise PromptError(failed[segment.image])
        feature = features[segment.image]
        start = int(np.flatnonzero(ids == token)[0])
        count = feature.grid[0] * feature.grid[1]
        ids = np.concatenate([ids[:start], np.full(count, token), ids[start + 1 :]])
        positions, advance = segment_positions(ids, token, feature.grid, 0)
        return PreparedSegment(ids, positions, advance, feature.tokens, start)
