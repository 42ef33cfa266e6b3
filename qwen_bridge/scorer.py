"""What a prompt is worth to the VLM: the scorer's contract, and its plain reference.

`PromptScorer` turns ids into prompts and log-probabilities into scores; how the log-probabilities
are computed is left to two implementations. `ReferenceScorer` here is obvious and slow: a forward
pass of the whole model for each prompt and answer, and the model's own `generate`. It is the
oracle of the tests; `TrieScorer` (trie_scorer.py) is the one that work is done with.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qwen_bridge.embedder import Embedder
from qwen_bridge.errors import InputError
from qwen_bridge.loading import LoadedModel
from qwen_bridge.out_of_memory import in_halves
from qwen_bridge.prompts import PromptError
from qwen_bridge.protocol import (
    OTHER_ANSWER,
    AnswerBatch,
    EmbedBatch,
    ScoreBatch,
    empty_answer,
    empty_score,
)
from qwen_bridge.recent import RecentlyUsed
from qwen_bridge.segments import PreparedSegment, SegmentFactory
from qwen_bridge.targets import AnswerBranches, answer_branches
from qwen_bridge.vqa.accuracy import accuracy_normalized, accuracy_official_2021
from qwen_bridge.vqa.answers import combine_forms
from qwen_bridge.vqa.examples import Dataset, Example

GT_PROB_MODES = ("product", "mean_token")
# Greedy decoding is certified where the arg-max leads by this many nats.
DEFAULT_MARGIN = {torch.float32: 1e-3, torch.bfloat16: 0.25}
MAX_NEW_TOKENS = 10
_QUERIES_KEPT = 4096  # whose ground truths are kept as tokens
_RAN_OUT = (
    "out of memory: going on with batches of half the size; a lower --batch_tokens, --cache_mib "
    "or --max_pixels avoids the second try"
)


@dataclasses.dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt to score.

    Attributes:
      query: the question to answer.
      demonstrations: the examples shown, in order.
      path: their ids.
      segments: system, one a demonstration, query.
      branches: the query's ground truths as tokens.
      known: other outputs, end included, that are tried as branches too; they enter no score.
    """

    query: Example
    demonstrations: tuple[Example, ...]
    path: tuple[int, ...]
    segments: list[PreparedSegment]
    branches: AnswerBranches
    known: tuple[tuple[int, ...], ...] = ()

    @property
    def forms(self) -> tuple[tuple[int, ...], ...]:
        """All branches: the ground truths' forms, then the other outputs."""
        return self.branches.forms + self.known


