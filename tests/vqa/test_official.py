"""The loader of the official VQA files: what it reads and refuses."""

import gzip
import io
import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa import official
from qwen_bridge.vqa.official import load_official
from qwen_bridge.vqa.subsample import SubSample

MINI = Path(__file__).parents[2].parent / "shared" / "data" / "vqav2_mini"
needs_mini = pytest.mark.skipif(not MINI.exists(), reason=f"the real questions are not at {MINI}")

ANSWERS = ["red"] * 7 + ["Red", "blue\n", "dark red"]


def split(first_id, images):
    """A split as its two documents; question first_id + n is on the n-th of the image ids."""
    questions, annotations = [], []
    for question_id, image_id in enumerate(images, first_id):
        ids = {"question_id": question_id, "image_id": image_id}
        questions.append({**ids, "question": f"What is {question_id}?"})
        answers = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(ANSWERS, 1)
        ]
        annotations.append(
            {**ids, "question_type": "what is", "answer_type": "other", "answers": answers}
        )
    return (
        {"data_subtype": "val2014", "questions": questions},
        {"data_subtype": "val2014", "annotations": annotations},
    )


class World:
    """Files of a small data set in a folder, to be changed before it is loaded."""

    def __init__(self, folder, bank_images=(1, 2, 3), query_images=(4, 5, 6, 7, 8, 9)):
        self.folder = folder
        self.bank_questions, self.bank_annotations = split(100, bank_images)
        self.query_questions, self.query_annotations = split(200, query_images)
        (folder / "images").mkdir()

    def load(self, **changes):
        arguments = {"sample": SubSample(num_train=2, num_eval=2, seed=0)}
        for part in ("bank_questions", "bank_annotations", "query_questions", "query_annotations"):
            path = self.folder / f"{part}.json"
            document = getattr(self, part)
            if document is not None:
                path.write_text(json.dumps(document))
            arguments[part] = path
        arguments["bank_images"] = arguments["query_images"] = self.folder / "images"
        return load_official(**(arguments | changes))

    def fails(self, match, **changes):
        with pytest.raises(InputError, match=match) as failure:
            self.load(**changes)
        assert "\n" not in str(failure.value)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_reads_every_field(world):
    data = world.load(name="toy")
    assert data.name == "toy"
    assert [example.id for example in data.bank] == [100, 101, 102]
    first = data.bank[0]
    assert first.image == "bank/COCO_val2014_000000000001.jpg"
    assert first.question == "What is 100?"
    assert first.answers == tuple(ANSWERS)
    assert first.answer == "red"
    assert (first.question_type, first.answer_type) == ("what is", "other")
    assert len(data.train) == len(data.eval) == 2


def test_types_are_optional_and_equal_strings_are_stored_once(world):
    for annotation in world.bank_annotations["annotations"]:
        del annotation["question_type"], annotation["answer_type"], annotation["image_id"]
    first, second, _ = world.load().bank
    assert (first.question_type, first.answer_type) == ("", "")
    assert first.answers[0] is second.answers[0]


def test_ok_vqa_answers_are_those_that_its_metric_reads(world):
    for answer in world.bank_annotations["annotations"][0]["answers"]:
        answer["raw_answer"] = "racing"
    assert world.load().bank[0].answers == tuple(ANSWERS)


def test_the_order_of_annotations_does_not_matter(world):
    expected = world.load()
    world.bank_annotations["annotations"].reverse()
    assert world.load() == expected


@pytest.mark.parametrize("name", ["questions.json.gz", "questions.json"])
def test_gzip_is_known_by_its_content(world, name):
    path = world.folder / name
    path.write_bytes(gzip.compress(json.dumps(world.bank_questions).encode()))
    assert world.load(bank_questions=path).bank == world.load().bank


def test_a_byte_order_mark_is_skipped(world):
    path = world.folder / "marked.json"
    path.write_text(json.dumps(world.bank_questions), encoding="utf-8-sig")
    assert world.load(bank_questions=path).bank == world.load().bank


# Images.


def picture(**format):
    file = io.BytesIO()
    Image.new("L", (3, 2), 128).save(file, **format)
    return file.getvalue()


def store_image(world, content, name="COCO_val2014_000000000001.jpg"):
    (world.folder / "images" / name).write_bytes(content)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_images_are_rgb_whatever_the_file_is(world, format):
    store_image(world, picture(format=format))
    data = world.load()
    image = data.load_image(data.bank[0].image)
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_images_are_opened_only_when_asked_for(world):
    data = world.load()  # there is no image at all
    with pytest.raises(InputError, match=r"COCO_val2014_0+1\.jpg: no such image.*--bank_images"):
        data.load_image(data.bank[0].image)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", picture(format="JPEG")[:-30], picture(format="PNG")[:50]],
    ids=["empty", "text", "half a JPEG", "half a PNG"],
)
def test_a_broken_image_is_named(world, content):
    store_image(world, content)
    data = world.load()
    with pytest.raises(InputError, match=r"0001\.jpg: cannot be decoded as an image"):
        data.load_image(data.bank[0].image)


