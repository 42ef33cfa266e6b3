"""What the figures are computed from: one row a candidate, as plain arrays.

Words, as everywhere here: a candidate is *failed* if its prompt could not be scored or answered;
it is *verified* if it did not fail and its accuracy is known (stage B ran, or a certificate gave
the answer); it is *positive* if it is verified and its accuracy is above 0. A query counts for a
figure only if it has a candidate of the kind that the figure is about.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


class Candidates(NamedTuple):
    """Every stored candidate of every query, one row each, in any order.

    Attributes:
      query_id: [N] integers.
      source: [N] names of the proposal sources (strings).
      gt_prob: [N] `vqa_gt_prob`; NaN where unknown.
      accuracy: [N] VQA accuracy; NaN where no answer was generated.
      reward: [N] the reward trained on; NaN where there is none.
      failed: [N] bool, `eval_failed`. Scores of a failed row are not looked at.
      pointer: [N, S] ordered actions or demonstration ids, padded with -1; None if unknown.
      log_prob: [N] log-probability under the selector being judged, in nats, NaN where unknown;
        None if there is no selector yet.
      sampled: [N] bool, the candidates that were answered because a uniform draw said so. Rates
        over candidates are estimated from them alone: the others were answered because their
        score was high or low, or certified. None if all were answered alike.
      position: [N, S] positions in the pool, padded with -1; None if pools are unknown.
      similarity: [N] best cosine of the answer and the ground truths, NaN where unknown; or None.
      reason: [N] why a candidate failed, "" where it did not; or None.
      answer_type: [N] the data set's label of the query ("number"), may be ""; or None.
    """

    query_id: np.ndarray
    source: np.ndarray
    gt_prob: np.ndarray
    accuracy: np.ndarray
    reward: np.ndarray
    failed: np.ndarray
    pointer: np.ndarray | None = None
    log_prob: np.ndarray | None = None
    sampled: np.ndarray | None = None
    position: np.ndarray | None = None
    similarity: np.ndarray | None = None
    reason: np.ndarray | None = None
    answer_type: np.ndarray | None = None


class Picks(NamedTuple):
    """One accuracy a query: of what a selector picks, or of the best that a search finds.

    Attributes:
      query_id: [P] integers, each at most once.
      accuracy: [P] VQA accuracy; NaN where unknown.
    """

    query_id: np.ndarray
    accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Candidates made ready: queries as codes 0 to Q - 1, scores of failed rows removed.

    Attributes:
      query_ids: [Q] sorted; `query` [N] is each row's place in them.
      failed, verified, positive: [N] bool.
      sample: [N] bool, the verified rows that rates over candidates are estimated from.
      gt_prob, accuracy, reward, similarity: [N] float64, NaN where unknown or failed.
      given: the candidates as they came.
      resamples, seed: of every bootstrap.
    """

    query_ids: np.ndarray
    query: np.ndarray
    failed: np.ndarray
    verified: np.ndarray
    positive: np.ndarray
    sample: np.ndarray
    gt_prob: np.ndarray
    accuracy: np.ndarray
    reward: np.ndarray
    similarity: np.ndarray
    given: Candidates
    resamples: int
    seed: int

    @property
    def num_queries(self) -> int:
        """Q."""
        return len(self.query_ids)

    @property
    def sampling(self) -> dict[str, int]:
        """Keyword arguments of the functions of `statistics`."""
        return {"resamples": self.resamples, "seed": self.seed}

    def per_query(self, flags: np.ndarray) -> np.ndarray:
        """How many rows of each query are flagged, int [Q]."""
        return np.bincount(self.query[flags], minlength=self.num_queries)

    def table(
        self,
        where: np.ndarray,
        code: np.ndarray,
        num_codes: int,
        values: np.ndarray | None = None,
    ) -> np.ndarray:
        """Sums by query and code, float64 [Q, num_codes], of the rows `where` [N].

        Args:
          where: [N] bool.
          code: [N] integers in [0, num_codes) where `where`.
          num_codes: columns.
          values: [N] what is summed; ones by default, which counts.
        """
        cell = self.query[where] * num_codes + code[where]
        weights = None if values is None else values[where]
        size = self.num_queries * num_codes
        return np.bincount(cell, weights, size).astype(np.float64).reshape(-1, num_codes)

    def extremes(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Largest and smallest known value of each query, [Q] each; NaN where none is known."""
        known = ~np.isnan(values)
        highest = np.full(self.num_queries, np.nan)
        lowest = np.full(self.num_queries, np.nan)
        if known.any():
            order = np.argsort(self.query[known], kind="stable")
            owner, ordered = self.query[known][order], values[known][order]
            starts = np.flatnonzero(np.diff(owner, prepend=-1))
            highest[owner[starts]] = np.maximum.reduceat(ordered, starts)
            lowest[owner[starts]] = np.minimum.reduceat(ordered, starts)
        return highest, lowest

    def aligned(self, picks: Picks | None) -> np.ndarray:
        """Accuracy [Q] of given picks, in the order of query_ids; NaN where there is none."""
        pick = np.full(self.num_queries, np.nan)
        if picks is not None:
            _, own, theirs = np.intersect1d(self.query_ids, picks.query_id, return_indices=True)
            pick[own] = np.asarray(picks.accuracy, np.float64)[theirs]
        return pick


def prepare(candidates: Candidates, *, resamples: int = 1000, seed: int = 0) -> Rows:
    """Makes candidates ready for the figures.

    Raises:
      ValueError: the arrays have different lengths.
    """
    count = len(candidates.query_id)
    for name, column in candidates._asdict().items():
        if column is not None and len(column) != count:
            raise ValueError(f"{name} has {len(column)} rows beside {count} query ids")
    query_ids, query = np.unique(np.asarray(candidates.query_id), return_inverse=True)
    failed = np.asarray(candidates.failed, bool)
    gt_prob, accuracy, reward, similarity = (
        np.full(count, np.nan)
        if column is None
        else np.where(failed, np.nan, np.asarray(column, np.float64))
        for column in (
            candidates.gt_prob,
            candidates.accuracy,
            candidates.reward,
            candidates.similarity,
        )
    )
    verified = ~np.isnan(accuracy)
    sample = verified.copy()
    if candidates.sampled is not None:
        sample &= np.asarray(candidates.sampled, bool)
    return Rows(
        query_ids=query_ids,
        query=query,
        failed=failed,
        verified=verified,
        positive=accuracy > 0,
        sample=sample,
        gt_prob=gt_prob,
        accuracy=accuracy,
        reward=reward,
        similarity=similarity,
        given=candidates,
        resamples=resamples,
        seed=seed,
    )
