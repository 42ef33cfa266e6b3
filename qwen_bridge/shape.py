"""The size of a Qwen2.5-VL network, read off its config.json: parameters and bytes, no weights.

The two published sizes are known here, so that a plan can be made before anything is downloaded.
"""

import dataclasses
import json
import pathlib

from qwen_bridge.errors import InputError
from qwen_bridge.grids import MERGE_SIZE, PATCH_SIZE


@dataclasses.dataclass(frozen=True)
class VisionShape:
    """The vision tower: ViT blocks with attention in windows, a few of them over everything.

    Attributes:
      depth: blocks.
      hidden: width.
      heads: attention heads.
      intermediate: width inside a block's MLP.
      out: width of a merged token, that of the language model.
      full_attention: how many blocks attend over the whole image.
      window: side of an attention window, pixels.
      patch: side of a patch, pixels.
      merge: side of a merged token, patches.
      patch_values: numbers in a patch: channels x frames x patch x patch.
    """

    depth: int
    hidden: int
    heads: int
    intermediate: int
    out: int
    full_attention: int
    window: int = 112
    patch: int = PATCH_SIZE
    merge: int = MERGE_SIZE
    patch_values: int = 3 * 2 * PATCH_SIZE**2

    @property
    def parameters(self) -> int:
        """Numbers in the weights."""
        wide = self.hidden * self.merge**2
        block = (
            2 * self.hidden  # norms
            + 4 * self.hidden**2 + 4 * self.hidden  # query, key, value, output; biases
            + 3 * self.hidden * self.intermediate + 2 * self.intermediate + self.hidden
        )  # fmt: skip
        merger = self.hidden + wide**2 + wide + wide * self.out + self.out
        return self.patch_values * self.hidden + self.depth * block + merger


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The whole network.

    Attributes:
      layers: of the language model.
      hidden: width.
      heads: query heads.
      kv_heads: key and value heads.
      head_dim: width of a head.
      intermediate: width inside a layer's MLP.
      vocabulary: rows of the embedding.
      tied: the language head is the embedding.
      vision: the vision tower.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision: VisionShape

    @classmethod
    def from_config(cls, config: dict, where: str = "config.json") -> "ModelShape":
        """Reads a config.json, of the published flat form or with a `text_config`.

        Raises:
          InputError: it is not of a qwen2_5_vl model, or lacks a field; names `where`.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise InputError(f"{where} is not of a qwen2_5_vl model")
        text = config.get("text_config") or config
        try:
            vision = config["vision_config"]
            patch, merge = vision.get("patch_size", PATCH_SIZE), vision.get("spatial_merge_size", 2)
            channels = vision.get("in_channels", vision.get("in_chans", 3))
            hidden, heads = text["hidden_size"], text["num_attention_heads"]
            return cls(
                layers=text["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or hidden // heads,
                intermediate=text["intermediate_size"],
                vocabulary=text["vocab_size"],
                tied=bool(
                    config.get("tie_word_embeddings", False)
                    or text.get("tie_word_embeddings", False)
                ),
                vision=VisionShape(
                    depth=vision["depth"],
                    hidden=vision["hidden_size"],
                    heads=vision["num_heads"],
                    intermediate=vision["intermediate_size"],
                    out=vision["out_hidden_size"],
                    full_attention=len(vision["fullatt_block_indexes"]),
                    window=vision.get("window_size", 112),
                    patch=patch,
                    merge=merge,
                    patch_values=channels * vision.get("temporal_patch_size", 2) * patch**2,
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: a Qwen2.5-VL config needs the field {error}") from None

    @classmethod
    def from_folder(cls, folder: pathlib.Path) -> "ModelShape":
        """Reads the config.json of a checkpoint folder; weights are not needed.

        Raises:
          InputError: there is none, or it cannot be used.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except OSError:
            raise InputError(f"--model={folder}: no configuration (config.json)") from None
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error})") from None
        return cls.from_config(config, str(path))

    @property
    def language_parameters(self) -> int:
        """Numbers in the weights of the language model, embedding and head included."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = (
            2 * self.hidden  # norms
            + 2 * self.hidden * queries + queries  # queries and output; the first with a bias
            + 2 * self.hidden * keys + 2 * keys
            + 3 * self.hidden * self.intermediate
        )  # fmt: skip
        tables = 1 if self.tied else 2
        return self.layers * layer + self.hidden + tables * self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return self.language_parameters + self.vision.parameters

    @property
    def kv_values(self) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding of the bridge: image, question and answer parts."""
        return self.vision.hidden + 2 * self.hidden


_PUBLISHED_VISION = {
    "depth": 32,
    "hidden": 1280,
    "heads": 16,
    "intermediate": 3420,
    "full_attention": 4,
}
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": ModelShape(
        layers=36,
        hidden=2048,
        heads=16,
        kv_heads=2,
        head_dim=128,
        intermediate=11_008,
        vocabulary=151_936,
        tied=True,
        vision=VisionShape(**_PUBLISHED_VISION, out=2048),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": ModelShape(
        layers=28,
        hidden=3584,
        heads=28,
        kv_heads=4,
        head_dim=128,
        intermediate=18_944,
        vocabulary=152_064,
        tied=False,
        vision=VisionShape(**_PUBLISHED_VISION, out=3584),
    ),
}
