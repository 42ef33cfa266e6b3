"""What crosses the bridge in a slot: prompts one way, scores and answers the other.

A scorer returns an `EmbedBatch`, a `ScoreBatch` or an `AnswerBatch`; their numbers travel as arrays
in a slot of shared memory, their words in the control frame beside it (see `messages.py`). Where an
array lies follows from the verb and the counts alone, so no offset of a peer is ever trusted. Both
ends check everything they receive: what is malformed is a `ProtocolError` that names the fault.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

VERBS = ("embed", "score", "answer")
# What `embed` embeds: all parts, or the image or the texts only.
KINDS = tuple(f"{split}{only}" for split in ("bank", "query") for only in ("", ":image", ":text"))

# What is said of an answer, besides its text.
JUDGED = ("accuracy", "accuracy_official", "confidence", "similarity")

MAX_FRAME_BYTES = 1 << 20
MAX_ROWS = 4096
MAX_SHOTS = 64
MAX_ANSWERS = 256
MAX_EMBEDDING_DIM = 1 << 17
MAX_TEXT = 4096

ALIGNMENT = 64

# In `ScoreBatch.certified`: what greedy decoding gives is known, and is no ground truth.
OTHER_ANSWER = -2

# A probability is a sum of float32 exponentials: it may pass 1 by this much and no more.
_ROUNDING = 1e-3


class ProtocolError(ValueError):
    """The other end sent something malformed; the message names the field and the value."""


@dataclass(frozen=True, slots=True, eq=False)
class EmbedBatch:
    """Embeddings of n examples.

    A row in `reasons` has an image that cannot be read: its image part is zero and stands for
    nothing, so whoever uses the row has to look there first. Its text parts are as they should be.

    Attributes:
      embeddings: [n, D] float32.
      reasons: row -> why its image could not be embedded.
    """

    embeddings: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreBatch:
    """What the VLM thinks of the ground truth after each of n prompts, without generating.

    A row in `reasons` could not be scored: its numbers are NaN (-inf in `answer_log_probs`),
    which is not the same as a score of zero.

    Attributes:
      gt_prob: [n] float32, `vqa_gt_prob`.
      answer_log_probs: [n, A] float32, log P of each unique ground truth of that row's query, in
        nats; rows with fewer than A answers are padded with -inf.
      certified: [n] int16, column of the answer that greedy decoding provably gives,
        `OTHER_ANSWER` where that is known to be another answer, or -1.
      margin: [n] float32, smallest logit gap along the certified answer, in nats.
      accuracy, accuracy_official, confidence, similarity: [n] float32, of the certified answer
        as in `AnswerBatch`; NaN where none is.
      texts: n strings, the certified answer as it would be generated; "" where none is.
      reasons: row -> why it could not be scored.
    """

    gt_prob: np.ndarray
    answer_log_probs: np.ndarray
    certified: np.ndarray
    margin: np.ndarray
    accuracy: np.ndarray
    accuracy_official: np.ndarray
    confidence: np.ndarray
    similarity: np.ndarray
    texts: list[str]
    reasons: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.gt_prob)


@dataclass(frozen=True, slots=True, eq=False)
class AnswerBatch:
    """What the VLM generates after each of n prompts, and how right it is.

    A row in `reasons` could not be answered: its numbers are NaN and its text is empty.

    Attributes:
      texts: n generated answers.
      accuracy: [n] float32 in [0, 1], VQA accuracy in the `normalized` mode.
      accuracy_official: [n] float32 in [0, 1], in the `official_2021` mode.
      confidence: [n] float32 in [0, 1], P(generated text and its end | prompt).
      similarity: [n] float32 in [-1, 1], best cosine between prediction and ground truths.
      reasons: row -> why it could not be answered.
    """

    texts: list[str]
    accuracy: np.ndarray
    accuracy_official: np.ndarray
    confidence: np.ndarray
    similarity: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)


def empty_score(rows: int, answers: int, reasons: Mapping[int, str]) -> ScoreBatch:
    """A batch of `rows` prompts and `answers` columns to be filled in: no score anywhere yet."""
    return ScoreBatch(
        gt_prob=np.full(rows, np.nan, np.float32),
        answer_log_probs=np.full((rows, answers), -np.inf, np.float32),
        certified=np.full(rows, -1, np.int16),
        margin=np.full(rows, np.nan, np.float32),
        **{name: np.full(rows, np.nan, np.float32) for name in JUDGED},
        texts=[""] * rows,
        reasons=dict(reasons),
    )


def empty_answer(rows: int, reasons: Mapping[int, str]) -> AnswerBatch:
    """A batch of `rows` prompts to be filled in: no answer anywhere yet."""
    numbers = {name: np.full(rows, np.nan, np.float32) for name in JUDGED}
    return AnswerBatch(texts=[""] * rows, reasons=dict(reasons), **numbers)


def failed_score(rows: int, reason: str) -> ScoreBatch:
    """A batch of `rows` prompts of which none could be scored, all for one reason."""
    return empty_score(rows, 0, dict.fromkeys(range(rows), reason))


def failed_answer(rows: int, reason: str) -> AnswerBatch:
    """A batch of `rows` prompts of which none could be answered, all for one reason."""
    return empty_answer(rows, dict.fromkeys(range(rows), reason))


# The arrays of a slot ------------------------------------------------------------------------


class ArraySpec(NamedTuple):
    """One array of a slot: little-endian `dtype`, C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def request_arrays(verb: str, rows: int, shots: int) -> tuple[ArraySpec, ...]:
    """The arrays of a request, in the order in which they lie in the slot."""
    if verb == "embed":
        return (ArraySpec("ids", "<i8", (rows,)),)
    return (ArraySpec("queries", "<i8", (rows,)), ArraySpec("pointers", "<i8", (rows, shots)))


