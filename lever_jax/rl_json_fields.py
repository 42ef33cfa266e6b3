"""One query of an RL JSON file: from its JSON object to typed records, and back.

All the rules about what a field may hold, and which readings of a pointer are possible, are here;
`rl_json.py` deals with files and the store.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lever_jax.errors import InputError
from lever_jax.store import HOW, ScoreRecord

_ENTRY_FIELDS = frozenset(
    {"query", "candidate_pool_ids", "candidate_pool_similarity", "pointer_candidates"}
)
_ANSWER_FIELDS = (
    "vqa_pred_answer",
    "vqa_correct",
    "vqa_acc_score",
    "vqa_acc_official",
    "confidence",
    "similarity",
    "how",
)
_CANDIDATE_FIELDS = frozenset(
    {
        *("pointer", "pointer_pos", "gen_method", "logprob_score", "beam_score", "kept"),
        *("vqa_gt_prob", "answer_log_probs", "certified", "margin"),
        *("eval_failed", "eval_failed_reason", *_ANSWER_FIELDS),
    }
)


@dataclass(slots=True)
class Candidate:
    """One scored pointer of a query.

    Attributes:
      record: its score and answer; `record.pointer` holds demonstration ids.
      source: the sampler that proposed it, `gen_method` in the file.
      log_prob: under the behaviour policy, nats; NaN where it has none.
      kept: whether it stayed in the query's group, None if nobody decided.
      beam_score: what a beam search of others ranked it by, any scale, higher is better; or None.
      extra: fields of the file that say nothing to us, passed through: unknown ones, and what
        stood beside a missing accuracy, such as the empty answer of a failed evaluation.
    """

    record: ScoreRecord
    source: str
    log_prob: float = math.nan
    kept: bool | None = None
    beam_score: float | None = None
    extra: dict = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether anything says how good it is, or that nothing could."""
        record = self.record
        return (record.gt_prob, record.accuracy, record.eval_failed) != (None, None, None)


@dataclass(slots=True)
class QueryEntry:
    """One query of the file.

    Attributes:
      query_id: the dataset's id.
      description: its "query" object without the id: question and answers, as they are.
      pool: demonstration ids of the candidate pool, in the order of the actions, or None.
      similarity: of each of them to the query, or None.
      candidates: its scored pointers; where one is there twice, both have the same scores.
      extra: unknown fields, passed through.
    """

    query_id: int
    description: dict
    pool: tuple[int, ...] | None = None
    similarity: tuple[float, ...] | None = None
    candidates: list[Candidate] = field(default_factory=list)
    extra: dict = field(default_factory=dict)


@dataclass(slots=True)
class FileReading:
    """How one file is read, and what its queries so far have settled.

    Attributes:
      path: the file, for messages.
      pointers: "global", "local" or "auto", as in `read_rl_json`.
      unlabelled: whether a pointer may come without any label.
      seen: ids of the queries so far.
      settled: with "auto", the reading that was the only one possible for some query, and that
        query's key; a file has one convention.
    """

    path: str | Path
    pointers: str = "auto"
    unlabelled: bool = False
    seen: set[int] = field(default_factory=set)
    settled: tuple[str, str] | None = None


