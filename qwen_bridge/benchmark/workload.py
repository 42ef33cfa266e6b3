"""What the benchmark scores: random pictures, questions and numbers, as much work as is asked for.

Every picture has the same size and every answer is a number of two digits, which has one surface
form only: so `answers` ground truths are `answers` branches, as the work is stated.
"""

import dataclasses

import numpy as np
import torch
from PIL import Image

from qwen_bridge.benchmark.models import SHAPES, random_model
from qwen_bridge.cost import PromptLengths
from qwen_bridge.embedder import Embedder, QwenEncoder
from qwen_bridge.errors import InputError
from qwen_bridge.loading import LoadedModel, load_model
from qwen_bridge.prompts import PromptBuilder, PromptTemplate
from qwen_bridge.scorer import PromptRequest
from qwen_bridge.segments import SegmentFactory
from qwen_bridge.shape import ModelShape
from qwen_bridge.trie import levels
from qwen_bridge.vision import VisionCache
from qwen_bridge.vqa.examples import Dataset, Example, fingerprint_of

POOLS = ("shared", "per_query")
OTHER_QUERIES = 32  # beside those that are timed
FEATURE_BYTES = 2 << 30  # of pictures' features
_GRID = 28  # pixels of a merged token's side
_WORDS = "number comes next before this is What".split()
_QUESTION_WORDS = 6  # with the mark some 7 tokens, as VQAv2's questions have
_ANNOTATORS = 10


