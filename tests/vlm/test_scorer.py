"""The fast scorer against the plain one, which runs the whole model for every answer."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from qwen_bridge.protocol import OTHER_ANSWER, check_score
from qwen_bridge.scorer import BranchScores
from qwen_bridge.vqa.accuracy import accuracy_normalized
from qwen_bridge.vqa.digits import QUESTIONS, border_colours
from qwen_bridge.vqa.languages import NUMBER_WORDS

DATASET = {"kind": "digits", "seed": 0, "bank": 900, "train": 10, "eval": 20}


def random_prompts(scorer, count, seed, most_shots=4):
    """Prompts of 0 to `most_shots` demonstrations, some shared, some shown twice."""
    rng = np.random.default_rng(seed)
    queries = rng.choice([example.id for example in scorer.dataset.eval], count)
    pool = rng.choice([example.id for example in scorer.dataset.bank], 6)
    pointers = np.full((count, most_shots), -1)
    for row in range(count):
        shots = rng.integers(0, most_shots + 1)
        pointers[row, :shots] = rng.choice(pool, shots)
    return queries, pointers


def prefix_bytes(scorer, request):
    """Bytes of a prompt's prefix, equal nodes once."""
    text = scorer.model.config.text_config
    token = 2 * text.num_hidden_layers * text.hidden_size * 4  # every head has keys of its own
    return token * sum(map(len, request.segments[:-1]))


def assert_scores_agree(fast, slow):
    known = np.isfinite(slow.answer_log_probs)
    np.testing.assert_array_equal(known, np.isfinite(fast.answer_log_probs))
    difference = np.abs(fast.answer_log_probs[known] - slow.answer_log_probs[known])
    assert difference.max() <= 1e-4
    np.testing.assert_allclose(fast.gt_prob, slow.gt_prob, atol=1e-5)
    # The fast one may know of wrong answers too, from what was asked before.
    wrong = fast.certified == OTHER_ANSWER
    np.testing.assert_array_equal(np.where(wrong, -1, fast.certified), slow.certified)
    assert np.where(wrong, "", fast.texts).tolist() == slow.texts


@pytest.mark.parametrize("style", ["chat", "inline"])
def test_scores_equal_the_reference(make_scorer, style):
    slow = make_scorer(scorer="reference", prompt_style=style)
    queries, pointers = random_prompts(slow, 12, seed=3)
    fast = make_scorer(prompt_style=style)
    assert_scores_agree(fast.score(queries, pointers), slow.score(queries, pointers))


def test_evictions_and_small_batches_change_nothing(make_scorer):
    slow = make_scorer(scorer="reference")
    queries, pointers = random_prompts(slow, 8, seed=4)
    tight = make_scorer(cache_mib=1, batch_tokens=64)
    requests, _ = tight._requests(queries, pointers)
    tight.cache.budget = max(prefix_bytes(tight, request) for request in requests.values())
    expected = slow.score(queries, pointers)
    for _ in range(2):
        assert_scores_agree(tight.score(queries, pointers), expected)
    assert tight.cache.evictions > 0
    assert tight.cache.bytes <= tight.cache.budget


def test_greedy_answers_equal_the_models_own_generate(make_scorer):
    slow, fast = make_scorer(scorer="reference"), make_scorer()
    queries, pointers = random_prompts(slow, 10, seed=5)
    expected, actual = slow.answer(queries, pointers), fast.answer(queries, pointers)
    assert actual.texts == expected.texts
    np.testing.assert_allclose(actual.confidence, expected.confidence, atol=1e-5)
    for row, query in enumerate(queries):
        truth = slow.dataset.example("query", int(query)).answers
        assert actual.accuracy[row] == pytest.approx(accuracy_normalized(actual.texts[row], truth))


def test_certificates_are_never_wrong(make_scorer):
    scorer = make_scorer()
    queries, pointers = random_prompts(scorer, 300, seed=6, most_shots=3)
    scores, answers = scorer.score(queries, pointers), scorer.answer(queries, pointers)
    assert 0.05 < (scores.certified >= 0).mean() < 1
    certified = scores.certified != -1
    for row in np.flatnonzero(certified):
        assert scores.texts[row] == answers.texts[row]
        for name in ("accuracy", "accuracy_official", "similarity", "confidence"):
            ours, theirs = getattr(scores, name)[row], getattr(answers, name)[row]
            assert ours == pytest.approx(theirs, abs=1e-4), name
    # Where a right answer is given and nothing is certified, the lead must be small or the form
    # one that no ground truth has.
    assert np.isnan(scores.accuracy[~certified]).all()


def test_results_do_not_depend_on_the_batch(make_scorer):
    scorer = make_scorer()
    queries, pointers = random_prompts(scorer, 20, seed=7)
    together = scorer.score(queries, pointers)
    order = np.random.default_rng(0).permutation(20)
    shuffled = scorer.score(queries[order], pointers[order])
    np.testing.assert_allclose(shuffled.gt_prob, together.gt_prob[order], atol=1e-6)


