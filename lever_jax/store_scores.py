"""Scores and answers in the store: a record of each prompt, written once, read back verified."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lever_jax import store_schema as schema
from lever_jax.store_file import StoreFile, named_errors
from lever_jax.store_schema import StoreError

HOW = (None, "verified", "generated")
_NUMBERS = ("gt_prob", "accuracy", "accuracy_official", "confidence", "similarity")


@dataclass(slots=True, eq=False)
class ScoreRecord:
    """What the VLM said about one query with one ordered prompt.

    Stage A fills `gt_prob` to `margin`; stage B fills `prediction` to `how`. A prompt that could
    not be scored or answered has the reason in `eval_failed` and None, never 0, for what is
    missing. Scores that come from elsewhere may have an accuracy and no `gt_prob`.

    Attributes:
      query_id: the dataset's id of the query.
      pointer: demonstration ids in prompt order; () for zero-shot.
      gt_prob: `vqa_gt_prob`.
      answer_log_probs: float32 [A], nats, one a unique ground truth of the query.
      certified: the text that greedy decoding provably gives, or None.
      margin: smallest gap of logits on the certified answer, nats; NaN where there is none.
      prediction: the VLM's answer.
      accuracy: `vqa_acc_score`, normalized mode.
      accuracy_official: the same, official_2021 mode.
      confidence: P of the prediction, its end included.
      similarity: best cosine between the prediction and the ground truths.
      how: "verified" if a certificate gave the prediction, "generated" if decoding did, None if
        there is no prediction or nobody said.
      eval_failed: why there is no score or no answer.
    """

    query_id: int
    pointer: tuple[int, ...]
    gt_prob: float | None = None
    answer_log_probs: np.ndarray | None = None
    certified: str | None = None
    margin: float = math.nan
    prediction: str | None = None
    accuracy: float | None = None
    accuracy_official: float | None = None
    confidence: float | None = None
    similarity: float | None = None
    how: str | None = None
    eval_failed: str | None = None

    @property
    def answered(self) -> bool:
        """Whether stage B has its say in this record: an answer, or the reason for none."""
        return self.accuracy is not None or (
            self.eval_failed is not None and self.gt_prob is not None
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScoreRecord) and self._content() == other._content()

    __hash__ = None

    def _content(self) -> tuple:
        values = [getattr(self, name) for name in self.__slots__]
        values[3] = schema.pack_array(self.answer_log_probs)
        values[5] = schema.real(self.margin)  # NaN equals NaN here.
        return tuple(values)


class ScoreTables(StoreFile):
    """An open store, as far as scores and answers go; see `lever_jax.store.Store`."""

    def put_scores(self, records: Iterable[ScoreRecord]) -> int:
        """Stores new scores in one transaction; answers too, where the records have them.

        A score that is there already stays as it is, is counted under `duplicate_scores`, and is
        the sign that somebody paid for it twice.

        Returns:
          How many were there already.
        """
        records = list(records)
        rows = []
        for record in records:
            _check(record)
            failure = None if record.answered else record.eval_failed
            rows.append(
                (
                    int(record.query_id),
                    schema.pack_pointer(record.pointer),
                    schema.real(record.gt_prob),
                    schema.pack_array(record.answer_log_probs),
                    record.certified,
                    schema.real(record.margin),
                    failure,
                )
            )
        answers = [_answer_row(record) for record in records if record.answered]
        with self.transaction():
            duplicates = self._insert_new("scores", rows, "query_id, pointer")
            if duplicates:  # Their scores may be failures; the new ones are not.
                self._check_scored(answers)
            self._insert_new("answers", answers, "query_id, pointer")
        return duplicates

    def put_answers(self, records: Iterable[ScoreRecord]) -> int:
        """Stores the stage B fields of records whose scores are stored, in one transaction.

        An answer that is there already stays as it is and is counted under `duplicate_answers`.

        Returns:
          How many were there already.
        """
        rows = []
        for record in records:
            _check(record)
            if not record.answered:
                raise ValueError(f"{_name(record)} has neither an accuracy nor an eval_failed")
            rows.append(_answer_row(record))
        with self.transaction():
            self._check_scored(rows)
            return self._insert_new("answers", rows, "query_id, pointer")

    def _check_scored(self, answers: list[tuple]) -> None:
        find = "SELECT failure FROM scores WHERE query_id = ? AND pointer = ?"
        for row in answers:
            score = self._db.execute(find, row[:2]).fetchone()
            if score is None or score[0] is not None:
                why = "has no score" if score is None else f"could not be scored: {score[0]}"
                raise StoreError(
                    f"table scores, {schema.name_row('scores', row)} {why}; "
                    "an answer is stored only beside a score"
                )

    def supersede(self, verb: str, records: Iterable[ScoreRecord]) -> None:
        """Puts what a later attempt said in the place of failures, in one transaction.

        What the failure was goes to the table `superseded`, numbered by prompt, and is counted
        under `superseded`. Scores and answers that are no failures are never replaced.

        Args:
          verb: "score" replaces failures of stage A, "answer" of stage B.
          records: the new records, which may have failed again.

        Raises:
          StoreError: there is no failure to replace.
        """
        records = list(records)
        table = {"score": "scores", "answer": "answers"}[verb]
        place = "WHERE query_id = ? AND pointer = ?"
        history = f"SELECT max(number) FROM superseded {place} AND verb = ?"
        old = []
        with self.transaction():
            for record in records:
                key = (int(record.query_id), schema.pack_pointer(record.pointer))
                row = self._db.execute(schema.select_sql(table, place), key).fetchone()
                failure = row and self._rows.open(table, row, query_id=key[0], pointer=key[1])[-1]
                if failure is None:
                    raise StoreError(
                        f"table {table}, {schema.name_row(table, key)} is no failure, so nothing "
                        "may take its place"
                    )
                number = (self._db.execute(history, (*key, verb)).fetchone()[0] or 0) + 1
                old.append((*key, verb, number, failure))
                self._db.execute(f"DELETE FROM {table} {place}", key)
            self._count(table, -len(records))
            self._insert_new("superseded", old, "query_id, pointer, verb, number")
            (self.put_scores if verb == "score" else self.put_answers)(records)

    def failed(self, verb: str) -> tuple[np.ndarray, np.ndarray]:
        """Prompts whose score or answer failed: query ids [n] and pointers [n, S], both int64."""
        table = {"score": "scores", "answer": "answers"}[verb]
        sql = f"SELECT query_id, pointer FROM {table} WHERE failure IS NOT NULL"
        with named_errors(self.path):
            rows = sorted(self._db.execute(sql).fetchall())
        pointers = schema.unpack_padded([row[1] for row in rows])
        return np.array([row[0] for row in rows], np.int64), pointers

    def reasons(self, verb: str) -> dict[str, int]:
        """How many scores or answers failed for each reason, the most frequent first."""
        table = {"score": "scores", "answer": "answers"}[verb]
        sql = (
            f"SELECT failure, count(*) FROM {table} WHERE failure IS NOT NULL"
            " GROUP BY failure ORDER BY count(*) DESC, failure"
        )
        with named_errors(self.path):
            return dict(self._db.execute(sql).fetchall())

    def superseded(self) -> set[tuple[int, tuple[int, ...]]]:
        """The prompts, query id and pointer, that failed until a later attempt."""
        rows = self.read_rows("superseded")
        return {(row[0], schema.unpack_pointer(row[1])) for row in rows}

    def get_scores(self, query_ids: np.ndarray, pointers: np.ndarray) -> list[ScoreRecord | None]:
        """The records of n queries [n] and pointers [n, S], None where there is none."""
        keys = list(zip(as_ids(query_ids), schema.pack_padded(pointers, "pointers"), strict=True))
        rows: dict[tuple[int, bytes], tuple] = {}
        with named_errors(self.path):
            for start in range(0, len(keys), _MANY):
                some = keys[start : start + _MANY]
                some += [(None, None)] * (_MANY - len(some))  # Equal to nothing.
                found = self._db.execute(_SCORES_SQL, list(itertools.chain.from_iterable(some)))
                rows.update(((row[0], row[1]), row) for row in found)
            return [self._record(rows[key], *key) if key in rows else None for key in keys]

    def scored_queries(self) -> np.ndarray:
        """Int64 [n]: the queries that have scores, in rising order."""
        with named_errors(self.path):
            rows = self._db.execute("SELECT DISTINCT query_id FROM scores").fetchall()
        return np.array([row[0] for row in rows], np.int64)

    def queries(self) -> np.ndarray:
        """Int64 [n]: the queries that any row is about, in rising order."""
        found = set()
        with named_errors(self.path):
            for table in ("pools", "scores", "proposals"):
                rows = self._db.execute(f"SELECT DISTINCT query_id FROM {table}")
                found.update(row[0] for row in rows)
        return np.array(sorted(found), np.int64)

    def iter_scores(self, query_ids: Sequence[int] | None = None) -> Iterator[ScoreRecord]:
        """Every record of the given queries, or of all, one query after another."""
        sql = _SCORE_SQL + " WHERE s.query_id = ?"
        for query_id in as_ids(self.scored_queries() if query_ids is None else query_ids):
            with named_errors(self.path):
                rows = self._db.execute(sql, (query_id,))
                records = [self._record(row, query_id, row[1]) for row in rows]
            yield from records

    def _record(self, row: tuple, query_id: int, pointer: bytes) -> ScoreRecord:
        score = self._rows.open("scores", row[:8], query_id=query_id, pointer=pointer)
        answer = (None,) * 9
        if row[8] is not None:
            answer = self._rows.open("answers", row[8:], query_id=query_id, pointer=pointer)
        return ScoreRecord(
            query_id=score[0],
            pointer=schema.unpack_pointer(score[1]),
            gt_prob=score[2],
            answer_log_probs=schema.unpack_array(score[3]),
            certified=score[4],
            margin=math.nan if score[5] is None else score[5],
            prediction=answer[2],
            accuracy=answer[3],
            accuracy_official=answer[4],
            confidence=answer[5],
            similarity=answer[6],
            how=answer[7],
            eval_failed=score[6] if score[6] is not None else answer[8],
        )


def _joined(source: str = "scores s") -> str:
    scores = ", ".join(f"s.{column}" for column in (*schema.TABLES["scores"][0], "checksum"))
    answers = ", ".join(f"a.{column}" for column in (*schema.TABLES["answers"][0], "checksum"))
    return (
        f"SELECT {scores}, {answers} FROM {source} LEFT JOIN answers a"
        " ON a.query_id = s.query_id AND a.pointer = s.pointer"
    )


_SCORE_SQL = _joined()

# Keys of one statement: alone, each costs more to ask for than to find.
_MANY = 128
_KEYS = ", ".join(["(?, ?)"] * _MANY)
_SCORES_SQL = _joined(
    f"(VALUES {_KEYS}) k CROSS JOIN scores s ON s.query_id = k.column1 AND s.pointer = k.column2"
)


def _answer_row(record: ScoreRecord) -> tuple:
    return (
        int(record.query_id),
        schema.pack_pointer(record.pointer),
        record.prediction,
        schema.real(record.accuracy),
        schema.real(record.accuracy_official),
        schema.real(record.confidence),
        schema.real(record.similarity),
        record.how,
        record.eval_failed,
    )


def _check(record: ScoreRecord) -> None:
    """Refuses a record that says too little or two things at once."""
    for name in _NUMBERS:
        value = getattr(record, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{_name(record)}: {name} is {value}; give None and an eval_failed")
    if min(record.pointer, default=0) < 0:
        raise ValueError(f"{_name(record)}: demonstration ids are >= 0")
    if record.how not in HOW:
        raise ValueError(f"{_name(record)}: how is {record.how!r}, not one of {HOW}")
    if record.eval_failed == "":
        raise ValueError(f"{_name(record)}: eval_failed needs a reason")
    if record.eval_failed is not None and record.accuracy is not None:
        raise ValueError(f"{_name(record)}: has an accuracy and eval_failed={record.eval_failed!r}")
    if record.gt_prob is None and record.accuracy is None and record.eval_failed is None:
        raise ValueError(f"{_name(record)}: has no gt_prob, no accuracy and no eval_failed")
    if record.accuracy is None:
        for name in ("prediction", "accuracy_official", "confidence", "similarity", "how"):
            if getattr(record, name) is not None:
                raise ValueError(f"{_name(record)}: has a {name} but no accuracy")


def _name(record: ScoreRecord) -> str:
    return f"query {record.query_id}, pointer {tuple(record.pointer)}"


def as_ids(query_ids: Sequence[int]) -> list[int]:
    """Ids of the dataset as Python integers."""
    return np.asarray(query_ids, np.int64).tolist()
