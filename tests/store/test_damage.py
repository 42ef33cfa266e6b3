"""Damage: what is read is right or refused with its place, and salvage gets out what is whole."""

import shutil
import sqlite3

import numpy as np
import pytest
from chance import fresh_rng
from damage import row_places

from lever_jax import store_schema as schema
from lever_jax.ledger import Ledger
from lever_jax.store import ScoreRecord, Store, StoreError
from lever_jax.store_copies import TABLES
from lever_jax.store_pages import Layout, Pages
from lever_jax.store_salvage import salvage

FINGERPRINT = {"model": "tiny", "prompt_template": "a1", "metric": "normalized"}


def records_of(query):
    records = []
    for i in range(30):
        record = ScoreRecord(query, (query, i), gt_prob=i / 32, margin=float(i))
        record.answer_log_probs = np.linspace(-3, -i, 4).astype(np.float32)
        if i % 3 == 0:
            record.certified = record.prediction = "sept"
            record.accuracy, record.accuracy_official = 0.9, 1.0
            record.confidence, record.similarity, record.how = 0.5, 0.7, "verified"
        elif i % 7 == 0:
            record.prediction = "x" * (1500 + 3000 * (i % 2))  # On overflow pages.
            record.accuracy, record.how = 0.0, "generated"
        records.append(record)
    records.append(ScoreRecord(query, (query, 99), eval_failed="image cannot be decoded"))
    return records


