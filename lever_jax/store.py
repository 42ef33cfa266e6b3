"""Everything that mining has paid for, in one SQLite file that survives a killed process.

A score costs a forward pass of a large model, so it is written once, in the same transaction as
whatever says that its batch is done, and is never computed or overwritten again. One process
writes, any number read. Pools, proposals, scores, answers and the stages that are finished live
side by side, each row with a checksum that also covers the fingerprint of the model, prompt
template, generation settings, dataset and metric.

    with Store.open("runs/digits/store.sqlite", fingerprint) as store:
        todo = ~store.present(query_ids, pointers)
        with store.transaction():
            store.put_scores(records)
            store.mark_done("score", {"rows": len(records)})

Query ids and demonstration ids are the dataset's int64 ids. A pointer is an ordered tuple of
demonstration ids; in arrays it is a row of [n, S], right-padded with -1, all -1 for zero-shot.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lever_jax import store_schema as schema
from lever_jax.store_file import StoreFile, named_errors
from lever_jax.store_schema import StoreError

__all__ = ["Proposals", "ScoreRecord", "Store", "StoreError"]

HOW = (None, "verified", "generated")


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


@dataclass(slots=True, eq=False)
class Proposals:
    """Pointers that samplers proposed, as columns in the order in which they were proposed.

    Attributes:
      query_ids: int64 [n].
      pointers: int64 [n, S], right-padded with -1.
      sources: n names of samplers.
      log_probs: float32 [n] under the behaviour policy, nats; NaN where it has none.
      kept: int8 [n]: 1 kept, 0 dropped, -1 not decided.
    """

    query_ids: np.ndarray
    pointers: np.ndarray
    sources: list[str]
    log_probs: np.ndarray
    kept: np.ndarray


class Store(StoreFile):
    """The store; see the module's text. Make one with `Store.open` in a `with` statement."""

    # --- scores and answers ---------------------------------------------------------------------

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
        with self.transaction():
            duplicates = self._insert_new("scores", rows, "query_id, pointer")
            answered = [record for record in records if record.answered]
            if answered:
                self.put_answers(answered)
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
            rows.append(
                (
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
            )
        with self.transaction():
            find = "SELECT failure FROM scores WHERE query_id = ? AND pointer = ?"
            for row in rows:
                score = self._db.execute(find, row[:2]).fetchone()
                if score is None or score[0] is not None:
                    why = "has no score" if score is None else f"could not be scored: {score[0]}"
                    raise StoreError(
                        f"table scores, {schema.name_row('scores', row)} {why}; "
                        "an answer is stored only beside a score"
                    )
            return self._insert_new("answers", rows, "query_id, pointer")

    def get_scores(self, query_ids: np.ndarray, pointers: np.ndarray) -> list[ScoreRecord | None]:
        """The records of n queries [n] and pointers [n, S], None where there is none."""
        sql = _SCORE_SQL + " WHERE s.query_id = ? AND s.pointer = ?"
        keys = zip(_ids(query_ids), schema.pack_padded(pointers, "pointers"), strict=True)
        with named_errors(self.path):
            rows = [(key, self._db.execute(sql, key).fetchone()) for key in keys]
            return [None if row is None else self._record(row, *key) for key, row in rows]

    def present(self, query_ids: np.ndarray, pointers: np.ndarray) -> np.ndarray:
        """Bool [n]: whether the query and pointer have a score, or a reason for having none."""
        sql = "SELECT query_id, pointer FROM scores WHERE query_id = ? AND pointer = ?"
        keys = zip(_ids(query_ids), schema.pack_padded(pointers, "pointers"), strict=True)
        with named_errors(self.path):
            found = [self._db.execute(sql, key).fetchone() == key for key in keys]
        return np.array(found, bool)

    def missing(self, query_ids: np.ndarray, pointers: np.ndarray) -> np.ndarray:
        """Bool [n]: what `present` is not, that is, what is still to be scored."""
        return ~self.present(query_ids, pointers)

    def scored_queries(self) -> np.ndarray:
        """Int64 [n]: the queries that have scores, in rising order."""
        with named_errors(self.path):
            rows = self._db.execute("SELECT DISTINCT query_id FROM scores").fetchall()
        return np.array([row[0] for row in rows], np.int64)

    def iter_scores(self, query_ids: Sequence[int] | None = None) -> Iterator[ScoreRecord]:
        """Every record of the given queries, or of all, one query after another."""
        sql = _SCORE_SQL + " WHERE s.query_id = ?"
        for query_id in _ids(self.scored_queries() if query_ids is None else query_ids):
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

    # --- pools ----------------------------------------------------------------------------------

    def put_pools(
        self, query_ids: np.ndarray, demo_ids: np.ndarray, similarity: np.ndarray
    ) -> None:
        """Stores the candidate pool of each query; another pool for the same query is refused.

        A pool that is there keeps its similarities too: another machine computes the last bits of
        them differently, and that does not make it another pool.

        Args:
          query_ids: int64 [B].
          demo_ids: int64 [B, K], the demonstration of each action, right-padded with -1.
          similarity: float32 [B, K] to the query.
        """
        similarity = np.asarray(similarity, np.float32)
        if similarity.shape != np.shape(demo_ids):
            raise ValueError(f"similarity {similarity.shape} for demo_ids {np.shape(demo_ids)}")
        rows = []
        blobs = schema.pack_padded(demo_ids, "demo_ids")
        for query_id, blob, values in zip(_ids(query_ids), blobs, similarity, strict=True):
            rows.append((query_id, blob, schema.pack_array(values[: len(blob) // 8])))
        with self.transaction():
            new = []
            for row in rows:
                stored = self._pool(row[0])
                if stored is None:
                    new.append(row)
                elif stored[1] != row[1]:
                    raise StoreError(
                        f"{self.path} has another candidate pool for query {row[0]}; a query has "
                        "one pool in mining, training and evaluation: use another --workdir for "
                        "another --encoder or --pool_size, or for other retrieval settings"
                    )
            self._insert_new("pools", new, "query_id")

    def get_pools(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pools of B queries: demonstration ids int64 [B, K] and similarity float32 [B, K].

        Padding is -1 and NaN. A query without a pool is an error; ask `has_pools` first.
        """
        rows = []
        with named_errors(self.path):
            for query_id in _ids(query_ids):
                rows.append(self._pool(query_id))
                if rows[-1] is None:
                    raise StoreError(f"table pools has no query_id {query_id} in {self.path}")
        demo_ids = schema.unpack_padded([row[1] for row in rows])
        similarity = np.full(demo_ids.shape, np.nan, np.float32)
        for i, row in enumerate(rows):
            similarity[i, : len(row[1]) // 8] = schema.unpack_array(row[2])
        return demo_ids, similarity

    def has_pools(self, query_ids: np.ndarray) -> np.ndarray:
        """Bool [B]: whether each query has a pool."""
        sql = "SELECT 1 FROM pools WHERE query_id = ?"
        with named_errors(self.path):
            found = [self._db.execute(sql, (i,)).fetchone() is not None for i in _ids(query_ids)]
        return np.array(found, bool)

    def _pool(self, query_id: int) -> tuple | None:
        sql = schema.select_sql("pools", "WHERE query_id = ?")
        row = self._db.execute(sql, (query_id,)).fetchone()
        return None if row is None else self._rows.open("pools", row, query_id=query_id)

    # --- proposals ------------------------------------------------------------------------------

    def put_proposals(
        self,
        stage: str,
        query_ids: np.ndarray,
        pointers: np.ndarray,
        sources: Sequence[str],
        log_probs: np.ndarray,
        kept: np.ndarray | None = None,
    ) -> int:
        """Stores what samplers proposed, in order, the first of equal pointers only.

        Args:
          stage: whose proposals these are, such as "warmup" or "grpo/round_3".
          query_ids: int64 [n].
          pointers: int64 [n, S], right-padded with -1.
          sources: n names of samplers.
          log_probs: float32 [n] under the behaviour policy, nats; NaN where it has none.
          kept: bool [n], or None to decide later with `mark_kept`.

        Returns:
          How many were new to the stage.
        """
        queries, blobs = _ids(query_ids), schema.pack_padded(pointers, "pointers")
        log_probs = np.asarray(log_probs, np.float32).tolist()
        marks = [None] * len(queries) if kept is None else np.asarray(kept, bool).tolist()
        columns = zip(queries, blobs, sources, log_probs, marks, strict=True)
        with self.transaction():
            last = self._db.execute("SELECT max(id) FROM proposals").fetchone()[0] or 0
            rows = [
                (last + i, stage, query, blob, str(source), schema.real(log_prob), _mark(mark))
                for i, (query, blob, source, log_prob, mark) in enumerate(columns, start=1)
            ]
            return len(rows) - self._insert_new("proposals", rows, "stage, query_id, pointer")

    def mark_kept(
        self, stage: str, query_ids: np.ndarray, pointers: np.ndarray, kept: np.ndarray
    ) -> None:
        """Decides which stored proposals of a stage stay in their groups: kept is bool [n]."""
        find = schema.select_sql("proposals", "WHERE stage = ? AND query_id = ? AND pointer = ?")
        change = "UPDATE proposals SET kept = ?, checksum = ? WHERE id = ?"
        keys = zip(_ids(query_ids), schema.pack_padded(pointers, "pointers"), strict=True)
        with self.transaction():
            for key, mark in zip(keys, np.asarray(kept, bool).tolist(), strict=True):
                row = self._db.execute(find, (stage, *key)).fetchone()
                if row is None:
                    name = schema.name_row("proposals", (0, stage, *key))
                    raise StoreError(f"table proposals has no {name} in {self.path}")
                known = {"stage": stage, "query_id": key[0], "pointer": key[1]}
                row = (*self._rows.open("proposals", row, **known)[:-1], _mark(mark))
                checksum = self._rows.of("proposals", row)
                self._db.execute(change, (_mark(mark), checksum, row[0]))

    def get_proposals(self, stage: str, query_ids: Sequence[int] | None = None) -> Proposals:
        """The proposals of a stage in order, of all its queries or query by query as given."""
        with named_errors(self.path):
            if query_ids is None:
                sql = schema.select_sql("proposals", "WHERE stage = ? ORDER BY id")
                rows = self._db.execute(sql, (stage,)).fetchall()
            else:
                sql = "WHERE stage = ? AND query_id = ? ORDER BY id"
                sql = schema.select_sql("proposals", sql)
                rows = [r for i in _ids(query_ids) for r in self._db.execute(sql, (stage, i))]
            rows = [self._rows.open("proposals", row, stage=stage) for row in rows]
        names: dict[str, str] = {}
        return Proposals(
            query_ids=np.array([row[2] for row in rows], np.int64),
            pointers=schema.unpack_padded([row[3] for row in rows]),
            sources=[names.setdefault(row[4], row[4]) for row in rows],
            log_probs=np.array([row[5] for row in rows], np.float32),  # None becomes NaN.
            kept=np.array([-1 if row[6] is None else row[6] for row in rows], np.int8),
        )

    def proposed_queries(self, stage: str) -> np.ndarray:
        """Int64 [n]: the queries of a stage, in the order in which they were first proposed to."""
        sql = "SELECT query_id FROM proposals WHERE stage = ? GROUP BY query_id ORDER BY min(id)"
        with named_errors(self.path):
            rows = self._db.execute(sql, (stage,)).fetchall()
        return np.array([row[0] for row in rows], np.int64)


def _joined() -> str:
    scores = ", ".join(f"s.{column}" for column in (*schema.TABLES["scores"][0], "checksum"))
    answers = ", ".join(f"a.{column}" for column in (*schema.TABLES["answers"][0], "checksum"))
    return (
        f"SELECT {scores}, {answers} FROM scores s LEFT JOIN answers a"
        " ON a.query_id = s.query_id AND a.pointer = s.pointer"
    )


_SCORE_SQL = _joined()


def _check(record: ScoreRecord) -> None:
    """Refuses a record that says too little or two things at once."""
    for name in ("gt_prob", "accuracy", "accuracy_official", "confidence", "similarity"):
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


def _ids(query_ids: Sequence[int]) -> list[int]:
    return np.asarray(query_ids, np.int64).tolist()


def _mark(kept: bool | None) -> int | None:
    return None if kept is None else int(kept)
