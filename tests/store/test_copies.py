"""Merge, filter and split, and the command that offers them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from chance import fresh_rng

from lever_jax.errors import InputError
from lever_jax.store import ScoreRecord, Store, StoreError
from lever_jax.store_copies import TABLES, filter_store, merge_stores, split_store
from lever_jax.store_salvage import salvage

FINGERPRINT = {"model": "tiny", "metric": "normalized"}


def record(query, pointer, **more):
    return ScoreRecord(query, pointer, **{"gt_prob": query / 64, **more})


def answered(query, pointer, **more):
    return record(query, pointer, accuracy=0.5, prediction="sept", how="generated", **more)


def make(path, queries, stage="mine", seed=0, fingerprint=FINGERPRINT):
    """A store of some of everything about `queries`, in a random order of proposals."""
    rng = np.random.default_rng(seed)
    with Store.open(path, fingerprint) as store:
        for query in queries:
            pointers = [(query, i) for i in range(int(rng.integers(3, 9)))]
            records = [answered(query, p) if p[1] % 2 else record(query, p) for p in pointers]
            records.append(ScoreRecord(query, (99,), eval_failed="no image"))
            records.append(record(query, (), eval_failed="it hung"))
            store.put_scores(records)
        store.supersede("score", [record(query, (99,)) for query in queries[:2]])
        store.put_pools(
            queries,
            np.arange(len(queries) * 4).reshape(-1, 4),
            np.ones((1, 4)) / 3 * np.ones((len(queries), 1)),
        )
        everything = list(store.iter_scores())
        for row in rng.permutation(len(everything)):
            one = everything[row]
            if len(one.pointer) == 2:
                store.put_proposals(stage, [one.query_id], [one.pointer], ["beam"], [-1.0], [True])
        store.mark_done(stage, {"queries": len(queries)})
        store.put_scores([record(queries[0], ())])  # A duplicate.
    return path


def content(path):
    """Every row of the tables that copies keep."""
    with Store.open(path, read_only=True) as store:
        assert store.verify() == []
        counts = store.counts()
        return {table: list(store.read_rows(table)) for table in TABLES} | {"counts": counts}


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_split_store_merges_into_itself(tmp_path, parts):
    whole = make(tmp_path / "whole", [3, 1, 4, 15, 9, 2**62], seed=fresh_rng())
    outs = [tmp_path / f"part{i}" for i in range(parts)]
    queries = split_store(whole, outs)
    assert sum(queries) == 6
    assert max(queries) - min(queries) <= 1
    seen = []
    for out in outs:
        with Store.open(out, read_only=True) as store:
            seen += store.queries().tolist()
            assert store.done("mine") == {"queries": 6}
    assert sorted(seen) == sorted(set(seen)) == [1, 3, 4, 9, 15, 2**62]
    merged = merge_stores(outs[::-1], tmp_path / "merged")
    before, after = content(whole), content(tmp_path / "merged")
    assert before == after
    assert merged.equal == parts - 1  # The mark of the stage.
    assert after["counts"]["duplicate_scores"] == 1
    assert not list(tmp_path.glob("*.partial*"))
    with pytest.raises(StoreError, match="exists and is not overwritten"):
        split_store(whole, outs)


def test_stores_of_several_machines_keep_their_orders(tmp_path):
    first = make(tmp_path / "a", [1, 2, 3], seed=1)
    second = make(tmp_path / "b", [7, 8], seed=2)
    merged = merge_stores([first, second], tmp_path / "c")
    assert merged.open_stages == {"mine"}  # {"queries": 3} here and {"queries": 2} there.
    with Store.open(tmp_path / "c") as store:
        assert store.verify() == []
        assert store.done("mine") is None
        for path in (first, second):
            with Store.open(path) as part:
                own = part.get_proposals("mine")
                assert list(part.iter_scores()) == list(store.iter_scores(part.queries()))
                both = store.get_proposals("mine")
                ours = np.isin(both.query_ids, own.query_ids)
                assert both.pointers[ours].tolist() == own.pointers.tolist()
    assert merged.counts["duplicate_scores"] == 2


def test_equal_rows_merge_and_others_are_named(tmp_path):
    first, second = make(tmp_path / "a", [1, 2], seed=3), make(tmp_path / "b", [1, 2], seed=3)
    assert merge_stores([first, second], tmp_path / "c").counts == content(first)["counts"] | {
        "duplicate_scores": 2
    }
    with Store.open(second) as store:
        store.put_scores([record(5, (6, 7)), record(5, (8,)), answered(1, (0, 3), gt_prob=0.5)])
    with Store.open(first) as store:
        store.put_scores([record(5, (6, 7), gt_prob=0.75), record(5, (8,), certified="x")])
    for conflicting in (["b", "a"], ["a", "b"]):
        with pytest.raises(StoreError) as caught:
            merge_stores([tmp_path / name for name in conflicting], tmp_path / "d")
        message = str(caught.value)
        assert "2 rows contradict each other" in message
        assert "table scores, query_id 5, pointer (6, 7) in" in message
        assert "table scores, query_id 5, pointer (8,) in" in message
        assert not list(tmp_path.glob("d*"))


def test_a_score_settles_the_failure_of_another_store(tmp_path):
    failed, scored = tmp_path / "failed", tmp_path / "scored"
    with Store.open(failed, FINGERPRINT) as store:
        store.put_scores([ScoreRecord(1, (1,), eval_failed="a"), record(1, (2,), eval_failed="b")])
    with Store.open(scored, FINGERPRINT) as store:
        store.put_scores([record(1, (1,)), answered(1, (2,))])
    for name, sources in (("c", [failed, scored]), ("d", [scored, failed])):
        merged = merge_stores(sources, tmp_path / name)
        assert merged.settled == 2
        with Store.open(tmp_path / name) as store:
            assert list(store.iter_scores()) == [record(1, (1,)), answered(1, (2,))]
            assert store.superseded() == {(1, (1,)), (1, (2,))}
            assert store.verify() == []


def test_two_failures_in_other_words_are_one(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for path, word in ((first, "a"), (second, "b")):
        with Store.open(path, FINGERPRINT) as store:
            store.put_scores([ScoreRecord(1, (1,), eval_failed=word)])
            store.put_scores([record(1, (2,), eval_failed=word)])
    for name, sources, here, noted in (
        ("c", [first, second], "a", "b"),
        ("d", [second, first], "b", "a"),
    ):
        assert merge_stores(sources, tmp_path / name).settled == 2
        with Store.open(tmp_path / name) as store:
            assert [one.eval_failed for one in store.iter_scores()] == [here, here]
            rows = [(row[2], row[4]) for row in store.read_rows("superseded")]
            assert rows == [("score", noted), ("answer", noted)]
            assert store.verify() == []


def test_what_one_store_kept_is_kept(tmp_path):
    """A pointer that one store decided on, or retried, and the other did not."""
    first, second = tmp_path / "first", tmp_path / "second"
    marks = {1: (None, 0, 0), 2: (1, None, 1), 3: (1, 0, 1), 4: (0, 1, 1), 5: (None, None, None)}
    for path, at in ((first, 0), (second, 1)):
        with Store.open(path, FINGERPRINT) as store:
            store.put_scores([record(1, (5,)), record(1, (1,)), record(1, (2,))])
            store.put_scores([answered(1, (3,))])
            store.put_scores([ScoreRecord(1, (4,), eval_failed="x")])
            if at:
                store.supersede("score", [record(1, (4,))])
            for i, kept in marks.items():
                decided = None if kept[at] is None else [bool(kept[at])]
                store.put_proposals("mine", [1], [[i]], ["beam"], [-1.0], decided)
    for name, sources in (("c", [first, second]), ("d", [second, first])):
        merge_stores(sources, tmp_path / name)
        with Store.open(tmp_path / name) as store:
            assert store.get_proposals("mine").pointers[:, 0].tolist() == list(marks)
            expected = [-1 if kept is None else kept for *_, kept in marks.values()]
            assert store.get_proposals("mine").kept.tolist() == expected
            assert store.verify() == []
    with Store.open(first) as one, Store.open(second) as two:
        for store, kept in ((one, True), (two, False)):
            store.put_scores([record(1, (6,))])
            store.put_proposals("mine", [1], [[6]], ["beam"], [-1.0], [kept])
    with pytest.raises(StoreError, match="1 rows contradict each other"):
        merge_stores([first, second], tmp_path / "e")


def test_other_settings_do_not_merge(tmp_path):
    first = make(tmp_path / "a", [1])
    other = make(tmp_path / "b", [2], fingerprint={"model": "big", "metric": "normalized"})
    with pytest.raises(InputError, match=r"model is 'tiny' in .*a and 'big' in .*b"):
        merge_stores([first, other], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_filter(tmp_path):
    path = make(tmp_path / "a", [1, 2, 3])
    with Store.open(path) as store:
        store.put_proposals("other", [1, 3], [[1, 0], [3, 1]], ["x", "x"], [0.0, 0.0])
    before = content(path)

    filter_store(path, tmp_path / "b", queries=[1, 3, 1000])
    kept = content(tmp_path / "b")
    at = {"pools": 0, "scores": 0, "answers": 0, "superseded": 0, "proposals": 2}
    for table, column in at.items():
        assert kept[table] == [row for row in before[table] if row[column] != 2], table
    assert kept["stages"] == before["stages"]

    left_out = filter_store(path, tmp_path / "c", stage="other")
    kept = content(tmp_path / "c")
    assert [(row[0], row[1]) for row in kept["scores"]] == [
        (1, np.array([1, 0]).tobytes()),
        (3, np.array([3, 1]).tobytes()),
    ]
    assert [row[0] for row in kept["pools"]] == [1, 3]
    assert [row[1] for row in kept["proposals"]] == ["other", "other"]
    assert kept["stages"] == []
    assert left_out["scores"] == len(before["scores"]) - 2

    filter_store(path, tmp_path / "d", drop_failed=True)
    with Store.open(tmp_path / "d") as store:
        assert store.verify() == []
        assert all(one.eval_failed is None for one in store.iter_scores())
        # An answer that failed leaves its score.
        found = store.get_scores([1, 3, 3], np.array([[-1], [-1], [99]]))
        assert [record is None for record in found] == [False, False, True]
    with pytest.raises(StoreError, match="no stage 'rce'; it has mine, other"):
        filter_store(path, tmp_path / "e", stage="rce")


def test_a_damaged_row_is_not_copied(tmp_path):
    path = make(tmp_path / "a", [1, 2])
    with Store.open(path) as store:
        store._db.execute("UPDATE scores SET gt_prob = 0.9 WHERE query_id = 2 AND pointer = x''")
    for copy in (
        lambda out: filter_store(path, out, queries=[1, 2]),
        lambda out: split_store(path, [out]),
        lambda out: merge_stores([path, path], out),
    ):
        with pytest.raises(StoreError, match=r"table scores, query_id 2, pointer \(\)"):
            copy(tmp_path / "b")
        assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_stale_log_swallows_no_new_store(tmp_path, suffix):
    """The log of a store that was killed, and then moved or deleted without it."""
    path, stale = make(tmp_path / "a", [1, 2]), tmp_path / f"out{suffix}"
    with Store.open(tmp_path / "old", {"model": "old"}) as old:
        old.mark_done("old", {})
        stale.write_bytes((tmp_path / "old-wal").read_bytes())
    stale_bytes = stale.read_bytes()
    for copy in (
        lambda out: filter_store(path, out, queries=[1, 2]),
        lambda out: split_store(path, [tmp_path / "first", out]),
        lambda out: merge_stores([path, path], out),
        lambda out: salvage(path, out),
    ):
        with pytest.raises(StoreError, match=rf"out{suffix} exists without its store.*; move it"):
            copy(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "first").exists()
        assert stale.read_bytes() == stale_bytes


# --- the command --------------------------------------------------------------------------------


def store(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.store", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path):
    path = make(tmp_path / "a.sqlite", [1, 2, 3])
    with Store.open(path):
        code, said, _ = store("info", path)
    assert code == 0
    for line in (
        f"process {os.getpid()}",
        "schema version 2",
        "fingerprint: model tiny",
        "eval_failed at score: 1",
        "  1 x no image",
        "  3 x it hung",
        "finished stage: mine {'queries': 3}",
        "jobs: 0 todo, 0 leased, 0 done, 0 failed",
    ):
        assert line in said
    assert "nobody is writing it" in store("info", path)[1]
    assert store("verify", path)[0] == 0

    part = tmp_path / "part.sqlite"
    assert store("split", f"--out={part}", "--parts=2", path)[0] == 0
    parts = sorted(tmp_path.glob("part-*"))
    assert [each.name for each in parts] == ["part-1-of-2.sqlite", "part-2-of-2.sqlite"]
    assert store("merge", f"--out={tmp_path / 'all'}", *parts)[0] == 0
    assert content(tmp_path / "all") == content(path)
    (tmp_path / "ids").write_text("1\n2\n")
    out = tmp_path / "some"
    assert store("filter", f"--out={out}", f"--queries={tmp_path / 'ids'}", path)[0] == 0
    assert {row[0] for row in content(out)["scores"]} == {1, 2}

    with Store.open(path) as damaged:
        damaged._db.execute("UPDATE scores SET gt_prob = 0.9 WHERE query_id = 2 AND pointer = x''")
    code, said, _ = store("verify", path)
    assert code == 1
    assert "table scores, query_id 2, pointer (): the content does not match" in said
    (tmp_path / "cut").write_bytes(path.read_bytes()[:9000])
    code, said, _ = store("verify", tmp_path / "cut")
    assert code == 1
    assert str(tmp_path / "cut") in said
    before = path.read_bytes()
    code, said, _ = store("salvage", f"--out={tmp_path / 'saved'}", path)
    assert code == 0
    assert ", 1 lost" in said
    assert "answers: 1 more are whole and left out" in said
    assert "a.sqlite-wal is not there" in said
    assert path.read_bytes() == before
    content(tmp_path / "saved")


WRONG = {
    "": "give one of info, verify, merge",
    "check a": "'check': give one of info",
    "info": "info: give one store, not 0",
    "info a": "there is no store a",
    "merge --out=b a": "merge: give at least two stores",
    "split --out=b a": "split: --parts is missing",
    "filter a": "filter: --out is missing",
    "filter --out=b a": "filter: give --queries, --stage or --drop_failed",
    "filter --out=b --queries=c a": "--queries=c cannot be read",
    "salvage --out=none/b a": "--out=none/b is in a folder that does not exist",
    "info --drop_failed a": "--drop_failed is not for info",
    "merge --out=b a ./a": "merge: a is named twice; give each store once",
    "filter --out=b --queries=/dev/null a": "--queries=/dev/null names no query",
}

DRIVER = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from experiments import store
from lever_jax.errors import InputError
said = []
for line in json.load(sys.stdin):
    with flagsaver.flagsaver():
        try:
            said.append(store.main(flags.FLAGS(["store", *line.split()])[1:]))
        except InputError as error:
            said.append(str(error))
print(json.dumps(said))
"""


def test_wrong_words_are_one_line(tmp_path):
    """In a process of its own, where no other entry point has flags of the same names."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(list(WRONG)),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for line, message in zip(json.loads(done.stdout), WRONG.values(), strict=True):
        assert message in line
        assert "\n" not in line