def result_arrays(verb: str, rows: int, columns: int) -> tuple[ArraySpec, ...]:
    """The arrays of a result; `columns` is D for embed, A for score and unused for answer."""
    if verb == "embed":
        return (ArraySpec("embeddings", "<f4", (rows, columns)),)
    if verb == "score":
        return (
            ArraySpec("gt_prob", "<f4", (rows,)),
            ArraySpec("answer_log_probs", "<f4", (rows, columns)),
            ArraySpec("certified", "<i2", (rows,)),
            ArraySpec("margin", "<f4", (rows,)),
            *(ArraySpec(name, "<f4", (rows,)) for name in JUDGED),
        )
    return tuple(ArraySpec(name, "<f4", (rows,)) for name in JUDGED)


def offsets(specs: Sequence[ArraySpec], capacity: int) -> list[int]:
    """Byte offset of each array in a slot of `capacity` bytes, each on a cache line of its own."""
    starts, end = [], 0
    for spec in specs:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        count = 1
        for length in spec.shape:
            count *= length
        end = start + count * np.dtype(spec.dtype).itemsize
        if end > capacity:
            raise ProtocolError(
                f"array {spec.name} of shape {spec.shape} ends at byte {end}, "
                f"past the {capacity} bytes of a slot"
            )
        starts.append(start)
    return starts


def extent(specs: Sequence[ArraySpec], capacity: int) -> int:
    """How many bytes of a slot these arrays take, gaps included."""
    last = specs[-1]
    nbytes = int(np.prod(last.shape)) * np.dtype(last.dtype).itemsize
    return offsets(specs, capacity)[-1] + nbytes


