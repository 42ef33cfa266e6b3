"""The store: what goes in comes out, twice is refused, and a killed writer loses nothing."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lever_jax import store_schema as schema
from lever_jax.errors import InputError
from lever_jax.store import ScoreRecord, Store, StoreError

FINGERPRINT = {"model": "tiny", "prompt_template": "a1", "metric": "normalized"}


def scored(query_id, pointer, **more):
    values = {"gt_prob": 0.25, "answer_log_probs": np.array([-1.5, -np.inf], np.float32)}
    return ScoreRecord(query_id, pointer, **{**values, "certified": "sept", "margin": 2.0, **more})


def answered(query_id, pointer, **more):
    values = {"prediction": "sept", "accuracy": 0.9, "accuracy_official": 0.6, "confidence": 0.5}
    return scored(query_id, pointer, **{**values, "similarity": 0.7, "how": "generated", **more})


def pointers_of(records):
    width = max(len(record.pointer) for record in records)
    return np.array([(*r.pointer, *[-1] * (width - len(r.pointer))) for r in records], np.int64)


def get(store, records):
    queries = np.array([record.query_id for record in records])
    return store.get_scores(queries, pointers_of(records).reshape(len(records), -1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


@pytest.fixture
def store(path):
    with Store.open(path, FINGERPRINT) as store:
        yield store


# --- records ------------------------------------------------------------------------------------


def test_records_come_back_as_they_went_in(store):
    records = [
        scored(7, ()),
        scored(7, (3, 1)),
        scored(7, (1, 3), gt_prob=0.5),
        scored(8, (3, 1, 2), certified=None, margin=float("nan"), answer_log_probs=None),
        scored(2**62, (2**62,), gt_prob=float(np.float32(0.1))),
        ScoreRecord(9, (4,), eval_failed="image 4 cannot be decoded"),
        answered(9, (5,), prediction="null\0byte", how="verified"),
        scored(9, (6,), eval_failed="worker died 3 times"),
    ]
    assert store.put_scores(records) == 0
    assert get(store, records) == records
    assert list(store.iter_scores([7])) == sorted(
        records[:3], key=lambda record: schema.pack_pointer(record.pointer)
    )
    assert sum(1 for _ in store.iter_scores()) == len(records)
    assert store.scored_queries().tolist() == [7, 8, 9, 2**62]
    counts = store.counts()
    assert (counts["scores"], counts["answers"]) == (8, 2)
    assert store.verify() == []


def test_order_of_a_pointer_matters_and_absent_is_none(store):
    store.put_scores([scored(7, (3, 1))])
    queries, pointers = np.array([7, 7, 7, 8]), np.array([[3, 1], [1, 3], [3, -1], [3, 1]])
    found = store.get_scores(queries, pointers)
    assert [record is None for record in found] == [False, True, True, True]


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 300])
def test_any_number_of_prompts_is_looked_up(store, count):
    """Known and unknown ones, some twice, as a scan of the whole store finds them."""
    rng = np.random.default_rng(count)
    keys = {(int(q), (int(a),)) for q, a in rng.integers(0, 20, (150, 2))}
    store.put_scores([answered(*key) if key[0] % 2 else scored(*key) for key in sorted(keys)])
    queries, pointers = rng.integers(0, 20, count), rng.integers(0, 20, (count, 1))
    known = {(record.query_id, record.pointer): record for record in store.iter_scores()}
    expected = [known.get((q, (a,))) for q, (a,) in zip(queries.tolist(), pointers.tolist())]
    assert store.get_scores(queries, pointers) == expected


def test_numbers_that_sqlite_changes_still_verify(store):
    records = [scored(1, (2,), gt_prob=-0.0, margin=-0.0), scored(1, (3,), margin=float("inf"))]
    store.put_scores([replace(record, gt_prob=np.float32(record.gt_prob)) for record in records])
    assert get(store, records) == records


def test_a_second_score_is_counted_and_never_overwrites(store, path):
    assert store.put_scores([scored(1, (2,), gt_prob=0.1)]) == 0
    again = [scored(1, (2,), gt_prob=0.9), scored(1, (3,)), scored(1, (3,), gt_prob=0.8)]
    assert store.put_scores(again) == 2
    assert [record.gt_prob for record in store.iter_scores()] == [0.1, 0.25]
    assert store.put_answers([answered(1, (2,))]) == 0
    assert store.put_answers([answered(1, (2,), accuracy=0.0)]) == 1
    assert get(store, [scored(1, (2,))])[0].accuracy == 0.9
    store.close()
    with Store.open(path, FINGERPRINT) as reopened:
        counts = reopened.counts()
        assert (counts["duplicate_scores"], counts["duplicate_answers"]) == (2, 1)
        assert reopened.verify() == []


def test_answers_fill_in_scores(store):
    store.put_scores([scored(1, (2,)), ScoreRecord(1, (3,), eval_failed="no image")])
    failure = scored(1, (2,), gt_prob=0.0, eval_failed="the worker hung")
    store.put_answers([failure])
    assert get(store, [failure])[0] == scored(1, (2,), eval_failed="the worker hung")
    with pytest.raises(StoreError, match=r"query_id 1, pointer \(4,\) has no score"):
        store.put_answers([answered(1, (4,))])
    with pytest.raises(StoreError, match=r"pointer \(3,\) could not be scored: no image"):
        store.put_answers([answered(1, (3,))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gt_prob": float("nan")}, "gt_prob is nan"),
        ({"gt_prob": None}, "no gt_prob, no accuracy and no eval_failed"),
        ({"accuracy": 1.0, "eval_failed": "x"}, "accuracy and eval_failed"),
        ({"eval_failed": ""}, "needs a reason"),
        ({"how": "guessed"}, "not one of"),
        ({"prediction": "sept"}, "has a prediction but no accuracy"),
        ({"pointer": (1, -1)}, "ids are >= 0"),
    ],
)
def test_half_said_records_are_refused(store, wrong, message):
    with pytest.raises(ValueError, match=message):
        store.put_scores([scored(3, (2,)), replace(scored(1, (2,)), **wrong)])
    assert store.counts()["scores"] == 0


def test_padding_only_at_the_end(store):
    with pytest.raises(ValueError, match="row 1 is"):
        store.get_scores(np.array([1, 1]), np.array([[1, -1], [-1, 1]]))
    with pytest.raises(ValueError, match="row 0 is"):
        store.get_scores(np.array([1]), np.array([[1, -2]]))


# --- transactions and stages --------------------------------------------------------------------


def put_and_raise(store, records, error):
    with store.transaction():
        store.put_scores(records)
        store.mark_done("score", {"rows": len(records) + 1})
        raise error


def test_a_commit_waits_until_it_is_on_disk(store):
    """A power cut cannot be tried here; that SQLite is told to sync can be seen."""
    (mode,), (sync,) = (store._db.execute(f"PRAGMA {name}").fetchone()
                        for name in ("journal_mode", "synchronous"))  # fmt: skip
    assert (mode, sync) == ("wal", 2)  # FULL


def test_transactions_nest(store):
    with store.transaction():
        store.put_scores([scored(1, (1,))])
        with pytest.raises(KeyError):
            put_and_raise(store, [scored(1, (2,)), scored(1, (1,))], KeyError())
        store.mark_done("score", {"rows": 1})
    assert [record.pointer for record in store.iter_scores()] == [(1,)]
    assert store.done("score") == {"rows": 1}
    with pytest.raises(KeyboardInterrupt):
        put_and_raise(store, [scored(1, (3,))], KeyboardInterrupt())
    assert store.done("score") == {"rows": 1}
    assert store.done("answer") is None
    counts = store.counts()
    assert (counts["scores"], counts["duplicate_scores"], counts["stages"]) == (1, 0, 1)


def test_disk_full_is_named_and_what_was_there_stays(store):
    store.put_scores([scored(1, (i,)) for i in range(100)])
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    more = [scored(2, (i,), certified="x" * 200) for i in range(1000)]
    with pytest.raises(StoreError, match="make space"):
        store.put_scores(more)
    with store.transaction():
        with pytest.raises(StoreError, match="make space"):
            store.put_scores(more)
        store._db.execute("PRAGMA max_page_count = 1000000")
        with pytest.raises(StoreError, match="undone"):
            store.put_scores(more)  # Not half of a transaction.
        store._db.execute("BEGIN")  # What the outer `with` is going to commit: nothing.
    assert store.put_scores(more) == 0
    assert store.verify() == []
    assert store.counts()["scores"] == 1100


# --- pools and proposals ------------------------------------------------------------------------


def test_pools(store):
    ids = np.array([[5, 4, 3], [9, -1, -1]])
    similarity = np.array([[0.5, 0.4, 0.3], [0.9, np.nan, np.nan]], np.float32)
    store.put_pools(np.array([1, 2]), ids, similarity)
    store.put_pools(np.array([2]), ids[1:, :1], similarity[1:, :1] + 1e-7)  # The same again.
    found_ids, found = store.get_pools(np.array([2, 1]))
    np.testing.assert_array_equal(found_ids, ids[::-1])
    np.testing.assert_array_equal(found, similarity[::-1])
    assert found.dtype == np.float32
    assert store.has_pools(np.array([1, 3])).tolist() == [True, False]
    with pytest.raises(StoreError, match="no query_id 3"):
        store.get_pools(np.array([3]))
    with pytest.raises(StoreError, match="another candidate pool for query 1"):
        store.put_pools(np.array([1]), ids[:1, ::-1], similarity[:1, ::-1])
    assert store.counts()["pools"] == 2


def test_proposals_are_unique_as_ordered_tuples(store):
    queries = np.array([2, 2, 1, 2, 1])
    pointers = np.array([[5, 4], [4, 5], [5, 4], [5, 4], [6, -1]])
    sources = ["beam", "random", "beam", "random", "policy"]
    store.put_scores([scored(q, p) for q, p in [(2, (5, 4)), (2, (4, 5)), (1, (5, 4))]])
    log_probs = np.array([-1.5, np.nan, -0.0, -2.0, -3.0], np.float32)
    assert store.put_proposals("warmup", queries, pointers, sources, log_probs) == 4
    assert store.put_proposals("warmup", queries, pointers, sources, log_probs) == 0
    assert store.put_proposals("rce", queries[:1], pointers[:1], ["x"], [0.0], [True]) == 1
    found = store.get_proposals("warmup")
    assert found.query_ids.tolist() == [2, 2, 1, 1]
    assert found.pointers.tolist() == [[5, 4], [4, 5], [5, 4], [6, -1]]
    assert found.sources == ["beam", "random", "beam", "policy"]
    np.testing.assert_array_equal(found.log_probs, log_probs[[0, 1, 2, 4]])
    assert found.kept.tolist() == [-1, -1, -1, -1]
    store.mark_kept("warmup", found.query_ids[:2], found.pointers[:2], np.array([True, False]))
    assert store.get_proposals("warmup", [1, 2]).kept.tolist() == [-1, -1, 1, 0]
    assert store.get_proposals("rce").kept.tolist() == [1]
    assert store.proposed_queries("warmup").tolist() == [2, 1]
    assert store.get_proposals("grpo").pointers.shape == (0, 0)
    with pytest.raises(StoreError, match=r"stage rce, query_id 1, pointer \(5, 4\)"):
        store.mark_kept("rce", [1], [[5, 4]], [True])
    lost = "table proposals, stage warmup, query_id 1, pointer (6,) was proposed and has no score"
    assert store.verify() == [lost]
    store.put_scores([scored(1, (6,))])
    assert store.verify() == []


# --- opening and refusing -----------------------------------------------------------------------


def test_another_fingerprint_is_spelled_out(store, path):
    store.put_pools([1], [[5, 6]], [[0.5, 0.4]])
    store.close()
    other = {"model": "tiny", "prompt_template": "b2", "seed": "1"}
    with pytest.raises(InputError) as caught:
        Store.open(path, other)
    message = str(caught.value)
    assert "prompt_template is 'a1' in the file and 'b2' now" in message
    assert "metric is 'normalized' in the file and not given now" in message
    assert "seed is not in the file and '1' now" in message
    assert "model" not in message
    assert "prompt_template follows --prompt_style and --instruction" in message
    with Store.open(path, read_only=True) as reader:
        assert reader.fingerprint == FINGERPRINT
    assert os.listdir(path.parent) == [path.name]


def test_a_store_that_holds_nothing_takes_another_fingerprint(store, path):
    store.close()
    other = {"model": "big"}
    with pytest.raises(StoreError, match="made with other settings"):
        Store.open(path, other, read_only=True)
    with Store.open(path, other) as again:
        assert again.fingerprint == other
        again.put_scores([scored(1, (2,))])
    with pytest.raises(StoreError, match="made with other settings"):
        Store.open(path, FINGERPRINT)
    with Store.open(path, other) as again:
        assert again.verify() == []
        assert get(again, [scored(1, (2,))]) == [scored(1, (2,))]


def test_a_row_of_another_fingerprint_does_not_verify(store, path, tmp_path):
    with Store.open(tmp_path / "other.sqlite", {"model": "big"}) as other:
        other.put_scores([scored(1, (2,))])
        row = other._db.execute("SELECT * FROM scores").fetchone()
    store._db.execute("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    with pytest.raises(StoreError, match=r"table scores, query_id 1, pointer \(2,\)"):
        get(store, [scored(1, (2,))])
    assert "table scores: 1 rows of 0 are there" in store.verify()


def test_readers_beside_the_writer(store, path):
    store.put_scores([scored(1, (2,))])
    with Store.open(path, FINGERPRINT, read_only=True) as reader:
        assert get(reader, [scored(1, (2,))]) == [scored(1, (2,))]
        with pytest.raises(StoreError, match="reading only"):
            reader.put_scores([scored(1, (3,))])
        store.put_scores([scored(1, (3,))])
        assert reader.counts()["scores"] == 2


def test_a_folder_that_may_not_be_written(store, path, monkeypatch):
    store.put_scores([scored(1, (2,))])
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with Store.open(path, read_only=True) as reader:  # While a log is there.
            assert reader.counts()["scores"] == 1
        store.close()
        with Store.open(path, read_only=True) as reader:
            assert reader.counts()["scores"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_files_that_are_no_stores_are_refused_and_left_alone(path):
    with pytest.raises(StoreError, match="there is no store"):
        Store.open(path, FINGERPRINT, read_only=True)
    with pytest.raises(ValueError, match="needs a fingerprint"):
        Store.open(path)
    path.unlink()
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="not a store"):
        Store.open(path, FINGERPRINT)
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE scores (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="SQLite file but not a store"):
        Store.open(path, FINGERPRINT)
    assert path.read_bytes() == before
    (path.parent / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open"):
        Store.open(path.parent / "file" / "store.sqlite", FINGERPRINT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP INDEX failed_scores", "table failed_scores is missing, so the file is damaged"),
        ("CREATE TABLE more (x)", "table more is not as this code creates it"),
        ("ALTER TABLE pools ADD COLUMN x", "table pools is not as this code creates it"),
    ],
)
def test_tables_that_are_not_as_they_should_be_are_named(store, path, change, message):
    store._db.execute(change)
    store.close()
    for read_only in (False, True):
        with pytest.raises(StoreError, match=message):
            Store.open(path, FINGERPRINT, read_only=read_only)


def test_migrations_go_forward_only(store, path, monkeypatch):
    store.put_scores([scored(1, (2,))])
    store.close()
    newer = [*schema.MIGRATIONS, ("ALTER TABLE stages ADD COLUMN note TEXT",)]
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", newer)
        with Store.open(path, read_only=True) as reader:  # As it is.
            assert schema.version(reader._db) == 2
            assert get(reader, [scored(1, (2,))]) == [scored(1, (2,))]
        with Store.open(path, FINGERPRINT) as migrated:
            assert schema.version(migrated._db) == 3
            assert get(migrated, [scored(1, (2,))]) == [scored(1, (2,))]
        Store.open(path, FINGERPRINT).close()
    with pytest.raises(StoreError, match="schema version 3, this code knows 1 to 2"):
        Store.open(path, FINGERPRINT)


# --- other processes ----------------------------------------------------------------------------

WRITER = """
import sys
from lever_jax.store import ScoreRecord, Store
path, batches = sys.argv[1], int(sys.argv[2])
with Store.open(path, {"model": "tiny"}) as store:
    start = (store.done("batch") or {"n": 0})["n"]
    print(start, flush=True)
    for n in range(start, start + batches):
        with store.transaction():
            store.put_scores([ScoreRecord(n, (i,), gt_prob=n / 1e4) for i in range(40)])
            store.put_answers([ScoreRecord(n, (i,), gt_prob=n, accuracy=1.0) for i in range(20)])
            store.mark_done("batch", {"n": n + 1})
        print(n + 1, flush=True)
    sys.stdin.read()
