"""What scoring costs, from the shape of the network: floating-point operations and bytes.

A FLOP is one multiplication or one addition, so a matrix product [m, k] x [k, n] is 2mkn. Counted
are matrix products and attention, as `torch.utils.flop_counter` does; norms, activations and
rotations are left out (under 1% at these widths). Attention counts its whole rectangle of queries
and keys, masked entries included, because that is what a dense mask computes.

The *rungs* are the ways to score the candidates of one query, from the naive loop to the trie
with resident prefixes; their ratios are what each idea is worth.
"""

import dataclasses
import math

from qwen_bridge.shape import ModelShape, VisionShape

RUNGS = ("naive", "naive_batched", "vision_cache", "branches", "trie_cold", "trie_warm")


@dataclasses.dataclass(frozen=True)
class PromptLengths:
    """How long the parts of a prompt are, in tokens.

    The defaults are means over 8,977 real VQAv2 questions with the published tokenizer and the
    chat layout, without an instruction.

    Attributes:
      image: merged tokens of an image.
      system: the system turn.
      question: a question with its instruction.
      answer: the answer that a demonstration shows.
      layout: special tokens and role names of a query: two turns' worth, and around the image.
      branch_tokens: tokens of all answer branches of a query that enter the last forward: each
        form without its last token, the end of the turn, which is only predicted.
      branch_rows: tokens of all branches that are predicted, ends included.
      forms: answer branches of a query.
      generated: tokens generated for an answer, its end included.
    """

    image: int
    system: float = 11.0
    question: float = 7.4
    answer: float = 1.4
    layout: float = 10.0
    branch_tokens: float = 9.2
    branch_rows: float = 14.1
    forms: float = 4.9
    generated: float = 2.4

    @property
    def query(self) -> float:
        """The query's segment, up to where the answer begins."""
        return self.layout + self.image + self.question

    @property
    def demonstration(self) -> float:
        """One demonstration's segment: as a query, with the answer and the end of its turn."""
        return self.query + self.answer + 2

    def prefix(self, depth: int) -> float:
        """System turn and `depth` demonstrations."""
        return self.system + depth * self.demonstration


