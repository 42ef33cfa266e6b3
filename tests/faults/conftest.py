"""Every test here must leave nothing behind, and says in the summary what it did.

`make test-faults` runs all of them; `make test` the quick half, which is the same with less.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from leaks import leaving_nothing

from lever_jax.store import Store

# A mining run of the real entry point, small.
SMALL = (
    "--num_queries=24 --num_eval=8 --bank_size=120 --pool_size=10 --warmup=none --proposals=24 "
    "--quotas=beam:6,sample:8,retrieval:2 --verify_best=4 --verify_low=3 --verify_uniform=3"
).split()
TESTS = Path(__file__).parents[1]
_LINES: list[str] = []


@pytest.fixture(autouse=True)
def story(request):
    """Words for the summary; the test appends its own, and leaks are looked for around it."""
    words: list[str] = []
    started = time.monotonic()
    with leaving_nothing():
        yield words
    seconds = time.monotonic() - started
    for word in words:
        _LINES.append(f"{request.node.name:<58} {word}; leaks 0 ({seconds:.0f} s)")


@pytest.fixture(scope="module", autouse=True)
def factories():
    """Workers and drivers find the factories of the tests."""
    places = (TESTS, TESTS / "bridge", TESTS / "faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_BRIDGE_FACTORIES", "trivial_scorer,faults.injection")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS.parent, *places))))
        patch.setattr(sys, "path", [str(place) for place in places] + sys.path)
        yield


class RealJob:
    """`experiments.mine` on the embedded model, and the store of an undisturbed run of it."""

    def __init__(self, folder):
        self.finish(self.command(folder))
        self._expected = self._content(folder)

    @staticmethod
    def command(workdir, *flags):
        """The command of a run in `workdir`."""
        return [sys.executable, "-m", "experiments.mine", *SMALL, f"--workdir={workdir}", *flags]

    @staticmethod
    def finish(command):
        """Runs it to its end."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr

    @staticmethod
    def _content(folder):
        with Store.open(folder / "store.sqlite", None, read_only=True) as store:
            assert store.verify() == []
            assert store.counts()["duplicate_scores"] == store.counts()["duplicate_answers"] == 0
            (stage,) = store.proposal_stages()
            mined = store.get_proposals(stage)
            records = {(r.query_id, r.pointer): r for r in store.iter_scores()}
        proposals = zip(mined.query_ids.tolist(), mined.pointers.tolist(), mined.sources)
        return stage, sorted(proposals), records

    def compare(self, folder):
        """The store in `folder` is that of the undisturbed run, record for record.

        Numbers within float32's rounding: a batch of another size is summed in another order.
        """
        stage, proposals, records = self._content(folder)
        assert (stage, proposals) == self._expected[:2]
        assert records.keys() == self._expected[2].keys()
        for key, expected in self._expected[2].items():
            record = records[key]
            assert (record.eval_failed, record.prediction) == (None, expected.prediction)
            assert record.accuracy == expected.accuracy
            assert record.gt_prob == pytest.approx(expected.gt_prob, abs=1e-4)
            np.testing.assert_allclose(
                record.answer_log_probs, expected.answer_log_probs, atol=1e-4
            )


@pytest.fixture(scope="session")
def real_job(tmp_path_factory):
    """The undisturbed run, made once."""
    return RealJob(tmp_path_factory.mktemp("undisturbed"))


def pytest_terminal_summary(terminalreporter):
    """What was injected, how often, and what came of it."""
    if _LINES:
        terminalreporter.section("faults")
        for line in _LINES:
            terminalreporter.write_line(line)
