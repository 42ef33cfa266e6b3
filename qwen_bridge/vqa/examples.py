"""What every VQA data set looks like to the rest of the bridge: examples and three groups of them.

A loader (the embedded digits, the official VQA files) fills a `Dataset`; prompts, scorers and
embeddings read nothing else. Images stay on disk and are opened by key when they are needed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from PIL import Image

from qwen_bridge.errors import InputError

_MAX_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Example:
    """One image, one question, and what the annotators answered.

    Attributes:
      id: the data set's own number, in [0, 2**63); negative numbers pad pointers on the wire.
      image: key of the image; two examples on the same picture have the same key.
      question: as asked.
      answers: one raw string an annotator, in the file's order.
      question_type: the data set's own label, for tables; may be empty.
      answer_type: likewise ("yes/no", "number", "other" in VQAv2).
    """

    id: int
    image: str
    question: str
    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""

    @property
    def answer(self) -> str:
        """The most common raw answer; of equals, the one that comes first."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class Dataset:
    """A bank of demonstrations, and the queries to train and to evaluate on.

    Attributes:
      name: for reports.
      bank: demonstrations; ids unique among themselves.
      train: queries to mine and train on.
      eval: queries to evaluate on; ids unique over train and eval together.
      load_image: from an image key to the picture, in RGB.
      fingerprint: changes whenever an id could mean another example; see `fingerprint_of`.
    """

    name: str
    bank: tuple[Example, ...] = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    eval: tuple[Example, ...] = field(repr=False)
    load_image: Callable[[str], Image.Image] = field(repr=False)
    fingerprint: str
    _by_kind: dict[str, dict[int, Example]] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not self.bank:
            raise InputError(f"data set {self.name!r}: the bank is empty; give it demonstrations")
        by_kind = {
            "bank": _index(self.bank, f"data set {self.name!r}, bank"),
            "query": _index(self.train + self.eval, f"data set {self.name!r}, train and eval"),
        }
        object.__setattr__(self, "_by_kind", by_kind)

    def example(self, kind: str, id: int) -> Example:
        """Looks an example up by id, among the demonstrations ("bank") or the queries ("query")."""
        if kind not in self._by_kind:
            allowed = " or ".join(map(repr, self._by_kind))
            raise InputError(f"kind={kind!r} is not a kind of example; it must be {allowed}")
        try:
            return self._by_kind[kind][id]
        except KeyError:
            raise InputError(
                f"data set {self.name!r} has no {kind} example with id {id}; "
                "the id comes from another data set, split or sub-sample"
            ) from None


def fingerprint_of(*groups: Iterable[Example]) -> str:
    """The sha256 of everything the examples say, in order, as hexadecimal digits.

    Images count by key, not by content. Examples moved from one group to the next change it.
    """
    digest = hashlib.sha256()
    for group in groups:
        for example in group:
            row = (
                example.id,
                example.image,
                example.question,
                example.answers,
                example.question_type,
                example.answer_type,
            )
            digest.update(json.dumps(row).encode() + b"\n")
        digest.update(b"end of group\n")
    return digest.hexdigest()


def _index(examples: tuple[Example, ...], where: str) -> dict[int, Example]:
    by_id = {}
    for example in examples:
        if not 0 <= example.id <= _MAX_ID:
            raise InputError(f"{where}: id {example.id} is outside [0, 2**63); renumber it")
        if not example.answers:
            raise InputError(f"{where}: id {example.id} has no answers; add some or remove it")
        if example.id in by_id:
            raise InputError(f"{where}: id {example.id} occurs twice; make the ids unique")
        by_id[example.id] = example
    return by_id
