"""A VLM of plain arithmetic that can go wrong, and lives of a driver that asks it."""

import pathlib
import types

import numpy as np
from progress import no_bar

from lever_jax.ledger import count_states
from lever_jax.scoring import ScoringService
from lever_jax.store import Store

FINGERPRINT = {"model": "tiny"}
# Where a process of its own finds this file and what it needs.
PLACES = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]


class Death(BaseException):
    """The end of a driver that had no time to write anything down."""


class Arithmetic:
    """A VLM whose gt_prob is `query / (query + sum of ids + 1)`; some prompts do something."""

    def __init__(self, batch=16, on_prompt=lambda query, pointer: None, failing=()):
        self.batch, self.on_prompt, self.failing = batch, on_prompt, set(failing)
        self.calls, self.asked, self.certified = [], [], -1

    def score(self, queries, pointers, on_batch=None):
        self._run("score", queries, pointers, on_batch)

    def answer(self, queries, pointers, on_batch=None):
        self._run("answer", queries, pointers, on_batch)

    def _run(self, verb, queries, pointers, on_batch):
        self.calls.append((verb, len(queries)))
        for start in range(0, len(queries), self.batch):
            rows = np.arange(start, min(start + self.batch, len(queries)))
            prompts = [(int(queries[i]), tuple(pointers[i].tolist())) for i in rows]
            for prompt in prompts:
                self.on_prompt(*prompt)
            self.asked += [(verb, *prompt) for prompt in prompts]
            value = np.array([q / (q + sum(p) + 1) for q, p in prompts], np.float32)
            judged = ("accuracy", "accuracy_official", "confidence", "similarity")
            result = types.SimpleNamespace(
                gt_prob=value,
                answer_log_probs=np.log(value)[:, None],
                certified=np.full(len(rows), self.certified),
                margin=value,
                texts=["sept"] * len(rows),
                reasons={i: "broken" for i, p in enumerate(prompts) if p in self.failing},
                **dict.fromkeys(judged, value),
            )
            on_batch(rows, result)


def prompts(count, queries=20, seed=0):
    """Distinct prompts of two demonstrations."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(queries * 900, count, replace=False)
    return ids % queries + 1, np.stack([ids // queries // 30, ids // queries % 30], axis=1)


def run(path, environment, verb="score", count=700, size=None):
    """One life of a driver, by default of one call; `Death` leaves the store as it stands."""
    store = Store.open(path, FINGERPRINT)
    records, (queries, pointers) = [], prompts(count)
    try:
        service = ScoringService(store, environment, no_bar)
        ask = service.score if verb == "score" else service.verify
        for start in range(0, count, size or count):
            some = slice(start, start + (size or count))
            records += ask(queries[some], pointers[some], label="x")
        return records
    finally:
        store.close()


def content(path):
    """The records of a sound store in which nothing was scored twice, and its jobs by state."""
    with Store.open(path, read_only=True) as store:
        assert store.verify() == []
        assert store.counts()["duplicate_scores"] == store.counts()["duplicate_answers"] == 0
        return list(store.iter_scores()), count_states(store)
