"""The loader of people's own data: what it reads and refuses."""

import dataclasses
import gzip
import json

import pytest
from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.jsonl import load_jsonl
from qwen_bridge.vqa.sources import open_dataset
from qwen_bridge.vqa.subsample import SubSample


def line(number, **changes):
    fields = {"image": f"{number}.png", "question": f"What is {number}?", "answers": ["red", "Red"]}
    return {name: value for name, value in (fields | changes).items() if value is not ...}


class World:
    """Two files in a folder, to be changed before they are loaded."""

    def __init__(self, folder):
        self.folder = folder
        self.bank = [line(number) for number in range(3)]
        self.query = [line(number) for number in range(10, 20)]

    def write(self, role):
        path = self.folder / f"{role}.jsonl"
        lines = getattr(self, role)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    def load(self, **changes):
        arguments = {f"{role}_jsonl": self.write(role) for role in ("bank", "query")}
        sample = SubSample(num_train=2, num_eval=2, seed=0)
        return load_jsonl(**(arguments | {"sample": sample} | changes))

    def fails(self, match, **changes):
        with pytest.raises(InputError, match=match) as failure:
            self.load(**changes)
        assert "\n" not in str(failure.value)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def ids(examples):
    return [example.id for example in examples]


def test_reads_every_field(world):
    world.bank[0] |= {"id": 7, "question_type": "what is", "answer_type": "other", "more": [1]}
    data = world.load(name="mine")
    assert data.name == "mine"
    first = data.example("bank", 7)
    assert first == data.bank[0]
    assert first.image == "bank/0.png"
    assert first.question == "What is 0?"
    assert first.answers == ("red", "Red")
    assert (first.question_type, first.answer_type) == ("what is", "other")
    assert (data.bank[1].question_type, data.bank[1].answer_type) == ("", "")
    assert (len(data.bank), len(data.train), len(data.eval)) == (3, 2, 2)


def test_a_single_text_is_one_annotator_and_null_is_absent(world):
    world.bank[0] |= {"answers": "red", "id": None, "question_type": None}
    first = world.load().bank[0]
    assert first.answers == ("red",)
    assert first.question_type == ""


def test_it_is_a_kind_of_data_set(world):
    expected = world.load()
    settings = {"kind": "jsonl", "num_train": 2, "num_eval": 2, "seed": 0}
    settings |= {f"{role}_jsonl": str(world.write(role)) for role in ("bank", "query")}
    assert open_dataset(settings).fingerprint == expected.fingerprint
    assert open_dataset(settings | {"bank_images": "", "query_images": ""}) == expected


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_gzip_is_known(world):
    expected = world.load()
    content = world.write("bank").read_bytes()
    path = world.folder / "other.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + content.replace(b"\n", b"\r\n \n"))
    assert world.load(bank_jsonl=path).bank == expected.bank
    path.write_bytes(gzip.compress(content))
    assert world.load(bank_jsonl=path).bank == expected.bank


# Ids.


def test_ids_by_content_are_stable(world):
    first, second, third = world.load().bank
    # Written down once: an id that changed would orphan every stored score.
    assert ids([first, second, third]) == [
        4_716_092_813_568_320_916,
        577_792_735_115_114_367,
        5_368_419_227_708_406_443,
    ]
    world.bank.reverse()
    assert ids(world.load().bank) == ids([third, second, first])
    world.bank[2]["image"] = "./0.png"
    world.bank[2]["question_type"] = "a label says nothing about the example"
    assert world.load().bank[2].id == first.id


@pytest.mark.parametrize("field", ["image", "question", "answers"])
def test_other_content_is_another_id(world, field):
    before = ids(world.load().bank)
    world.bank[1][field] = "other"
    after = ids(world.load().bank)
    assert [a == b for a, b in zip(before, after)] == [True, False, True]


def test_ids_may_be_texts(world):
    world.bank[0]["id"], world.bank[1]["id"] = "q1", "q2"
    first, second, _ = ids(world.load().bank)
    world.bank[0]["question"] = "Changed?"
    assert ids(world.load().bank)[:2] == [first, second]
    assert 0 <= min(first, second) < max(first, second) < 2**63


@pytest.mark.parametrize("id", [0, 2**63 - 1])
def test_ids_at_the_ends_of_the_range(world, id):
    world.bank[0]["id"] = id
    assert world.load().bank[0].id == id


@pytest.mark.parametrize("id", [-1, 2**63, 1.0, True, [], {}])
def test_ids_that_are_none(world, id):
    world.bank[1]["id"] = id
    world.fails(r"bank\.jsonl:2: id .* is not one; give a whole number in \[0, 2\*\*63\)")


def test_an_id_that_occurs_twice(world):
    world.query[0]["id"] = world.query[3]["id"] = 5
    world.fails(r"query\.jsonl:4: id 5 is that of line 1 already")


def test_a_line_that_is_repeated(world):
    world.bank.append(world.bank[1])
    world.fails(r"bank\.jsonl:4: id \d+ is that of line 2 already; .* if it is a repetition")