def entry_to_json(entry: QueryEntry) -> dict:
    """The JSON object of one query."""
    value: dict = {"query": {"query_id": entry.query_id, **entry.description}}
    position = {}
    if entry.pool is not None:
        value["candidate_pool_ids"] = list(entry.pool)
        position = {demo_id: action for action, demo_id in enumerate(entry.pool)}
    if entry.similarity is not None:
        value["candidate_pool_similarity"] = [_finite(x) for x in entry.similarity]
    candidates = value["pointer_candidates"] = []
    for candidate in entry.candidates:
        record = candidate.record
        one = {"pointer": list(record.pointer)}
        if entry.pool is not None:
            try:
                one["pointer_pos"] = [position[demo_id] for demo_id in record.pointer]
            except KeyError as error:
                raise InputError(
                    f"query {entry.query_id}: demonstration {error} of pointer {record.pointer} "
                    "is not in the query's candidate pool"
                ) from None
        accuracy = record.accuracy
        one |= {
            "gen_method": candidate.source,
            "logprob_score": _finite(candidate.log_prob),
            "vqa_pred_answer": record.prediction,
            "vqa_correct": None if accuracy is None else int(accuracy > 0),
            "vqa_acc_score": accuracy,
            "vqa_gt_prob": record.gt_prob,
            "eval_failed": record.eval_failed is not None,
            "eval_failed_reason": record.eval_failed,
            "vqa_acc_official": record.accuracy_official,
            "confidence": record.confidence,
            "similarity": record.similarity,
            "how": record.how,
            "certified": record.certified,
            "margin": _finite(record.margin),
            "answer_log_probs": None,
            "kept": candidate.kept,
        }
        if candidate.beam_score is not None:
            one["beam_score"] = candidate.beam_score
        if record.answer_log_probs is not None:
            # null stands for -inf: JSON has no infinity, and there is no other missing value.
            one["answer_log_probs"] = [_finite(x) for x in record.answer_log_probs.tolist()]
        candidates.append(one | candidate.extra)
    return value | entry.extra


def json_to_entry(key: str, value: object, file: FileReading) -> QueryEntry:
    """The query under one key of a file, checked.

    Args:
      key: the key, the query id as a decimal number.
      value: the parsed JSON under it.
      file: how it is read; learns from this query.
    """
    read = _Reader(f"{file.path}, query {key}")
    if not (key.isascii() and key.isdigit() and len(key) < 19):
        read.fail("the key is not a query id (a whole number >= 0)")
    query_id = int(key)
    if query_id in file.seen:
        read.fail(f"query id {query_id} is there twice (written in two ways)")
    file.seen.add(query_id)
    value = read.typed(value, dict, "the entry", "an object")
    description = dict(read.typed(value.get("query", {}), dict, "query", "an object"))
    inner = description.pop("query_id", query_id)
    if str(inner) != str(query_id):
        read.fail(f"query.query_id is {inner!r}, another than the key")
    pool = similarity = None
    if value.get("candidate_pool_ids") is not None:
        pool = read.ids(value["candidate_pool_ids"], "candidate_pool_ids")
    if value.get("candidate_pool_similarity") is not None:
        numbers = value["candidate_pool_similarity"]
        if pool is None or not isinstance(numbers, list) or len(numbers) != len(pool):
            read.fail("candidate_pool_similarity does not go with candidate_pool_ids")
        similarity = tuple(math.nan if x is None else read.number(x, "similarity") for x in numbers)
    if "pointer_candidates" not in value:
        read.fail("has no pointer_candidates")
    raw = read.typed(value["pointer_candidates"], list, "pointer_candidates", "a list")
    for one in raw:
        read.typed(one, dict, "a pointer candidate", "an object")
    resolved, reading = _resolve(raw, pool, file.pointers, read)
    if reading is not None:
        first, where = file.settled = file.settled or (reading, key)
        if first != reading:
            read.fail(
                f"its pointers can only be {reading}, those of query {where} only {first}; a file "
                "has one convention, so one of the two is wrong"
            )
    candidates = []
    first_of: dict[tuple[int, ...], Candidate] = {}
    for number, (one, pointer) in enumerate(zip(raw, resolved, strict=True)):
        inside = _Reader(f"{read.place}, candidate {number}, pointer {list(pointer)}")
        candidate = _candidate(query_id, pointer, one, inside)
        if not (file.unlabelled or candidate.labelled):
            inside.fail(
                "has no vqa_acc_score and no vqa_gt_prob; add one, or eval_failed; or read the "
                "file as beams, which need no label"
            )
        candidates.append(candidate)
        if first_of.setdefault(pointer, candidate).record != candidate.record:
            inside.fail("the same pointer has another score earlier in the query")
    extra = {name: x for name, x in value.items() if name not in _ENTRY_FIELDS}
    return QueryEntry(query_id, description, pool, similarity, candidates, extra)


