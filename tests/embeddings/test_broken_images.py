"""Images that cannot be read: zero, named, never cached, in no pool; and how many are too many."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from progress import no_bar

from lever_jax.pooled import Embedded, PoolConfig, pool_queries
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.store import Store
from lever_jax.types import CandidatePool
from qwen_bridge.embedding_cache import EmbeddingCache
from qwen_bridge.errors import InputError
from qwen_bridge.protocol import EmbedBatch
from qwen_bridge.vqa.examples import Dataset, Example
from qwen_bridge.vqa.images import ImageFolders

PARTS = {"image": (0, 4), "question": (4, 7), "answer": (7, 10)}
SIZES = {"bank": 30, "train": 8, "eval": 2}
# Demonstrations 3 and 4 have the same broken bytes, 5 has no file; queries 1 and 6 of train.
BROKEN = {"bank/3.png", "bank/4.png", "bank/5.png", "query/1.png", "query/6.png"}


class Workers:
    """Stands in for the workers: embeds files by their pixels, and remembers what was asked."""

    hello = {"parts": PARTS, "embedding_dim": 10, "encoder": "e1"}  # noqa: RUF012

    def __init__(self, dataset):
        self._dataset, self.asked = dataset, []

    def embed(self, kind, ids, on_batch, batch_size):
        split, _, only = kind.partition(":")
        for first in range(0, len(ids), 7):
            some = [self._dataset.example(split, int(id_)) for id_ in ids[first : first + 7]]
            rows, reasons = np.zeros((len(some), 10), np.float32), {}
            for i, example in enumerate(some):
                self.asked.append((only, example.image))
                texts = (
                    [example.question, example.answer] if split == "bank" else [example.question]
                )
                for at, text in zip((4, 7), texts if only == "text" else []):
                    rows[i, at : at + 3] = len(text), ord(text[0]), ord(text[-1])
                if only == "image":
                    try:
                        pixels = np.asarray(self._dataset.load_image(example.image), np.float32)
                        rows[i, :4] = *pixels.mean((0, 1)), pixels.std()
                    except InputError as error:
                        reasons[i] = f"image {example.image}: {error}"
            on_batch(np.arange(first, first + len(some)), EmbedBatch(rows, reasons))


def save(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def data(tmp_path):
    """Forty pictures as files, five of them broken in all the ways."""
    folders = {role: tmp_path / role for role in ("bank", "query")}
    for folder in folders.values():
        folder.mkdir()
    examples, number = {name: [] for name in SIZES}, 0
    for name, size in SIZES.items():
        role = "bank" if name == "bank" else "query"
        for i in range(size):
            file = f"{role}/{i if name != 'eval' else 100 + i}.png"
            save(tmp_path / file, number)
            examples[name].append(
                Example(number, file, f"what is {number % 5}?", (f"it {number}",))
            )
            number += 1
    for file in ("bank/3.png", "bank/4.png"):
        (tmp_path / file).write_bytes(b"no picture")
    (tmp_path / "bank/5.png").unlink()
    whole = (tmp_path / "query/1.png").read_bytes()
    (tmp_path / "query/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "query/6.png").write_bytes(b"")
    groups = (tuple(examples[name]) for name in SIZES)
    return Dataset("files", *groups, ImageFolders(folders), "f")


def embedded(folder, workers, data, share=0.5):
    """Bank and queries as a session embeds them, and the closed cache."""
    with EmbeddingCache(folder, workers, data, no_bar, share) as cache:
        bank, rows = cache.demonstrations(data.bank, "bank")
        queries = [cache.embed("query", some, "queries") for some in (data.train, data.eval)]
    return (bank, rows), queries, cache


def test_broken_images_are_zero_and_named_and_the_rest_is_as_ever(tmp_path, data):
    workers = Workers(data)
    (bank, rows), (train, evaluated), cache = embedded(tmp_path / "cache", workers, data)
    assert set(cache.broken) == BROKEN
    assert all(why.startswith(f"image {image}: ") for image, why in cache.broken.items())
    assert "5.png: no such image; check --bank_images" in cache.broken["bank/5.png"]
    assert "3.png: cannot be decoded as an image" in cache.broken["bank/3.png"]
    assert "image bank/4.png: the same content as image bank/3.png" in cache.broken["bank/4.png"]
    assert cache.first_broken().count(" | ") == 3
    assert cache.first_broken().endswith(" | and 2 more")
    # A bank has only what can be shown; queries stay, their texts as they should be.
    assert [e.id for e in bank] == [e.id for e in data.bank if e.image not in BROKEN]
    assert rows.shape == (27, 10)
    assert np.asarray(rows)[:, :4].any(axis=1).all()
    train = np.asarray(train)
    assert (~train[:, :4].any(axis=1)).nonzero()[0].tolist() == [1, 6]
    assert train[:, 4:7].all()
    # Everything else is what a data set without the broken ones gives.
    sound = [e for e in data.train if e.image not in BROKEN]
    clean = dataclasses.replace(data, bank=bank, train=tuple(sound))
    (_, alone), (alone_train, alone_eval), other = embedded(
        tmp_path / "x", Workers(clean), clean, 0
    )
    assert other.broken == {}
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(alone))
    keep = [i for i in range(8) if i not in (1, 6)]
    np.testing.assert_array_equal(train[keep], np.asarray(alone_train))
    np.testing.assert_array_equal(np.asarray(evaluated), np.asarray(alone_eval))
    # Beside it only the answers of the three demonstrations.
    assert cache.counts.computed == other.counts.computed + 3


def test_what_failed_is_tried_again_and_mended_files_are_found(tmp_path, data):
    embedded(tmp_path / "cache", Workers(data), data)
    second = Workers(data)
    _, _, cache = embedded(tmp_path / "cache", second, data)
    assert set(cache.broken) == BROKEN
    # One of the equal ones is asked for again, the missing one is not: there is nothing to read.
    assert second.asked == [("image", f) for f in ("bank/3.png", "query/1.png", "query/6.png")]
    # 35 sound images; 30 answers and 5 questions of the bank, those of 8 and of 2 queries.
    assert cache.counts == (35 + 35 + 5 + 2, 0, 0)
    for seed, image in enumerate(sorted(BROKEN)):
        save(tmp_path / image, 100 + seed)
    third = Workers(data)
    (bank, rows), _, cache = embedded(tmp_path / "cache", third, data, 0.0)
    assert (cache.broken, len(bank), rows.shape) == ({}, 30, (30, 10))
    assert {image for _, image in third.asked} == BROKEN


def test_too_many_are_an_error_that_names_the_mend(tmp_path, data):
    images = sum(SIZES.values())
    embedded(tmp_path / "cache", Workers(data), data, len(BROKEN) / images)  # exactly so many
    for share in (len(BROKEN) / images - 1e-6, 0.0):
        with pytest.raises(InputError) as caught:
            embedded(tmp_path / f"{share}", Workers(data), data, share)
        message = str(caught.value)
        assert f"of {images} images" in message
        assert f"more than --max_bad_images={share:g} allows: image bank/" in message
        assert message.endswith("of them), or raise the flag")
        assert "\n" not in message


def test_a_wrong_folder_is_found_before_anything_is_embedded(tmp_path, data):
    for path in (tmp_path / "bank").iterdir():
        path.unlink()
    workers = Workers(data)
    with pytest.raises(
        InputError, match=r"^at least 30 of 40 images \(75.00%\) cannot be read, more than"
    ):
        embedded(tmp_path / "cache", workers, data)
    assert workers.asked == []


def test_broken_images_are_in_no_pool_and_make_no_nan(tmp_path, data):
    (bank, rows), (train, _), _ = embedded(tmp_path / "cache", Workers(data), data)

    def as_embedded(examples, embeddings):
        ids = np.array([example.id for example in examples], np.int64)
        return Embedded(ids, tuple(example.image for example in examples), embeddings)

    image_of = {example.id: example.image for example in data.bank}
    for shares in ({}, {"image": 5, "random": 10}):
        config = PoolConfig(size=20, shares=shares, near_duplicate=0.999)
        with Store.open(tmp_path / f"{len(shares)}.sqlite", {"model": "any"}) as store:
            pooled = pool_queries(
                as_embedded(data.train, train), as_embedded(bank, rows), PARTS, config, store
            )
            _, similarity = store.get_pools(pooled.query_ids)
        assert (pooled.pool_ids >= 0).all()
        assert not BROKEN & {image_of[i] for i in pooled.pool_ids.ravel().tolist()}
        assert np.isfinite(similarity).all()
        assert np.isfinite(pooled.mean).all()
    init, policy = make_selector(SelectorConfig(width=8, heads=2), PARTS, 10)
    table = pooled.table
    assert not np.asarray(table.queries)[1, :4].any()
    pool = CandidatePool(table.bank[table.rows[1]], table.mask[1])

    @jax.jit
    def logits(params):
        encoding = policy.encode(params, table.queries[1], pool)
        return policy.logits(params, encoding, policy.start(params, encoding))

    params = init(jax.random.key(0))
    gradient = jax.grad(lambda params: logits(params).sum())(params)
    assert np.isfinite(logits(params)).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
