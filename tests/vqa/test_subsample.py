"""Which queries are trained on and which evaluated: by seed, on other images, growing in place."""

import dataclasses
import random

import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Example
from qwen_bridge.vqa.subsample import SubSample, subsampled

# Fifty images have one question each and ten have five: a hundred queries.
CROWDED = [*range(1000, 1050), *(image for image in range(2000, 2010) for _ in range(5))]


def examples(first_id, images_):
    return [
        Example(id, f"{image}.jpg", f"What is {id}?", ("red",))
        for id, image in enumerate(images_, first_id)
    ]


def draw(num_train=20, num_eval=20, seed=0, max_bank=None, *, bank=None, queries=None):
    sample = SubSample(num_train=num_train, num_eval=num_eval, seed=seed, max_bank=max_bank)
    bank = examples(100, range(40)) if bank is None else bank
    queries = examples(200, CROWDED) if queries is None else queries
    return subsampled("crowd", bank, queries, None, sample, "queries.json")


def ids(group):
    return [example.id for example in group]


def images(group):
    return {example.image for example in group}


def test_the_same_seed_draws_the_same_and_another_another():
    first, again, other = draw(max_bank=20), draw(max_bank=20), draw(max_bank=20, seed=1)
    assert first == again
    for group in ("bank", "train", "eval"):
        assert set(ids(getattr(first, group))) != set(ids(getattr(other, group)))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_no_group_is_a_prefix():
    data = draw(max_bank=20)
    assert len(data.bank) == 20
    assert sorted(ids(data.bank)) != list(range(100, 120))
    for queries in (data.train, data.eval):
        assert min(ids(queries)) < 230
        assert max(ids(queries)) > 260


def test_the_order_of_the_file_does_not_change_the_draw():
    expected = draw(max_bank=20)
    data = draw(
        max_bank=20, bank=examples(100, range(40))[::-1], queries=examples(200, CROWDED)[::-1]
    )
    assert (data.train, data.eval) == (expected.train, expected.eval)
    assert set(data.bank) == set(expected.bank)


def test_max_bank_is_a_limit_and_keeps_the_order():
    assert ids(draw(max_bank=1000).bank) == list(range(100, 140))
    assert ids(draw(max_bank=39).bank) == sorted(ids(draw(max_bank=39).bank))


# Images.


@pytest.mark.parametrize("seed", range(5))
def test_train_and_eval_share_no_image(seed):
    for num_train, num_eval in [(10, 10), (40, 10), (10, 40), (60, 20), (0, 100), (100, 0)]:
        data = draw(num_train, num_eval, seed)
        assert (len(data.train), len(data.eval)) == (num_train, num_eval)
        assert not set(ids(data.train)) & set(ids(data.eval))
        assert not images(data.train) & images(data.eval)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_data_no_image_is_shared_and_what_is_said_to_fit_fits(seed):
    rng = random.Random(seed)
    queries = examples(0, [rng.randrange(12) for _ in range(rng.randrange(2, 40))])
    num_eval = rng.randrange(len(queries) + 1)
    for num_train in range(len(queries) - num_eval, -1, -1):
        try:
            data = draw(num_train, num_eval, seed, queries=queries)
        except InputError as error:
            fits = int(str(error).split("at most --num_queries=")[1].split()[0])
            assert fits < num_train
        else:
            assert (len(data.train), len(data.eval)) == (num_train, num_eval)
            assert not images(data.train) & images(data.eval)
            break
    if num_train < len(queries) - num_eval:
        assert num_train == fits


def test_queries_that_would_share_an_image_are_refused():
    # Two images with three questions each: four for training cannot have images of their own.
    queries = examples(200, [1, 1, 1, 2, 2, 2])
    message = (
        r"--num_queries=4 and --num_eval=2 do not fit: .*different images.*queries\.json has 6 "
        r"questions on 2 images; .* at most --num_queries=3 fits"
    )
    with pytest.raises(InputError, match=message):
        draw(4, 2, queries=queries)
    data = draw(3, 2, queries=queries)
    assert len(images(data.train)) == len(images(data.eval)) == 1


def test_evaluation_takes_an_image_once_while_there_are_others():
    assert len(images(draw(20, 15).eval)) == 15


# Growing.


def test_larger_numbers_add_queries_and_change_none():
    few, larger = draw(10, 10), draw(45, 45)
    assert larger.train[:10] == few.train
    assert larger.eval[:10] == few.eval
    assert draw(45, 10).eval == few.eval
    assert draw(10, 45).train == few.train


def test_the_fingerprint_does_not_see_how_many_are_drawn():
    fingerprints = {
        draw(*numbers).fingerprint
        for numbers in [(10, 10), (45, 10), (10, 45), (90, 5), (10, 10, 0, 20)]
    }
    assert len(fingerprints) == 1


def test_the_fingerprint_sees_what_every_example_says_and_the_seed():
    bank, queries = examples(100, range(40)), examples(200, CROWDED)
    fingerprints = {draw().fingerprint, draw(seed=1).fingerprint}
    for change in (
        {"question": "Changed?"},
        {"answers": ("blue",)},
        {"image": "other.jpg"},
        {"answer_type": "other"},
    ):
        for group in (bank, queries):
            kept = group[-1]
            group[-1] = dataclasses.replace(kept, **change)
            fingerprints.add(draw(1, 1, 0, 1, bank=bank, queries=queries).fingerprint)
            group[-1] = kept
    assert len(fingerprints) == 10
    assert draw(1, 1, 0, 1, bank=bank, queries=queries).fingerprint in fingerprints


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train": -1}, "--num_queries=-1 is negative"),
        ({"num_eval": -1}, "--num_eval=-1 is negative"),
        ({"max_bank": 0}, "--max_bank=0 leaves no demonstrations"),
        ({"num_train": 81}, "--num_queries=81 and --num_eval=20 together exceed the 100 questions"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        draw(**changes)