def fill(store, queries=12):
    """Some of everything; the true records by prompt."""
    truth = {}
    for query in range(queries):
        records = records_of(query)
        with store.transaction():
            store.put_scores(records)
        truth.update({(r.query_id, r.pointer): r for r in records})
    again = [ScoreRecord(0, (0, 99), gt_prob=0.5)]
    store.supersede("score", again)
    truth[0, (0, 99)] = again[0]
    ids = np.array([[q, i] for q, (_, i) in truth])
    proposed = np.array([list(pointer) for _, pointer in truth])
    log_probs = np.linspace(-9, 0, len(ids))
    store.put_proposals("mine", ids[:, 0], proposed, ["beam"] * len(ids), log_probs)
    store.mark_kept("mine", ids[:40, 0], proposed[:40], np.arange(40) % 2 == 0)
    store.put_pools(np.arange(9), np.arange(360).reshape(9, 40), np.ones((9, 40)) / 3)
    store.mark_done("mine", {"queries": queries})
    ledger = Ledger(store)
    for lease in ledger.leases("score", np.arange(300), np.arange(600).reshape(300, 2)):
        with lease, lease.landing(np.arange(256)):
            pass
    return truth


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file without a log, its truth, and where its rows lie."""
    path = tmp_path_factory.mktemp("sound") / "store.sqlite"
    with Store.open(path, FINGERPRINT) as store:
        truth = fill(store)
        assert store.verify() == []
    return path, truth, row_places(path)


def read_all(store, truth):
    """Compares every record that can be read with the true one; what was refused, and lost."""
    refused, lost = [], []
    for query in sorted({query for query, _ in truth}):
        own = {key: record for key, record in truth.items() if key[0] == query}
        for key, record in own.items():
            try:
                (found,) = store.get_scores([query], [key[1]])
            except StoreError as error:
                refused.append(str(error))
                continue
            if found is None or (found != record and not found.answered):
                lost.append(key)
            else:
                assert found == record, key
        try:
            for found in store.iter_scores([query]):
                assert found == own[found.query_id, found.pointer] or not found.answered
        except StoreError as error:
            refused.append(str(error))
    try:
        kept = store.get_proposals("mine")
        assert set(map(tuple, kept.pointers.tolist())) <= {pointer for _, pointer in truth}
        store.get_pools(np.arange(9))
    except StoreError as error:
        refused.append(str(error))
    return refused, lost


def check_reading(path, truth, places):
    """A damaged file: refused at once, or each row read is true, and silence means all is well."""
    try:
        with Store.open(path, FINGERPRINT, read_only=True) as store:
            refused, lost = read_all(store, truth)
            faults = store.verify()
            assert all("table" in fault or "check" in fault for fault in faults)
            if not faults:  # Then only bytes that mean nothing can have been hit.
                assert not refused
                assert not lost
                found = {(t, row) for t in schema.TABLES for row in rows_of(store, t)}
                assert found == set(places)
            assert all("table" in why or str(path) in why for why in refused)
            return "named" if refused or lost else "whole"
    except StoreError as error:
        message = str(error)
    assert str(path) in message or "table" in message
    return "refused"


def check_salvage(path, places, hit, *, log=False):
    """Everything whole comes out, and nothing that was not there; how much that is.

    Args:
      path: the damaged file.
      places: of the rows in the sound file.
      hit: whether a range of bytes was damaged.
      log: whether rows may be there that `places` does not have.
    """
    out = path.with_name("out")
    out.unlink(missing_ok=True)
    result = salvage(path, out, FINGERPRINT)
    whole = {
        (table, row)
        for (table, row), ranges in places.items()
        if table in TABLES and not any(hit(*each) for each in ranges)
    }
    scored = {row[:2] for table, row in whole if table == "scores" and row[6] is None}
    failed = {row[:2] for table, row in whole if table == "scores"}
    needs = {"answers": (scored, 0), "superseded": (failed, 0)}
    with Store.open(out, FINGERPRINT) as store:
        assert store.verify() == []
        found = {(table, row) for table in TABLES for row in rows_of(store, table)}
    assert log or found <= set(places)
    # Of a query either all proposals are there, with their scores and answers, or none.
    proposed = {row for table, row in places if table == "proposals"}
    groups = {row[1:3] for table, row in found if table == "proposals"}
    prompts = {row[2:4] for row in proposed if row[1:3] in groups}
    if not log:
        for table, row in places:
            in_group = row[1:3] in groups if table == "proposals" else row[:2] in prompts
            assert (table, row) in found or not (
                in_group and table in ("scores", "answers", "proposals")
            )
    mined = all(
        result.expected.get(table) == sum(t == table for t, _ in places)
        and {each for each in places if each[0] == table} <= whole
        for table in ("answers", "proposals")
    )
    harmed = {row[1:3] for row in proposed if row[2:4] not in failed}
    for table, row in whole:
        keys, at = needs.get(table, (None, 0))
        if table == "proposals":
            assert (table, row) in found or row[1:3] in harmed or not mined
        elif table == "stages":
            assert (table, row) in found or harmed or not mined
        else:
            assert (table, row) in found or (keys is not None and row[at : at + 2] not in keys)
    assert result.rows == {t: sum(table == t for table, _ in found) for t in TABLES}
    return len(found)


def rows_of(store, table):
    return [(*row, store._rows.of(table, row)) for row in store.read_rows(table)]


def flip(path, sound_path, rng, place):
    data = bytearray(sound_path.read_bytes())
    data[place] ^= int(rng.integers(1, 256))
    path.write_bytes(data)


def flipped(tmp_path, sound, count):
    path, truth, places = sound
    rng = fresh_rng()
    size = path.stat().st_size
    outcomes = {"whole": 0, "named": 0, "refused": 0}
    for n in range(count):
        # Every tenth among the first bytes, where SQLite keeps what it must know.
        place = int(rng.integers(100 if n % 10 == 0 else size))
        flip(tmp_path / "bad", path, rng, place)
        outcomes[check_reading(tmp_path / "bad", truth, places)] += 1
        check_salvage(tmp_path / "bad", places, lambda start, end, x=place: start <= x < end)
    print(f"{count} places: {outcomes}; {len(places)} rows")
    return outcomes


def cut(tmp_path, sound, count):
    path, truth, places = sound
    rng = fresh_rng()
    whole = path.read_bytes()
    outcomes = {"whole": 0, "named": 0, "refused": 0}
    for length in [1, 99, 100, 4096, *map(int, rng.integers(1, len(whole), count - 4))]:
        (tmp_path / "bad").write_bytes(whole[:length])
        outcomes[check_reading(tmp_path / "bad", truth, places)] += 1
        check_salvage(tmp_path / "bad", places, lambda start, end, x=length: end > x)
    print(f"{count} cuts: {outcomes}")
    assert outcomes["refused"] > count // 2


def test_twenty_flipped_bytes(tmp_path, sound):
    flipped(tmp_path, sound, 20)


def test_twenty_cuts(tmp_path, sound):
    cut(tmp_path, sound, 20)


@pytest.mark.slow
def test_two_thousand_flipped_bytes(tmp_path, sound):
    outcomes = flipped(tmp_path, sound, 2000)
    assert outcomes["named"] > 500
    assert outcomes["refused"] > 50


@pytest.mark.slow
def test_three_hundred_cuts(tmp_path, sound):
    cut(tmp_path, sound, 300)


def test_salvage_of_a_sound_file_is_the_file(tmp_path, sound):
    path, truth, places = sound
    shutil.copyfile(path, tmp_path / "copy")
    check_salvage(tmp_path / "copy", places, lambda start, end: False)
    with Store.open(tmp_path / "out", FINGERPRINT) as store:
        assert {(r.query_id, r.pointer): r for r in store.iter_scores()} == truth
        assert store.superseded() == {(0, (0, 99))}
    with pytest.raises(StoreError, match="exists and is not overwritten"):
        salvage(path, tmp_path / "out")
    with pytest.raises(StoreError, match="model is 'tiny' in the file and 'big' now"):
        salvage(path, tmp_path / "new", {"model": "big"})
    with pytest.raises(StoreError, match="there is no file"):
        salvage(tmp_path / "none", tmp_path / "new")


def test_a_lost_fingerprint_is_asked_for(tmp_path, sound):
    path, _, places = sound
    (place,) = (ranges for (table, _), ranges in places.items() if table == "meta")
    flip(tmp_path / "bad", path, np.random.default_rng(0), place[0][1] - 20)
    with pytest.raises(StoreError, match=r"lost its fingerprint.*--like"):
        salvage(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_salvage(tmp_path / "bad", places, lambda start, end: start == place[0][0])


# --- the log ------------------------------------------------------------------------------------


def logged(tmp_path, queries):
    """A store with a log that nobody has folded in; the files after each transaction."""
    path = tmp_path / "logged" / "store.sqlite"
    lengths, truths = [], []
    with Store.open(path, FINGERPRINT) as store:
        store._db.execute("PRAGMA wal_autocheckpoint = 0")
        log = path.with_name(path.name + "-wal")
        truth = {}
        for query in range(queries):
            records = records_of(query)[: 3 if query == queries - 1 else None]  # The last is small.
            with store.transaction():
                store.put_scores(records)
                store.mark_done("batch", {"n": query + 1})
            truth.update({(r.query_id, r.pointer): r for r in records})
            lengths.append(log.stat().st_size)
            truths.append(dict(truth))
        return path.read_bytes(), log.read_bytes(), lengths, truths


def damaged_log(tmp_path, main, log):
    bad = tmp_path / "bad"
    for suffix in ("-shm", "-wal"):
        bad.with_name("bad" + suffix).unlink(missing_ok=True)
    bad.write_bytes(main)
    bad.with_name("bad-wal").write_bytes(log)
    return bad


def check_log(tmp_path, main, log, truths):
    """The state after some whole transaction, all of it; how many transactions that are."""
    bad = damaged_log(tmp_path, main, log)
    try:
        with Store.open(bad, FINGERPRINT) as store:
            done = (store.done("batch") or {"n": 0})["n"]
            found = {(r.query_id, r.pointer): r for r in store.iter_scores()}
            assert found == (truths[done - 1] if done else {})
            assert store.counts()["scores"] == len(found)
            return done
    except StoreError as error:
        message = str(error)
    assert str(bad) in message
    return None


def check_cut_log(tmp_path, step):
    main, log, lengths, truths = logged(tmp_path, 4)
    states = set()
    for length in [*range(lengths[-2], lengths[-1], step), lengths[-1]]:
        states.add(check_log(tmp_path, main, log[:length], truths))
        assert states <= {3, 4}
    assert check_log(tmp_path, main, log, truths) == 4
    assert check_log(tmp_path, main, log[: lengths[-1] - 1], truths) == 3


def test_a_log_cut_at_some_bytes_of_its_last_transaction(tmp_path):
    check_cut_log(tmp_path, 4111)


@pytest.mark.slow
def test_a_log_cut_at_every_byte_of_its_last_transaction(tmp_path):
    check_cut_log(tmp_path, 1)


def check_flipped_log(tmp_path, count):
    main, log, _, truths = logged(tmp_path, 4)
    rng = fresh_rng()
    for place in [*map(int, rng.integers(0, len(log), count - 3)), 1, 17, 28]:
        data = bytearray(log)
        data[place] ^= int(rng.integers(1, 256))
        check_log(tmp_path, main, bytes(data), truths)
        bad = damaged_log(tmp_path, main, bytes(data))
        (tmp_path / "out").unlink(missing_ok=True)
        salvage(bad, tmp_path / "out", FINGERPRINT)
        with Store.open(tmp_path / "out", FINGERPRINT) as store:
            assert store.verify() == []
            saved = {(r.query_id, r.pointer): r for r in store.iter_scores()}
        assert all(
            r == truths[-1][key] or not r.answered for key, r in saved.items()
        )  # At most the rows of one page and what refers to them are lost.
        assert len(saved) >= len(truths[-1]) - 45


def test_twenty_flipped_bytes_of_a_log(tmp_path):
    check_flipped_log(tmp_path, 20)


@pytest.mark.slow
def test_two_hundred_flipped_bytes_of_a_log(tmp_path):
    check_flipped_log(tmp_path, 200)


@pytest.mark.parametrize("restarted", [False, True])
def test_pages_are_those_that_sqlite_takes_from_a_flipped_log(tmp_path, restarted):
    """Sound frames behind a broken one do not count, nor those of the log before this one."""
    rng, path = fresh_rng(), tmp_path / "store"
    with Store.open(path, FINGERPRINT) as store:
        store._db.execute("PRAGMA wal_autocheckpoint = 0")
        for query in range(4):
            if restarted and query == 3:
                store._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
            for record in records_of(query)[:: 10 if query == 3 else 1]:
                store.put_scores([record])
        main, log = path.read_bytes(), path.with_name("store-wal").read_bytes()
    for place in [None, 1, 17, 28, *map(int, rng.integers(0, len(log) // 2, 12))]:
        data = bytearray(log)
        if place is not None:
            data[place] ^= int(rng.integers(1, 256))
        bad = damaged_log(tmp_path, main, bytes(data))
        with Pages(bad, Layout()) as pages:
            ours = b"".join(map(pages.read, range(1, pages.count + 1)))
            assert place is not None or not pages.beyond
        db = sqlite3.connect(bad)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        db.close()
        assert ours == bad.read_bytes(), place


def test_salvage_reads_a_log_as_sqlite_does(tmp_path):
    main, log, lengths, truths = logged(tmp_path, 4)
    for length in (lengths[-1], lengths[1], lengths[1] + 5000, lengths[0] - 1):
        bad = damaged_log(tmp_path, main, log[:length])
        (tmp_path / "out").unlink(missing_ok=True)
        salvage(bad, tmp_path / "out", FINGERPRINT)
        with Store.open(tmp_path / "out") as store:
            saved = {(r.query_id, r.pointer): r for r in store.iter_scores()}
        db = sqlite3.connect(bad)
        (count,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        done = db.execute("SELECT value FROM counters WHERE name = 'scores'").fetchone()
        db.close()
        assert count
        assert saved == next((t for t in truths if done and len(t) == done[0]), {})