def vision_flops(vision: VisionShape, grid: tuple[int, int]) -> float:
    """FLOPs of one image in the vision tower.

    Args:
      vision: the tower.
      grid: (rows, columns) of patches.
    """
    patches = math.prod(grid)
    merged = patches // vision.merge**2
    wide = vision.hidden * vision.merge**2
    linear = 2 * (4 * vision.hidden**2 + 3 * vision.hidden * vision.intermediate)
    side = vision.window // vision.merge // vision.patch  # of a window, merged tokens
    # The window at an edge holds what is left: pairs are (sum of r^2) (sum of c^2) in patches.
    rows, columns = (
        (cells // side) * side**2 + (cells % side) ** 2
        for cells in (extent // vision.merge for extent in grid)
    )
    windowed = rows * columns * vision.merge**4
    full = patches**2
    pairs = (vision.depth - vision.full_attention) * windowed + vision.full_attention * full
    return (
        2.0 * patches * vision.patch_values * vision.hidden
        + patches * vision.depth * linear
        + 4.0 * vision.hidden * pairs
        + 2.0 * merged * wide * (wide + vision.out)
    )


def language_flops(shape: ModelShape, tokens: float, keys: float) -> float:
    """FLOPs of the language model's layers, without its head.

    Args:
      shape: the network.
      tokens: that pass through it, the images' included.
      keys: tokens that each attends to, cached ones and masked ones included.
    """
    queries, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 2 * shape.hidden * (2 * queries + 2 * kv + 3 * shape.intermediate)
    return shape.layers * tokens * (linear + 4.0 * queries * keys)


def head_flops(shape: ModelShape, rows: float) -> float:
    """FLOPs of the language head at `rows` positions."""
    return 2.0 * shape.hidden * shape.vocabulary * rows


def prefix_flops(shape: ModelShape, lengths: PromptLengths, depth: int) -> float:
    """FLOPs of one node of the trie: a segment after its cached prefix.

    Args:
      shape: the network.
      lengths: of the prompt's parts.
      depth: 0 is the system turn, d the d-th demonstration.
    """
    own = lengths.demonstration if depth else lengths.system
    return language_flops(shape, own, lengths.prefix(depth))


def last_flops(shape: ModelShape, lengths: PromptLengths, shots: int) -> float:
    """FLOPs of the last forward: query and answer branches after a cached prefix, head included."""
    own = lengths.query + lengths.branch_tokens
    attended = language_flops(shape, own, lengths.prefix(shots) + own)
    return attended + head_flops(shape, lengths.branch_rows)


def decode_flops(shape: ModelShape, lengths: PromptLengths, shots: int) -> float:
    """FLOPs of generating one answer from a cached prefix: query once, then token by token."""
    prompt = lengths.prefix(shots) + lengths.query
    steps = lengths.generated
    first = language_flops(shape, lengths.query, prompt)
    later = language_flops(shape, steps - 1, prompt + steps / 2)
    return first + later + head_flops(shape, steps)


def embedding_flops(shape: ModelShape, lengths: PromptLengths, *, answer: bool) -> float:
    """FLOPs of the texts of one embedding: question, and answer where it is shown."""
    question = language_flops(shape, lengths.question, lengths.question)
    return question + (language_flops(shape, lengths.answer, lengths.answer) if answer else 0.0)


def distinct(draws: float, of: float) -> float:
    """Expected number of distinct values among `draws` uniform draws from `of`."""
    return of * -math.expm1(draws * math.log1p(-1 / of)) if of > 1 else min(draws, 1.0)


def trie_nodes(candidates: float, shots: int, pool: int) -> list[float]:
    """Expected prefix nodes of each depth, 1 to `shots`, that one query's candidates need.

    Pointers are ordered and do not repeat a demonstration; all of them are distinct, so the
    deepest level has one node a candidate.
    """
    nodes, places = [], 1
    for depth in range(1, shots + 1):
        places *= pool - depth + 1
        full = candidates if depth == shots else distinct(candidates, places)
        nodes.append(min(full, float(places)))
    return nodes


def rung_flops(
    shape: ModelShape,
    lengths: PromptLengths,
    grid: tuple[int, int],
    *,
    candidates: int,
    shots: int,
    nodes: list[float] | None = None,
    images: int = 0,
) -> dict[str, float]:
    """FLOPs of scoring one query's candidates, by rung.

    `naive`: a forward of the whole model for each candidate and answer form, logits everywhere.
    `naive_batched`: the forms of a candidate in one batch; the same work, fewer calls.
    `vision_cache`: `naive` with the features of every image kept.
    `branches`: one forward a candidate, the forms as branches, the head at answer rows only.
    `trie_cold`: shared prefixes once, none of them known before. `trie_warm`: all known before.

    Args:
      shape: the network.
      lengths: of the prompt's parts; its image length must be that of `grid`.
      grid: (rows, columns) of patches of every image.
      candidates: pointers of the query.
      shots: demonstrations each.
      nodes: prefix nodes of each depth for `trie_cold`; expected ones of a pool of as many
        demonstrations as candidates by default.
      images: that pass through the vision tower in the cached rungs, `trie_warm` excepted; 0
        where the features are known from before, as a long run amortises them.

    Returns:
      FLOPs by name of `RUNGS`.
    """
    prompts = candidates * lengths.forms
    length = lengths.prefix(shots) + lengths.query
    # Every form is a row of its own, read to its last token.
    row = length + lengths.branch_rows / lengths.forms
    text = prompts * (language_flops(shape, row, row) + head_flops(shape, row))
    image = vision_flops(shape.vision, grid)
    naive = text + prompts * (shots + 1) * image
    known = images * image
    own = length + lengths.branch_tokens
    branches = language_flops(shape, own, own) + head_flops(shape, lengths.branch_rows)
    last = candidates * last_flops(shape, lengths, shots)
    nodes = trie_nodes(candidates, shots, candidates) if nodes is None else nodes
    prefixes = prefix_flops(shape, lengths, 0) + sum(
        count * prefix_flops(shape, lengths, depth) for depth, count in enumerate(nodes, 1)
    )
    return {
        "naive": naive,
        "naive_batched": naive,
        "vision_cache": text + known,
        "branches": candidates * branches + known,
        "trie_cold": prefixes + last + known,
        "trie_warm": last,
    }
