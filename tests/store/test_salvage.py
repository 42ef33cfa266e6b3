"""Salvage where a row is there more than once: which version counts, and what is torn."""

import sqlite3
import struct

import pytest
from damage import PAGE

from lever_jax.store import ScoreRecord, Store, StoreError
from lever_jax.store_salvage import salvage

FINGERPRINT = {"model": "tiny"}
A = ScoreRecord(1, (2,), gt_prob=0.25)
B = ScoreRecord(1, (2,), gt_prob=0.5)
FAILED = ScoreRecord(1, (2,), eval_failed="no image")
OTHER = ScoreRecord(7, (8, 9), gt_prob=0.75)


def store_of(path, record):
    """A store that holds one score, and no log."""
    with Store.open(path, FINGERPRINT) as store:
        store.put_scores([record])
    return path


def page_of(path):
    """The page of the table of scores."""
    db = sqlite3.connect(path)
    (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'scores'").fetchone()
    db.close()
    return path.read_bytes()[(root - 1) * PAGE : root * PAGE]


@pytest.fixture
def salvaged(tmp_path):
    """Salvages a store to which pages with other records were appended.

    A page that is `dropped` has its records still, but does not point to them any more.
    """

    def run(*versions):
        pages = []
        for number, (record, dropped) in enumerate(versions):
            page = bytearray(page_of(store_of(tmp_path / f"version{number}", record)))
            if dropped:
                struct.pack_into(">H", page, 3, 0)  # How many cells there are.
            pages.append(bytes(page))
        damaged = store_of(tmp_path / "damaged", OTHER)
        damaged.write_bytes(damaged.read_bytes() + b"".join(pages))
        result = salvage(damaged, tmp_path / "out")
        with Store.open(tmp_path / "out") as store:
            assert store.verify() == []
            records = list(store.iter_scores())
        assert records.pop() == OTHER
        return records, result.torn

    return run


LIVE, DROPPED = False, True
NAME = "table scores, query_id 1, pointer (2,)"


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([(A, LIVE)], A),
        ([(A, LIVE), (A, LIVE)], A),
        ([(A, LIVE), (B, DROPPED)], A),
        ([(B, DROPPED), (A, LIVE)], A),
        ([(B, DROPPED)], B),
        ([(FAILED, LIVE), (A, LIVE)], A),
        ([(A, LIVE), (FAILED, LIVE)], A),
        ([(FAILED, LIVE), (A, DROPPED)], A),
        ([(FAILED, DROPPED), (A, DROPPED)], A),
        ([(A, LIVE), (B, LIVE)], None),
        ([(A, LIVE), (B, LIVE), (A, LIVE)], None),
        ([(A, LIVE), (B, LIVE), (A, DROPPED)], None),
        ([(A, DROPPED), (B, DROPPED)], None),
        ([(A, DROPPED), (B, DROPPED), (B, DROPPED)], None),
    ],
)
def test_which_version_counts(salvaged, versions, expected):
    records, torn = salvaged(*versions)
    assert records == ([] if expected is None else [expected])
    assert torn == ([NAME] if expected is None else [])


@pytest.mark.parametrize(("total", "torn"), [(2, []), (3, [NAME])])
def test_pages_that_sqlite_has_freed_are_left_alone(tmp_path, total, torn):
    """As long as the list of them can be believed: it has as many as the header says."""
    whole = store_of(tmp_path / "damaged", OTHER).read_bytes()
    pages = [page_of(store_of(tmp_path / str(i), record)) for i, record in enumerate((A, B))]
    freed, trunk = len(whole) // PAGE + 2, len(whole) // PAGE + 3
    pages.append(struct.pack(">III", 0, 1, freed).ljust(PAGE, b"\0"))
    file = bytearray(whole + b"".join(pages))
    struct.pack_into(">II", file, 32, trunk, total)
    (tmp_path / "damaged").write_bytes(file)
    assert salvage(tmp_path / "damaged", tmp_path / "out").torn == torn
    with Store.open(tmp_path / "out") as store:
        assert list(store.iter_scores([1])) == ([] if torn else [A])


def test_a_store_that_is_being_written_is_left_alone(tmp_path):
    path = tmp_path / "store"
    with Store.open(path, FINGERPRINT) as store:
        store.put_scores([A])
        with pytest.raises(StoreError, match="is being written by process"):
            salvage(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert salvage(path, tmp_path / "out").rows["scores"] == 1