def _candidate(query_id: int, pointer: tuple[int, ...], one: dict, read: "_Reader") -> Candidate:
    """One element of `pointer_candidates`, with its pointer already resolved."""
    failed = _failure(one, read)
    accuracy = read.share(one.get("vqa_acc_score"), "vqa_acc_score")
    gt_prob = read.optional(one.get("vqa_gt_prob"), "vqa_gt_prob")
    if gt_prob is not None and gt_prob < 0:
        read.fail(f"vqa_gt_prob is {gt_prob}; it must be >= 0")
    correct = one.get("vqa_correct")
    if correct not in (None, 0, 1):
        read.fail(f"vqa_correct is {correct!r}; it must be 0 or 1")
    if failed is not None:
        if accuracy or correct:
            read.fail("eval_failed and an accuracy above 0; remove one of the two")
        accuracy = correct = None
    elif accuracy is None:
        if correct is not None:
            read.fail("vqa_correct without vqa_acc_score; add it (0 to 1)")
    elif correct is not None and bool(correct) != (accuracy > 0):
        read.fail(f"vqa_correct is {int(correct)} but vqa_acc_score is {accuracy}")
    how = one.get("how")
    if how not in HOW:
        read.fail(f"how is {how!r}, not one of {HOW}")
    log_probs = one.get("answer_log_probs")
    if log_probs is not None:
        log_probs = read.typed(log_probs, list, "answer_log_probs", "a list")
        log_probs = np.array(
            [-math.inf if x is None else read.number(x, "answer_log_probs") for x in log_probs],
            np.float32,
        )
    margin = read.optional(one.get("margin"), "margin")
    log_prob = read.optional(one.get("logprob_score"), "logprob_score")
    kept = one.get("kept")
    if kept not in (None, False, True):
        read.fail(f"kept is {kept!r}; it must be true, false or null")
    record = ScoreRecord(
        query_id=query_id,
        pointer=pointer,
        gt_prob=gt_prob,
        answer_log_probs=log_probs,
        certified=read.text(one.get("certified"), "certified"),
        margin=math.nan if margin is None else margin,
        eval_failed=failed,
    )
    extra = {name: x for name, x in one.items() if name not in _CANDIDATE_FIELDS}
    if accuracy is None:
        extra |= {name: one[name] for name in _ANSWER_FIELDS if one.get(name) is not None}
    else:
        record.prediction = read.text(one.get("vqa_pred_answer"), "vqa_pred_answer")
        record.accuracy = accuracy
        record.accuracy_official = read.share(one.get("vqa_acc_official"), "vqa_acc_official")
        record.confidence = read.optional(one.get("confidence"), "confidence")
        record.similarity = read.optional(one.get("similarity"), "similarity")
        record.how = how
    source = read.text(one.get("gen_method"), "gen_method") or "imported"
    beam_score = read.optional(one.get("beam_score"), "beam_score")
    log_prob = math.nan if log_prob is None else log_prob
    return Candidate(record, source, log_prob, kept, beam_score, extra)


def _failure(one: dict, read: "_Reader") -> str | None:
    """Why a candidate could not be evaluated, None if it could."""
    failed = one.get("eval_failed")
    reason = read.text(one.get("eval_failed_reason"), "eval_failed_reason")
    if isinstance(failed, str):
        failed, reason = bool(failed), reason or failed
    if failed not in (None, False, True):
        read.fail(f"eval_failed is {failed!r}; it must be true, false, null or the reason as text")
    if not failed:
        if reason:
            read.fail("eval_failed_reason without eval_failed; remove one or set the other")
        return None
    return reason or "eval_failed in imported data"


