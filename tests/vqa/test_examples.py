"""Examples, data sets and their fingerprints."""

import dataclasses
import hashlib

import pytest
from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example, fingerprint_of


def example(id, **changes):
    fields = {"image": f"{id}.png", "question": "what?", "answers": ("red", "blue")}
    return Example(id=id, **(fields | changes))


def dataset(bank=(), train=(), eval=()):
    return Dataset(
        name="toy",
        bank=tuple(bank),
        train=tuple(train),
        eval=tuple(eval),
        load_image=lambda key: Image.new("RGB", (1, 1)),
        fingerprint=fingerprint_of(bank, train, eval),
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("red",), "red"),
        (("red", "blue", "blue"), "blue"),
        (("red", "blue", "blue", "red"), "red"),
        (("Red", "red", "red "), "Red"),
    ],
)
def test_answer_is_the_most_common_and_of_equals_the_first(answers, expected):
    assert example(1, answers=answers).answer == expected


def test_examples_are_small_and_cannot_be_changed():
    one = example(1)
    assert not hasattr(one, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.question = "why?"


def test_lookup_keeps_demonstrations_and_queries_apart():
    demonstration, train, evaluation = example(7), example(7, question="how?"), example(8)
    toy = dataset([demonstration], [train], [evaluation])
    assert toy.example("bank", 7) is demonstration
    assert toy.example("query", 7) is train
    assert toy.example("query", 8) is evaluation


def test_lookup_errors_name_what_was_asked_for():
    toy = dataset([example(7)], [example(8)])
    with pytest.raises(InputError, match="'toy' has no bank example with id 8"):
        toy.example("bank", 8)
    with pytest.raises(InputError, match="'toy' has no query example with id -1"):
        toy.example("query", -1)
    with pytest.raises(InputError, match=r"kind='eval' .* 'bank' or 'query'"):
        toy.example("eval", 8)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"bank": []}, "the bank is empty"),
        ({"bank": [example(1), example(1)]}, "bank: id 1 occurs twice"),
        ({"bank": [example(1)], "train": [example(2), example(2)]}, "id 2 occurs twice"),
        ({"bank": [example(1)], "train": [example(2)], "eval": [example(2)]}, "id 2 occurs twice"),
        ({"bank": [example(-1)]}, "bank: id -1 is outside"),
        ({"bank": [example(2**63)]}, "is outside"),
        ({"bank": [example(1)], "eval": [example(2, answers=())]}, "id 2 has no answers"),
    ],
)
def test_what_a_dataset_refuses(groups, message):
    with pytest.raises(InputError, match=message):
        dataset(**groups)


def test_the_same_id_may_name_a_demonstration_and_a_query():
    assert dataset([example(1)], [example(1)]).example("query", 1) == example(1)


def test_fingerprint_is_the_same_for_the_same_content():
    assert fingerprint_of([example(1)], [example(2)]) == fingerprint_of((example(1),), [example(2)])
    assert len(fingerprint_of([example(1)])) == 64
    # The bytes written out: a fingerprint that drifts would throw away what was mined.
    content = b'[1, "1.png", "what?", ["red", "blue"], "", ""]\nend of group\n'
    assert fingerprint_of([example(1)]) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        example(2),
        example(1, image="2.png"),
        example(1, question="why?"),
        example(1, answers=("red", "blue", "blue")),
        example(1, answers=("blue", "red")),
        example(1, answers=('red", "blue',)),
        example(1, question_type="what"),
        example(1, answer_type="what"),
    ],
)
def test_fingerprint_changes_with_every_field(changed):
    assert fingerprint_of([example(1)]) != fingerprint_of([changed])


def test_fingerprint_changes_with_order_and_group():
    one, two = example(1), example(2)
    fingerprints = [
        fingerprint_of([one, two]),
        fingerprint_of([two, one]),
        fingerprint_of([one], [two]),
        fingerprint_of([one, two], []),
    ]
    assert len(set(fingerprints)) == 4