@dataclasses.dataclass(frozen=True, slots=True)
class BranchScores:
    """What the model says of each branch of a prompt: forms of ground truths, known outputs.

    Attributes:
      log_probs: float64 `[F]` sum of token log-probabilities, the end included, in nats.
      mean_log_probs: float64 `[F]` the same divided by the number of tokens.
      margins: float64 `[F]` smallest lead of the form's token over any other, in nats;
        negative where greedy decoding would leave the form.
    """

    log_probs: np.ndarray
    mean_log_probs: np.ndarray
    margins: np.ndarray

    @classmethod
    def from_tokens(cls, forms: Sequence[tuple[np.ndarray, np.ndarray]]) -> "BranchScores":
        """Reduces (log-probabilities, margins) of each form's tokens."""
        return cls(
            np.array([log_probs.sum() for log_probs, _ in forms]),
            np.array([log_probs.mean() for log_probs, _ in forms]),
            np.array([margins.min() for _, margins in forms]),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
    """Greedy output: tokens, the end of the turn included if reached, and their log P in nats."""

    tokens: tuple[int, ...]
    log_prob: float


class PromptScorer(abc.ABC):
    """Scores prompts given as ids; subclasses supply the forward passes.

    Args:
      loaded: the checkpoint.
      dataset: where ids lead to examples.
      factory: prepares prompt segments.
      embedder: embeds examples and answers.
      answer_weight: `count3` or `official`, what each ground truth is worth.
      gt_prob: `product` (a probability) or `mean_token` (the geometric mean of token
        probabilities, which others report and which is none).
      margin: lead in nats from which a greedy answer counts as certified; None by dtype.
      max_new_tokens: most tokens of a generated answer.

    Attributes:
      notes: what the user should hear; whoever reports them takes them out.

    Raises:
      InputError: an unknown `gt_prob`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        dataset: Dataset,
        factory: SegmentFactory,
        embedder: Embedder,
        *,
        answer_weight: str = "count3",
        gt_prob: str = "product",
        margin: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        if gt_prob not in GT_PROB_MODES:
            raise InputError(f"--gt_prob={gt_prob} is not one of {', '.join(GT_PROB_MODES)}")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.dataset, self.factory, self.embedder = dataset, factory, embedder
        self.device, self.dtype = self.model.device, self.model.dtype
        self.end_of_turn = factory.builder.end_of_turn
        self.max_new_tokens = max_new_tokens
        self.margin = DEFAULT_MARGIN[self.dtype] if margin is None else margin
        self._answer_weight, self._gt_prob = answer_weight, gt_prob
        self._branches = RecentlyUsed(_QUERIES_KEPT)
        self.notes: list[str] = []
        self._ran_out = False

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding."""
        return self.embedder.dim

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Column ranges of the parts of an embedding."""
        return self.embedder.parts

    def embed(self, kind: str, ids: np.ndarray) -> EmbedBatch:
        """Embeds examples, see `Embedder.embed`."""
        split, _, _ = kind.partition(":")
        return self.embedder.embed([self.dataset.example(split, int(i)) for i in ids], kind)

    def score(self, queries: np.ndarray, pointers: np.ndarray) -> ScoreBatch:
        """Scores prompts without generating.

        Args:
          queries: int64 `[n]` query ids.
          pointers: int64 `[n, S]` demonstration ids in order, padded with -1.

        Returns:
          `n` scores in the caller's order; a prompt that could not be scored has a reason.
        """
        done, reasons = self._settle(self._score_branches, queries, pointers)
        width = max((len(request.branches.texts) for request, _ in done.values()), default=1)
        batch = empty_score(len(queries), width, reasons)
        for row, (request, branch_scores) in done.items():
            self._fill_score(batch, row, request, branch_scores)
        return batch

    def answer(self, queries: np.ndarray, pointers: np.ndarray) -> AnswerBatch:
        """Generates greedily and judges the answers; arguments as for `score`."""
        done, reasons = self._settle(self._generate, queries, pointers)
        batch = empty_answer(len(queries), reasons)
        for row, (request, output) in done.items():
            text, confidence = self._text(output.tokens), float(np.exp(output.log_prob))
            self._fill_answer(batch, row, request.query, text, confidence)
        return batch

    @abc.abstractmethod
    def _score_branches(self, requests: list[PromptRequest]) -> list[BranchScores | PromptError]:
        """Log-probabilities of every branch of every prompt, or why there are none."""

    @abc.abstractmethod
    def _generate(self, requests: list[PromptRequest]) -> list[Generated | PromptError]:
        """Greedy answers of every prompt, of at most `max_new_tokens` tokens; or why not."""

    def _known_outputs(self, query_id: int) -> tuple[tuple[int, ...], ...]:
        """Outputs, end included, that other prompts of the query gave."""
        return ()

    def limits(self) -> tuple[int, ...]:
        """What bounds the memory of a batch, see `shrink`."""
        return (self.factory.vision.batch_patches,)

    def set_limits(self, limits: tuple[int, ...]) -> None:
        """Bounds batches as they were when `limits` returned this."""
        (self.factory.vision.batch_patches,) = limits

    def shrink(self) -> bool:
        """Makes batches smaller, memory having run out; whether that may help a prompt alone."""
        if not self._ran_out:
            self.notes.append(_RAN_OUT)
        self._ran_out = True
        return self.factory.vision.shrink()

    def empty_caches(self) -> None:
        """Forgets what can be computed again."""
        self.factory.vision.kept.clear()

    def _settle(
        self, run: Callable[[list], list], queries, pointers
    ) -> tuple[dict[int, tuple], dict[int, str]]:
        """Runs prompts, in halves where memory runs out.

        Returns:
          By row, (request, outcome) of those done, the request without its segments, which would
          keep the images' features in memory; and the reasons of the others.
        """

        queries, pointers = np.asarray(queries), np.asarray(pointers)

        def attempt(rows: np.ndarray) -> list:
            requests, refused = self._requests(queries[rows], pointers[rows])
            found: dict[int, object] = {i: PromptError(why) for i, why in refused.items()}
            for (i, request), outcome in zip(requests.items(), run(list(requests.values()))):
                failed = isinstance(outcome, PromptError)
                done = (dataclasses.replace(request, segments=[]), outcome)
                found[i] = outcome if failed else done
            return [found[i] for i in range(len(rows))]

        outcomes = dict(enumerate(in_halves(len(queries), attempt, self)))
        failed = {row: o for row, o in outcomes.items() if isinstance(o, PromptError)}
        done = {row: o for row, o in outcomes.items() if row not in failed}
        return done, {row: str(why) for row, why in failed.items()}

    def _requests(self, queries, pointers) -> tuple[dict[int, PromptRequest], dict[int, str]]:
        """Builds the prompts; a prompt that cannot be built gets a reason instead."""
        shown: dict[int, tuple[Example, tuple[Example, ...]]] = {}
        requests, reasons = {}, {}
        for row, (query, pointer) in enumerate(zip(queries, pointers)):
            try:
                shown[row] = (
                    self.dataset.example("query", int(query)),
                    tuple(self.dataset.example("bank", int(i)) for i in pointer if i >= 0),
                )
            except InputError as error:
                reasons[row] = str(error)
        images = self.factory.images([e for q, shots in shown.values() for e in (q, *shots)])
        for row, (query, demonstrations) in shown.items():
            try:
                segments = self.factory.prompt(demonstrations, query, images)
                branches = self._branches_of(query)
                self._check_length(segments, branches)
            except PromptError as error:
                reasons[row] = str(error)
                continue
            path = tuple(demonstration.id for demonstration in demonstrations)
            known = tuple(o for o in self._known_outputs(query.id) if o not in branches.forms)
            requests[row] = PromptRequest(query, demonstrations, path, segments, branches, known)
        return requests, reasons

    def _check_length(self, segments, branches) -> None:
        longest = max(map(len, branches.forms))
        length = sum(map(len, segments)) + max(longest, self.max_new_tokens)
        limit = self.model.config.text_config.max_position_embeddings
        if length > limit:
            raise PromptError(f"the prompt has {length} tokens; the model's context is {limit}")

    def _branches_of(self, query: Example) -> AnswerBranches:
        found = self._branches.get(query.id)
        if found is None:
            found = answer_branches(query.answers, self.factory.builder, self._answer_weight)
            self._branches.put(query.id, found, 1)
        return found

    def _fill_score(self, batch, row, request, scores: BranchScores) -> None:
        branches = request.branches
        forms, count = (branches.form_answer, branches.weights), len(branches.forms)
        gt_prob, answer_log_probs = combine_forms(scores.log_probs[:count], *forms)
        if self._gt_prob == "mean_token":
            # No probability, so only the score; the answers' log-probabilities stay what they are.
            gt_prob, _ = combine_forms(scores.mean_log_probs[:count], *forms)
        batch.gt_prob[row] = gt_prob
        batch.answer_log_probs[row, : len(answer_log_probs)] = answer_log_probs
        batch.margin[row] = scores.margins[:count].max()
        best = int(np.argmax(scores.margins))
        fits = len(request.forms[best]) <= self.max_new_tokens
        if scores.margins[best] >= self.margin and fits:
            right = best < count
            batch.certified[row] = branches.form_answer[best] if right else OTHER_ANSWER
            batch.margin[row] = scores.margins[best]
            text = branches.form_texts[best] if right else self._text(request.forms[best])
            confidence = float(np.exp(scores.log_probs[best]))
            self._fill_answer(batch, row, request.query, text, confidence)

    def _text(self, tokens: Sequence[int]) -> str:
        """What an output says; its end does not count."""
        words = [token for token in tokens if token != self.end_of_turn]
        return self.tokenizer.decode(words, skip_special_tokens=True).strip()

    def _fill_answer(self, batch, row, query: Example, text: str, confidence: float) -> None:
        batch.texts[row] = text
        batch.accuracy[row] = accuracy_normalized(text, query.answers)
        batch.accuracy_official[row] = accuracy_official_2021(text, query.answers)
        batch.confidence[row] = min(confidence, 1.0)
        batch.similarity[row] = self.embedder.similarity(text, query.answers)


class ReferenceScorer(PromptScorer):
    """One forward pass of the whole model a prompt and answer: plain, obvious, slow."""

    @torch.inference_mode()
    def _score_branches(self, requests: list[PromptRequest]) -> list[BranchScores]:
        return [
            BranchScores.from_tokens([self._one(request, form) for form in request.branches.forms])
            for request in requests
        ]

    @torch.inference_mode()
    def _generate(self, requests: list[PromptRequest]) -> list[Generated]:
        return [self._generate_one(request) for request in requests]

    def _one(self, request: PromptRequest, form) -> tuple[np.ndarray, np.ndarray]:
        inputs = self._inputs(request, form)
        logits = self.model(**inputs, use_cache=False).logits[0]
        return self._read(logits[-len(form) - 1 : -1], form)

    def _read(self, logits: torch.Tensor, form) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability and margin of each token of a form, from its logits `[L, vocabulary]`."""
        rows = logits.float()
        targets = torch.tensor(form, device=self.device)[:, None]
        chosen = rows.gather(1, targets)
        others = rows.scatter(1, targets, float("-inf")).max(-1, keepdim=True).values
        log_probs = chosen - rows.logsumexp(-1, keepdim=True)
        return tuple(x[:, 0].double().cpu().numpy() for x in (log_probs, chosen - others))

    def _generate_one(self, request: PromptRequest) -> Generated:
        inputs = self._inputs(request, ())
        self.model.generation_config.repetition_penalty = 1.0
        out = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end_of_turn,
            pad_token_id=self.end_of_turn,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        log_probs = torch.stack([step[0].float().log_softmax(-1) for step in out.logits])
        return Generated(
            tuple(new.tolist()), float(log_probs.gather(1, new[:, None]).double().sum())
        )

    def _inputs(self, request: PromptRequest, form) -> dict:
        """The model's own inputs, positions left to the model itself."""
        ids = np.concatenate([*(s.ids for s in request.segments), np.array(form, np.int64)])
        ids = torch.from_numpy(ids)[None].to(self.device)
        image_tokens = ids == self.factory.builder.image_token
        examples = (*request.demonstrations, request.query)
        images = [self._pixels(example.image) for example in examples]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": image_tokens.int(),
            "pixel_values": torch.cat([pixels for pixels, _ in images]),
            "image_grid_thw": torch.tensor([grid for _, grid in images], device=self.device),
        }

    def _pixels(self, image: str) -> tuple[torch.Tensor, tuple[int, int, int]]:
        pixels, grid = self.factory.vision.patches(image)
        return torch.from_numpy(pixels).to(self.device, self.dtype), grid
