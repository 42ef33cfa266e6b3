"""CLIP and SigLIP from folders, against the models' own features computed one at a time."""

import json
import pathlib

import numpy as np
import published
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_bridge.encoders import load_encoder
from qwen_bridge.errors import InputError

TEXTS = [
    "What colour is the CAT?",
    "a dog",
    "red",
    "",
    "Two, two!  two",
    "how many dogs are there and how many cats are there and what colour are they",
]
FOLDERS = {
    "clip": ("clip", published.clip_folder),
    "siglip": ("siglip", published.siglip_folder),
    "siglip2": ("siglip", published.siglip2_folder),
    "naflex": ("siglip", lambda folder: published.siglip2_folder(folder, naflex=True)),
}


def load_image(key):
    if key == "broken":
        raise OSError("image file is truncated")
    rng = np.random.default_rng(len(key))
    size = {"wide": (70, 30), "high": (20, 61)}.get(key, (40, 40))
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8))


@pytest.fixture(scope="module", params=FOLDERS)
def loaded(request, tmp_path_factory):
    """An encoder, the model that its folder was made of, and the kind of folder."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, make = FOLDERS[request.param]
    model = make(folder)
    return load_encoder(kind, str(folder), load_image, "cpu"), model, request.param


def resized(image, size):
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255


def pixels_by_hand(image, kind):
    """What the published settings do to a picture, in plain Pillow and NumPy."""
    mean, std = np.full(3, 0.5), np.full(3, 0.5)
    if kind == "clip":  # shortest edge to 32, then the middle 32 x 32
        mean = np.array([0.48145466, 0.4578275, 0.40821073])
        std = np.array([0.26862954, 0.26130258, 0.27577711])
        scale = 32 / min(image.size)
        width, height = (max(32, int(side * scale)) for side in image.size)
        array = resized(image, (width, height))
        top, left = (height - 32) // 2, (width - 32) // 2
        array = array[top : top + 32, left : left + 32]
    else:
        array = resized(image, (32, 32))
    return torch.tensor(((array - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)


@torch.inference_mode()
def test_images_equal_the_models_features_one_at_a_time(loaded):
    encoder, model, kind = loaded
    keys = ["square", "wide", "high", "square"]
    actual, failed = encoder.images(keys)
    assert failed == {}
    assert actual.shape == (4, encoder.image_dim)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual[0], actual[3])
    for row, key in enumerate(keys):
        if kind == "naflex":  # its patches are checked by shape and mask only
            inputs = encoder._processor(images=[load_image(key)], return_tensors="pt")
            rows, columns = inputs["spatial_shapes"][0].tolist()
            assert rows * columns == inputs["pixel_attention_mask"].sum() <= 16
        else:
            inputs = {"pixel_values": pixels_by_hand(load_image(key), kind)}
        expected = model.get_image_features(**inputs).pooler_output[0]
        np.testing.assert_allclose(actual[row], expected.numpy(), atol=1e-5)


def ids_by_hand(kind, text, vocabulary):
    """Token ids of a text by the rules of the papers, word by word or letter by letter."""
    text = text.lower()
    if kind == "clip":
        words = text.replace("?", " ?").replace(",", " ,").replace("!", " !").split()
        ids = [i for word in words for i in clip_word(word, vocabulary)]
        return [vocabulary["<|startoftext|>"], *ids[:10], vocabulary["<|endoftext|>"]]
    if kind == "siglip":
        words = "".join(letter for letter in text if letter not in "?!,.").split()
        pieces = [piece for word in words for piece in likeliest("▁" + word, vocabulary)]
        end = pad = vocabulary["</s>"]
    else:
        pieces = list(text.replace(" ", "▁"))
        end, pad = vocabulary["<eos>"], vocabulary["<pad>"]
    ids = [vocabulary[piece] for piece in pieces][:7]
    return [*ids, end] + [pad] * (7 - len(ids))


def likeliest(word, vocabulary):
    """Of all ways to cut a word into pieces the likeliest; a piece's log P is minus its id."""
    if not word:
        return []
    cuts = [
        [word[:length], *likeliest(word[length:], vocabulary)]
        for length in range(1, len(word) + 1)
        if word[:length] in vocabulary
    ]
    return min(cuts, key=lambda pieces: sum(vocabulary[piece] for piece in pieces))


