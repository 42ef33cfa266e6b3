"""Keys of content: what an embedding was computed from, whatever it is called.

A file of an image counts by its bytes. To read a large data set's images at every start would
take minutes, so a file's key is remembered by its path, size and time of modification; who
changes a file and restores all three gets the old key. Pictures that are generated count by their
pixels.
"""

import hashlib
import os
import pathlib
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vector_table import KEY_BYTES
from qwen_bridge.vqa.examples import Dataset
from qwen_bridge.vqa.images import ImageFolders

_THREADS = 8  # reading files waits for the disk, and hashing leaves Python's lock
_COMMIT_FILES = 512
_BLOCK = 1 << 20


def text_key(text: str) -> bytes:
    """Key of a text."""
    return _digest(b"text", text.encode("utf-8", "surrogatepass"))


def pixels_key(image: Image.Image) -> bytes:
    """Key of a picture's mode, size and pixels."""
    facts = f"{image.mode} {image.width} {image.height}"
    return _digest(b"pixels", facts.encode(), image.tobytes())


class ImageKeys:
    """Keys of a data set's images.

    Args:
      path: SQLite file that remembers the files read; its folder is made if it is not there.
      bar: `bar(label, total)`, a context that yields `advance(count)`.
    """

    def __init__(self, path: pathlib.Path, bar):
        self._path, self._bar = path, bar

    def of(
        self, dataset: Dataset, images: Sequence[str]
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """Returns the key of each image that can be read, and of each other one why it cannot.

        A key says nothing about whether the bytes can be decoded.

        Raises:
          InputError: the file that remembers keys cannot be used.
        """
        images = list(dict.fromkeys(images))
        folders, failed = dataset.load_image, {}
        if not isinstance(folders, ImageFolders):
            return {image: pixels_key(dataset.load_image(image)) for image in images}, failed
        stats = {}
        for image in images:
            try:
                stats[image] = _stat(folders, image)
            except InputError as error:
                failed[image] = f"image {image}: {error}"
        try:
            return self._remembered(stats, failed), failed
        except sqlite3.Error as error:
            raise InputError(
                f"{self._path} cannot be used ({error}); delete it, or give another "
                "--embeddings_dir"
            ) from error

    def of_file(self, path: pathlib.Path) -> bytes:
        """Returns the key of one file's content.

        Raises:
          InputError: it cannot be read.
        """
        return _file_key(str(path))

    def _remembered(
        self, stats: dict[str, tuple[str, int, int]], failed: dict[str, str]
    ) -> dict[str, bytes]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=120.0)
        try:
            db.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, key BLOB)"
            )
            sql = "SELECT key FROM files WHERE path = ? AND size = ? AND mtime_ns = ?"
            found = {image: db.execute(sql, stat).fetchone() for image, stat in stats.items()}
            keys = {image: row[0] for image, row in found.items() if row is not None}
            missing = [image for image in stats if image not in keys]
            if missing:
                with self._bar("read image files", len(missing)) as advance:
                    for first in range(0, len(missing), _COMMIT_FILES):
                        some = missing[first : first + _COMMIT_FILES]
                        some_stats = {image: stats[image] for image in some}
                        keys.update(self._read(db, some_stats, failed))
                        advance(len(some))
            return keys
        finally:
            db.close()

    def _read(
        self, db, stats: dict[str, tuple[str, int, int]], failed: dict[str, str]
    ) -> dict[str, bytes]:
        """Hashes files and remembers them, with what was known of them before they were read."""

        def attempt(image: str) -> bytes | None:
            try:
                return _file_key(stats[image][0])
            except InputError as error:
                failed[image] = f"image {image}: {error}"
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            found = zip(stats, pool.map(attempt, stats))
            keys = {image: key for image, key in found if key is not None}
        with db:
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                [(*stats[image], key) for image, key in keys.items()],
            )
        return keys


def _stat(folders: ImageFolders, image: str) -> tuple[str, int, int]:
    """Path, size and time of an image's file."""
    path = os.path.abspath(folders.path(image))
    try:
        stat = os.stat(path)
    except OSError:
        folders(image)  # Raises, and says what is to be done.
        raise
    return path, stat.st_size, stat.st_mtime_ns


def _file_key(path: str) -> bytes:
    digest = hashlib.blake2b(b"file\0", digest_size=KEY_BYTES)
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise InputError(
            f"{path}: the image file cannot be read ({error.strerror}); mend it or leave it out"
        ) from error
    return digest.digest()


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=KEY_BYTES).digest()
