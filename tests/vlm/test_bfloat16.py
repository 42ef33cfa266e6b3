"""bfloat16, as GPUs run it: how far from float32, beside the plain loop's own error; certificates.

The plain loop is the reference scorer in bfloat16; both are measured against it in float32.
"""

import numpy as np
import pytest
from test_scorer import random_prompts

QUANTILES = (50, 99, 100)


def errors(scores, exact):
    """Absolute differences of per-answer log-probabilities, nats."""
    known = np.isfinite(exact.answer_log_probs)
    return np.abs(scores.answer_log_probs[known] - exact.answer_log_probs[known])


def assert_no_worse(fast, plain):
    """Quantiles of the fast scorer's errors are no larger than the plain loop's, up to chance."""
    rows = [np.percentile(each, QUANTILES) for each in (fast, plain)]
    for name, row in zip(("trie", "plain loop"), rows):
        p50, p99, largest = row
        print(f"bfloat16, {name}: p50 {p50:.4f}, p99 {p99:.4f}, max {largest:.4f} nats")
    # Both round as often; which of them is luckier differs from prompt to prompt.
    assert rows[0][0] <= 1.1 * rows[1][0]
    assert rows[0][1] <= 1.25 * rows[1][1]
    assert rows[0][2] <= 1.5 * rows[1][2]


@pytest.mark.slow
def test_errors_are_those_of_bfloat16_itself(make_scorer):
    exact, plain = (make_scorer(scorer="reference", dtype=d) for d in ("float32", "bfloat16"))
    queries, pointers = random_prompts(exact, 400, seed=41, most_shots=8)
    expected = exact.score(queries, pointers)
    fast = make_scorer(dtype="bfloat16").score(queries, pointers)
    assert_no_worse(errors(fast, expected), errors(plain.score(queries, pointers), expected))


@pytest.mark.slow
def test_certificates_are_never_wrong_in_bfloat16(make_scorer):
    """Of 2,400 prompts every certified answer is what the model's own `generate` gives."""
    slow, fast = make_scorer(scorer="reference", dtype="bfloat16"), make_scorer(dtype="bfloat16")
    assert fast.margin == 0.25
    certified = others = unsafe = 0
    for seed in range(6):
        queries, pointers = random_prompts(fast, 400, seed=50 + seed, most_shots=4)
        scores = fast.score(queries, pointers)
        rows = np.flatnonzero(scores.certified != -1)
        generated = slow.answer(queries[rows], pointers[rows]).texts
        for row, text in zip(rows, generated):
            assert scores.texts[row] == text, (queries[row], pointers[row], scores.margin[row])
        certified += len(rows)
        others += int((scores.certified < -1).sum())
        unsafe += int((scores.margin[scores.certified == -1] > 0).sum())
        # What is not certified is generated, and then tried on the prompts that follow.
        rest = np.setdiff1d(np.arange(400), rows)
        fast.answer(queries[rest], pointers[rest])
    print(
        f"bfloat16: {certified} of 2,400 prompts certified, {others} of them wrong answers; "
        f"{unsafe} led by less than the margin and were left to generation"
    )
    assert certified > 800