def test_formats_that_start_other_programs_are_refused(world):
    store_image(world, picture(format="EPS"))
    data = world.load()
    with pytest.raises(InputError, match="cannot identify image file"):
        data.load_image(data.bank[0].image)


def png_of_size(width, height):
    """A PNG that claims a size without having the pixels."""

    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8_200, 8_200), "8200 x 8200 pixels exceed the limit"),  # ours
        ((10_000, 10_000), "cannot be decoded"),  # Pillow warns, and warnings are errors here
        ((60_000, 60_000), "cannot be decoded"),  # Pillow refuses
    ],
)
def test_a_decompression_bomb_is_refused(world, size, message):
    store_image(world, png_of_size(*size))
    data = world.load()
    with pytest.raises(InputError, match=message):
        data.load_image(data.bank[0].image)


def test_links_that_leave_the_image_folder_are_refused(world, tmp_path):
    data = world.load()
    key, images = data.bank[0].image, world.folder / "images"
    file = images / key.partition("/")[2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / file.name).write_bytes(picture(format="PNG"))
    file.unlink(missing_ok=True)
    file.symlink_to(elsewhere / file.name)
    with pytest.raises(InputError, match=r"leads to .*elsewhere.*out of the image folder"):
        data.load_image(key)
    file.unlink()
    (images / "inside.png").write_bytes(picture(format="PNG"))
    file.symlink_to("inside.png")  # One that stays is as good as a file.
    assert data.load_image(key).size == (3, 2)
    linked = tmp_path / "linked"
    linked.symlink_to(images)  # The user's own choice of a folder, too.
    moved = world.load(bank_images=linked)
    assert moved.load_image(key).size == (3, 2)
    assert moved.fingerprint == data.fingerprint


def test_keys_of_a_shared_folder_are_the_same_for_bank_and_queries(tmp_path):
    world = World(tmp_path, query_images=(1, 1, 2, 2))
    images = world.folder / "images"
    data = world.load(query_images=images / ".." / "images")
    assert {query.image for query in data.train + data.eval} <= {one.image for one in data.bank}


def test_keys_of_two_folders_differ_and_hold_no_absolute_path(tmp_path):
    world = World(tmp_path, query_images=(1, 1, 2, 2))
    other = world.folder / "other"
    other.mkdir()
    store_image(world, picture(format="JPEG"))
    Image.new("RGB", (5, 5)).save(other / "COCO_val2014_000000000001.jpg")
    data = world.load(query_images=other)
    assert data.load_image("bank/COCO_val2014_000000000001.jpg").size == (3, 2)
    assert data.load_image("query/COCO_val2014_000000000001.jpg").size == (5, 5)
    assert all(query.image.startswith("query/COCO") for query in data.train + data.eval)
    moved = tmp_path / "moved"
    other.rename(moved)
    assert world.load(query_images=moved).fingerprint == data.fingerprint


def test_image_pattern(tmp_path):
    world = World(tmp_path, bank_images=("a/b", "./c", "d"))
    data = world.load(image_pattern="{image_id}.png")
    assert [one.image for one in data.bank] == ["bank/a/b.png", "bank/c.png", "bank/d.png"]
    del world.bank_questions["data_subtype"]
    assert world.load(image_pattern="train_{image_id}.jpg").bank[2].image == "bank/train_d.jpg"
    world.fails(
        r"bank_questions.json: no text field 'data_subtype'",
        image_pattern="{data_subtype}/{image_id}.jpg",
    )


@pytest.mark.parametrize(
    "pattern",
    ["image.jpg", "{}.jpg", "{image_id}{name}.jpg", "{image_id.real}.jpg", "{image_id", "{0}"],
)
def test_a_pattern_that_cannot_work(world, pattern):
    world.fails("--image_pattern=", image_pattern=pattern)


@pytest.mark.parametrize(
    "image_id", ["../secret", "/etc/secret", "a/../../secret", "..", "", "a\0b"]
)
def test_images_outside_the_folder_are_refused(tmp_path, image_id):
    world = World(tmp_path, bank_images=(1, image_id))
    world.fails(
        r"bank_questions.json: question_id 101: image .* outside", image_pattern="{image_id}"
    )


def test_an_image_id_that_does_not_fit_the_pattern(tmp_path):
    world = World(tmp_path, bank_images=(1, "two"))
    world.fails(r"question_id 101: image_id 'two' does not fit --image_pattern=COCO")


def test_a_folder_that_is_none(world):
    world.fails("--query_images=.*nowhere is not a folder", query_images=world.folder / "nowhere")


# Bad files.


