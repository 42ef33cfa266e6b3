"""Embeddings of examples: an image part, a question part and an answer part.

An *encoder* says what an image and what a text is worth; `Embedder` lays its vectors out as
parts. A query's answer part is zero: its answers are not known to a selector. `QwenEncoder` is
the VLM itself; CLIP and SigLIP are in `encoders.py`.
"""

import abc
import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from qwen_bridge.errors import InputError
from qwen_bridge.prompts import PromptBuilder, PromptError
from qwen_bridge.protocol import EmbedBatch
from qwen_bridge.recent import RecentlyUsed
from qwen_bridge.vision import VisionCache
from qwen_bridge.vqa.examples import Example

# Raise when any encoder gives other vectors for the same input: cached ones are then not read.
EMBEDDING_VERSION = 1

_ANSWERS_BYTES = 64 << 20  # embedded answers, which the same query asks for again and again


class Encoder(abc.ABC):
    """Turns images and texts into vectors.

    Attributes:
      image_dim: width of an image's vector.
      text_dim: width of a text's vector.
      fingerprint: changes whenever the same input could give another vector.
    """

    image_dim: int
    text_dim: int
    fingerprint: str

    @abc.abstractmethod
    def images(self, keys: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """Returns float32 `[N, image_dim]` of image keys, and why an image cannot be read, by key.

        The row of an image that cannot be read is zero.
        """

    @abc.abstractmethod
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32 `[N, text_dim]`.

        Raises:
          PromptError: a text cannot be embedded.
        """


class QwenEncoder(Encoder):
    """Qwen2.5-VL as an encoder, so that no second model is needed.

    An image is the mean over patches before the merger (in the embedded world it still tells the
    border's colour, which the merged token no longer does); a text is the mean over tokens of the
    language model's hidden states half-way up.

    Args:
      model: the Qwen2.5-VL network.
      builder: tokenises text.
      vision: reads images and runs the vision tower.
      fingerprint: of the checkpoint, its data type and its image processor.
      batch: texts a forward pass holds.
    """

    def __init__(
        self,
        model,
        builder: PromptBuilder,
        vision: VisionCache,
        fingerprint: str,
        batch: int = 256,
    ):
        self._model, self._builder, self._vision, self._batch = model, builder, vision, batch
        self.image_dim = model.config.vision_config.hidden_size
        self.text_dim = model.config.text_config.hidden_size
        self._layer = (model.config.text_config.num_hidden_layers + 1) // 2
        self.fingerprint = encoder_fingerprint("qwen", fingerprint)

    def images(self, keys: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """See `Encoder.images`."""
        return self._vision.means(keys)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.texts`; raises where a text holds a special token."""
        tokens = [self._builder.text(text) or (self._builder.end_of_turn,) for text in texts]
        return in_batches(self._run, tokens, self.text_dim, self._batch)

    @torch.inference_mode()
    def _run(self, tokens: list[tuple[int, ...]]) -> np.ndarray:
        ids = torch.full((len(tokens), max(map(len, tokens))), self._builder.end_of_turn)
        inside = torch.zeros(ids.shape)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = torch.tensor(row)
            inside[i, : len(row)] = 1.0
        # Right padding cannot reach back through causal attention.
        states = self._model.model.language_model(
            input_ids=ids.to(self._model.device), output_hidden_states=True, use_cache=False
        ).hidden_states[self._layer]
        inside = inside.to(states.device)
        means = (states.float() * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
        return means.cpu().numpy()


class Embedder:
    """Embeds examples, and judges how alike answers are.

    Args:
      encoder: of images and texts.
      judge: encoder of the similarity of answers. That is part of the reward, so it is the VLM's
        own whatever encoder chooses the pools.

    Attributes:
      parts: column range of each part.
      dim: columns of all of them.
    """

    def __init__(self, encoder: Encoder, judge: Encoder):
        self.encoder, self._judge = encoder, judge
        image, text = encoder.image_dim, encoder.text_dim
        self.parts = {
            "image": (0, image),
            "question": (image, image + text),
            "answer": (image + text, image + 2 * text),
        }
        self.dim = image + 2 * text
        self._answers = RecentlyUsed(_ANSWERS_BYTES)

    def embed(self, examples: Sequence[Example], kind: str) -> EmbedBatch:
        """Embeds examples.

        Args:
          examples: `N` of them.
          kind: `bank` shows the answer, `query` leaves its part zero. With `:image` or `:text`
            after it, only the image part or only the text parts are computed, and the rest is
            zero.

        Returns:
          `[N, dim]`, columns as `parts` says; the image part of an example whose image cannot be
          read is zero and has a reason.

        Raises:
          InputError: a text holds a special token.
        """
        split, _, only = kind.partition(":")
        out = np.zeros((len(examples), self.dim), np.float32)
        reasons = {}
        if only != "text":
            vectors, failed = self.encoder.images([example.image for example in examples])
            self._fill(out, "image", vectors)
            reasons = {i: failed[e.image] for i, e in enumerate(examples) if e.image in failed}
        if only != "image":
            questions = [example.question for example in examples]
            answers = [example.answer for example in examples] if split == "bank" else []
            try:
                texts = self._unique_texts([*questions, *answers])
            except PromptError as error:
                raise InputError(
                    f"{split} example {self._unfit(examples, split)}: {error}; change the text or "
                    "leave the example out"
                ) from error
            self._fill(out, "question", texts[: len(questions)])
            if answers:
                self._fill(out, "answer", texts[len(questions) :])
        return EmbedBatch(out, reasons)

    def similarity(self, text: str, answers: Sequence[str]) -> float:
        """Best cosine between a predicted answer and the ground truths, in [-1, 1]; 0 if empty."""
        answers = [answer for answer in dict.fromkeys(answers) if answer.strip()]
        if not text or not answers:
            return 0.0
        predicted, *truths = self._judged([text, *answers]).astype(np.float64)
        truths = np.stack(truths)
        norms = np.linalg.norm(truths, axis=1) * np.linalg.norm(predicted)
        return float(np.max(truths @ predicted / np.maximum(norms, 1e-12)))

    def _unfit(self, examples: Sequence[Example], split: str) -> int:
        """Id of the first example whose texts cannot be embedded."""
        for example in examples:
            try:
                self.encoder.texts([example.question, *[example.answer] * (split == "bank")])
            except PromptError:
                return example.id
        raise AssertionError("every example can be embedded alone")

    def _fill(self, out: np.ndarray, part: str, vectors: np.ndarray) -> None:
        low, high = self.parts[part]
        out[:, low:high] = vectors

    def _unique_texts(self, texts: list[str]) -> np.ndarray:
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        return self.encoder.texts(list(row_of))[[row_of[text] for text in texts]]

    def _judged(self, texts: list[str]) -> np.ndarray:
        vectors = {text: self._answers.get(text) for text in dict.fromkeys(texts)}
        missing = [text for text, vector in vectors.items() if vector is None]
        if missing:
            for text, vector in zip(missing, self._judge.texts(missing)):
                vectors[text] = vector
                self._answers.put(text, vector, vector.nbytes)
        return np.stack([vectors[text] for text in texts])


def in_batches(run, items: Sequence, width: int, batch: int) -> np.ndarray:
    """Runs `items` longest first in batches, so that little is padding.

    Args:
      run: takes a list of at most `batch` items, returns float32 `[n, width]`.
      items: `N` of them, each with a length.
      width: columns.
      batch: items of a pass.

    Returns:
      float32 `[N, width]` in the caller's order.
    """
    out = np.empty((len(items), width), np.float32)
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        out[rows] = run([items[i] for i in rows])
    return out


def encoder_fingerprint(*facts: str) -> str:
    """Identifies an encoder by its kind and its weights, and by the code's version."""
    text = "\0".join((str(EMBEDDING_VERSION), *facts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
