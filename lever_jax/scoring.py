"""Scores through the store: what is known is read, what is not is scored once and written down.

Every stage (warm-up search, mining, on-policy rounds, evaluation) asks here and nowhere else, so
the score of a prompt is never computed twice, whichever stage asked first. A batch is committed
as it lands, together with the jobs of the ledger that it ends; a run that is killed loses at most
the batches in flight.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from lever_jax.final_records import FinalRecords
from lever_jax.ledger import RETRY, Ledger
from lever_jax.store import ScoreRecord, Store

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Environment(Protocol):
    """The VLM, as the policy half sees it; results are objects with the fields named below.

    `score` results have gt_prob, answer_log_probs, certified, margin, texts, accuracy,
    accuracy_official, confidence, similarity and reasons; `answer` results have texts, accuracy,
    accuracy_official, confidence, similarity and reasons. Each calls `on_batch(rows, result)` in
    this thread as batches land.
    """

    def score(self, queries: np.ndarray, pointers: np.ndarray, on_batch=None) -> Any:
        """Scores prompts without generating: queries int64 [n], pointers int64 [n, S]."""

    def answer(self, queries: np.ndarray, pointers: np.ndarray, on_batch=None) -> Any:
        """Generates greedily for prompts and judges the answers."""


@dataclasses.dataclass
class ScoringCounts:
    """What the service was asked for and what it had to compute, in prompts.

    Attributes:
      asked: prompts asked for, repeats included.
      scored: prompts that went through stage A.
      generated: prompts whose answer had to be generated.
      verified: prompts whose answer a certificate gave for free.
    """

    asked: int = 0
    scored: int = 0
    generated: int = 0
    verified: int = 0


class ScoringService:
    """Scores and answers of prompts, each computed once.

    Args:
      store: where they are kept.
      environment: what computes them.
      progress: shows a bar; called with a label and a total.
      blameless: exceptions of the environment that say nothing about the prompts in hand; see
        `Ledger`.
    """

    def __init__(
        self,
        store: Store,
        environment: Environment,
        progress: Progress,
        blameless: Sequence[type[BaseException]] = (),
    ):
        self.store, self._environment, self.progress = store, environment, progress
        self.counts = ScoringCounts()
        self._ledger = Ledger(store, blameless)
        self._final = FinalRecords()

    def score(
        self,
        query_ids,
        pointers,
        *,
        label: str,
        advance: Callable[[int], None] | None = None,
    ) -> list[ScoreRecord]:
        """Stage A: `vqa_gt_prob` of prompts, without generating.

        Args:
          query_ids: int64 [n].
          pointers: int64 [n, S] demonstration ids in prompt order, right-padded with -1.
          label: what the progress bar says.
          advance: of a bar of the caller's, which counts all n prompts, those already known at
            once. By default there is a bar over what has to be computed.

        Returns:
          n records in the caller's order; equal prompts share a record.
        """
        asked = _Distinct(query_ids, pointers)
        return asked.spread(self._score(asked, label, advance))

    def verify(self, query_ids, pointers, *, label: str) -> list[ScoreRecord]:
        """Stage B: the VLM's own answers to prompts; arguments and result as for `score`.

        Prompts whose answer stage A has certified are not generated again.
        """
        asked = _Distinct(query_ids, pointers)
        records = self._score(asked, label, None)
        open_ = [not one.answered and one.eval_failed is None for one in records]
        open_ = np.flatnonzero(open_)
        if len(open_):
            with self.progress(f"{label}: generate", len(open_)) as advance:
                self._fill(records, "answer", asked, open_, advance)
        return asked.spread(records)

    def known(self, query_ids, pointers) -> list[ScoreRecord | None]:
        """What is known of prompts [n], None where nothing is; nothing is computed."""
        asked = _Distinct(query_ids, pointers)
        return asked.spread(self._look_up(asked))

    def retry_failed(self, query_ids, demo_ids, *, label: str) -> tuple[int, int]:
        """Asks again for every score and answer that failed; what comes back takes its place.

        Args:
          query_ids: int64 [Q], the queries of this run; failures of others are left alone.
          demo_ids: int64 [N], likewise its demonstrations.
          label: what the progress bar says.

        Returns:
          How many prompts were asked for again, and how many of them have failed again.
        """
        asked = failed = 0
        for verb in ("score", "answer"):
            queries, pointers = self.store.failed(verb)
            ours = np.isin(queries, query_ids)
            ours &= (np.isin(pointers, demo_ids) | (pointers < 0)).all(axis=1)
            queries, pointers = queries[ours], pointers[ours]
            if len(queries):
                with self.progress(f"{label}: {verb}", len(queries)) as advance:
                    records = self._work(verb, queries, pointers, advance, retry=True)
                asked += len(records)
                failed += sum(record.eval_failed is not None for record in records)
        return asked, failed

    def _score(self, asked: "_Distinct", label: str, advance) -> list[ScoreRecord]:
        """Stage A of distinct prompts."""
        self.counts.asked += len(asked.copies)
        records = self._look_up(asked)
        unknown = np.flatnonzero([one is None for one in records])
        if advance is not None:
            advance(len(asked.copies) - len(unknown))
        if len(unknown):
            bar = contextlib.nullcontext(advance) if advance else self.progress(label, len(unknown))
            with bar as advance_unknown:
                self._fill(records, "score", asked, unknown, advance_unknown)
        return records

    def _look_up(self, asked: "_Distinct") -> list[ScoreRecord | None]:
        """The records of distinct prompts as far as there are any."""
        records = [self._final.get(key) for key in asked.keys]
        missing = np.flatnonzero([one is None for one in records])
        stored = self.store.get_scores(asked.query_ids[missing], asked.pointers[missing])
        for place, record in zip(missing.tolist(), stored, strict=True):
            records[place] = record
        self._final.add(filter(None, stored))
        return records

    def _fill(self, records: list, verb: str, asked: "_Distinct", places, advance) -> None:
        """Computes some of distinct prompts, and puts what comes back into their places."""
        found = self._work(verb, asked.query_ids[places], asked.pointers[places], advance)
        for place, record in zip(places.tolist(), found, strict=True):
            records[place] = record

    def _work(
        self, verb: str, query_ids, pointers, advance, *, retry: bool = False
    ) -> list[ScoreRecord]:
        """Computes distinct prompts through the ledger; stores what comes back and returns it.

        The records are those in the store, without the time that reading them back would take,
        in which the VLM has nothing to do.
        """
        ask = getattr(self._environment, verb)
        landed: list[ScoreRecord | None] = [None] * len(query_ids)
        put = self._put_scores if verb == "score" else self._put_answers
        for lease in self._ledger.leases(RETRY * retry + verb, query_ids, pointers):
            asked = query_ids[lease.rows], pointers[lease.rows]

            def land(rows, batch, lease=lease, asked=asked):
                rows = np.asarray(rows)
                with lease.landing(rows):
                    records = put(asked[0][rows], asked[1][rows], batch, retry)
                self._final.add(records)
                for place, record in zip(lease.rows[rows].tolist(), records):
                    landed[place] = record
                advance(len(rows))

            with lease:
                if lease.given_up:
                    land(range(len(lease.rows)), _GivenUp(lease.given_up))
                else:
                    ask(*asked, on_batch=land)
        return landed

    def _put_scores(self, query_ids, pointers, batch, retry: bool) -> list[ScoreRecord]:
        records = []
        for row, (query_id, pointer) in enumerate(zip(query_ids, pointers)):
            record = ScoreRecord(int(query_id), _key(pointer))
            if row in batch.reasons:
                record.eval_failed = batch.reasons[row]
            else:
                log_probs = np.asarray(batch.answer_log_probs[row], np.float32)
                record.gt_prob = float(batch.gt_prob[row])
                record.answer_log_probs = log_probs[np.isfinite(log_probs)]
                record.margin = float(batch.margin[row])
                if batch.certified[row] != -1:  # Also where it is proven, and wrong.
                    record.certified = batch.texts[row]
                    _set_answer(record, batch, row, "verified")
                    self.counts.verified += 1
            records.append(record)
        self.counts.scored += len(records)
        if retry:
            self.store.supersede("score", records)
        else:
            self.store.put_scores(records)
        return records

    def _put_answers(self, query_ids, pointers, batch, retry: bool) -> list[ScoreRecord]:
        records = self.store.get_scores(query_ids, pointers)
        for row, record in enumerate(records):
            record.eval_failed = None
            if row in batch.reasons:
                record.eval_failed = batch.reasons[row]
            else:
                _set_answer(record, batch, row, "generated")
        self.counts.generated += len(records)
        if retry:
            self.store.supersede("answer", records)
        else:
            self.store.put_answers(records)
        return records


class _GivenUp:
    """The result of one prompt that the ledger has given up."""

    def __init__(self, why: str):
        self.reasons = {0: why}


def columns(records: list[ScoreRecord]) -> dict[str, np.ndarray]:
    """Scores as float32 arrays [n]: gt_prob, accuracy, similarity, confidence; NaN where unknown.

    A record that failed has NaN everywhere, never 0. `shots` is the number of demonstrations.
    """
    names = ("gt_prob", "accuracy", "accuracy_official", "similarity", "confidence")
    out = {name: np.full(len(records), np.nan, np.float32) for name in names}
    for row, record in enumerate(records):
        if record.eval_failed is not None:
            continue
        for name in names:
            value = getattr(record, name)
            if value is not None:
                out[name][row] = value
    out["shots"] = np.array([len(record.pointer) for record in records], np.float32)
    return out


def _set_answer(record: ScoreRecord, batch, row: int, how: str) -> None:
    record.prediction = batch.texts[row]
    for name in ("accuracy", "accuracy_official", "confidence", "similarity"):
        value = float(getattr(batch, name)[row])
        setattr(record, name, None if math.isnan(value) else value)
    record.how = how


def _key(pointer) -> tuple[int, ...]:
    return tuple(int(i) for i in pointer if i >= 0)


class _Distinct:
    """The distinct prompts of n rows of a call, in order of appearance.

    Attributes:
      query_ids: [m].
      pointers: [m, S], right-padded with -1.
      keys: m pairs of a query id and a pointer without padding.
      copies: n places, which of them each row is.
    """

    def __init__(self, query_ids, pointers):
        query_ids, pointers = np.asarray(query_ids), np.asarray(pointers)
        places: dict[tuple, int] = {}
        keys = zip(query_ids.tolist(), map(_key, pointers.tolist()), strict=True)
        self.copies = [places.setdefault(key, len(places)) for key in keys]
        self.keys = list(places)
        first = np.unique(self.copies, return_index=True)[1]
        self.query_ids, self.pointers = query_ids[first], pointers[first]

    def spread(self, records: list) -> list:
        """The records [m] of the distinct prompts, for all rows."""
        return [records[place] for place in self.copies]
