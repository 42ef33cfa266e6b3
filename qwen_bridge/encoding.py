"""The encoder of a finished run, in the caller's own process: its demonstrations, and new queries.

    encoder = RunEncoder.open("runs/digits")
    encoder.queries(["kitchen.jpg"], ["What is on the stove?"])

Made for `lever_jax.demonstrations`, which says how a selector is used as a library. The run's
demonstrations are read from its cache on disk; what is missing there is computed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFile

from qwen_bridge import workers
from qwen_bridge.contents import ImageKeys, pixels_key
from qwen_bridge.embedding_cache import EmbeddingCache
from qwen_bridge.errors import InputError
from qwen_bridge.hub import resolve_model
from qwen_bridge.prompts import PromptError
from qwen_bridge.vqa.examples import Dataset, Example
from qwen_bridge.vqa.images import ImageFolders, MissingImageError, rgb_on_white, upright_rgb
from qwen_bridge.vqa.sources import open_dataset

_RUN_FILE = "run.json"  # also named in lever_jax.demonstrations, which this half cannot import
_NEW = "new"  # folder part of the key of an image that is not of the data set

ImageLike = str | os.PathLike | Image.Image


class RunEncoder:
    """Embeds what a run's selector looks at; make one with `open`.

    Attributes:
      fingerprint: identifies the vectors.
      hello: parts and width of an embedding, as a worker tells its driver.
    """

    def __init__(
        self, dataset: Dataset, settings: dict, folder: pathlib.Path, max_broken: float = 0.0
    ):
        self._dataset, self._folder, self._max_broken = dataset, folder, max_broken
        self._pictures: dict[str, Image.Image] = {}
        # The network reads new pictures and those of the data set through one function.
        everything = dataclasses.replace(dataset, load_image=self._load)
        scorer, hello = workers.build(settings, everything)
        self._embedder = scorer.embedder
        self.fingerprint = hello["encoder"]
        self.hello = {
            "encoder": self.fingerprint,
            "parts": self._embedder.parts,
            "embedding_dim": self._embedder.dim,
        }
        self._keys = ImageKeys(folder / "files.sqlite", _no_bar)
        self._bank_keys: dict[bytes, str] | None = None

    @classmethod
    def open(cls, workdir: str | os.PathLike, device: str = "auto") -> "RunEncoder":
        """Opens the encoder of a run: its data set and its model, on `device`.

        Args:
          workdir: of the run.
          device: `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
          InputError: there is no run, or its data or its model cannot be read.
        """
        path = pathlib.Path(workdir) / _RUN_FILE
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: there is no such file; train in {workdir} first") from None
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}); train there again") from None
        worker = run["worker"]
        settings = {**worker, "device": device, "model": resolve_model(worker["model"])}
        folder = pathlib.Path(run["embeddings_dir"])
        # Runs that are older than the flag allowed no broken image.
        max_broken = run.get("max_bad_images", 0.0)
        return cls(open_dataset(settings["dataset"]), settings, folder, max_broken)

    def demonstration(self, id: int) -> Example:
        """Returns the demonstration of the run with this id: image key, question, answers."""
        return self._dataset.example("bank", id)

    def image(self, key: str) -> Image.Image:
        """Returns the picture of a demonstration, by its key."""
        return self._dataset.load_image(key)

    def bank(self) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        """Returns ids int64 [N], image keys and float32 [N, D] embeddings of the demonstrations.

        As in the run, those whose image cannot be read are left out. The embeddings may lie on the
        disk, and be read where they are indexed.

        Raises:
          InputError: more images cannot be read than the run allows.
        """
        cache = EmbeddingCache(self._folder, self, self._dataset, _no_bar, self._max_broken)
        with cache:
            bank, rows = cache.demonstrations(self._dataset.bank, "embed the bank")
        ids = np.array([example.id for example in bank], np.int64)
        return ids, tuple(example.image for example in bank), rows

    def queries(
        self, images: Sequence[ImageLike], questions: Sequence[str]
    ) -> tuple[list[str], np.ndarray]:
        """Embeds new queries.

        Args:
          images: `Q` paths or PIL images.
          questions: `Q` texts.

        Returns:
          `Q` image keys and float32 `[Q, D]` embeddings. A picture that a demonstration shows, by
          its content, has that demonstration's key, so that it never demonstrates itself; where
          the demonstrations' pictures are files, a PIL image is known by the file it was opened
          from, if it still is what the file shows. PIL images that were not just opened are taken
          to be upright.

        Raises:
          InputError: an image cannot be read, or a text holds a special token.
        """
        for question in questions:
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"question {question!r} is not a text with words in it")
        keys = [self._key(image) for image in images]
        examples = [Example(i, k, q, ("",)) for i, (k, q) in enumerate(zip(keys, questions))]
        try:
            embedded = self._embedder.embed(examples, "query")
        except PromptError as error:
            raise InputError(str(error)) from error
        finally:
            self._pictures.clear()
        if embedded.reasons:
            raise InputError(next(iter(embedded.reasons.values())))
        return keys, embedded.embeddings

    def embed(self, kind: str, ids: Sequence[int], on_batch, batch_size: int = 64) -> None:
        """Embeds examples of the run, as `client.Environment.embed` does; for the cache on disk."""
        split = kind.partition(":")[0]
        for first in range(0, len(ids), batch_size):
            rows = np.arange(first, min(first + batch_size, len(ids)))
            examples = [self._dataset.example(split, int(ids[row])) for row in rows]
            on_batch(rows, self._embedder.embed(examples, kind))

    def _load(self, key: str) -> Image.Image:
        return self._pictures[key] if key in self._pictures else self._dataset.load_image(key)

    def _key(self, image: ImageLike) -> str:
        """Key of a new picture, which is kept until it is embedded."""
        if self._bank_keys is None:
            images = [example.image for example in self._dataset.bank]
            known, _ = self._keys.of(self._dataset, images)
            self._bank_keys = {content: key for key, content in known.items()}
        of_files = isinstance(self._dataset.load_image, ImageFolders)
        if isinstance(image, Image.Image):
            # What was made of an opened file is upright already, and may still have its EXIF.
            opened = isinstance(image, ImageFile.ImageFile)
            picture = upright_rgb(image) if opened else rgb_on_white(image)
            path = pathlib.Path(os.fsdecode(image.filename) if opened else "")
            shown = of_files and path.is_file() and pixels_key(_read(path)) == pixels_key(picture)
        else:
            path, shown = pathlib.Path(image), True
            picture = _read(path)
        content = self._keys.of_file(path) if of_files and shown else pixels_key(picture)
        key = self._bank_keys.get(content, f"{_NEW}/{content.hex()}")
        self._pictures[key] = picture
        return key


def _read(path: pathlib.Path) -> Image.Image:
    """The picture of a file, by the rules of a data set's."""
    folders = ImageFolders({_NEW: path.parent}, "the path given")
    try:
        return folders(f"{_NEW}/{path.name}")
    except MissingImageError:
        raise InputError(f"{path}: no such image") from None


@contextlib.contextmanager
def _no_bar(label: str, total: int):
    del label, total
    yield lambda count: None
