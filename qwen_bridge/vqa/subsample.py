"""From two splits to a data set: which queries are trained on, which evaluated, which left out.

Every loader of files uses it. Choices follow hashes of ids, so that none depends on the order of
a file and a larger choice contains the smaller one.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example, fingerprint_of


@dataclass(frozen=True, kw_only=True)
class SubSample:
    """How many of the examples are used, and which.

    Attributes:
      num_train: how many queries to train on, at least 0.
      num_eval: how many queries to evaluate on, at least 0; on other images.
      seed: decides which queries, and which demonstrations.
      max_bank: at most so many demonstrations, at least 1; None for all.

    Raises:
      InputError: a number that no data could satisfy.
    """

    num_train: int
    num_eval: int
    seed: int
    max_bank: int | None = None

    def __post_init__(self):
        if self.max_bank is not None and self.max_bank < 1:
            raise InputError(f"--max_bank={self.max_bank} leaves no demonstrations; give 1 or more")
        for flag, number in (("num_queries", self.num_train), ("num_eval", self.num_eval)):
            if number < 0:
                raise InputError(f"--{flag}={number} is negative; give 0 or more")


def subsampled(
    name: str,
    bank: list[Example],
    queries: list[Example],
    load_image: Callable[[str], Image.Image],
    sample: SubSample,
    queries_file: str | Path,
) -> Dataset:
    """Makes a data set; queries and, if asked, the bank are sub-sampled by seed.

    No image has both training and evaluation queries. As long as either number is at most about
    half of the questions, a larger one adds queries and changes none, of its own or of the other.

    Args:
      name: for reports.
      bank: all demonstrations.
      queries: all queries.
      load_image: from an image key to the picture.
      sample: how many of them, and which.
      queries_file: where the queries come from, for messages.

    Returns:
      A data set whose fingerprint covers all of `bank`, all of `queries` and the seed, but not
      how many of them are drawn: mined scores stay valid when the numbers grow.

    Raises:
      InputError: the numbers do not fit the data.
    """
    train, evaluation = _divide(queries, sample, queries_file)
    drawn = bank
    if sample.max_bank is not None and sample.max_bank < len(bank):
        order = _shuffled((example.id for example in bank), sample.seed, "bank")
        chosen = set(order[: sample.max_bank])
        drawn = [example for example in bank if example.id in chosen]
    content = fingerprint_of(bank, sorted(queries, key=lambda example: example.id))
    return Dataset(
        name=name,
        bank=tuple(drawn),
        train=tuple(train),
        eval=tuple(evaluation),
        load_image=load_image,
        fingerprint=hashlib.sha256(f"seed {sample.seed} of {content}".encode()).hexdigest(),
    )


def _divide(
    queries: list[Example], sample: SubSample, queries_file: str | Path
) -> tuple[list[Example], list[Example]]:
    """Draws the training and the evaluation queries, as `subsampled` promises.

    The images, in an order by seed, are cut in two: evaluation draws from those before the cut,
    training from those behind it. The cut halves the questions, and moves only where one side
    needs more than it has.
    """
    by_id = {example.id: example for example in queries}
    order = [by_id[id] for id in _shuffled(by_id, sample.seed, "query")]
    by_image: dict[str, list[Example]] = {}
    for example in order:
        by_image.setdefault(example.image, []).append(example)
    groups = list(by_image.values())
    # before[i] questions are on the first i images.
    before = [0, *itertools.accumulate(map(len, groups))]
    least = next((i for i, count in enumerate(before) if count >= sample.num_eval), None)
    most = max(
        (i for i, count in enumerate(before) if len(order) - count >= sample.num_train),
        default=None,
    )
    if least is None or most is None or least > most:
        _refuse(sample, before, least, queries_file)
    half = max(i for i, count in enumerate(before) if count <= len(order) // 2)
    cut = min(max(half, least), most)
    # Evaluation takes a query from each image before a second from any: queries of one image are
    # not independent, and its intervals take them as if they were.
    rounds = itertools.zip_longest(*groups[:cut])
    in_turn = (example for turn in rounds for example in turn if example is not None)
    evaluation = list(itertools.islice(in_turn, sample.num_eval))
    behind = {group[0].image for group in groups[cut:]}
    train = (example for example in order if example.image in behind)
    return list(itertools.islice(train, sample.num_train)), evaluation


def _refuse(sample: SubSample, before: list[int], least: int | None, queries_file: str | Path):
    asked = f"--num_queries={sample.num_train} and --num_eval={sample.num_eval}"
    total, images = before[-1], len(before) - 1
    if sample.num_train + sample.num_eval > total:
        raise InputError(
            f"{asked} together exceed the {total} questions in {queries_file}; "
            "lower them or add questions"
        )
    room = total - before[least]
    raise InputError(
        f"{asked} do not fit: training and evaluation queries are on different images, and "
        f"{queries_file} has {total} questions on {images} images; beside this --num_eval at most "
        f"--num_queries={room} fits, so lower one of them or add questions"
    )


def _shuffled(ids: Iterable[int], seed: int, purpose: str) -> list[int]:
    """Orders ids by a hash, so that where an id stands among others depends on the seed only."""

    def rank(id: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{purpose}/{id}".encode(), digest_size=16).digest()

    return sorted(ids, key=rank)
