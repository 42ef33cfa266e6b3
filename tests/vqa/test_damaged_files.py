"""Files damaged at random: whatever is wrong, it is one line that names the file, and no traceback.

Each case damages a good file in one of two ways: a few bytes of it, or a value anywhere inside it
that is replaced by junk, dropped, doubled or swapped. What still loads must load as a sound data
set; what does not must say which file, and where a record is at fault, which record.
"""

import copy
import gzip
import json
import random
import re

import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.checks import PROBLEMS, Findings, check_examples
from qwen_bridge.vqa.images import image_folders
from qwen_bridge.vqa.jsonl import read_jsonl
from qwen_bridge.vqa.official import read_split
from qwen_bridge.vqa.results import score_results
from qwen_bridge.vqa.sources import open_dataset

CASES = 600
SAMPLE = {"num_train": 1, "num_eval": 1, "seed": 0}
JUNK = [
    None, True, False, 0, -1, 7, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", " ", "x",
    "\ud800", "\0", "../..", "/", "a\nb", "é" * 5000, [], {}, [[]], [None], {"answer": 3},
    {"question_id": 1}, [0] * 1000, [[[[[[[[[[]]]]]]]]]], {"": ""},
]  # fmt: skip


def places(node, path=()):
    """Every path to a value inside a document."""
    yield path
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            yield from places(value, (*path, key))


def damaged_value(document, rng):
    """The document with one value replaced, dropped, doubled or swapped with its neighbour."""
    document = copy.deepcopy(document)
    path = rng.choice(list(places(document)))
    if not path:
        return rng.choice(JUNK)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], rng.choice(("junk", "junk", "drop", "double", "swap"))
    if how == "junk":
        parent[key] = rng.choice(JUNK)
    elif how == "drop":
        del parent[key]
    elif isinstance(parent, list):
        if how == "double":
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key], parent[-1] = parent[-1], parent[key]
    else:
        other = rng.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    return document


def damaged_json(document, rng):
    return json.dumps(damaged_value(document, rng)).encode()


