"""picks.jsonl and the comparison of two runs that is made from it alone."""

import dataclasses
import json
import os

import numpy as np
import pytest

from experiments.compare import compare, picks_of, read_picks
from experiments.output import check_out, whole_file, write_out
from experiments.picks import PickLines, prompt_hash, query_hash
from experiments.progress import CONSOLE
from experiments.tables import print_comparison, print_evaluation
from lever_jax.decoding import Answered
from lever_jax.errors import InputError
from lever_jax.evaluation import Picked
from lever_jax.statistics import paired_difference
from lever_jax.store import ScoreRecord
from qwen_bridge.errors import InputError as BridgeInputError
from qwen_bridge.vqa.examples import Dataset, Example

IDENTITY = {"prompt_template": "t1", "dataset": "d" * 64, "model": "m1"}
BANK = tuple(Example(i, f"bank/{i}", f"what is {i}?", (f"a{i}",) * 10) for i in range(6))
QUERIES = tuple(Example(100 + i, f"eval/{i}", "which?", ("yes", "no")) for i in range(4))
DATASET = Dataset("test", BANK, (), QUERIES, None, "d" * 64)


class Queries:
    """As much of `PooledQueries` as lines need."""

    query_ids = np.array([q.id for q in QUERIES])


def record(query_id, pointer, accuracy, **changes):
    """An answered prompt; accuracy None is a prompt that failed after it was scored."""
    fields = {
        "gt_prob": 0.25,
        "prediction": "ja ✓",
        "accuracy": accuracy,
        "accuracy_official": 0.5,
        "confidence": 0.75,
        "how": "generated",
        "eval_failed": None if accuracy is not None else "broken",
    }
    return ScoreRecord(query_id, pointer, **{**fields, **changes})


def picked(method="mmr", accuracies=(1.0, 0.0, 0.3, 1.0), draw=0, first=1):
    pointers = np.array([[first, 2]] * 4, np.int32)
    records = [record(q.id, (first + 2, 4), a) for q, a in zip(QUERIES, accuracies)]
    return Picked(method, 2, draw, Answered(pointers, records))


def write(path, *picks, identity=IDENTITY, dataset=DATASET):
    with whole_file(path) as out:
        lines = PickLines(out, Queries, dataset, identity)
        for one in picks:
            lines(one)
    return path


def test_a_line_says_what_was_shown_and_what_came_of_it(tmp_path):
    path = write(tmp_path / "picks.jsonl", picked(accuracies=(1.0, None, 0.3, 1.0)))
    first, failed, *_ = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    shown = [BANK[3], BANK[4]]
    assert first == {
        "query_id": 100, "method": "mmr", "shots": 2, "draw": 0,
        "demonstrations": [3, 4], "pointer_pos": [1, 2],
        "prompt_hash": prompt_hash("t1", shown, QUERIES[0]),
        "output": "ja ✓", "accuracy": 1.0, "accuracy_official": 0.5, "gt_prob": 0.25,
        "confidence": 0.75, "how": "generated", "eval_failed": None,
        "query_hash": query_hash(QUERIES[0]), "dataset": "d" * 16, "model": first["model"],
    }  # fmt: skip
    assert failed["eval_failed"] == "broken"
    for name in ("output", "accuracy", "accuracy_official", "gt_prob", "confidence", "how"):
        assert failed[name] is None, name


def test_zero_shot_and_a_query_without_a_pick(tmp_path):
    records = [record(q.id, (), 1.0) for q in QUERIES]
    nothing = Picked("zero_shot", 0, 0, Answered(np.zeros((4, 0), np.int32), records))
    missing = ScoreRecord(100, (), eval_failed="no prompt of its pool could be scored")
    oracle = Answered(np.full((1, 2), -1, np.int32), [missing])
    path = write(tmp_path / "picks.jsonl", nothing, Picked("oracle_in_pool", 2, 0, oracle))
    *zero, last = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert all(line["demonstrations"] == line["pointer_pos"] == [] for line in zero)
    assert last["demonstrations"] == last["pointer_pos"] == []
    assert last["accuracy"] is None


