"""The ground truth as the scorer reads it: unique answers, what each is worth, how it is written.

`vqa_gt_prob` = sum over unique answers a of w(a) P(a), where P(a) adds up the probabilities of
all the forms in which the model may write that answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.accuracy import leave_one_out, normalize

WEIGHTS = ("count3", "official")

# Probabilities come from float32 log-softmax: their sum may pass 1 by so much, and no more.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class AnswerTarget:
    """One unique ground-truth answer of a question.

    Attributes:
      text: the normalised string; may be empty ("the" is nothing but an article).
      weight: what giving this answer is worth, in (0, 1].
      forms: distinct, non-empty ways to write it, each of which normalises to `text`, so that
        no form belongs to two answers and probabilities of all forms add up to at most 1.
    """

    text: str
    weight: float
    forms: tuple[str, ...]


def answer_targets(answers: Sequence[str], weight: str = "count3") -> tuple[AnswerTarget, ...]:
    """Groups the annotators' raw answers into unique ground truths, the first given first.

    Args:
      answers: raw answers, one an annotator.
      weight: "count3" for min(count / 3, 1); "official" for the accuracy that the answer would
        get (0.3, 0.6, 0.9 and 1.0 for one, two, three and more of ten annotators).

    Returns:
      One target for each unique normalised answer that can be written at all; the forms are the
      normalised string, the raw strings stripped, and all of these capitalised. Weights may add
      up to more than 1.
    """
    if weight not in WEIGHTS:
        raise InputError(
            f"--answer_weight={weight} is not a weight; it must be {' or '.join(WEIGHTS)}"
        )
    raw_by_text: dict[str, list[str]] = {}
    for answer in answers:
        raw_by_text.setdefault(normalize(answer), []).append(answer.strip())
    targets = []
    for text, raw in raw_by_text.items():
        forms = _forms(text, raw)
        if forms:
            value = min(len(raw) / 3, 1.0)
            if weight == "official":
                value = leave_one_out(len(raw), len(answers))
            targets.append(AnswerTarget(text, value, forms))
    return tuple(targets)


def combine_forms(
    form_log_probs: np.ndarray, form_to_answer: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Adds the probabilities of forms into answers, and those of answers into `vqa_gt_prob`.

    log P(a) = logsumexp over the forms f of a of log P(f);  gt_prob = sum over a of w(a) P(a)

    The caller chooses which log-probability a form has: that of the whole token sequence, end
    of turn included, or its mean per token. Only the first makes gt_prob at most 1.

    Args:
      form_log_probs: [F] log-probability of each form, in nats.
      form_to_answer: [F] int, which answer each form belongs to, in [0, A).
      weights: [A] what each answer is worth.

    Returns:
      gt_prob, and [A] float64 log-probabilities of the answers, -inf for one without forms. A
      NaN among the forms makes gt_prob NaN.
    """
    if not len(weights):
        raise ValueError("a question without ground-truth answers has no gt_prob")
    answer_log_probs = np.full(len(weights), -np.inf)
    with np.errstate(invalid="ignore"):  # A NaN is passed on, for the caller to see.
        np.logaddexp.at(answer_log_probs, form_to_answer, np.asarray(form_log_probs, np.float64))
    gt_prob = float(np.dot(np.asarray(weights, np.float64), np.exp(answer_log_probs)))
    if 1.0 < gt_prob < 1.0 + _ROUNDING:
        gt_prob = 1.0
    return gt_prob, answer_log_probs


def _forms(text: str, raw: Sequence[str]) -> tuple[str, ...]:
    written = [text, *raw]
    written += [form[:1].upper() + form[1:] for form in written]
    # Upper case can change a word for good ("ß" to "SS"), and the metric would not forgive it.
    return tuple(form for form in dict.fromkeys(written) if form and normalize(form) == text)
