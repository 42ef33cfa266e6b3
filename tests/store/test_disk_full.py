"""A full disk is named, leaves the store readable, and the job goes on when there is space."""

import os
import subprocess
import sys

import pytest
from arithmetic import FINGERPRINT, PLACES, Arithmetic, content, prompts
from chance import fresh_rng
from progress import no_bar

from lever_jax.ledger import count_states
from lever_jax.scoring import ScoringService
from lever_jax.store import Store, StoreError

COUNT = 4000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB; a skip where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def work(path):
    with Store.open(path, FINGERPRINT) as store:
        service = ScoringService(store, Arithmetic(batch=64), no_bar)
        service.verify(*prompts(COUNT), label="x")


def check_readable(path, kept):
    """Sound, and no fewer scores than before; how many."""
    try:
        with Store.open(path, FINGERPRINT, read_only=True) as store:
            assert store.verify() == []
            assert store.counts()["scores"] >= kept
            return store.counts()["scores"]
    except StoreError as error:
        if kept or "holds nothing yet" not in str(error):
            raise
        return 0  # Space can run out before there is even a table.


def check_full(disk, rounds, tmp_path):
    rng = fresh_rng()
    path, ballast = disk / "store.sqlite", disk / "ballast"
    full, kept, refused = 0, 0, []
    for _ in range(rounds):
        space = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(b"x" * max(space - int(rng.integers(8_000, 600_000)), 0))
        message = ""
        try:
            work(path)
        except StoreError as error:
            message = str(error)
        if message:
            full += 1
            assert str(path) in message
            assert "space" in message
        if path.exists():
            try:
                kept = check_readable(path, kept)
            except StoreError as error:
                refused.append(str(error))
                ballast.unlink()
                kept = check_readable(path, kept)
        ballast.unlink(missing_ok=True)
        if not message:
            break
    assert full
    # A log can be too much for a disk without a single free block: its index needs 32 KiB.
    assert all("space" in why for why in refused)
    print(f"full {full} times, not readable before there was space {len(refused)}, {kept} kept")
    work(path)
    work(tmp_path / "clean")
    assert content(path)[0] == content(tmp_path / "clean")[0]
    assert content(path)[1]["failed"] == 0


def test_a_full_disk(small_disk, tmp_path):
    check_full(small_disk, 3, tmp_path)


def test_no_space_for_the_index_of_the_log(small_disk, tmp_path):
    path, ballast = small_disk / "store.sqlite", small_disk / "ballast"
    work(path)
    space = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(space - 16_384))  # Enough for the lock's note.
    with pytest.raises(StoreError, match=r"SQLITE_IOERR_SHMSIZE.*make space"):
        Store.open(path, FINGERPRINT)
    ballast.unlink()
    work(path)
    work(tmp_path / "clean")
    assert content(path)[0] == content(tmp_path / "clean")[0]


@pytest.mark.slow
def test_a_full_disk_at_many_moments(small_disk, tmp_path):
    check_full(small_disk, 60, tmp_path)


LIMITED = """
import resource, signal, sys
sys.path[:0] = {places!r}
from test_disk_full import work
from lever_jax.store import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    work({path!r})
except StoreError as error:
    print(error)
"""


def test_a_limit_of_file_sizes(tmp_path):
    path = tmp_path / "store.sqlite"
    for limit in (100_000, 300_000):
        script = LIMITED.format(places=PLACES, limit=limit, path=str(path))
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        )
        assert str(path) in done.stdout
        assert "make space" in done.stdout
        with Store.open(path, read_only=True) as store:
            assert store.verify() == []
            assert count_states(store)["failed"] == 0
    work(path)
    work(tmp_path / "clean")
    assert content(path)[0] == content(tmp_path / "clean")[0]
