"""The driver's embeddings: what was ever computed is read from disk, the rest asked of workers.

    DIR/files.sqlite         keys of image files by path, size and time (contents.py)
    DIR/<encoder>/image.*    vectors of images, by content key (vector_table.py)
    DIR/<encoder>/text.*     vectors of questions and answers

`<encoder>` is a fingerprint of weights, processor settings and code, so another encoder never
reads this one's vectors. Images and texts are kept apart, each once, because a bank shows an
image under many questions and asks a question of many images. The cache is the driver's and not
the workers': the driver is the one process that needs all rows, and workers that come and go
then have nothing to share. Each batch is kept as it lands; a run that is stopped or killed goes
on after the last one.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qwen_bridge.client import Environment
from qwen_bridge.contents import ImageKeys, text_key
from qwen_bridge.errors import InputError
from qwen_bridge.gathered import Gathered, GatheredRows
from qwen_bridge.vector_table import VectorTable
from qwen_bridge.vqa.examples import Dataset, Example

# Ids of one call of the environment, which holds its results in memory until it ends.
_CALL_IDS = 4096

# (part, the key of each example) of the parts that share a table.
_Parts = list[tuple[str, list[bytes]]]


class Counts(NamedTuple):
    """How many vectors there were to be had.

    Attributes:
      read: from the disk.
      computed: by the workers.
      damaged: computed again because their checksum was wrong.
    """

    read: int
    computed: int
    damaged: int


class EmbeddingCache:
    """Embeds examples through a cache on disk.

    Args:
      folder: of the cache; may serve any number of runs, also at the same time.
      environment: the workers; their `hello` names the encoder and its parts.
      dataset: where the examples come from.
      bar: `bar(label, total)`, a context that yields `advance(count)`.

    Attributes:
      counts: of all calls of `embed`.

    Raises:
      InputError: the folder cannot be used.
    """

    def __init__(
        self, folder: pathlib.Path, environment: Environment, dataset: Dataset, bar: Callable
    ):
        self._environment, self._dataset, self._bar = environment, dataset, bar
        hello = environment.hello
        self._parts, self._dim = hello["parts"], hello["embedding_dim"]
        self._image_keys = ImageKeys(folder / "files.sqlite", bar)
        widths = {name: high - low for name, (low, high) in self._parts.items()}
        own = folder / hello["encoder"]
        self._images = VectorTable(own, "image", widths["image"])
        self._texts = VectorTable(own, "text", widths["question"])
        self.counts = Counts(0, 0, 0)

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *exception) -> None:
        self._images.close()
        self._texts.close()

    def embed(self, kind: str, examples: Sequence[Example], label: str) -> GatheredRows:
        """Returns `[N, D]` float32 embeddings, in memory only where they are read.

        Args:
          kind: "bank" or "query"; a query's answer part is zero.
          examples: `N` of the data set.
          label: of the progress bars.

        Raises:
          InputError: an image cannot be read, or a text not be embedded.
        """
        image_keys = self._image_keys.of(self._dataset, [example.image for example in examples])
        images = [image_keys[example.image] for example in examples]
        questions = [text_key(example.question) for example in examples]
        sources = [(self._images, "image", [("image", images)])]
        texts = [("question", questions)]
        if kind == "bank":
            texts.append(("answer", [text_key(example.answer) for example in examples]))
        sources.append((self._texts, "text", texts))
        gathered = []
        for table, only, parts in sources:
            row_of = self._rows(table, f"{kind}:{only}", examples, parts, f"{label}: {only}s")
            vectors = table.data()
            for part, keys in parts:
                rows = np.array([row_of[key] for key in keys], np.int64)
                gathered.append(Gathered(self._parts[part], vectors, rows))
        return GatheredRows(len(examples), self._dim, gathered)

    def _rows(
        self, table: VectorTable, kind: str, examples: Sequence[Example], parts: _Parts, label: str
    ) -> dict[bytes, int]:
        """The row of every key of `parts`, after the missing vectors were computed."""
        unique = list(dict.fromkeys(key for _, keys in parts for key in keys))
        found, damaged = table.find(unique)
        rows = dict(zip(unique, found.tolist()))
        missing = [key for key, row in rows.items() if row < 0]
        if missing:
            self._compute(table, kind, examples, parts, set(missing), label)
            found, lost = table.find(missing)
            if lost or found.min() < 0:
                raise InputError(
                    f"{table.path}: what was written there a moment ago cannot be read back; "
                    "give another --embeddings_dir, on a disk that works"
                )
            rows.update(zip(missing, found.tolist()))
        old = self.counts
        self.counts = Counts(
            old.read + len(unique) - len(missing),
            old.computed + len(missing),
            old.damaged + damaged,
        )
        return rows

    def _compute(
        self,
        table: VectorTable,
        kind: str,
        examples: Sequence[Example],
        parts: _Parts,
        missing: set[bytes],
        label: str,
    ) -> None:
        """Asks the workers for vectors; of the examples that share one, the first is embedded."""
        wanted: list[tuple[int, list[tuple[str, bytes]]]] = []
        unclaimed = set(missing)
        for i, example in enumerate(examples):
            mine = [(part, keys[i]) for part, keys in parts if keys[i] in unclaimed]
            if mine:
                unclaimed.difference_update(key for _, key in mine)
                wanted.append((example.id, mine))
        with self._bar(label, len(missing)) as advance:
            for first in range(0, len(wanted), _CALL_IDS):
                some = wanted[first : first + _CALL_IDS]

                def land(rows: np.ndarray, embeddings: np.ndarray, some=some) -> None:
                    found = {}
                    for row, embedding in zip(rows.tolist(), embeddings):
                        for part, key in some[row][1]:
                            low, high = self._parts[part]
                            found[key] = embedding[low:high]
                    table.append(list(found), np.stack(list(found.values())))
                    advance(len(found))

                self._environment.embed(kind, [id for id, _ in some], land)