def test_probabilities_are_of_disjoint_events(make_scorer):
    scorer = make_scorer()
    queries, pointers = random_prompts(scorer, 60, seed=8)
    scores = scorer.score(queries, pointers)
    total = np.exp(scores.answer_log_probs.astype(np.float64)).sum(1)
    assert (total <= 1 + 1e-5).all()
    assert ((scores.gt_prob >= 0) & (scores.gt_prob <= 1)).all()


def test_mean_token_is_the_geometric_mean():
    scores = BranchScores.from_tokens([(np.log([0.5, 0.25]), np.array([1.0, -2.0]))])
    assert scores.log_probs[0] == pytest.approx(np.log(0.125))
    assert scores.mean_log_probs[0] == pytest.approx(0.5 * np.log(0.125))
    assert scores.margins[0] == -2.0


def test_mean_token_changes_the_score_and_not_the_probabilities(make_scorer):
    product, mean = make_scorer(), make_scorer(gt_prob="mean_token")
    queries, pointers = random_prompts(product, 40, seed=9)
    ours, theirs = mean.score(queries, pointers), product.score(queries, pointers)
    # The two scorers have other prefixes in their caches, hence rounding.
    np.testing.assert_allclose(ours.answer_log_probs, theirs.answer_log_probs, atol=1e-4)
    assert (ours.gt_prob >= theirs.gt_prob - 1e-6).all()
    check_score(ours, 40)


def test_a_bad_prompt_fails_alone(make_scorer):
    scorer = make_scorer()
    good = scorer.dataset.eval[0].id
    demo = scorer.dataset.bank[0].id
    queries = np.array([good, good, 999, good])
    pointers = np.array([[demo, -1], [123_456, -1], [demo, -1], [-1, -1]])
    scores = scorer.score(queries, pointers)
    assert sorted(scores.reasons) == [1, 2]
    assert "123456" in scores.reasons[1]
    assert "999" in scores.reasons[2]
    assert np.isnan(scores.gt_prob[[1, 2]]).all()
    assert np.isfinite(scores.gt_prob[[0, 3]]).all()
    answers = scorer.answer(queries, pointers)
    assert sorted(answers.reasons) == [1, 2]


def test_a_prompt_longer_than_the_context_is_refused(make_scorer):
    scorer = make_scorer()
    config = scorer.model.config.text_config
    limit, config.max_position_embeddings = config.max_position_embeddings, 60
    try:
        demo = scorer.dataset.bank[0].id
        query = scorer.dataset.eval[0].id
        scores = scorer.score(np.array([query] * 2), np.array([[demo, demo], [-1, -1]]))
    finally:
        config.max_position_embeddings = limit
    assert list(scores.reasons) == [0]
    assert "context is 60" in scores.reasons[0]


def test_an_unreadable_image_fails_its_prompts_only(make_scorer):
    scorer = make_scorer(scorer="trie", batch_tokens=2048)
    bad = scorer.dataset.bank[7]
    load = scorer.factory.vision._load

    def broken(key):
        if key == bad.image:
            raise OSError("image file is truncated")
        return load(key)

    scorer.factory.vision._load = broken
    query = scorer.dataset.eval[1].id
    other = scorer.dataset.bank[8].id
    scores = scorer.score(np.array([query, query]), np.array([[bad.id], [other]]))
    assert scores.reasons == {
        0: f"image {bad.image}: image file is truncated; mend the file or leave it out"
    }
    assert scorer.embed("bank", np.array([other, bad.id])).reasons == {1: scores.reasons[0]}


def test_embeddings_tell_colour_digit_and_language(make_scorer):
    scorer = make_scorer(dataset=DATASET)
    bank = scorer.dataset.bank
    embeddings = scorer.embed("bank", np.array([e.id for e in bank])).embeddings
    assert embeddings.shape == (len(bank), scorer.embedding_dim)
    corners = np.stack([np.asarray(scorer.dataset.load_image(e.image))[0, 0] for e in bank]) / 255
    colours = border_colours()
    shade = (corners @ colours.T) / (colours**2).sum(1)  # [N, colours] how bright it would be
    off = ((corners[:, None] - np.clip(shade[..., None] * colours, 0, 1)) ** 2).sum(-1)
    colour = np.where(np.abs(shade - 0.97) < 0.15, off, np.inf).argmin(1)
    assert len(np.unique(colour)) == 8
    steps = dict(QUESTIONS.values())
    digit = [NUMBER_WORDS[e.answer_type].index(e.answer) - steps[e.question] for e in bank]
    for part, labels, least in [
        ("image", colour, 0.99),
        ("image", np.array(digit), 0.8),
        ("question", np.array([e.question for e in bank]), 1.0),
        ("answer", np.array([e.answer_type for e in bank]), 0.85),
    ]:
        low, high = scorer.parts[part]
        assert probe(embeddings[:, low:high], labels) >= least, part
    queries = scorer.embed("query", np.array([e.id for e in scorer.dataset.eval])).embeddings
    low, high = scorer.parts["answer"]
    assert not queries[:, low:high].any()


def probe(features, labels):
    """Accuracy of a linear classifier, fitted on two thirds and tested on the rest."""
    split = 2 * len(features) // 3
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    model = LogisticRegression(max_iter=2000, C=10.0)
    return model.fit(features[:split], labels[:split]).score(features[split:], labels[split:])