def _resolve(
    raw: list[dict], pool: tuple[int, ...] | None, pointers: str, read: "_Reader"
) -> tuple[list[tuple[int, ...]], str | None]:
    """The demonstration ids of every candidate of a query, under the one reading that fits.

    The second value is that reading if the other was tried and is impossible, else None.
    """
    readings: dict[str, list[tuple[int, ...]]] = {}
    reasons = []
    for reading in ("global", "local") if pointers == "auto" else (pointers,):
        try:
            readings[reading] = [
                _demonstrations(one, pool, reading, number, read) for number, one in enumerate(raw)
            ]
        except _DoesNotFit as error:
            reasons.append(f"as {reading}: {error}")
    if not readings:
        read.fail("; ".join(reasons))
    found = list(readings.values())
    if len(found) == 2 and found[0] != found[1]:
        read.fail(
            "the pointers fit both as demonstration ids (global) and as positions in the pool "
            "(local); say which they are"
        )
    if pointers == "auto" and pool is None and any(found[0]):
        read.fail(
            "there are no candidate_pool_ids, so pointers may be ids or positions; say that they "
            "are global, or add the pool"
        )
    decided = pool is not None and pointers == "auto" and len(found) == 1
    return found[0], next(iter(readings)) if decided else None


class _DoesNotFit(Exception):
    """A pointer that is impossible under one reading."""


def _demonstrations(
    one: dict, pool: tuple[int, ...] | None, reading: str, number: int, read: "_Reader"
) -> tuple[int, ...]:
    """The demonstration ids of one candidate if "pointer" is read as `reading` says."""
    place = f"candidate {number}"
    pointer = positions = None
    if one.get("pointer") is not None:
        pointer = read.ids(one["pointer"], f"{place}: pointer")
    if one.get("pointer_pos") is not None:
        positions = read.ids(one["pointer_pos"], f"{place}: pointer_pos")
    if pointer is None and positions is None:
        read.fail(f"{place} has neither pointer nor pointer_pos")
    if pool is None and (positions or reading == "local"):
        raise _DoesNotFit(f"{place} has positions but the query has no candidate_pool_ids")
    if reading == "local" and pointer is not None:
        if positions is not None and positions != pointer:
            raise _DoesNotFit(f"{place}: pointer {pointer} is not pointer_pos {positions}")
        positions, pointer = pointer, None
    if positions is not None and pool is not None:
        beyond = [action for action in positions if action >= len(pool)]
        if beyond:
            raise _DoesNotFit(f"{place}: position {beyond[0]} is beyond the pool of {len(pool)}")
        there = tuple(pool[action] for action in positions)
        if pointer is not None and pointer != there:
            raise _DoesNotFit(f"{place}: pointer {pointer} is not at pointer_pos, where {there} is")
        pointer = there
    elif pool is not None:
        outside = [demo_id for demo_id in pointer if demo_id not in pool]
        if outside:
            raise _DoesNotFit(f"{place}: demonstration {outside[0]} is not in candidate_pool_ids")
    return pointer


class _Reader:
    """Typed reading of JSON values, with the place in the file in every message."""

    def __init__(self, place: str):
        self.place = place

    def fail(self, why: str) -> None:
        raise InputError(f"{self.place}: {why}")

    def typed(self, value: object, kind: type, what: str, name: str):
        if not isinstance(value, kind):
            self.fail(f"{what} is not {name}")
        return value

    def ids(self, value: object, what: str) -> tuple[int, ...]:
        self.typed(value, list, what, "a list")
        for one in value:
            if type(one) is not int or not 0 <= one < 2**63:
                self.fail(f"{what} contains {one!r}; ids and positions are whole numbers >= 0")
        if len(set(value)) != len(value):
            self.fail(f"{what} {value} contains a number twice")
        return tuple(value)

    def number(self, value: object, what: str) -> float:
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail(f"{what} contains {value!r}, not a finite number")
        return number

    def optional(self, value: object, what: str) -> float | None:
        return None if value is None else self.number(value, what)

    def share(self, value: object, what: str) -> float | None:
        number = self.optional(value, what)
        if number is not None and not 0.0 <= number <= 1.0:
            self.fail(f"{what} is {number}; it must be from 0 to 1 (a percentage is not)")
        return number

    def text(self, value: object, what: str) -> str | None:
        if value is None:
            return None
        self.typed(value, str, what, "text")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(f"{what} {value!r} is not valid Unicode text")
        return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