def test_a_prompt_hash_says_whether_the_prompt_was_the_same():
    def changed(example, **fields):
        return dataclasses.replace(example, **fields)

    shown, query = [BANK[0], BANK[1]], QUERIES[0]
    same = prompt_hash("t1", shown, query)
    assert same == prompt_hash("t1", list(shown), changed(query, id=7, answers=("other",)))
    # An answer that is not shown does not count; the one that is shown does.
    more = changed(BANK[0], answers=("a0",) * 9 + ("rare",))
    assert same == prompt_hash("t1", [more, BANK[1]], query)
    others = [
        prompt_hash("t2", shown, query),
        prompt_hash("t1", shown[::-1], query),
        prompt_hash("t1", shown[:1], query),
        prompt_hash("t1", [changed(BANK[0], answers=("z",)), BANK[1]], query),
        prompt_hash("t1", [changed(BANK[0], image="bank/5"), BANK[1]], query),
        prompt_hash("t1", [changed(BANK[0], question="why?"), BANK[1]], query),
        prompt_hash("t1", shown, changed(query, question="why?")),
        prompt_hash("t1", shown, changed(query, image="eval/9")),
    ]
    assert len({same, *others}) == 9


def test_comparison_by_hand(tmp_path):
    a = write(
        tmp_path / "a.jsonl",
        picked(accuracies=(1.0, 0.0, 0.3, None)),
        *(picked("random", (r, 0.0, 0.3, 1.0), draw=d) for d, r in enumerate((1.0, 0.0))),
        picked("selector_rce"),
    )
    b = write(
        tmp_path / "b.jsonl",
        picked(accuracies=(0.0, 0.0, 0.0, 1.0), first=0),
        picked("random", (0.3, 0.0, 0.3, 1.0)),
        picked("selector_grpo"),
        identity={**IDENTITY, "model": "m2"},
    )
    result = compare(read_picks(a, "normalized"), read_picks(b, "normalized"), "normalized")
    assert result["queries"] == {"a": 4, "b": 4, "common": 4}
    assert (result["same_dataset"], result["same_model"]) == (True, False)
    assert result["only_a"] == ["selector_rce (2 shots)"]
    assert result["only_b"] == ["selector_grpo (2 shots)"]
    mmr, random = result["rows"]
    expected = paired_difference([1.0, 0.0, 0.3], [0.0, 0.0, 0.0])  # the fourth failed in a
    assert (mmr["method"], mmr["shots"], mmr["n"], mmr["same_prompt"]) == ("mmr", 2, 3, 0.0)
    assert (mmr["diff"], mmr["ci95"]) == (expected.value, expected.interval)
    assert (mmr["a"], mmr["b"]) == (pytest.approx(1.3 / 3), 0.0)
    assert (random["n"], random["diff"]) == (4, pytest.approx((0.5 - 0.3) / 4))
    official = compare(
        read_picks(a, "official_2021"), read_picks(b, "official_2021"), "official_2021"
    )
    assert official["rows"][0]["diff"] == 0.0  # both 0.5 everywhere
    assert official["rows"][0]["ci95"][0] < 0 < official["rows"][0]["ci95"][1]


def test_a_comparison_with_itself_differs_nowhere(tmp_path):
    run = read_picks(write(tmp_path / "a.jsonl", picked(), picked("random")), "normalized")
    for row in compare(run, run, "normalized")["rows"]:
        assert (row["diff"], row["same_prompt"], row["n"]) == (0.0, 1.0, 4)


def test_only_common_queries_count(tmp_path):
    a = write(tmp_path / "a.jsonl", picked())
    b = tmp_path / "b.jsonl"
    b.write_text("".join(a.read_text(encoding="utf-8").splitlines(keepends=True)[:2]))
    result = compare(read_picks(a, "normalized"), read_picks(b, "normalized"), "normalized")
    assert result["queries"] == {"a": 4, "b": 2, "common": 2}
    assert result["rows"][0]["n"] == 2