def test_bank_and_queries_may_be_one_file(world):
    path = world.write("query")
    data = world.load(bank_jsonl=path, query_jsonl=path)
    assert set(data.train + data.eval) <= set(data.bank)  # with the same image keys


# Images.


def test_images_are_beside_the_file_or_where_the_flags_say(world):
    for name, size in (("beside", 2), ("photos", 3)):
        (world.folder / name).mkdir()
        Image.new("L", (size, size)).save(world.folder / name / "0.png")
    world.bank[0]["image"] = "beside/0.png"
    data = world.load()
    assert data.load_image(data.bank[0].image).size == (2, 2)
    assert data.load_image(data.bank[0].image).mode == "RGB"

    world.bank[0]["image"] = "0.png"
    data = world.load(bank_images=world.folder / "photos")
    assert data.load_image(data.bank[0].image).size == (3, 3)
    assert data.train[0].image.startswith("query/")
    with pytest.raises(InputError, match=r"photos/1\.png: no such image; .* the field 'image'"):
        data.load_image(data.bank[1].image)


@pytest.mark.parametrize("image", ["../secret", "/etc/secret", "a/../../secret", "..", "", "a\0b"])
def test_images_outside_the_folder_are_refused(world, image):
    world.bank[1]["image"] = image
    world.fails(r"bank\.jsonl:2: image .* lies outside the image folder")


def test_folders_and_files_that_are_none(world):
    world.fails("--query_images=nowhere is not a folder", query_images="nowhere")
    world.fails("--bank_jsonl=none.jsonl is not a file", bank_jsonl="none.jsonl")
    world.fails(
        "--bank_jsonl=none.jsonl cannot be read",
        bank_jsonl="none.jsonl",
        bank_images=world.folder,
    )


# Bad lines.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"image": ', "not JSON"),
        (b"{'image': 1}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{}", "field 'image' is missing"),
    ],
)
def test_a_line_that_is_not_what_it_should_be(world, content, message):
    path = world.folder / "bad.jsonl"
    path.write_bytes(json.dumps(line(1)).encode() + b"\n" + content)
    world.fails(rf"bad\.jsonl:2: {message}", bank_jsonl=path)


@pytest.mark.parametrize("name", ["image", "question"])
@pytest.mark.parametrize("value", [None, 3, ["a"], {}])
def test_a_field_that_is_not_text(world, name, value):
    world.query[4][name] = value
    world.fails(rf"query\.jsonl:5: field '{name}' is .* it must be text")
    del world.query[4][name]
    world.fails(rf"query\.jsonl:5: field '{name}' is missing")


@pytest.mark.parametrize("value", [None, 3, [], {}, ...])
def test_no_answers(world, value):
    world.bank[2] = line(2, answers=value)
    world.fails(r"bank\.jsonl:3: field 'answers' is missing or empty")


def test_an_answer_that_is_not_text(world):
    for wrong in (2, {"text": "2"}, {"answer": 2}, ["2"]):
        world.bank[2]["answers"] = ["2", wrong]
        world.fails(r"bank\.jsonl:3: answers\[1\] is neither a text .* nor an object with a text")


def test_answers_may_be_annotators_records(world):
    texts = world.bank[2]["answers"]
    before = world.load()
    world.bank[2]["answers"] = [{"answer": text, "answer_confidence": "yes"} for text in texts]
    assert world.load() == before


@pytest.mark.parametrize("name", ["image", "question", "answers", "answer_type"])
def test_half_a_surrogate_pair(world, name):
    world.query[4][name] = "half a \ud800 pair"
    world.fails(rf"query\.jsonl:5: .*{name}.* has half a surrogate pair")


def test_a_label_that_is_not_text(world):
    world.bank[2]["answer_type"] = 3
    world.fails(r"bank\.jsonl:3: field 'answer_type' is 3; it must be text")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file(world, content):
    path = world.folder / "empty.jsonl"
    path.write_bytes(content)
    world.fails(r"empty\.jsonl: no line is an example", query_jsonl=path)


def test_half_a_gzip_file(world):
    path = world.folder / "half.jsonl.gz"
    path.write_bytes(gzip.compress(world.write("bank").read_bytes())[:-9])
    world.fails(r"--bank_jsonl=.*half\.jsonl\.gz cannot be read", bank_jsonl=path)


# Sub-sampling has tests of its own; that it is used is all there is to see.


def test_draws_by_seed_and_not_by_order(world):
    sample = SubSample(num_train=4, num_eval=4, seed=0, max_bank=2)
    data = world.load(sample=sample)
    world.query.reverse()
    world.bank.reverse()
    again = world.load(sample=sample)
    assert (again.train, again.eval) == (data.train, data.eval)
    assert set(again.bank) == set(data.bank)
    assert len(data.bank) == 2
    other = world.load(sample=dataclasses.replace(sample, seed=1))
    assert (set(other.train), set(other.eval)) != (set(data.train), set(data.eval))
    world.fails(
        r"--num_queries=9 and --num_eval=4 .* 10 questions in .*query\.jsonl",
        sample=dataclasses.replace(sample, num_train=9),
    )
