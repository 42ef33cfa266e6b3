"""A run's encoder as a library over files: broken demonstrations are left out, new queries not."""

import json
import re

import numpy as np
import pytest
from PIL import ExifTags, Image
from worker_settings import SETTINGS

from qwen_bridge.encoding import RunEncoder
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.digits import DigitsConfig, load_digits_world


@pytest.fixture
def run(tmp_path):
    """The workdir of a run on 20 demonstrations, two of them broken, and two queries."""
    world = load_digits_world(DigitsConfig(bank=20, train=2, eval=1))
    files = {}
    for role, examples in (("bank", world.bank), ("query", world.train)):
        lines = []
        for i, example in enumerate(examples):
            name = f"{role}{i}.png"
            world.load_image(example.image).save(tmp_path / name)
            row = {"image": name, "question": example.question, "answers": list(example.answers)}
            lines.append(json.dumps(row) + "\n")
        files[role] = tmp_path / f"{role}.jsonl"
        files[role].write_text("".join(lines))
    (tmp_path / "bank3.png").write_bytes(b"no picture")
    (tmp_path / "bank7.png").unlink()
    data = {"kind": "jsonl", "num_train": 1, "num_eval": 1, "seed": 0, "bank_images": ""}
    data |= {"query_images": "", **{f"{role}_jsonl": str(path) for role, path in files.items()}}
    settings = {"worker": {**SETTINGS, "dataset": data}, "embeddings_dir": str(tmp_path / "cache")}

    def write(**more):
        (tmp_path / "run.json").write_text(json.dumps({**settings, **more}))
        return tmp_path

    return write


def test_the_bank_is_that_of_the_run(run):
    ids, images, rows = RunEncoder.open(run(max_bad_images=0.1), "cpu").bank()
    assert len(ids) == len(images) == len(rows) == 18
    assert not {"bank/bank3.png", "bank/bank7.png"} & set(images)
    assert np.asarray(rows)[:, :64].any(axis=1).all()
    # 2 of 22 images; a run that is older than the flag allowed none.
    for more in ({"max_bad_images": 0.09}, {}):
        with pytest.raises(
            InputError, match=r"of 22 images .* cannot be read, more than --max_bad"
        ):
            RunEncoder.open(run(**more), "cpu").bank()


def test_a_new_query_with_a_broken_image_is_an_error(run):
    folder = run(max_bad_images=0.1)
    encoder = RunEncoder.open(folder, "cpu")
    for image, words in [
        (folder / "bank3.png", "bank3.png: cannot be decoded as an image"),
        (folder / "bank7.png", "bank7.png: no such image"),
        (Image.new("RGB", (10_000, 1)), "absolute aspect ratio must be smaller than 200"),
    ]:
        with pytest.raises(InputError, match=re.escape(words)):
            encoder.queries([folder / "bank1.png", image], ["What is it?", "What is it?"])
    keys, rows = encoder.queries([folder / "bank1.png"], ["What is it?"])
    assert (keys, rows.shape[0], np.isfinite(rows).all()) == (["bank/bank1.png"], 1, True)


def test_an_opened_picture_is_what_its_path_is(run):
    folder = run(max_bad_images=0.1)
    encoder = RunEncoder.open(folder, "cpu")
    clear = Image.new("RGBA", (56, 28), (200, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 20, 20))
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(folder / "bank1.png").resize((56, 28)).save(folder / "turned.jpg", exif=exif)
    paths = [folder / name for name in ("bank1.png", "clear.png", "turned.jpg")]
    questions = ["What is it?"] * len(paths)
    keys, rows = encoder.queries(paths, questions)
    assert keys[0] == "bank/bank1.png"
    opened_keys, opened = encoder.queries([Image.open(path) for path in paths], questions)
    assert opened_keys == keys
    np.testing.assert_array_equal(opened, rows)


def test_what_was_made_of_an_opened_picture_is_a_picture_of_its_own(run):
    folder = run(max_bad_images=0.1)
    encoder = RunEncoder.open(folder, "cpu")
    plain, edited = (Image.open(folder / "bank1.png") for _ in range(2))
    edited.paste((9, 9, 9), (0, 0, 9, 9))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    plain.resize((56, 28)).save(folder / "turned.jpg", exif=exif)
    by_hand = Image.open(folder / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    assert by_hand.getexif()  # which must not turn it again
    pictures = [plain, edited, by_hand, folder / "turned.jpg"]
    keys, rows = encoder.queries(pictures, ["What is it?"] * 4)
    assert keys[0] == "bank/bank1.png"
    assert len(set(keys)) == 4  # a file and a picture made of it are not known for the same
    assert np.abs(rows[0] - rows[1]).max() > 0
    np.testing.assert_array_equal(rows[2], rows[3])
