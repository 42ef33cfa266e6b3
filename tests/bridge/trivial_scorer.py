"""A scorer without a model: every number is a hash of the prompt. It can be told to misbehave.

Settings: `embedding_dim`; `hello`, more fields for the hello; `unscorable`, query ids that come
back with a reason; `delay_s` a batch; `note`, said with every result; `build`, an error while
building ("input_error", "raise", "exit", "hang"); and `faults`, a list of dicts:

  fault: crash_before | crash_during | crash_after | hang | wrong_shape | wrong_rows | nan | slow
    | raise | input_error | out_of_memory | not_a_batch
  query: only for batches that hold this query id (default: every batch)
  request: only for the n-th request that this process serves, from 0
  rows: only for batches of more than so many rows
  once: path of a file made when the fault strikes; where it exists, the fault does not
"""

import os
import threading
import time

import numpy as np

from qwen_bridge.errors import InputError
from qwen_bridge.protocol import AnswerBatch, ScoreBatch


def build(settings: dict):
    """The factory of the tests."""
    mode = settings.get("build", "")
    if mode == "input_error":
        raise InputError("--model=nowhere has no config.json; give a model folder")
    if mode == "raise":
        raise KeyError("a bug in the factory")
    if mode == "exit":
        os._exit(7)
    if mode == "hang":
        time.sleep(3600)
    scorer = TrivialScorer(settings)
    hello = {"model": "trivial", "threads": os.environ["OMP_NUM_THREADS"]}
    return scorer, {**hello, **settings.get("hello", {})}


def build_with_own_hello(settings: dict):
    """The other form of a factory: the scorer knows its hello."""
    scorer = TrivialScorer(settings)
    scorer.hello = {"model": "own", "worker": "same", "pid": 0}
    return scorer


def build_unlike(settings: dict):
    """Each worker says that it is something else."""
    return TrivialScorer(settings), {"model": os.environ["QWEN_BRIDGE_WORKER"]}


def hashed(*columns) -> np.ndarray:
    """Uniform [0, 1) float32 of integer columns of one length."""
    state = np.full(len(columns[0]), 0x243F6A8885A308D3, np.uint64)
    for column in columns:
        state ^= np.asarray(column).astype(np.uint64)
        state *= np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(29)
    return ((state >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


class TrivialScorer:
    """Implements the scorer's contract without looking at anything but ids."""

    def __init__(self, settings: dict):
        self.embedding_dim = settings.get("embedding_dim", 6)
        self.parts = {"image": (0, 2), "question": (2, 4), "answer": (4, 6)}
        self._settings = settings
        self._requests = 0
        self.notes = []

    def embed(self, kind, ids):
        """[N, D], column d from id and d."""
        self._strike("crash_before", ids)
        return np.stack([hashed(ids, ids * 0 + d) for d in range(self.embedding_dim)], axis=1)

    def score(self, queries, pointers):
        """Scores by hash; queries have one to four ground truths."""
        rows = len(queries)
        reasons = self._begin(queries)
        gt_prob = hashed(queries, *pointers.T)
        answers = 1 + queries % 4
        log_probs = np.full((rows, int(answers.max())), -np.inf, np.float32)
        for column in range(log_probs.shape[1]):
            has = answers > column
            log_probs[has, column] = -1.0 - column - gt_prob[has]
        certified = np.where(gt_prob > 0.7, 0, -1).astype(np.int16)
        texts = [f"sure {q}" if c == 0 else "" for q, c in zip(queries, certified)]
        judged = [np.where(certified == 0, x, np.nan) for x in (gt_prob, gt_prob / 2, gt_prob / 3)]
        numbers = (gt_prob, log_probs, certified, gt_prob * 3, *judged, judged[0])
        batch = ScoreBatch(*numbers, texts, reasons)
        return self._end(queries, batch)

    def answer(self, queries, pointers):
        """Answers by hash."""
        reasons = self._begin(queries)
        value = hashed(queries, *pointers.T)
        texts = [f"answer {q} é" for q in queries]
        batch = AnswerBatch(texts, value, value / 2, value / 3, 2 * value - 1, reasons)
        return self._end(queries, batch)

    def _begin(self, queries) -> dict:
        self._strike("crash_before", queries)
        time.sleep(self._settings.get("delay_s", 0.0))
        unscorable = self._settings.get("unscorable", ())
        return {i: f"no image for {q}" for i, q in enumerate(queries) if q in unscorable}

    def _end(self, queries, batch):
        self._strike("crash_during", queries)
        self._strike("hang", queries)
        self._strike("slow", queries)
        for name in ("raise", "input_error", "out_of_memory"):
            self._strike(name, queries)
        if self._strikes("wrong_shape", queries):
            batch.margin.shape = (1, -1)
        if self._strikes("wrong_rows", queries):
            batch.texts.pop()
        if self._strikes("nan", queries):
            (batch.gt_prob if isinstance(batch, ScoreBatch) else batch.accuracy)[0] = np.nan
        if self._strikes("not_a_batch", queries):
            return {"gt_prob": [0.0]}
        self._strike("crash_after", queries)
        self._requests += 1
        if note := self._settings.get("note"):
            self.notes.append(note)
        return batch

    def _strike(self, name: str, ids) -> None:
        if not self._strikes(name, ids):
            return
        if name in ("crash_before", "crash_during"):
            os._exit(3)
        if name == "crash_after":
            threading.Timer(0.005, os._exit, (3,)).start()
        elif name == "hang":
            time.sleep(3600)
        elif name == "slow":
            time.sleep(0.3)
        elif name == "raise":
            raise ZeroDivisionError("a bug in the scorer")
        elif name == "input_error":
            raise InputError("query 5 is not in the dataset; use ids of questions.json")
        elif name == "out_of_memory":
            raise MemoryError("the batch does not fit")

    def _strikes(self, name: str, ids) -> bool:
        for fault in self._settings.get("faults", ()):
            if fault["fault"] != name:
                continue
            if "query" in fault and fault["query"] not in ids:
                continue
            if fault.get("request", self._requests) != self._requests:
                continue
            if len(ids) <= fault.get("rows", 0):
                continue
            if "once" in fault:
                try:
                    os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
            return True
        return False