def test_a_missing_file(world):
    world.fails("--query_annotations=.*none.json cannot be read", query_annotations="none.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"questions": [', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"annotations": []}', "has no list 'questions'; give the questions file"),
        (b'{"questions": {}}', "has no list 'questions'"),
        (b"\x1f\x8b", "cannot be read"),
        (gzip.compress(b'{"questions": []}' * 100, mtime=0)[:-12], "cannot be read"),
        (gzip.compress(b'{"questions": []}', mtime=0)[:10] + b"\xff" * 30, "cannot be read"),
        (b'{"questions": [3]}', r"questions\[0\] has no whole number as 'question_id'"),
        (b'{"questions": [{"question_id": true}]}', r"questions\[0\] has no whole number"),
        (b'{"questions": [{"question_id": "7"}]}', r"questions\[0\] has no whole number"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(world, content, message):
    path = world.folder / "bad.json"
    path.write_bytes(content)
    world.fails(f"bad.json:? {message}", bank_questions=path)


@pytest.mark.parametrize("field", ["image_id", "question"])
@pytest.mark.parametrize("value", [None, [], True, 1.5])
def test_a_question_with_a_wrong_field(world, field, value):
    world.query_questions["questions"][1][field] = value
    world.fails(f"query_questions.json: question_id 201: field '{field}' is .* it must be")
    del world.query_questions["questions"][1][field]
    world.fails(f"query_questions.json: question_id 201: field '{field}' is missing")


def test_an_annotation_with_wrong_answers(world):
    where = "query_annotations.json: question_id 201: "
    annotation = world.query_annotations["annotations"][1]
    annotation["answers"][3] = {"answer_id": 4}
    world.fails(where + r"answers\[3\] has no text as 'answer'")
    annotation["answers"][3] = {"answer": 4}
    world.fails(where + r"answers\[3\] has no text as 'answer'")
    annotation["answers"] = []
    world.fails(where + "field 'answers' is missing or empty")
    del annotation["answers"]
    world.fails(where + "field 'answers' is missing or empty")
    annotation["answer"] = "red"
    world.fails(where + "field 'answers' is missing or empty")


def test_an_annotation_with_a_wrong_label(world):
    world.query_annotations["annotations"][1]["answer_type"] = 3
    world.fails("query_annotations.json: question_id 201: field 'answer_type' is 3")


def test_two_images_for_one_question(world):
    world.query_annotations["annotations"][1]["image_id"] = 77
    world.fails("query_annotations.json: question_id 201: image_id 77 is not the 5 of")


def test_a_question_without_annotation_and_the_reverse(world):
    lost = world.bank_annotations["annotations"].pop()
    world.fails(r"bank_questions.json: question_id 102 has no annotation in .*bank_annotations")
    world.bank_annotations["annotations"].pop()
    world.fails(r"question_id 101 \(and 1 more\) has no annotation")
    world.bank_annotations["annotations"] += [lost, lost | {"question_id": 999}]
    del world.bank_questions["questions"][1]
    world.fails(r"bank_annotations.json: question_id 999 has no question in .*bank_questions")


@pytest.mark.parametrize("part", ["questions", "annotations"])
def test_duplicate_ids(world, part):
    records = getattr(world, f"bank_{part}")[part]
    records.append(records[0])
    world.fails(f"bank_{part}.json: question_id 100 occurs twice")


def test_an_id_that_the_wire_cannot_carry(tmp_path):
    world = World(tmp_path)
    world.bank_questions, world.bank_annotations = split(-1, (1, 2))
    world.fails(r"bank_questions.json: question_id -1 is outside \[0, 2\*\*63\)")


def test_half_a_surrogate_pair(world):
    where = r"query_questions.json: question_id 201: field 'question' has half a surrogate pair"
    world.query_questions["questions"][1]["question"] = "\ud83d?"
    world.fails(where)
    world.query_annotations["annotations"][0]["answers"][9]["answer"] = "\udc00"
    world.fails(r"query_annotations.json: question_id 200: answers\[9\] has half a surrogate")


def test_more_queries_than_there_are(world):
    world.fails(
        "--num_queries=5 and --num_eval=2 .* exceed the 6 questions in .*query_questions.json",
        sample=SubSample(num_train=5, num_eval=2, seed=0),
    )


# Real questions and photographs.


def images(examples):
    return {example.image for example in examples}


def load_mini(**changes):
    arguments = {
        "bank_questions": MINI / "bank_questions.json",
        "bank_annotations": MINI / "bank_annotations.json",
        "bank_images": MINI / "train2014",
        "query_questions": MINI / "query_questions.json",
        "query_annotations": MINI / "query_annotations.json",
        "query_images": MINI / "train2014",
        "sample": SubSample(num_train=70, num_eval=80, seed=0),
    }
    return load_official(**(arguments | changes))


@needs_mini
def test_real_questions():
    data = load_mini()
    assert (len(data.bank), len(data.train), len(data.eval)) == (340, 70, 80)
    assert data.example("bank", 3602003).question == "How long can you park here?"
    assert data.example("bank", 3602003).answer == "0"
    assert len(images(data.bank)) == 228
    assert not images(data.train) & images(data.eval)
    assert not images(data.bank) & images(data.train + data.eval)
    for pattern in ("COCO_train2014_{image_id:012d}.jpg", official.DEFAULT_IMAGE_PATTERN):
        assert load_mini(image_pattern=pattern) == data


@needs_mini
def test_every_real_photograph_opens():
    data = load_mini(sample=SubSample(num_train=0, num_eval=158, seed=0))
    keys = images(data.bank + data.eval)
    assert len(keys) == 328
    for key in keys:
        image = data.load_image(key)
        assert image.mode == "RGB"
        assert 1 < max(image.size) <= 336
