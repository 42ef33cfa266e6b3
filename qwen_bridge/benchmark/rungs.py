"""The ways to score that are compared, from the naive loop to the trie with resident prefixes.

Each is a `PromptScorer`, so that all are asked and answer in the same way. The naive ones are what
a careful user would write with the published library: correct answer spans, pictures decoded
once, no gradients, no copies without need.
"""

import torch

from qwen_bridge.scorer import BranchScores, PromptRequest, ReferenceScorer
from qwen_bridge.trie_scorer import Row, TrieScorer, inputs_of


class NaiveScorer(ReferenceScorer):
    """One forward pass of the whole model a prompt and answer; pictures are decoded once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._decoded: dict[str, tuple[torch.Tensor, tuple[int, int, int]]] = {}

    def _pixels(self, image: str) -> tuple[torch.Tensor, tuple[int, int, int]]:
        if image not in self._decoded:
            self._decoded[image] = super()._pixels(image)
        return self._decoded[image]


class BatchedNaiveScorer(NaiveScorer):
    """The answers of a prompt as the rows of one padded batch, each with the whole prompt."""

    @torch.inference_mode()
    def _score_branches(self, requests: list[PromptRequest]) -> list[BranchScores]:
        return [BranchScores.from_tokens(self._forms(request)) for request in requests]

    def _forms(self, request: PromptRequest):
        forms = request.branches.forms
        prompt = self._inputs(request, ())
        ids, length = prompt["input_ids"], prompt["input_ids"].shape[1]
        rows, longest = len(forms), max(map(len, forms))
        padded = torch.full((rows, longest), self.end_of_turn)
        inside = torch.zeros(rows, longest, dtype=ids.dtype)
        for row, form in enumerate(forms):
            padded[row, : len(form)] = torch.tensor(form)
            inside[row, : len(form)] = 1

        def beside(whole, tail):
            return torch.cat([whole.expand(rows, -1), tail.to(self.device)], 1)

        logits = self.model(
            input_ids=beside(ids, padded),
            attention_mask=beside(prompt["attention_mask"], inside),
            mm_token_type_ids=beside(
                prompt["mm_token_type_ids"], torch.zeros_like(padded, dtype=torch.int32)
            ),
            pixel_values=prompt["pixel_values"].repeat(rows, 1),
            image_grid_thw=prompt["image_grid_thw"].repeat(rows, 1),
            use_cache=False,
        ).logits
        return [
            self._read(logits[row, length - 1 : length - 1 + len(form)], form)
            for row, form in enumerate(forms)
        ]


class CachedVisionScorer(NaiveScorer):
    """The naive loop with the vision tower's features kept, put where the model would put them."""

    def _inputs(self, request: PromptRequest, form) -> dict:
        inputs = super()._inputs(request, form)
        del inputs["pixel_values"]
        ids = inputs["input_ids"]
        features = [segment.image for segment in request.segments if segment.image is not None]
        image_tokens = (ids == self.factory.builder.image_token)[..., None]
        embeds = self.model.get_input_embeddings()(ids)
        # The ids stay beside the embeddings: it is from them that the model counts its positions.
        return {**inputs, "inputs_embeds": embeds.masked_scatter(image_tokens, torch.cat(features))}


class BranchScorer(TrieScorer):
    """One prefill a prompt with its answers as branches; no prompt shares anything."""

    def _prompt_rows(self, requests: list[PromptRequest], *, branches: bool) -> list[Row]:
        return [
            Row((), tuple(r.segments), inputs_of(r.forms) if branches else ()) for r in requests
        ]
