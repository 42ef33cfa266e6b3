"""A mining run of the real entry point, small, and the store that it leaves undisturbed."""

import subprocess
import sys

import numpy as np
import pytest

from lever_jax.store import Store

FLAGS = (
    "--num_queries=24 --num_eval=8 --bank_size=120 --pool_size=10 --warmup=none --proposals=24 "
    "--quotas=beam:6,sample:8,retrieval:2 --verify_best=4 --verify_low=3 --verify_uniform=3"
).split()


class RealJob:
    """`experiments.mine` on the embedded model, and the store of an undisturbed run of it."""

    def __init__(self, folder):
        self.finish(self.command(folder))
        self._expected = self._content(folder)

    @staticmethod
    def command(workdir, *flags):
        """The command of a run in `workdir`."""
        return [sys.executable, "-m", "experiments.mine", *FLAGS, f"--workdir={workdir}", *flags]

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