def test_other_data_are_refused(tmp_path):
    a = read_picks(write(tmp_path / "a.jsonl", picked()), "normalized")
    other = tuple(dataclasses.replace(q, question="why?") for q in QUERIES)
    world = dataclasses.replace(DATASET, eval=other)
    b = read_picks(write(tmp_path / "b.jsonl", picked(), dataset=world), "normalized")
    with pytest.raises(InputError, match=r"different data sets: query 100 is another question"):
        compare(a, b, "normalized")
    c = dataclasses.replace(b, queries={7: "x"})
    with pytest.raises(InputError, match="no query in common"):
        compare(a, c, "normalized")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 4 is cut"),
        (lambda lines: [*lines, lines[0]], "line 5: query 100 has mmr, 2 shots, draw 0 twice"),
        (lambda lines: ["[1]", *lines], "line 1 is cut or was edited"),
        (lambda lines: ["{}", *lines], "no 'query_id'; this is no picks.jsonl"),
        (lambda lines: [lines[0].replace('"accuracy": 1.0', '"accuracy": 7')], "outside"),
        (lambda lines: [lines[0].replace('"shots": 2', '"shots": "2"')], "shots is '2'"),
        (lambda lines: [lines[0], lines[1].replace("d" * 16, "e" * 16)], "another data set"),
        (lambda lines: [], "is empty"),
    ],
)
def test_damaged_picks_are_one_clear_error(tmp_path, edit, words):
    path = write(tmp_path / "picks.jsonl", picked())
    lines = edit(path.read_text(encoding="utf-8").splitlines())
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=words) as error:
        read_picks(path, "normalized")
    assert "picks.jsonl" in str(error.value)


def test_picks_are_found_in_a_workdir_or_named(tmp_path):
    with pytest.raises(InputError, match=r"--compare=.*picks.jsonl"):
        picks_of(tmp_path, "compare")
    path = write(tmp_path / "picks.jsonl", picked())
    assert picks_of(tmp_path, "compare") == picks_of(path, "compare") == path


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before")

    def interrupted():
        with whole_file(path) as out:
            out("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    with whole_file(path) as out:
        out("after")
    write_out(str(tmp_path / "x.json"), {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "x.json"]
    assert path.read_text() == "after"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(BridgeInputError, match=r"--picks=.*folder that does not exist"):
        check_out(str(tmp_path / "no" / "picks.jsonl"), "picks")
    with (
        pytest.raises(BridgeInputError, match=r"--picks=.*cannot be written"),
        whole_file(tmp_path / "no" / "picks.jsonl", "picks"),
    ):
        pass


def test_tables_stay_within_100_columns():
    long = "selector_warmup_oracle_rerank"
    row = {"accuracy": 0.4567, "ci95": [0.1234, 0.5678], "n": 4000}
    row["by_answer_type"] = dict.fromkeys(("yes/no", "number", "other", "rare"), row)
    names = ("zero_shot", "similarity_image", "similarity_question_reversed", long, "selector_grpo")
    table = dict.fromkeys((*names, "oracle_in_pool"), row)
    table["random"] = {**row, "seeds": {"count": 3, "min": 0.123, "max": 0.456, "sd": None}}
    paired = [("selector_warmup_shuffled", "similarity_question_reversed"), (long, "selector_grpo")]
    result = {
        "n": 4000,
        "metric": "official_2021",
        "shots": {str(shots): table for shots in range(1, 9)},
        "paired": [
            {"a": a, "b": b, "shots": 8, "diff": -0.1234, "ci95": [-0.2345, -0.1234], "n": 4000}
            for a, b in paired
        ],
    }
    compared = {"metric": "normalized", "rows": []}
    for name in table:
        same = {"a": 0.1, "b": 0.2, "same_prompt": 1.0, "method": name}
        compared["rows"].append({**result["paired"][0], **same})
    with CONSOLE.capture() as capture:
        print_evaluation(result)
        print_comparison(compared)
    lines = capture.get().splitlines()
    assert max(map(len, (line.rstrip() for line in lines))) <= 100
    text = "\n".join(lines)
    assert f"{long} *" in text
    assert "oracle_in_pool *" in text
    assert "* reads the ground truth" in text
    assert "random, 2 shots: 3 seeds from 0.123 to 0.456, sd -" in text
    assert "selector_grpo *" not in text
    assert all(f"{shots} shot" in text for shots in range(1, 9))
