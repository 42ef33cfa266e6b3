"""Outputs that a query gave before are branches of its next scores: fewer answers to generate."""

import contextlib

import numpy as np
import pytest
from test_scorer import random_prompts

from qwen_bridge.known_outputs import KnownOutputs
from qwen_bridge.loading import LoadedModel
from qwen_bridge.protocol import OTHER_ANSWER, check_score
from qwen_bridge.trie_scorer import TrieScorer


@pytest.fixture
def fresh(make_scorer):
    """Scorers with nothing in their memory, around one model."""
    base = make_scorer()
    loaded = LoadedModel(base.model, base.tokenizer, None, "")
    parts = loaded, base.dataset, base.factory, base.embedder

    def make(known_outputs):
        return TrieScorer(*parts, batch_tokens=4096, known_outputs=known_outputs)

    return make


@contextlib.contextmanager
def counted(scorer):
    """Counts passes through the language model: calls, tokens, and rows that are decoded on."""
    language = scorer.model.model.language_model
    counts = {"passes": 0, "tokens": 0, "steps": 0}
    forward = language.forward

    def count(*args, **kwargs):
        if "past_key_values" in kwargs:  # Else it embeds a text.
            rows, width = kwargs["inputs_embeds"].shape[:2]
            counts["passes"] += 1
            counts["tokens"] += rows * width
            counts["steps"] += rows * (width == 1)
        return forward(*args, **kwargs)

    language.forward = count
    try:
        yield counts
    finally:
        language.forward = forward


def candidates(scorer, queries, each, seed):
    """`each` prompts of two shots for every query, in the order of a mining round."""
    rng = np.random.default_rng(seed)
    ids = np.repeat([example.id for example in scorer.dataset.eval[:queries]], each)
    pool = rng.choice([example.id for example in scorer.dataset.bank], 12)
    return ids, np.stack([rng.choice(pool, 2, replace=False) for _ in ids])


def test_usual_outputs_come_first():
    known = KnownOutputs(2)
    for tokens in [(1, 9), (2, 9), (2, 9), (3, 9), (3, 9), (3, 9)]:
        known.add(7, tokens)
    assert known.of(7) == ((3, 9), (2, 9))
    assert known.of(8) == ()
    none = KnownOutputs(0)
    none.add(7, (1, 9))
    assert none.of(7) == ()


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("qwen_bridge.known_outputs._QUERIES", 3)
    known = KnownOutputs(2)
    for query in (1, 2, 3, 1, 4):
        known.add(query, (query, 9))
    assert [bool(known.of(query)) for query in (1, 2, 3, 4)] == [True, False, True, True]
    for output in range(1000):
        known.add(1, (output, 0, 9))
        known.add(1, (1, 9))
    assert known.of(1)[0] == (1, 9)
    assert len(known._outputs[1]) <= 33


def test_scores_are_the_same_and_prove_wrong_answers_too(fresh):
    plain, trying = fresh(0), fresh(4)
    queries, pointers = candidates(plain, 20, 16, seed=2)
    expected = plain.score(queries, pointers)
    trying.answer(*candidates(plain, 20, 4, seed=3))  # Now it knows outputs.
    actual = check_score(trying.score(queries, pointers), len(queries))
    np.testing.assert_allclose(actual.gt_prob, expected.gt_prob, atol=1e-5)
    known = np.isfinite(expected.answer_log_probs)
    np.testing.assert_allclose(
        actual.answer_log_probs[known], expected.answer_log_probs[known], atol=1e-4
    )
    wrong = actual.certified == OTHER_ANSWER
    np.testing.assert_array_equal(np.where(wrong, -1, actual.certified), expected.certified)
    assert wrong.mean() > 0.1
    generated = plain.answer(queries, pointers)
    for row in np.flatnonzero(wrong):
        assert actual.texts[row] == generated.texts[row]
        for name in ("accuracy", "accuracy_official", "similarity", "confidence"):
            ours, theirs = getattr(actual, name)[row], getattr(generated, name)[row]
            assert ours == pytest.approx(theirs, abs=1e-4), name
    np.testing.assert_allclose(actual.margin[~wrong], expected.margin[~wrong], atol=1e-3)


def test_rounds_of_a_query_cost_fewer_tokens(fresh):
    """As training asks: a round scores candidates, and generates what is not proven."""
    totals = {}
    for limit in (0, 4):
        scorer, generated = fresh(limit), 0
        with counted(scorer) as counts:
            for turn in range(3):
                queries, pointers = candidates(scorer, 10, 12, seed=turn)
                rest = np.flatnonzero(scorer.score(queries, pointers).certified == -1)
                scorer.answer(queries[rest], pointers[rest])
                generated += len(rest)
        totals[limit] = {**counts, "generated": generated}
    print(f"three rounds: {totals[0]} without, {totals[4]} with known outputs")
    assert totals[4]["generated"] < 0.75 * totals[0]["generated"]
    assert totals[4]["steps"] < 0.75 * totals[0]["steps"]
    # An image is one token here; where it is 150, a prompt generated costs that much more.
    assert totals[4]["tokens"] < totals[0]["tokens"]


def test_results_do_not_depend_on_what_came_before(fresh):
    plain, trying = fresh(0), fresh(3)
    for seed in range(3):
        queries, pointers = random_prompts(plain, 60, seed=seed)
        expected, answers = plain.answer(queries, pointers), trying.answer(queries, pointers)
        assert answers.texts == expected.texts
        scores = trying.score(queries, pointers)
        for row in np.flatnonzero(scores.certified != -1):
            assert scores.texts[row] == expected.texts[row]
            assert scores.accuracy[row] == expected.accuracy[row]
