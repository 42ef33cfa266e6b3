"""A scorer without a model: every number is a hash of the prompt. It can be told to misbehave.

Settings: `embedding_dim`; `hello`, more fields for the hello; `unscorable`, query ids that come
back with a reason; `delay_s` a batch; `note`, said with every result; `build`, an error while
building ("input_error", "raise", "exit", "hang"); `faults`, a list of dicts as `faults.injection`
knows them, and `log`, where it writes what it served.
"""

import os
import time

import numpy as np
from faults.injection import Faulty, hashed

from qwen_bridge.errors import InputError
from qwen_bridge.protocol import AnswerBatch, EmbedBatch, ScoreBatch


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
    scorer = Faulty(TrivialScorer(settings), settings.get("faults", []), settings.get("log"))
    place = f"cpu, the worker {os.environ.get('QWEN_BRIDGE_WORKER')}"
    hello = {"model": "trivial", "threads": os.environ["OMP_NUM_THREADS"], "device": place}
    return scorer, {**hello, **settings.get("hello", {})}


def build_with_own_hello(settings: dict):
    """The other form of a factory: the scorer knows its hello."""
    scorer = TrivialScorer(settings)
    scorer.hello = {"model": "own", "worker": "same", "pid": 0}
    return scorer


def build_unlike(settings: dict):
    """Each worker says that it is something else."""
    return TrivialScorer(settings), {"model": os.environ["QWEN_BRIDGE_WORKER"]}


class TrivialScorer:
    """Implements the scorer's contract without looking at anything but ids."""

    def __init__(self, settings: dict):
        self.embedding_dim = settings.get("embedding_dim", 6)
        self.parts = {"image": (0, 2), "question": (2, 4), "answer": (4, 6)}
        self._settings = settings
        self.notes = []

    def embed(self, kind, ids):
        """[N, D], column d from id and d; the image part of an unscorable id is zero."""
        rows = np.stack([hashed(ids, ids * 0 + d) for d in range(self.embedding_dim)], axis=1)
        unscorable = self._settings.get("unscorable", ())
        reasons = {i: f"no image for {id_}" for i, id_ in enumerate(ids) if id_ in unscorable}
        rows[list(reasons), slice(*self.parts["image"])] = 0.0
        return EmbedBatch(rows, reasons)

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
        return ScoreBatch(*numbers, texts, reasons)

    def answer(self, queries, pointers):
        """Answers by hash."""
        reasons = self._begin(queries)
        value = hashed(queries, *pointers.T)
        texts = [f"answer {q} é" for q in queries]
        return AnswerBatch(texts, value, value / 2, value / 3, 2 * value - 1, reasons)

    def _begin(self, queries) -> dict:
        time.sleep(self._settings.get("delay_s", 0.0))
        if note := self._settings.get("note"):
            self.notes.append(note)
        unscorable = self._settings.get("unscorable", ())
        return {i: f"no image for {q}" for i, q in enumerate(queries) if q in unscorable}