def clip_word(word, vocabulary):
    """Longest merge from the left, as every merge of the test's vocabulary grows a prefix."""
    letters, ids = [*word[:-1], word[-1] + "</w>"], []
    while letters:
        length = len(letters)
        while "".join(letters[:length]) not in vocabulary:
            length -= 1
        ids.append(vocabulary["".join(letters[:length])])
        letters = letters[length:]
    return ids


@torch.inference_mode()
def test_texts_equal_the_models_features_one_at_a_time(loaded):
    encoder, model, kind = loaded
    file = pathlib.Path(encoder._model.name_or_path) / "tokenizer.json"
    described = json.loads(file.read_text())["model"]["vocab"]
    if isinstance(described, list):
        described = {piece: i for i, (piece, _) in enumerate(described)}
    actual = encoder.texts(TEXTS)
    assert actual.shape == (len(TEXTS), encoder.text_dim)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([ids_by_hand(kind, text, described)])
        expected = model.get_text_features(input_ids=ids).pooler_output[0].numpy()
        np.testing.assert_allclose(actual[row], expected, atol=1e-5)
    # Only the last text is beyond the context; cut, it is what its beginning says.
    shuffled = encoder.texts(TEXTS[::-1])
    np.testing.assert_allclose(shuffled[::-1], actual, atol=1e-5)


def test_an_unreadable_image_is_zero_and_named_with_one_mend(loaded):
    encoder, _, _ = loaded
    rows, failed = encoder.images(["square", "broken", "wide"])
    reason = "image broken: image file is truncated; mend the file or leave it out"
    assert failed == {"broken": reason}
    assert not rows[1].any()
    np.testing.assert_allclose(rows[[0, 2]], encoder.images(["square", "wide"])[0], atol=1e-5)
    rows, failed = encoder.images(["broken", "broken"])  # no pass of the network at all
    assert (rows.shape, rows.any(), list(failed)) == ((2, encoder.image_dim), False, ["broken"])


@pytest.fixture
def folder(tmp_path):
    published.siglip_folder(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"],
)
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    name = name.replace("model.", "*.")
    with pytest.raises(InputError) as caught:
        load_encoder("siglip", str(folder), load_image, "cpu")
    assert f"--encoder_model={folder}: no " in str(caught.value)
    assert f"({name})" in str(caught.value)


def test_another_kind_of_model_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="is of a siglip model, not of clip"):
        load_encoder("clip", str(folder), load_image, "cpu")
    with pytest.raises(InputError, match="is not a folder"):
        load_encoder("clip", str(tmp_path / "nothing"), load_image, "cpu")


def test_weights_that_do_not_fit_are_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if "text_model" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, file, {"format": "pt"})
    with pytest.raises(InputError, match="1 weights missing"):
        load_encoder("siglip", str(folder), load_image, "cpu")
    save_file({**weights, "extra.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"architecture in config.json: extra.weight"):
        load_encoder("siglip", str(folder), load_image, "cpu")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_encoder("siglip", str(folder), load_image, "cpu")


def test_old_clip_folders_hold_their_positions_as_a_weight(tmp_path):
    published.clip_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file({**load_file(file), **positions}, file, {"format": "pt"})
    assert load_encoder("clip", str(tmp_path), load_image, "cpu").image_dim == 20


def test_a_tokenizer_without_an_end_is_refused(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="names no eos_token"):
        load_encoder("siglip", str(folder), load_image, "cpu")


def test_the_fingerprint_follows_weights_and_image_settings(folder, tmp_path):
    def fingerprint():
        return load_encoder("siglip", str(folder), load_image, "cpu").fingerprint

    before = fingerprint()
    assert fingerprint() == before
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    assert fingerprint() != before
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint() != before
