"""From two splits to a data set: which queries are trained on, which evaluated, which left out.

Every loader of files uses it. Choices follow hashes of ids, so that none depends on the order of
a file and a larger choice contains the smaller one.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example, fingerprint_of


def check_sizes(num_train: int, num_eval: int, max_bank: int | None):
    """Refuses numbers that no data could satisfy, before any is read."""
    if max_bank is not None and max_bank < 1:
        raise InputError(f"--max_bank={max_bank} leaves no demonstrations; give 1 or more")
    for flag, number in (("num_queries", num_train), ("num_eval", num_eval)):
        if number < 0:
            raise InputError(f"--{flag}={number} is negative; give 0 or more")


def subsampled(
    name: str,
    bank: list[Example],
    queries: list[Example],
    load_image: Callable[[str], Image.Image],
    *,
    num_train: int,
    num_eval: int,
    seed: int,
    max_bank: int | None,
    queries_file: str | Path,
) -> Dataset:
    """Makes a data set; queries and, if asked, the bank are sub-sampled by seed.

    Evaluation queries lie on different images if they can, and training queries on images
    without evaluation queries until these are used up. As long as `num_train` is at most half of
    the questions, the evaluation queries do not depend on it and a larger one adds training
    queries and changes none. No choice depends on the order of the file.

    Args:
      name: for reports.
      bank: all demonstrations.
      queries: all queries.
      load_image: from an image key to the picture.
      num_train: how many queries to train on, at least 0.
      num_eval: how many queries to evaluate on, at least 0.
      seed: draws the sub-samples.
      max_bank: at most so many demonstrations; None for all.
      queries_file: where the queries come from, for messages.

    Returns:
      A data set whose fingerprint covers the bank, the evaluation queries and all `queries`, but
      not which of them are trained on: mined scores stay valid when `num_train` grows.

    Raises:
      InputError: the numbers do not fit the data.
    """
    if num_train + num_eval > len(queries):
        raise InputError(
            f"--num_queries={num_train} and --num_eval={num_eval} together exceed the "
            f"{len(queries)} questions in {queries_file}; lower them or add questions"
        )
    if max_bank is not None and max_bank < len(bank):
        chosen = set(_shuffled((example.id for example in bank), seed, "bank")[:max_bank])
        bank = [example for example in bank if example.id in chosen]
    train, evaluation = _divide(queries, num_train, num_eval, seed)
    return Dataset(
        name=name,
        bank=tuple(bank),
        train=tuple(train),
        eval=tuple(evaluation),
        load_image=load_image,
        fingerprint=fingerprint_of(bank, evaluation, sorted(queries, key=lambda e: e.id)),
    )


def _divide(
    queries: list[Example], num_train: int, num_eval: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draws the training and the evaluation queries, as `subsampled` promises."""
    by_id = {example.id: example for example in queries}
    order = [by_id[id] for id in _shuffled(by_id, seed, "query")]
    by_image: dict[str, list[Example]] = {}
    for example in order:
        by_image.setdefault(example.image, []).append(example)
    # Evaluation takes a query from each image before a second from any, and training wants images
    # that evaluation leaves: so evaluation draws from half of the questions, from fewer where
    # training needs more, and always from as many as it needs itself.
    limit = min(len(queries) // 2, len(queries) - num_train)
    groups: list[list[Example]] = []
    room = 0
    for group in by_image.values():
        if room >= num_eval and room + len(group) > limit:
            break
        groups.append(group)
        room += len(group)
    rounds = itertools.zip_longest(*groups)
    in_turn = (example for turn in rounds for example in turn if example is not None)
    evaluation = list(itertools.islice(in_turn, num_eval))

    taken = {example.id for example in evaluation}
    shared = {example.image for example in evaluation}
    rest = [example for example in order if example.id not in taken]
    rest.sort(key=lambda example: example.image in shared)
    return rest[:num_train], evaluation


def _shuffled(ids: Iterable[int], seed: int, purpose: str) -> list[int]:
    """Orders ids by a hash, so that where an id stands among others depends on the seed only."""

    def rank(id: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{purpose}/{id}".encode(), digest_size=16).digest()

    return sorted(ids, key=rank)
