"""Embeddings from the VLM itself: an image part, a question part and an answer part.

The image part is the mean over patches before the merger (in the embedded world it still tells
the border's colour, which the merged token no longer does); text parts are means over tokens of
the language model's hidden states half-way up. A query's answer part is zero: its answers are
not known to a selector.
"""

import numpy as np
import torch

from qwen_bridge.errors import InputError
from qwen_bridge.prompts import PromptBuilder, PromptError
from qwen_bridge.vision import VisionCache


class Embedder:
    """Embeds examples and texts.

    Args:
      model: the Qwen2.5-VL network.
      builder: tokenises text.
      vision: cache of image features.
      batch: texts a forward pass holds.
    """

    def __init__(self, model, builder: PromptBuilder, vision: VisionCache, batch: int = 256):
        self._model, self._builder, self._vision, self._batch = model, builder, vision, batch
        image = model.config.vision_config.hidden_size
        text = model.config.text_config.hidden_size
        self.parts = {
            "image": (0, image),
            "question": (image, image + text),
            "answer": (image + text, image + 2 * text),
        }
        self.dim = image + 2 * text
        self._layer = (model.config.text_config.num_hidden_layers + 1) // 2
        self._texts: dict[str, np.ndarray] = {}

    def embed(self, examples, kind: str) -> np.ndarray:
        """Embeds examples.

        Args:
          examples: `N` of them.
          kind: `bank` shows the answer, `query` leaves its part zero.

        Returns:
          float32 `[N, dim]`; columns as `parts` says.

        Raises:
          InputError: an image cannot be read, or a text holds a special token.
        """
        try:
            return self._embed(examples, kind)
        except PromptError as error:
            raise InputError(f"{error}; change the text or leave the example out") from error

    def _embed(self, examples, kind: str) -> np.ndarray:
        out = np.zeros((len(examples), self.dim), np.float32)
        features, failed = self._vision.fetch([example.image for example in examples])
        if failed:
            raise InputError(f"{next(iter(failed.values()))}; mend the file or leave it out")
        low, high = self.parts["image"]
        out[:, low:high] = [features[example.image].mean for example in examples]
        low, high = self.parts["question"]
        out[:, low:high] = self.texts([example.question for example in examples])
        if kind == "bank":
            low, high = self.parts["answer"]
            out[:, low:high] = self.texts([example.answer for example in examples])
        return out

    def similarity(self, text: str, answers) -> float:
        """Best cosine between a predicted answer and the ground truths, in [-1, 1]; 0 if empty."""
        answers = [answer for answer in dict.fromkeys(answers) if answer.strip()]
        if not text or not answers:
            return 0.0
        predicted, *truths = self.texts([text, *answers]).astype(np.float64)
        truths = np.stack(truths)
        norms = np.linalg.norm(truths, axis=1) * np.linalg.norm(predicted)
        return float(np.max(truths @ predicted / np.maximum(norms, 1e-12)))

    def texts(self, texts) -> np.ndarray:
        """Returns float32 `[N, hidden]` embeddings of non-empty texts, each computed once."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(missing), self._batch):
            self._run(missing[start : start + self._batch])
        return np.stack([self._texts[text] for text in texts])

    @torch.inference_mode()
    def _run(self, texts) -> None:
        tokens = [self._builder.text(text) or (self._builder.end_of_turn,) for text in texts]
        ids = torch.full((len(texts), max(map(len, tokens))), self._builder.end_of_turn)
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
        self._texts.update(zip(texts, means.cpu().numpy()))