@dataclasses.dataclass(frozen=True)
class WorkloadConfig:
    """How much is scored.

    Attributes:
      image_size: side of every picture, pixels.
      queries: that are scored together.
      candidates: of each query.
      shots: demonstrations of each candidate.
      answers: ground truths of each query, each one branch.
      pool: `shared` by all queries, or one `per_query`.
      pool_size: demonstrations of a pool.
      seed: of pictures, texts and pointers.
    """

    image_size: int
    queries: int
    candidates: int
    shots: int
    answers: int
    pool: str
    pool_size: int
    seed: int

    def __post_init__(self):
        if self.image_size % _GRID or self.image_size < _GRID:
            raise InputError(f"--image_size={self.image_size} is not a multiple of {_GRID} pixels")
        if self.answers > _ANNOTATORS:
            raise InputError(
                f"--answers={self.answers} exceeds the {_ANNOTATORS} annotators of a question"
            )
        if self.pool_size < self.shots:
            raise InputError(
                f"--pool_size={self.pool_size} is less than --shots={self.shots}; raise it"
            )
        different = np.prod([float(self.pool_size - i) for i in range(self.shots)])
        if self.candidates > different:
            raise InputError(
                f"--candidates={self.candidates} exceeds the {different:.0f} different pointers "
                f"of --shots={self.shots} into --pool_size={self.pool_size}; raise --pool_size"
            )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to score together.

    Attributes:
      queries: int64 `[n]` query ids.
      pointers: int64 `[n, shots]` demonstration ids.
    """

    queries: np.ndarray
    pointers: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def first(self, count: int) -> "Prompts":
        """The first `count` prompts."""
        return Prompts(self.queries[:count], self.pointers[:count])

    def of(self, query: int) -> "Prompts":
        """The same pointers, all shown to another query."""
        return Prompts(np.full_like(self.queries, query), self.pointers)

    def spread(self, count: int, queries: int) -> "Prompts":
        """`count` of the pointers in turn, each shown to the next of `queries` queries."""
        rows = np.arange(count)
        return Prompts(rows % queries, self.pointers[rows % len(self)])


class Workload:
    """A network and what it is to score.

    Args:
      config: the amount of work.
      model: a name of `SHAPES`, or a checkpoint folder.
      device: torch device.
      dtype: `float32` or `bfloat16`.

    Attributes:
      loaded: the network.
      random: whether its weights are.
      dataset: the queries that are timed, others, and demonstrations of all pools.
      parts: what every `PromptScorer` is made of.
    """

    def __init__(self, config: WorkloadConfig, model: str, device: str, dtype: str):
        self.config = config
        self.random = model in SHAPES
        if self.random:
            torch_dtype = getattr(torch, dtype)
            loaded = random_model(model, device=device, dtype=torch_dtype, seed=config.seed)
        else:
            loaded = load_model(model, device=device, dtype=dtype, max_pixels=1 << 30)
        self.loaded: LoadedModel = loaded
        self.shape = ModelShape.from_config(loaded.model.config.to_dict(), model)
        self.dataset = random_dataset(config)
        self.parts = self.parts_of(loaded)

    def parts_of(
        self, loaded: LoadedModel, vision_bytes: int = FEATURE_BYTES
    ) -> tuple[LoadedModel, Dataset, SegmentFactory, Embedder]:
        """What a scorer with this network is made of; every call has caches of its own."""
        builder = PromptBuilder(loaded.tokenizer, PromptTemplate("chat"))
        vision = VisionCache(
            loaded.model.model.visual,
            loaded.image_processor,
            self.dataset.load_image,
            cache_bytes=vision_bytes,
        )
        judge = QwenEncoder(loaded.model, builder, vision, loaded.fingerprint)
        return loaded, self.dataset, SegmentFactory(builder, vision), Embedder(judge, judge)

    def prompts(self) -> Prompts:
        """Draws distinct pointers for every query."""
        config = self.config
        rng = np.random.default_rng((config.seed, 2))
        queries, pointers = [], []
        for query in range(config.queries):
            first = 0 if config.pool == "shared" else query * config.pool_size
            found: dict[tuple[int, ...], None] = {}
            while len(found) < config.candidates:
                pointer = rng.choice(config.pool_size, config.shots, replace=False) + first
                found.setdefault(tuple(pointer.tolist()))
            queries += [query] * config.candidates
            pointers += found
        shape = (len(queries), config.shots)
        return Prompts(np.array(queries), np.array(pointers, np.int64).reshape(shape))


def random_dataset(config: WorkloadConfig) -> Dataset:
    """Makes the examples; pictures are drawn when they are asked for."""
    rng = np.random.default_rng((config.seed, 1))

    def example(id: int, image: str) -> Example:
        question = " ".join(rng.choice(_WORDS, _QUESTION_WORDS)) + "?"
        numbers = map(str, rng.choice(np.arange(10, 100), config.answers, replace=False))
        # Each of `answers` numbers at least once, in as many answers as there are annotators.
        return Example(id, image, question, tuple(np.resize(list(numbers), _ANNOTATORS).tolist()))

    pools = 1 if config.pool == "shared" else config.queries
    bank = tuple(example(i, f"bank {i}") for i in range(pools * config.pool_size))
    queries = tuple(example(i, f"query {i}") for i in range(config.queries + OTHER_QUERIES))

    def load_image(key: str) -> Image.Image:
        kind, number = key.split()
        rng = np.random.default_rng((config.seed, kind == "bank", int(number)))
        side = config.image_size
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))

    name = f"random {config.image_size} x {config.image_size}"
    return Dataset(name, bank, (), queries, load_image, fingerprint_of(bank, queries))


def measured_lengths(requests: list[PromptRequest]) -> PromptLengths:
    """What the prompts' parts are long, for the cost model.

    Args:
      requests: the prompts.
    """
    layout = PromptLengths.layout
    queries = [request.segments[-1] for request in requests]
    shown = [segment for request in requests for segment in request.segments[1:-1]]
    query = float(np.mean([len(segment) for segment in queries]))
    image = float(np.mean([len(segment.image) for segment in queries]))
    forms = [request.branches.forms for request in requests]
    rows = float(np.mean([sum(map(len, f)) for f in forms]))
    count = float(np.mean([len(f) for f in forms]))
    demonstration = float(np.mean([len(s) for s in shown])) if shown else query + 2
    return PromptLengths(
        image=image,
        system=float(np.mean([len(request.segments[0]) for request in requests])),
        question=query - image - layout,
        answer=demonstration - query - 2,
        layout=layout,
        branch_tokens=rows - count,
        branch_rows=rows,
        forms=count,
    )


def prefix_nodes(prompts: Prompts) -> list[float]:
    """Prefix nodes of each depth, from 1 on, that the prompts need."""
    paths = (tuple(pointer) for pointer in prompts.pointers.tolist())
    return [float(len(level)) for level in levels(paths)[1:]]
