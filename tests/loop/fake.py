"""A VLM of plain arithmetic, for the loop's tests: its scores are known by hand.

gt_prob of a prompt is the mean of its demonstrations' worth, the last one counting double; a
demonstration is worth `(id * 7 + query) % 10 / 10`. A prompt is answered right where that is at
least 0.6, and certified where it is at least 0.8.
"""

import types

import numpy as np


def worth(query, pointer):
    """gt_prob of a prompt; 0.05 with no demonstration."""
    values = [(int(i) * 7 + int(query)) % 10 / 10 for i in pointer if i >= 0]
    if not values:
        return 0.05
    return round(float(np.mean([*values, values[-1]])), 6)


class FakeEnvironment:
    """Scores by `worth`, in batches, and remembers every prompt it was asked.

    `stop_after` batches of a call, or of all calls together (`stop_in_all`), Ctrl-C is pressed.
    """

    def __init__(self, batch=7, failing=frozenset(), stop_after=None, stop_in_all=False):
        self.batch, self.failing, self.stop_after = batch, failing, stop_after
        self.stop_in_all, self.landed = stop_in_all, 0
        self.scored, self.answered = [], []

    def score(self, queries, pointers, on_batch=None):
        return self._run(self._score_batch, queries, pointers, on_batch)

    def answer(self, queries, pointers, on_batch=None):
        return self._run(self._answer_batch, queries, pointers, on_batch)

    def _run(self, work, queries, pointers, on_batch):
        starts = list(range(0, len(queries), self.batch))
        for done, start in enumerate(reversed(starts)):  # batches land in any order
            done = self.landed if self.stop_in_all else done
            if self.stop_after is not None and done >= self.stop_after:
                raise KeyboardInterrupt
            rows = np.arange(start, min(start + self.batch, len(queries)))
            on_batch(rows, work(queries[rows], pointers[rows]))
            self.landed += 1

    def _score_batch(self, queries, pointers):
        self.scored += [key(q, p) for q, p in zip(queries, pointers)]
        gt_prob = np.array([worth(q, p) for q, p in zip(queries, pointers)], np.float32)
        certified = gt_prob >= 0.8
        return types.SimpleNamespace(
            gt_prob=gt_prob,
            answer_log_probs=np.log(np.maximum(gt_prob, 1e-6))[:, None],
            certified=np.where(certified, 0, -1),
            margin=gt_prob,
            texts=["right" if c else "" for c in certified],
            reasons={i: "broken" for i, q in enumerate(queries) if int(q) in self.failing},
            **judged(np.where(certified, 1.0, np.nan)),
        )

    def _answer_batch(self, queries, pointers):
        self.answered += [key(q, p) for q, p in zip(queries, pointers)]
        right = np.array([worth(q, p) >= 0.6 for q, p in zip(queries, pointers)])
        return types.SimpleNamespace(
            texts=["right" if r else "wrong" for r in right],
            reasons={},
            **judged(right.astype(np.float32)),
        )


def judged(accuracy):
    """The numbers that go with an answer."""
    names = ("accuracy", "accuracy_official", "confidence", "similarity")
    return dict.fromkeys(names, accuracy.astype(np.float32))


def key(query, pointer):
    """A prompt as a tuple."""
    return int(query), tuple(int(i) for i in pointer if i >= 0)
