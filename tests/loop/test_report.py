"""report.html: whole, self-contained and safe, from a run's files and from files of others."""

import html.parser
import json
import re

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from experiments import charts, settings
from experiments.analysis import analyze_file, write_analysis
from experiments.curves import learning_curves
from experiments.gallery import EACH, gallery
from experiments.reporting import write_report
from experiments.stored import keep_training_picks
from lever_jax.errors import InputError
from qwen_bridge.errors import InputError as BridgeInputError
from qwen_bridge.vqa.examples import Dataset, Example

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(autouse=True)
def parsed():
    settings.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield


class Page(html.parser.HTMLParser):
    """What a page loads, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.words, self.stack = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [v for name, v in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br", "path", "line", "circle", "rect"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in ("path", "line", "circle", "rect"):
            return
        assert self.stack.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)


def page_of(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.stack == []
    assert "script" not in page.tags
    assert all(url.startswith("data:image/") for url in page.loaded)
    assert not re.search(r"url\(|@import|https?://", text)
    assert not re.search(r"\b(nan|None|undefined)\b", " ".join(page.words))
    return text, page


def rl_json(path, *, labels=True):
    """Data of others: local pointers, no images, no similarities, some failures."""
    rng = np.random.default_rng(0)
    document = {}
    for query in range(30):
        candidates = []
        for number in range(8):
            right = int(rng.random() < 0.4)
            one = {"pointer": rng.permutation(6)[:2].tolist(), "gen_method": "beam" + HOSTILE}
            if number == 7:
                one |= {"eval_failed": True, "eval_failed_reason": f"too long {HOSTILE}"}
            elif labels:
                one |= {"vqa_acc_score": right, "vqa_gt_prob": float(rng.random()) / 2 + right / 2}
            candidates.append(one)
        document[str(query)] = {
            "query": {"query_id": query, "question": HOSTILE},
            "candidate_pool_ids": list(range(100, 106)),
            "pointer_candidates": candidates,
        }
    path.write_text(json.dumps(document))
    return path


def distinct(document):
    for entry in document.values():
        seen = {}
        for one in entry["pointer_candidates"]:
            seen.setdefault(tuple(one["pointer"]), one)
        entry["pointer_candidates"] = list(seen.values())
    return document


def test_a_file_of_others_gives_what_it_can_and_says_what_is_missing(tmp_path):
    path = rl_json(tmp_path / "theirs.json")
    path.write_text(json.dumps(distinct(json.loads(path.read_text()))))
    result = analyze_file(str(path), "local")
    assert result["health"]["queries"] == 30
    assert result["health"]["eval_failed"] > 0
    assert result["positions"]
    write_analysis(tmp_path, result)
    assert json.loads((tmp_path / "analysis.json").read_text()) == result
    assert (tmp_path / "analysis.csv").read_text().startswith("section,series,figure,x,n,value")
    size = write_report(tmp_path / "report.html", result, None, None)
    text, page = page_of(tmp_path / "report.html")
    assert size == (tmp_path / "report.html").stat().st_size
    for part in ("Calibration", "Coverage", "What is missing", "no evaluation", "no training"):
        assert part in text
    assert "no similarities of answers" in text
    assert HOSTILE in " ".join(page.words)  # as text, not as an element


def test_pointers_without_labels_are_no_reason_to_stop(tmp_path):
    path = rl_json(tmp_path / "beams.json", labels=False)
    path.write_text(json.dumps(distinct(json.loads(path.read_text()))))
    result = analyze_file(str(path), "local")
    assert result["health"]["outcome"] == "too_few"
    write_report(tmp_path / "report.html", result, None, None)
    text, _ = page_of(tmp_path / "report.html")
    assert "no candidate was answered" in text


def dataset_of(images, broken=()):
    def load(key):
        if key in broken:
            raise BridgeInputError(f"{key} is broken")
        return images[key]

    examples = [
        Example(i, f"image{i % 3}", f"What is {i}? {HOSTILE}", (f"a{i}", f"a{i}", "b"), "", "x")
        for i in range(40)
    ]
    return Dataset("fake", tuple(examples[:20]), (), tuple(examples[20:]), load, "f")


@pytest.fixture
def run(tmp_path):
    """A workdir with an evaluation, its picks, and curves of two trainings of RCE."""
    sizes = {"image0": (40, 30), "image1": (900, 400), "image2": (64, 64)}
    images = {key: Image.new("RGB", size, (200, 30, 90)) for key, size in sizes.items()}
    methods = {"similarity_image": 0.25, "selector_rce": 0.5, "oracle_in_pool": 1.0}
    table = {
        name: {"accuracy": value, "ci95": [value - 0.1, value], "n": 20, "by_answer_type": {}}
        for name, value in methods.items()
    }
    paired = [
        {
            "a": "selector_rce",
            "b": "similarity_image",
            "shots": 2,
            "diff": None,
            "ci95": None,
            "n": 0,
        }
    ]
    document = {"n": 20, "metric": "normalized", "shots": {"2": table}, "paired": paired}
    (tmp_path / "eval.json").write_text(json.dumps(document))
    outcomes = {"similarity_image": [0, 1, 0, None], "selector_rce": [1, 0.3, 0, 1]}
    lines = [
        {
            "query_id": 20 + query,
            "method": method,
            "shots": 2,
            "draw": 0,
            "demonstrations": [query % 20, (query + 1) % 20],
            "output": HOSTILE,
            "accuracy": accuracy[query % 4],
            "accuracy_official": 0.0,
            "gt_prob": 0.5,
        }
        for method, accuracy in outcomes.items()
        for query in range(20)
    ]
    (tmp_path / "picks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"phase": "rce", "recipe": recipe, "step": step, "loss": 5.0 - step, "entropy": 1.0}
        for recipe, steps in (("old", 9), ("new", 5))
        for step in [*range(1, steps), 3]  # the last was done again after a stop
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"phase": "rce", "cut')
    return tmp_path, images


def test_the_gallery_shows_queries_of_each_kind(run):
    workdir, images = run
    evaluation = json.loads((workdir / "eval.json").read_text())
    found = gallery(workdir, evaluation, dataset_of(images, broken={"image1"}))
    assert found["counts"] == {"improved": 5, "worse": 5, "wrong": 5}
    assert (found["similarity"], found["selector"]) == ("similarity_image", "selector_rce")
    for kind, cards in found["cards"].items():
        assert len(cards) == EACH
        for card in cards:
            before, after = (pick["accuracy"] for pick in card["picks"])
            assert {"improved": after > before, "worse": after < before, "wrong": not after}[kind]
            assert card["answers"] == [f"a{card['query_id']}", "b"]
            for demo in card["picks"][0]["demonstrations"]:
                assert (demo["image"] is None) == (demo["id"] % 3 == 1)
    assert found["missing_pictures"] > 0
    assert gallery(workdir, {**evaluation, "shots": {}}, None) is None


def test_the_report_of_a_run_is_whole_and_safe(run):
    workdir, images = run
    size = write_report(workdir / "report.html", None, workdir, dataset_of(images, {"image2"}))
    assert size < 5 * 2**20
    text, page = page_of(workdir / "report.html")
    for part in ("selector_rce", "Got worse", "ground truth", "rce: loss", "nothing was mined"):
        assert part in text
    assert text.count("data:image/jpeg") > 0  # the large picture, as a thumbnail
    assert text.count("data:image/png") > 0
    assert HOSTILE in " ".join(page.words)


def test_two_runs_stand_side_by_side(run, tmp_path_factory):
    workdir, images = run
    other = tmp_path_factory.mktemp("other")
    (other / "eval.json").write_text((workdir / "eval.json").read_text())
    write_report(workdir / "report.html", None, workdir, dataset_of(images), other)
    text, _ = page_of(workdir / "report.html")
    assert "selector_rce (a)" in text
    assert "selector_rce (b)" in text
    assert "paired comparison" in text  # missing, and says so


def test_curves_are_those_of_the_last_training(run):
    rows = learning_curves(run[0])["rce"]
    assert {row["recipe"] for row in rows} == {"new"}
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert learning_curves(run[0], {"rce": "old"})["rce"][-1]["step"] == 8
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()
    (run[0] / "metrics.jsonl").write_text("\n".join([lines[0], "{cut", *lines[1:]]))
    with pytest.raises(InputError, match="line 2 is damaged"):
        learning_curves(run[0])


def test_training_picks_start_anew_with_the_first_selector(tmp_path):
    def names():
        return list(json.loads((tmp_path / "training_picks.json").read_text()))

    ids = np.array([3, 4])
    for name in ("warm-up", "RCE", "GRPO"):
        keep_training_picks(tmp_path, name, ids, np.array([1.0, np.nan], np.float32))
    assert names() == ["warm-up", "RCE", "GRPO"]
    kept = json.loads((tmp_path / "training_picks.json").read_text())["RCE"]
    assert kept == {"query_id": [3, 4], "accuracy": [1.0, None]}
    keep_training_picks(tmp_path, "RCE", ids, np.zeros(2))
    assert names() == ["warm-up", "RCE"]
    keep_training_picks(tmp_path, "warm-up", ids, np.zeros(2))
    assert names() == ["warm-up"]


@pytest.mark.parametrize("log", [False, True])
def test_charts_of_any_numbers(log):
    series = {"a <b>": [(1, 0.5, 0.4, 0.6), (100, None), (1000, 0.5, None, None)], "empty": []}
    text = charts.lines(series, x="x", y="y & z", log=log)
    assert Page(text).stack == []
    assert "y &amp; z" in text
    assert "nan" not in text
    assert charts.lines({"a": [(1, None)]}, x="x", y="y") == ""
    assert charts.bars([], [], x="x", y="y") == ""
    one = charts.bars([0, 1, 2], [0, 0], x="x", y="y")
    assert one.count("<rect") == 2
    row = {"label": "m", "value": 0.5, "ci95": None, "group": 9}
    assert charts.intervals([row, {**row, "value": None}], x="x").count("<circle") == 1