def damaged_bytes(content, rng):
    """The bytes with some of them overwritten, cut off, cut out, or repeated."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content))
        how = rng.choice(("flip", "truncate", "cut", "repeat"))
        if how == "flip":
            content[at] = rng.randrange(256)
        elif how == "truncate":
            del content[max(at, 1) :]
        elif how == "cut":
            del content[at : at + rng.randrange(20)]
        else:
            content[at:at] = content[at : at + 50]
        content = content or bytearray(b" ")
    return bytes(content)


def check_message(error, *files):
    """The error must be one line of a bearable length that names one of the files."""
    message = str(error)
    assert "\n" not in message
    assert len(message) < 2000, message
    message.encode()
    assert any(str(file) in message for file in files), message


def write(path, content, rng):
    path.write_bytes(gzip.compress(content) if rng.random() < 0.2 else content)


OFFICIAL = {
    "questions": {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": id, "image_id": id // 2, "question": f"What is {id}?"}
            for id in range(10, 18)
        ],
    },
    "annotations": {
        "annotations": [
            {
                "question_id": id,
                "image_id": id // 2,
                "question_type": "what",
                "answer_type": "other",
                "answers": [{"answer": "red", "answer_id": n} for n in range(3)],
            }
            for id in range(10, 18)
        ],
    },
    "results": [{"question_id": id, "answer": "red"} for id in range(10, 18)],
}
LINES = [
    {"image": f"{n}.png", "question": f"What is {n}?", "answers": ["red", "Red"], "id": n}
    for n in range(8)
]


@pytest.fixture
def official(tmp_path):
    """Good files of every kind, and what opens them."""
    for role in ("bank", "query"):
        for name in ("questions", "annotations"):
            (tmp_path / f"{role}_{name}.json").write_text(json.dumps(OFFICIAL[name]))
    (tmp_path / "query_results.json").write_text(json.dumps(OFFICIAL["results"]))
    return tmp_path


def check_sound(dataset):
    for example in dataset.bank + dataset.train + dataset.eval:
        assert 0 <= example.id < 2**63
        assert example.answers
        json.dumps([example.image, example.question, *example.answers], ensure_ascii=False).encode()
    assert not {one.image for one in dataset.train} & {one.image for one in dataset.eval}


def check_load_and_check(settings, read, path):
    """Loads a damaged data set, then looks it over; returns the loader's message, if any.

    The readers are the same, so what stops the loader is found by the check.
    """
    message = ""
    try:
        check_sound(open_dataset(settings))
    except InputError as error:
        check_message(error, path)
        message = str(error)
    findings = Findings()
    try:
        check_examples(read(findings), lambda example: str(example.id), 1, findings)
    except InputError as error:  # the file cannot be read at all
        check_message(error, path)
        assert message
    else:
        about_numbers = "--num_queries" in message
        assert not message or about_numbers or findings.count(PROBLEMS)
    return message


@pytest.mark.parametrize("name", ["questions", "annotations"])
def test_official_files(official, name):
    rng = random.Random(f"official {name}")
    path = official / f"query_{name}.json"
    good = json.dumps(OFFICIAL[name]).encode()
    files = {
        f"{role}_{part}": str(official / f"{role}_{part}.json")
        for role in ("bank", "query")
        for part in ("questions", "annotations")
    }
    images = {"bank_images": str(official), "query_images": str(official)}
    settings = {"kind": "official", **files, **images, "image_pattern": "{image_id}.jpg", **SAMPLE}

    def read(findings):
        folders = image_folders(None, official)
        pair = files["query_questions"], files["query_annotations"]
        return read_split("query", *pair, "{image_id}.jpg", folders, findings)

    named = 0
    for case in range(CASES):
        write(
            path, damaged_bytes(good, rng) if case % 2 else damaged_json(OFFICIAL[name], rng), rng
        )
        message = check_load_and_check(settings, read, path)
        named += bool(re.search(r"question_id -?\d+|\[\d+\]", message))
    assert named > CASES / 10


def test_jsonl_files(tmp_path):
    rng = random.Random("jsonl")
    good, path = tmp_path / "bank.jsonl", tmp_path / "query.jsonl"
    lines = [json.dumps(line).encode() for line in LINES]
    good.write_bytes(b"\n".join(lines))
    settings = {"kind": "jsonl", "bank_jsonl": str(good), "query_jsonl": str(path), **SAMPLE}

    def read(findings):
        return list(read_jsonl("query", path, image_folders(None, tmp_path), findings).values())

    named = 0
    for case in range(CASES):
        if case % 2:
            content = damaged_bytes(b"\n".join(lines), rng)
        else:
            row = rng.randrange(len(lines))
            changed = list(lines)
            changed[row] = damaged_json(LINES[row], rng)
            content = b"\n".join(changed)
        write(path, content, rng)
        message = check_load_and_check(settings, read, path)
        named += bool(re.search(rf"{re.escape(str(path))}:\d+: ", message))
    assert named > CASES / 4


@pytest.mark.parametrize("name", ["questions", "annotations", "results"])
def test_files_to_score(official, name):
    rng = random.Random(f"score {name}")
    path = official / f"query_{name}.json"
    good = json.dumps(OFFICIAL[name]).encode()
    files = [official / f"query_{part}.json" for part in ("questions", "annotations", "results")]
    scored = 0
    for case in range(CASES):
        write(
            path, damaged_bytes(good, rng) if case % 2 else damaged_json(OFFICIAL[name], rng), rng
        )
        try:
            rows = score_results(*files)
        except InputError as error:
            check_message(error, *files)
        else:
            scored += 1
            assert all(0 <= row.accuracy <= 1 for row in rows)
    assert 0 < scored < CASES
