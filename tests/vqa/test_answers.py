"""Unique ground truths, their weights and forms, and how probabilities add up."""

import itertools
import math

import numpy as np
import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.accuracy import accuracy_normalized, normalize
from qwen_bridge.vqa.answers import AnswerTarget, answer_targets, combine_forms


def test_groups_by_normalised_string_in_the_order_given():
    targets = answer_targets(["Two", "cat", "2", "two.", "cat", "the dog"])
    assert targets == (
        AnswerTarget("2", min(3 / 3, 1), ("2", "Two", "two.", "Two.")),
        AnswerTarget("cat", 2 / 3, ("cat", "Cat")),
        AnswerTarget("dog", 1 / 3, ("dog", "the dog", "Dog", "The dog")),
    )


def test_a_capital_leaves_the_other_letters_alone():
    (target,) = answer_targets(["iPad of the NBA"])
    assert target.forms == ("ipad of nba", "iPad of the NBA", "Ipad of nba", "IPad of the NBA")


def test_raw_answers_are_stripped_and_repeated_forms_are_one():
    (target,) = answer_targets([" yes", "yes\n", "Yes", "yes"])
    assert target.forms == ("yes", "Yes")
    assert target.weight == 1.0


def test_a_capital_that_the_metric_would_not_forgive_is_left_out():
    # "ß" has no upper case of one letter: "SS", which lower case does not turn back.
    (target,) = answer_targets(["ßeta"])
    assert target.forms == ("ßeta",)


@pytest.mark.parametrize(
    ("count", "count3", "official"),
    [(1, 1 / 3, 0.3), (2, 2 / 3, 0.6), (3, 1.0, 0.9), (4, 1.0, 1.0), (10, 1.0, 1.0)],
)
def test_weights_of_ten(count, count3, official):
    answers = count * ["red"] + [f"other{number}x" for number in range(10 - count)]
    assert answer_targets(answers)[0].weight == pytest.approx(count3)
    assert answer_targets(answers, weight="count3")[0].weight == pytest.approx(count3)
    assert answer_targets(answers, weight="official")[0].weight == pytest.approx(official)


@pytest.mark.parametrize("annotators", [1, 2, 3, 5, 10, 12])
def test_official_weight_is_the_accuracy_of_the_answer(annotators):
    answers = ["red", "Red", "blue", "the red", "2", "two", "blue", "red", "x", "y", "z", "red"]
    for target in answer_targets(answers[:annotators], weight="official"):
        for form in target.forms:
            assert target.weight == accuracy_normalized(form, answers[:annotators])


def test_weights_may_add_up_to_more_than_one():
    targets = answer_targets(5 * ["red"] + 5 * ["blue"])
    assert [target.weight for target in targets] == [1.0, 1.0]


def test_an_answer_without_letters_keeps_its_raw_forms():
    # "the" normalises to nothing, and so does the dot: one answer, given twice.
    targets = answer_targets(["the", "red", "."])
    assert targets[0] == AnswerTarget("", 2 / 3, ("the", ".", "The"))
    assert targets[1].text == "red"


def test_an_answer_that_cannot_be_written_is_left_out():
    assert [target.text for target in answer_targets(["", "red", "  "])] == ["red"]
    assert answer_targets(["", "\n"]) == ()


def test_every_form_counts_as_its_answer_and_as_no_other():
    answers = ["Yes!", "yes", "two, or 3", "a", "The", "t-shirt", "T Shirt", "1,000", "dont", "Im"]
    targets = answer_targets(answers)
    for target in targets:
        assert all(form and normalize(form) == target.text for form in target.forms)
    forms = [form for target in targets for form in target.forms]
    assert len(forms) == len(set(forms))


def test_unknown_weight():
    with pytest.raises(InputError, match=r"--answer_weight=count .* count3 or official"):
        answer_targets(["red"], weight="count")


def test_forms_add_up_to_answers_and_answers_to_gt_prob():
    log_probs = np.log([0.25, 0.5, 0.125]).astype(np.float32)
    gt_prob, answers = combine_forms(log_probs, np.array([0, 1, 0]), np.array([1.0, 1 / 3]))
    assert gt_prob == pytest.approx(1.0 * (0.25 + 0.125) + (1 / 3) * 0.5)
    np.testing.assert_allclose(answers, np.log([0.25 + 0.125, 0.5]), rtol=1e-6)
    assert answers.dtype == np.float64


def test_every_order_of_the_forms_gives_the_same():
    log_probs = np.float32([-1.0, -2.0, -3.0, -700.0])
    owner = np.array([0, 1, 0, 1], np.int32)
    weights = np.float32([1.0, 0.5])
    expected, _ = combine_forms(log_probs, owner, weights)
    for order in map(list, itertools.permutations(range(4))):
        gt_prob, _ = combine_forms(log_probs[order], owner[order], weights)
        assert gt_prob == pytest.approx(expected, rel=1e-14)


def test_very_small_probabilities_survive_as_logs():
    gt_prob, answers = combine_forms(np.array([-2000.0, -2000.0]), np.array([0, 0]), np.ones(1))
    assert gt_prob == 0.0
    assert answers[0] == pytest.approx(-2000.0 + math.log(2))


def test_impossible_forms_and_answers_without_forms_are_minus_infinity():
    gt_prob, answers = combine_forms(np.array([-np.inf, -np.inf]), np.array([0, 0]), np.ones(2))
    assert gt_prob == 0.0
    assert answers.tolist() == [-np.inf, -np.inf]


def test_rounding_does_not_pass_one_but_a_larger_sum_is_shown():
    gt_prob, _ = combine_forms(np.array([0.0, -14.0]), np.array([0, 1]), np.ones(2))
    assert gt_prob == 1.0
    # Means per token are no probabilities, and may add up to more.
    gt_prob, _ = combine_forms(np.log([0.75, 0.5]), np.array([0, 1]), np.ones(2))
    assert gt_prob == pytest.approx(1.25)


def test_nothing_is_silently_negative():
    gt_prob, _ = combine_forms(np.array([np.nan, -1.0]), np.array([0, 1]), np.ones(2))
    assert math.isnan(gt_prob)
    with pytest.raises(ValueError, match="without ground-truth answers"):
        combine_forms(np.zeros(0), np.zeros(0, np.int32), np.zeros(0))
