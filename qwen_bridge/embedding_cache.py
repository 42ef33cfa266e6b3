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

An image that cannot be read has no vector and is not kept: its part of an embedding is zero, the
reason is in `broken`, and the next run tries again. Where too many are broken, the folder is
probably the wrong one, and that is an error.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qwen_bridge.client import Environment
from qwen_bridge.contents import ImageKeys, text_key
from qwen_bridge.errors import InputError
from qwen_bridge.gathered import Gathered, GatheredRows
from qwen_bridge.protocol import EmbedBatch
from qwen_bridge.vector_table import VectorTable
from qwen_bridge.vqa.examples import Dataset, Example

# Ids of one call of the environment, which holds its results in memory until it ends.
_CALL_IDS = 4096
# Ids of one request to a worker; a text costs far less than an image.
_REQUEST_IDS = {"image": 64, "text": 256}
_NAMED = 3  # broken images that a message names

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
      max_broken: share of the data set's images that may be broken, in [0, 1].

    Attributes:
      counts: of all calls.
      broken: image key -> why it cannot be read, of all calls.

    Raises:
      InputError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        environment: Environment,
        dataset: Dataset,
        bar: Callable,
        max_broken: float = 0.0,
    ):
        self._environment, self._dataset, self._bar = environment, dataset, bar
        self._max_broken = max_broken
        self._images_in_all = len({e.image for e in dataset.bank + dataset.train + dataset.eval})
        self._reasons: dict[bytes, str] = {}  # of content that cannot be decoded
        self.broken: dict[str, str] = {}
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
          examples: `N` of the data set; the image part of one in `broken` is zero.
          label: of the progress bars.

        Raises:
          InputError: too many images cannot be read, or a text cannot be embedded.
        """
        image_keys, failed = self._image_keys.of(self._dataset, [e.image for e in examples])
        self._note_broken(failed)
        images = [image_keys.get(example.image) for example in examples]
        questions = [text_key(example.question) for example in examples]
        sources: list[tuple[VectorTable, str, _Parts]] = [
            (self._images, "image", [("image", images)])
        ]
        texts = [("question", questions)]
        if kind == "bank":
            texts.append(("answer", [text_key(example.answer) for example in examples]))
        sources.append((self._texts, "text", texts))
        gathered = []
        for table, only, parts in sources:
            row_of = self._rows(table, kind, only, examples, parts, f"{label}: {only}s")
            row_of[None] = -1
            vectors = table.data()
            for part, keys in parts:
                rows = np.array([row_of[key] for key in keys], np.int64)
                gathered.append(Gathered(self._parts[part], vectors, rows))
            if only == "image":
                self._note_copies(image_keys)
        return GatheredRows(len(examples), self._dim, gathered)

    def demonstrations(
        self, examples: Sequence[Example], label: str
    ) -> tuple[tuple[Example, ...], GatheredRows]:
        """Embeds a bank: those of `examples` whose image can be shown, and their embeddings."""
        rows = self.embed("bank", examples, label)
        sound = [i for i, example in enumerate(examples) if example.image not in self.broken]
        return tuple(examples[i] for i in sound), rows.take(sound)

    def first_broken(self) -> str:
        """Why the first broken images by name cannot be read, in one line."""
        first = [self.broken[image] for image in sorted(self.broken)[:_NAMED]]
        more = len(self.broken) - len(first)
        return " | ".join(first) + (f" | and {more:,} more" if more else "")

    def _note_broken(self, failed: dict[str, str]) -> None:
        """Adds broken images; too many are an error at once, not after hours of embedding."""
        self.broken |= failed
        share = len(self.broken) / max(self._images_in_all, 1)
        if failed and share > self._max_broken:
            raise InputError(
                f"at least {len(self.broken):,} of {self._images_in_all:,} images ({share:.2%}) "
                f"cannot be read, more than --max_bad_images={self._max_broken:g} allows: "
                f"{self.first_broken()}; replace the files (python -m experiments.check_data finds "
                "all of them), or raise the flag"
            )

    def _note_copies(self, image_keys: dict[str, bytes]) -> None:
        """Images whose content was found broken under another name."""
        copies = {
            image: f"image {image}: the same content as {self._reasons[key]}"
            for image, key in image_keys.items()
            if key in self._reasons and image not in self.broken
        }
        self._note_broken(copies)

    def _rows(
        self,
        table: VectorTable,
        kind: str,
        only: str,
        examples: Sequence[Example],
        parts: _Parts,
        label: str,
    ) -> dict[bytes, int]:
        """The row of every key of `parts`, -1 for none, after the missing vectors were computed."""
        unique = list(dict.fromkeys(k for _, keys in parts for k in keys if k is not None))
        found, damaged = table.find(unique)
        rows = dict(zip(unique, found.tolist()))
        missing = [key for key, row in rows.items() if row < 0 and key not in self._reasons]
        if missing:
            self._compute(table, kind, only, examples, parts, set(missing), label)
            missing = [key for key in missing if key not in self._reasons]
            found, lost = table.find(missing)
            if lost or found.min(initial=0) < 0:
                raise InputError(
                    f"{table.path}: what was written there a moment ago cannot be read back; "
                    "give another --embeddings_dir, on a disk that works"
                )
            rows.update(zip(missing, found.tolist()))
        old = self.counts
        self.counts = Counts(
            old.read + len(unique) - len(missing) - sum(key in self._reasons for key in unique),
            old.computed + len(missing),
            old.damaged + damaged,
        )
        return rows

    def _compute(
        self,
        table: VectorTable,
        kind: str,
        only: str,
        examples: Sequence[Example],
        parts: _Parts,
        missing: set[bytes],
        label: str,
    ) -> None:
        """Asks the workers for vectors; of the examples that share one, the first is embedded."""
        wanted: list[tuple[Example, list[tuple[str, bytes]]]] = []
        unclaimed = set(missing)
        for i, example in enumerate(examples):
            mine = [(part, keys[i]) for part, keys in parts if keys[i] in unclaimed]
            if mine:
                unclaimed.difference_update(key for _, key in mine)
                wanted.append((example, mine))
        with self._bar(label, len(missing)) as advance:
            for first in range(0, len(wanted), _CALL_IDS):
                some = wanted[first : first + _CALL_IDS]

                def land(rows: np.ndarray, batch: EmbedBatch, some=some) -> None:
                    found, failed = {}, {}
                    for i, row in enumerate(rows.tolist()):
                        example, mine = some[row]
                        if i in batch.reasons:
                            failed[example.image] = batch.reasons[i]
                            self._reasons |= {key: batch.reasons[i] for _, key in mine}
                            continue
                        for part, key in mine:
                            low, high = self._parts[part]
                            found[key] = batch.embeddings[i, low:high]
                    if found:
                        table.append(list(found), np.stack(list(found.values())))
                    advance(len(found) + len(failed))
                    self._note_broken(failed)

                ids = [example.id for example, _ in some]
                self._environment.embed(f"{kind}:{only}", ids, land, _REQUEST_IDS[only])
