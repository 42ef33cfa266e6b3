"""The driver's embeddings: equal to the workers' own, and no vector computed twice."""

import collections

import numpy as np
import pytest
from progress import no_bar

from qwen_bridge.embedding_cache import EmbeddingCache
from qwen_bridge.errors import InputError
from qwen_bridge.protocol import EmbedBatch
from qwen_bridge.vqa.digits import DigitsConfig, load_digits_world

PARTS = {"image": (0, 4), "question": (4, 7), "answer": (7, 10)}


class Workers:
    """Stands in for the workers: vectors are means and bytes, and everything asked is counted."""

    def __init__(self, dataset, encoder="e1", batch=16):
        self.hello = {"parts": PARTS, "embedding_dim": 10, "encoder": encoder}
        self.asked = collections.Counter()
        self.die_after = None
        self._dataset, self._batch = dataset, batch

    def image(self, key):
        pixels = np.asarray(self._dataset.load_image(key), np.float32)
        return np.append(pixels.mean((0, 1)), pixels.std())

    def text(self, text):
        raw = np.frombuffer(text.encode(), np.uint8)
        return np.array([raw.mean(), raw.std(), len(raw)])

    def row(self, kind, example):
        split, _, only = kind.partition(":")
        row = np.zeros(10, np.float32)
        if only != "text":
            row[0:4] = self.image(example.image)
        if only != "image":
            row[4:7] = self.text(example.question)
            if split == "bank":
                row[7:10] = self.text(example.answer)
        return row

    def embed(self, kind, ids, on_batch, batch_size):
        assert self._batch <= batch_size
        split = kind.partition(":")[0]
        for first in range(0, len(ids), self._batch):
            some = ids[first : first + self._batch]
            if self.die_after is not None and self.die_after <= sum(self.asked.values()):
                raise KeyboardInterrupt
            examples = [self._dataset.example(split, int(i)) for i in some]
            self.asked[kind] += len(some)
            rows = np.arange(first, first + len(some))
            made = [self.row(kind, example) for example in examples]
            on_batch(rows, EmbedBatch(np.stack(made)))


@pytest.fixture(scope="module")
def world():
    return load_digits_world(DigitsConfig(bank=90, train=30, eval=12))


def embedded(folder, workers, world, groups=("bank", "train", "eval")):
    with EmbeddingCache(folder, workers, world, no_bar) as cache:
        rows = [
            cache.embed("bank" if name == "bank" else "query", getattr(world, name), name)
            for name in groups
        ]
        return rows, cache.counts


def test_embeddings_are_the_workers_own_and_computed_once(tmp_path, world):
    workers = Workers(world)
    rows, counts = embedded(tmp_path, workers, world)
    for name, some in zip(("bank", "train", "eval"), rows):
        kind = "bank" if name == "bank" else "query"
        expected = np.stack([workers.row(kind, example) for example in getattr(world, name)])
        np.testing.assert_array_equal(np.asarray(some), expected)
    assert not np.asarray(rows[1])[:, 7:10].any()
    texts = {e.question for e in world.bank} | {e.answer for e in world.bank}
    pictures = {world.load_image(e.image).tobytes() for e in world.bank + world.train + world.eval}
    assert workers.asked["bank:text"] <= len(texts)
    assert sum(workers.asked[f"{kind}:image"] for kind in ("bank", "query")) == len(pictures)
    assert counts.computed == len(texts) + len(pictures)
    assert workers.asked["query:text"] == 0  # the bank has asked these questions

    again = Workers(world)
    same, counts = embedded(tmp_path, again, world)
    assert not again.asked
    assert (counts.computed, counts.damaged) == (0, 0)
    for before, after in zip(rows, same):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    assert all(isinstance(part.vectors, np.memmap) for part in same[0]._parts)


def test_growing_computes_what_is_new(tmp_path, world):
    embedded(tmp_path, Workers(world), world)
    larger = load_digits_world(DigitsConfig(bank=90, train=45, eval=12))
    workers = Workers(larger)
    rows, _ = embedded(tmp_path, workers, larger)
    assert set(workers.asked) == {"query:image"}
    assert workers.asked["query:image"] == 15
    assert rows[1].shape == (45, 10)


def test_another_encoder_reads_nothing_of_the_first(tmp_path, world):
    first, second = Workers(world), Workers(world, encoder="e2")
    embedded(tmp_path, first, world)
    embedded(tmp_path, second, world)
    assert first.asked == second.asked


@pytest.mark.parametrize("after", [1, 60, 110])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, world, after):
    whole = Workers(world)
    rows, _ = embedded(tmp_path / "whole", whole, world)
    stopped = Workers(world)
    stopped.die_after = after
    with pytest.raises(KeyboardInterrupt):
        embedded(tmp_path / "stopped", stopped, world)
    rest = Workers(world)
    resumed, _ = embedded(tmp_path / "stopped", rest, world)
    for before, now in zip(rows, resumed):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(now))
    for kind in ("bank:image", "query:image"):
        assert stopped.asked[kind] + rest.asked[kind] == whole.asked[kind]


def test_damaged_vectors_are_computed_again(tmp_path, world):
    rows, _ = embedded(tmp_path, Workers(world), world)
    expected = [np.asarray(some) for some in rows]
    path = tmp_path / "e1" / "image.f32"
    content = bytearray(path.read_bytes())
    content[5 * 16] ^= 1
    path.write_bytes(content)
    workers = Workers(world)
    rows, counts = embedded(tmp_path, workers, world)
    assert (counts.computed, counts.damaged) == (1, 1)
    assert sum(workers.asked.values()) == 1
    for before, now in zip(expected, rows):
        np.testing.assert_array_equal(before, np.asarray(now))


def test_a_disk_that_forgets_is_named(tmp_path, world, monkeypatch):
    from qwen_bridge.vector_table import VectorTable

    monkeypatch.setattr(VectorTable, "_write", lambda *args: None)
    with pytest.raises(InputError, match=r"image.f32: what was written .* cannot be read back"):
        embedded(tmp_path, Workers(world), world)
