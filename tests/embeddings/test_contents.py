"""Keys of images: by content, and files read once."""

import contextlib
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from qwen_bridge import contents
from qwen_bridge.contents import ImageKeys, pixels_key, text_key
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example
from qwen_bridge.vqa.images import ImageFolders

SILENT = []


@contextlib.contextmanager
def counting_bar(label, total):
    SILENT.append((label, total))
    yield lambda count: None


def picture(seed, size=(6, 5)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def dataset(load_image):
    return Dataset("test", (Example(0, "bank/0.png", "?", ("a",)),), (), (), load_image, "f")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three pictures, of which two are the same; and a count of the files read."""
    images = tmp_path / "images"
    images.mkdir()
    for name, seed in (("0", 0), ("1", 1), ("copy", 0)):
        picture(seed).save(images / f"{name}.png")
    reads = []
    key_of = contents._file_key
    monkeypatch.setattr(contents, "_file_key", lambda path: (reads.append(path), key_of(path))[1])
    data = dataset(ImageFolders({"bank": images}))
    names = ["bank/0.png", "bank/1.png", "bank/copy.png"]

    def keys():
        reads.clear()
        found, _ = ImageKeys(tmp_path / "cache" / "files.sqlite", counting_bar).of(data, names)
        return [found[name] for name in names], sorted(pathlib.Path(path).name for path in reads)

    return images, keys


def test_files_count_by_content_and_are_read_once(folder):
    images, keys = folder
    first, read = keys()
    assert read == ["0.png", "1.png", "copy.png"]
    assert first[0] == first[2] != first[1]
    assert all(len(key) == 16 for key in first)
    assert keys() == (first, [])
    os.rename(images / "1.png", images / "x.png")
    os.rename(images / "copy.png", images / "1.png")
    os.rename(images / "x.png", images / "copy.png")
    assert keys() == ([first[0], first[2], first[1]], ["1.png", "copy.png"])


def test_a_changed_file_is_read_again(folder):
    images, keys = folder
    before, _ = keys()
    picture(5).save(images / "1.png")
    after, read = keys()
    assert read == ["1.png"]
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]
    os.utime(images / "1.png", ns=(1, 1))  # touched, and the same
    assert keys() == (after, ["1.png"])


def test_files_that_cannot_be_read_are_named_and_the_others_have_keys(tmp_path):
    images, outside = tmp_path / "images", tmp_path / "outside.png"
    images.mkdir()
    picture(0).save(images / "0.png")
    picture(1).save(outside)
    (images / "empty.png").write_bytes(b"")
    (images / "folder.png").mkdir()
    (images / "link.png").symlink_to(outside)
    names = [f"bank/{name}.png" for name in ("0", "gone", "empty", "folder", "link")]
    keys = ImageKeys(tmp_path / "files.sqlite", counting_bar)
    data = dataset(ImageFolders({"bank": images}))
    found, failed = keys.of(data, names)
    assert set(found) == {"bank/0.png", "bank/empty.png"}  # whether it is a picture is not asked
    assert "gone.png: no such image; check --bank_images" in failed.pop("bank/gone.png")
    assert "folder.png: the image file cannot be read (Is a directory)" in failed.pop(
        "bank/folder.png"
    )
    reason = failed.pop("bank/link.png")
    assert reason.startswith("image bank/link.png: ")
    assert "out of the image folder" in reason
    assert not failed
    picture(2).save(images / "gone.png")  # mended: what failed was not remembered
    again, failed = keys.of(data, names)
    assert set(failed) == {"bank/folder.png", "bank/link.png"}
    assert again.keys() - found.keys() == {"bank/gone.png"}


def test_a_broken_memory_is_named(folder, tmp_path):
    _, keys = folder
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "files.sqlite").write_bytes(b"no database at all, but long" * 20)
    with pytest.raises(InputError, match=r"files.sqlite cannot be used .*--embeddings_dir"):
        keys()


def test_generated_pictures_count_by_pixels(tmp_path):
    pictures = {"a": picture(0), "b": picture(1), "same": picture(0), "wide": picture(0, (5, 6))}
    data = dataset(pictures.__getitem__)
    keys, failed = ImageKeys(tmp_path / "none" / "files.sqlite", counting_bar).of(
        data, list(pictures)
    )
    assert failed == {}
    assert keys["a"] == keys["same"]
    assert len(set(keys.values())) == 3
    assert not (tmp_path / "none").exists()
    # The same bytes in another shape are another picture.
    raw = picture(0).tobytes()
    assert pixels_key(Image.frombytes("RGB", (6, 5), raw)) != pixels_key(
        Image.frombytes("RGB", (5, 6), raw)
    )


def test_texts_count_by_their_letters():
    assert text_key("a cat") == text_key("a cat")
    assert len({text_key(text) for text in ("a cat", "A cat", "a cat ", "", "\udc80")}) == 5
