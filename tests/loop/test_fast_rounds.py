"""Mining and an on-policy round with the fast scorer and with the plain one: same result, sooner.

An image is one token of the embedded model; where it is 150, the fast scorer gains far more.
"""

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import configs, phases, run_folder, session, settings
from lever_jax.on_policy import draw, judge

SMALL = {
    "bank_size": 200, "num_queries": 10, "num_eval": 5, "pool_size": 12, "proposals": 48,
    "quotas": ["beam:8,sample:16,retrieval:2"], "verify_best": 4, "verify_low": 3,
    "verify_uniform": 3, "group_size": 16, "threads": 1,
}  # fmt: skip


def run(scorer, workdir):
    """Both rounds with one scorer: records of all prompts, rewards, and seconds of the VLM."""
    with flagsaver.flagsaver():
        flags.FLAGS(["train", f"--workdir={workdir}", f"--scorer={scorer}"])
        for name, value in SMALL.items():
            given = ",".join(value) if isinstance(value, list) else value
            flags.FLAGS[name].parse(str(given))
        with session.open_session(run_folder.make_workdir()) as opened:
            before = sum(opened.environment.stats["busy_s"])
            selector = phases.fresh(opened)
            phases.mine_data(opened, selector)
            mined = opened.store.get_proposals(phases.mining_stage(selector))
            drawn = draw(
                opened.train_proposer,
                selector.params,
                jax.random.key(3),
                np.arange(len(opened.train)),
                shots=2,
                group_size=settings.GROUP_SIZE.value,
            )
            groups, scores = judge(
                opened.train,
                drawn,
                opened.service,
                configs.reward_config(),
                verify="all",
                config=configs.mining_config(),
                label="round",
            )
            seconds = sum(opened.environment.stats["busy_s"]) - before
            records = {(r.query_id, r.pointer): r for r in opened.store.iter_scores()}
            return records, mined, groups, scores, seconds


@pytest.mark.slow
def test_same_result_in_a_third_of_the_time(tmp_path):
    fast = run("trie", tmp_path / "fast")
    slow = run("reference", tmp_path / "slow")
    assert fast[0].keys() == slow[0].keys()
    for key, record in slow[0].items():
        ours = fast[0][key]
        assert ours.gt_prob == pytest.approx(record.gt_prob, abs=1e-4)
        np.testing.assert_allclose(ours.answer_log_probs, record.answer_log_probs, atol=1e-3)
        if record.answered and ours.answered:
            assert (ours.prediction, ours.accuracy) == (record.prediction, record.accuracy)
    np.testing.assert_array_equal(fast[1].pointers, slow[1].pointers)
    np.testing.assert_array_equal(fast[2].query_rows, slow[2].query_rows)
    np.testing.assert_allclose(fast[3]["reward"], slow[3]["reward"], atol=1e-3)
    ratio = slow[4] / fast[4]
    print(f"{len(slow[0])} prompts: {slow[4]:.1f} s plain, {fast[4]:.1f} s fast, {ratio:.1f} times")
    assert ratio >= 3