def rows_that_fit(verb: str, shots: int, columns: int, capacity: int) -> int:
    """How many prompts a slot holds, request and result being in it one after the other."""
    rows = MAX_ROWS
    for specs in (request_arrays(verb, 1, shots), result_arrays(verb, 1, columns)):
        row_bytes = sum(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in specs)
        rows = min(rows, (capacity - ALIGNMENT * len(specs)) // row_bytes)
    return max(rows, 0)


def write_arrays(
    view: memoryview, specs: Sequence[ArraySpec], arrays: Mapping[str, np.ndarray]
) -> None:
    """Copies `arrays` into a slot."""
    for spec, start in zip(specs, offsets(specs, len(view))):
        array = np.asarray(arrays[spec.name])
        if array.shape != spec.shape:
            raise ProtocolError(f"{spec.name} has shape {array.shape}, not {spec.shape}")
        np.ndarray(spec.shape, spec.dtype, buffer=view, offset=start)[...] = array


def read_arrays(view: memoryview, specs: Sequence[ArraySpec]) -> dict[str, np.ndarray]:
    """Copies the arrays out of a slot; the slot may be reused as soon as this returns."""
    return {
        spec.name: np.ndarray(spec.shape, spec.dtype, buffer=view, offset=start).copy()
        for spec, start in zip(specs, offsets(specs, len(view)))
    }


# What is accepted ----------------------------------------------------------------------------


def check_ids(ids, name: str = "ids") -> np.ndarray:
    """[N] int64 dataset ids, none negative."""
    ids = _integers(name, ids, 1)
    if ids.size and ids.min() < 0:
        raise ProtocolError(f"{name} holds {ids.min()}; an id is never negative")
    return ids


def check_prompts(queries, pointers) -> tuple[np.ndarray, np.ndarray]:
    """[n] int64 query ids and [n, S] int64 demonstration ids, right-padded with -1.

    No column at all means no demonstration, as does a column of -1.
    """
    queries = check_ids(queries, "queries")
    pointers = _integers("pointers", pointers, 2)
    if len(pointers) != len(queries):
        raise ProtocolError(f"{len(pointers)} pointers for {len(queries)} queries; one each")
    if pointers.shape[1] > MAX_SHOTS:
        raise ProtocolError(f"pointers of {pointers.shape[1]} shots; at most {MAX_SHOTS}")
    if pointers.shape[1] == 0:
        pointers = np.full((len(queries), 1), -1, np.int64)
    if pointers.size and pointers.min() < -1:
        raise ProtocolError(f"pointers hold {pointers.min()}; ids are >= 0 and padding is -1")
    gaps = np.flatnonzero(((pointers[:, :-1] < 0) & (pointers[:, 1:] >= 0)).any(axis=1))
    if gaps.size:
        row = int(gaps[0])
        raise ProtocolError(
            f"pointers row {row} is {pointers[row].tolist()}; -1 only pads on the right"
        )
    return queries, pointers


def check_embed(batch, rows: int, columns: int) -> EmbedBatch:
    """An `EmbedBatch` of exactly `rows` examples, finite also where an image has a reason."""
    if not isinstance(batch, EmbedBatch):
        raise ProtocolError(f"embed returned {type(batch).__name__}, not an EmbedBatch")
    reasons, _ = _check_reasons(batch.reasons, rows)
    embeddings = _floats("embeddings", batch.embeddings, (rows, columns))
    _require("embeddings", embeddings, np.isfinite(embeddings), "finite")
    return EmbedBatch(embeddings, reasons)


def check_score(batch, rows: int) -> ScoreBatch:
    """A `ScoreBatch` of exactly `rows` prompts, each with its numbers or with its reason."""
    if not isinstance(batch, ScoreBatch):
        raise ProtocolError(f"score returned {type(batch).__name__}, not a ScoreBatch")
    reasons, scored = _check_reasons(batch.reasons, rows)
    gt_prob = _floats("gt_prob", batch.gt_prob, (rows,))
    log_probs = _floats("answer_log_probs", batch.answer_log_probs, (rows, None))
    margin = _floats("margin", batch.margin, (rows,))
    certified = _integers("certified", batch.certified, 1)
    texts = _check_texts(batch.texts, rows)
    answers = log_probs.shape[1]
    if answers > MAX_ANSWERS:
        raise ProtocolError(f"answer_log_probs has {answers} columns; at most {MAX_ANSWERS}")
    if len(certified) != rows:
        raise ProtocolError(f"certified has {len(certified)} rows, not {rows}")
    if reasons:
        failed = ~scored
        gt_prob[failed] = margin[failed] = np.nan
        log_probs[failed] = -np.inf
        certified[failed] = -1
        texts = [text if kept else "" for text, kept in zip(texts, scored)]
    _require("gt_prob", gt_prob, np.isfinite(gt_prob) & (gt_prob >= 0) | ~scored, "finite, >= 0")
    _require("answer_log_probs", log_probs, log_probs <= _ROUNDING, "<= 0, and no NaN")
    allowed = (certified >= OTHER_ANSWER) & (certified < answers)
    _require("certified", certified, allowed, f"-1, {OTHER_ANSWER} or a column")
    _require("margin", margin, np.isfinite(margin) | (certified == -1), "finite where certified")
    return ScoreBatch(
        gt_prob,
        log_probs,
        certified.astype(np.int16),
        margin,
        **_check_judged(batch, rows, certified != -1),
        texts=texts,
        reasons=reasons,
    )


def check_answer(batch, rows: int) -> AnswerBatch:
    """An `AnswerBatch` of exactly `rows` prompts, each with its numbers or with its reason."""
    if not isinstance(batch, AnswerBatch):
        raise ProtocolError(f"answer returned {type(batch).__name__}, not an AnswerBatch")
    reasons, answered = _check_reasons(batch.reasons, rows)
    texts = _check_texts(batch.texts, rows)
    if reasons:
        texts = [text if kept else "" for text, kept in zip(texts, answered)]
    return AnswerBatch(texts=texts, reasons=reasons, **_check_judged(batch, rows, answered))


def _check_judged(batch, rows: int, answered: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers that judge an answer: in range where `answered`, NaN elsewhere."""
    numbers = {}
    for name in JUDGED:
        array = _floats(name, getattr(batch, name), (rows,))
        array[~answered] = np.nan
        low, high = (-1.0 if name == "similarity" else 0.0), 1.0
        within = (array >= low - _ROUNDING) & (array <= high + _ROUNDING)
        _require(name, array, within | ~answered, f"in [{low:g}, {high:g}]")
        numbers[name] = array
    return numbers


def check_result(verb: str, result, rows: int, embedding_dim: int):
    """What a scorer returned for one request, checked and of the dtypes of the wire."""
    if verb == "embed":
        return check_embed(result, rows, embedding_dim)
    return check_score(result, rows) if verb == "score" else check_answer(result, rows)


def split_result(verb: str, result) -> tuple[int, dict[str, np.ndarray], list[str], dict]:
    """A checked result as (columns, arrays, texts, reasons): numbers for the slot, words not."""
    if verb == "embed":
        return result.embeddings.shape[1], {"embeddings": result.embeddings}, [], result.reasons
    columns = result.answer_log_probs.shape[1] if verb == "score" else 0
    names = (spec.name for spec in result_arrays(verb, 0, 0))
    return columns, {name: getattr(result, name) for name in names}, result.texts, result.reasons


def join_result(verb: str, arrays: Mapping[str, np.ndarray], texts: list[str], reasons: dict):
    """The inverse of `split_result`, still to be checked."""
    if verb == "embed":
        return EmbedBatch(arrays["embeddings"], reasons)
    return (ScoreBatch if verb == "score" else AnswerBatch)(texts=texts, reasons=reasons, **arrays)


def _integers(name: str, values, ndim: int) -> np.ndarray:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        raise ProtocolError(
            f"{name} is {array.dtype} of shape {array.shape}; "
            f"it must hold integers in {ndim} dimension{'s' if ndim > 1 else ''}"
        )
    return array.astype(np.int64)


def _floats(name: str, values, shape: tuple[int | None, ...]) -> np.ndarray:
    """A float32 copy of `values`, whose shape must be `shape` (None: any length)."""
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape)
    )
    if array.dtype.kind != "f" or not fits:
        wanted = tuple("any" if length is None else length for length in shape)
        raise ProtocolError(
            f"{name} is {array.dtype} of shape {array.shape}; it must be float of shape {wanted}"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _require(name: str, array: np.ndarray, good: np.ndarray, what: str) -> None:
    if good.all():
        return
    where = tuple(int(i) for i in np.argwhere(~good)[0])
    raise ProtocolError(
        f"{name}{list(where)} is {array[where]}, with no reason given; it must be {what}"
    )


def _check_texts(texts, rows: int) -> list[str]:
    if not isinstance(texts, list | tuple) or len(texts) != rows:
        raise ProtocolError(f"texts must be a list of {rows} strings")
    if {str}.issuperset(map(type, texts)) and max(map(len, texts), default=0) <= MAX_TEXT:
        return list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise ProtocolError(f"texts[{row}] must be a string of at most {MAX_TEXT} characters")
    return list(texts)


def _check_reasons(reasons, rows: int) -> tuple[dict[int, str], np.ndarray]:
    """The reasons by row as plain ints, and [rows] bool: which rows have none."""
    if not isinstance(reasons, Mapping):
        raise ProtocolError(f"reasons is {type(reasons).__name__}, not a dict from row to text")
    clean = {}
    for row, why in reasons.items():
        if isinstance(row, bool) or not isinstance(row, int | np.integer) or not 0 <= row < rows:
            raise ProtocolError(f"reasons names row {row!r} of {rows}")
        if not isinstance(why, str) or not why:
            raise ProtocolError(f"reasons[{row}] is {why!r}; it must say why in words")
        clean[int(row)] = why[:MAX_TEXT]
    fine = np.ones(rows, bool)
    fine[list(clean)] = False
    return clean, fine