"""


def start_writer(path, batches):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(batches)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_writer_is_refused_by_name_until_the_first_is_killed(path):
    with start_writer(path, 1) as writer:
        assert [writer.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        with pytest.raises(InputError) as caught:
            Store.open(path, {"model": "tiny"})
        assert f"process {writer.pid} (-c {path})" in str(caught.value)
        with Store.open(path, read_only=True) as reader:
            assert reader.counts()["scores"] == 40
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with Store.open(path, {"model": "tiny"}) as store:
        with pytest.raises(InputError, match=f"process {os.getpid()}"):
            Store.open(path, {"model": "tiny"})
        assert store.counts()["scores"] == 40
    assert os.listdir(path.parent) == [path.name]  # No lock, no log left.


def test_kill_9_leaves_every_committed_batch_whole(path):
    said = 0
    for after in (1, 8, 27):  # Batches after which the writer is killed, wherever it is then.
        with start_writer(path, 10**6) as writer:
            for _ in range(after):
                said = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
            said = int(rest[-1]) if rest else said
        with Store.open(path, read_only=True) as store:
            batches = (store.done("batch") or {"n": 0})["n"]
            assert said <= batches <= said + 1
            assert store.verify() == []
            records = list(store.iter_scores())
            assert len(records) == 40 * batches == store.counts()["scores"]
            assert sum(record.answered for record in records) == 20 * batches
            assert store.counts()["duplicate_scores"] == 0
            assert all(record.gt_prob == record.query_id / 1e4 for record in records)


# --- damage -------------------------------------------------------------------------------------


def fill(store):
    records = [answered(q, (q, i), gt_prob=i / 64) for q in range(12) for i in range(30)]
    with store.transaction():
        store.put_scores(records)
        store.mark_done("score", {"rows": len(records)})
    queries = np.array([record.query_id for record in records])
    store.put_proposals("m", queries, pointers_of(records), ["beam"] * 360, np.zeros(360))
    store.put_pools(np.arange(9), np.arange(90).reshape(9, 10), np.zeros((9, 10)))
    return records


def check_damaged(path, records):
    """Opens a damaged store: refused, or what it gives is right; silent only if all is right."""
    try:
        with Store.open(path, FINGERPRINT, read_only=True) as store:
            faults = store.verify()
            assert all(any(mark in fault for mark in ("table", "check")) for fault in faults)
            for start in range(0, len(records), 30):
                batch = records[start : start + 30]
                try:
                    found = get(store, batch)
                except StoreError as error:
                    found = [None]
                    place = str(error)
                    assert "table" in place or str(path) in place
                    assert faults
                for record, stored in zip(batch, found, strict=False):
                    # A row whose key was hit is lost, which `verify` tells, and never misread.
                    lost = (None, scored(record.query_id, record.pointer, gt_prob=record.gt_prob))
                    assert stored == record or (stored in lost and faults)
            return "recovered" if not faults else "named"
    except StoreError:
        return "refused"


def test_flipped_bytes_are_never_misread(store, path, tmp_path):
    records = fill(store)
    store.close()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(whole), 30), *rng.integers(0, 100, 5)]
    outcomes = []
    for place in map(int, places):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "damaged").write_bytes(damaged)
        outcomes.append(check_damaged(tmp_path / "damaged", records))
    assert outcomes.count("named") > 12  # Most bytes are rows.
    assert "refused" in outcomes


def test_cut_files_are_never_misread(store, path, tmp_path):
    records = fill(store)
    store.close()
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for length in [1, 99, 100, 511, 512, 4096, *map(int, rng.integers(1, len(whole), 20))]:
        (tmp_path / "cut").write_bytes(whole[:length])
        assert check_damaged(tmp_path / "cut", records) in ("refused", "named"), length


def test_a_cut_log_gives_the_state_after_some_whole_transaction(store, path, tmp_path):
    store._db.execute("PRAGMA wal_autocheckpoint = 0")
    for n in range(6):
        with store.transaction():
            store.put_scores([scored(n, (i,)) for i in range(20)])
            store.mark_done("batch", {"n": n + 1})
    log = path.with_name(path.name + "-wal")
    size = log.stat().st_size
    copy = tmp_path / "copy"
    seen = set()
    for length in [*map(int, np.linspace(0, size, 17)), *range(size - 9, size + 1)]:
        shutil.copyfile(path, copy)
        copy.with_name("copy-wal").write_bytes(log.read_bytes()[:length])
        try:
            with Store.open(copy, FINGERPRINT) as cut:
                batches = (cut.done("batch") or {"n": 0})["n"]
                assert cut.counts()["scores"] == 20 * batches
                assert cut.verify() == []
                seen.add(batches)
        except StoreError as error:
            pytest.fail(str(error))
    assert 6 in seen
    assert len(seen) > 3


def test_a_row_found_under_another_key_is_refused(store):
    store.put_scores([scored(1, (2,)), scored(1, (3,))])
    row = store._db.execute(schema.select_sql("scores")).fetchone()
    with pytest.raises(StoreError, match=r"asked for query_id 1, pointer \(3,\), found .*\(2,\)"):
        store._rows.open("scores", row, query_id=1, pointer=schema.pack_pointer((3,)))


def test_a_store_is_small_and_has_our_mark(store, path):
    fill(store)
    store.close()
    assert path.stat().st_size < 360 * 2 * 400
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA application_id").fetchone()[0] == schema.APPLICATION_ID
    meta = dict(db.execute("SELECT key, value FROM meta"))
    assert json.loads(meta["fingerprint"]) == FINGERPRINT
    db.close()
