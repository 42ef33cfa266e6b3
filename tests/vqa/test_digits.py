"""Polyglot digits: deterministic, disjoint, and starving a selector in the intended way."""

import collections

import numpy as np
import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.accuracy import accuracy_normalized
from qwen_bridge.vqa.digits import (
    COMMUNITIES,
    ID_BASE,
    QUESTIONS,
    DigitsConfig,
    handwritten,
    load_digits_world,
    render,
    split_rows,
)
from qwen_bridge.vqa.languages import NUMBER_WORDS


@pytest.fixture(scope="module")
def world():
    return load_digits_world(DigitsConfig())


def test_sizes(world):
    assert (len(world.bank), len(world.train), len(world.eval)) == (1600, 600, 400)


def test_handwritten_digits_of_the_parts_are_disjoint():
    parts = [set(split_rows(part).tolist()) for part in ID_BASE]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(handwritten()[1])


def test_same_seed_same_world_other_seed_other_languages(world):
    again = load_digits_world(DigitsConfig())
    assert again.fingerprint == world.fingerprint
    assert (again.bank, again.train, again.eval) == (world.bank, world.train, world.eval)
    key = world.eval[5].image
    assert np.array_equal(np.asarray(again.load_image(key)), np.asarray(world.load_image(key)))
    other = load_digits_world(DigitsConfig(seed=1))
    assert other.fingerprint != world.fingerprint
    assert colour_languages(other) != colour_languages(world)


def colour_languages(world):
    """The language that most annotators of each border colour use."""
    votes = collections.defaultdict(collections.Counter)
    for example in world.train:
        border = np.asarray(world.load_image(example.image))[0, 0].astype(float)
        hue = tuple(np.round(border / border.max(), 1))
        votes[hue if border.min() < 0.8 * border.max() else border.max() > 150][
            example.answer_type
        ] += 1
    return {colour: count.most_common(1)[0][0] for colour, count in votes.items()}


def test_the_colour_tells_the_language(world):
    languages = colour_languages(world)
    assert sorted(set(languages.values())) == sorted({e.answer_type for e in world.train})
    assert len(set(languages.values())) == COMMUNITIES == 8


def test_more_queries_are_the_same_queries_and_more(world):
    small = load_digits_world(DigitsConfig(train=50))
    assert small.train == world.train[:50]
    assert small.fingerprint == world.fingerprint


def test_languages_are_real_and_partly_shared():
    words = [word for language in NUMBER_WORDS.values() for word in language]
    assert all(len(language) == 11 for language in NUMBER_WORDS.values())
    assert len(NUMBER_WORDS) >= 8
    assert len(set(words)) < len(words)


def test_annotators_sometimes_differ_and_the_majority_is_right(world):
    for example in (*world.bank, *world.train, *world.eval):
        assert len(example.answers) == 10
        assert example.answers.count(example.answer) >= 6
        assert accuracy_normalized(example.answer, example.answers) == 1.0
    assert 0.3 < np.mean([len(set(e.answers)) > 1 for e in world.eval]) < 0.8


def test_some_of_the_bank_is_foreign(world):
    languages = colour_languages(world)
    foreign = 0
    for example in world.bank:
        border = np.asarray(world.load_image(example.image))[0, 0].astype(float)
        hue = tuple(np.round(border / border.max(), 1))
        colour = hue if border.min() < 0.8 * border.max() else border.max() > 150
        foreign += languages.get(colour, example.answer_type) != example.answer_type
    assert 0.05 < foreign / len(world.bank) < 0.16


def test_answers_answer_the_question(world):
    steps = dict(QUESTIONS.values())
    rows = split_rows("eval")
    labels = set(handwritten()[1][rows].tolist())
    for example in world.eval[:50]:
        number = NUMBER_WORDS[example.answer_type].index(example.answer)
        assert number - steps[example.question] in labels


def test_render_keeps_the_border_and_the_ink():
    rng = np.random.default_rng(0)
    pictures = render(handwritten()[0][:4], np.array([[1.0, 0.0, 0.0]] * 4, np.float32), rng)
    assert pictures.shape == (4, 28, 28, 3)
    assert (pictures[:, 0, 0, 0] > 200).all()
    assert not pictures[:, 0, :, 1:].any()
    assert (pictures[:, 5:-5, 5:-5].max((1, 2, 3)) > 150).all()


@pytest.mark.parametrize(
    ("change", "flag"), [({"bank": 0}, "--bank_size=0"), ({"foreign": 1.5}, "--foreign=1.5")]
)
def test_bad_settings_name_the_flag(change, flag):
    with pytest.raises(InputError, match=flag):
        load_digits_world(DigitsConfig(**change))
