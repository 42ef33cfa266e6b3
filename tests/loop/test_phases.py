"""Which checkpoints belong together, and what decides a phase's parameters."""

import types

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import configs, phases, settings
from lever_jax import checkpoint
from lever_jax.errors import InputError
from lever_jax.training import LOSS_FIELDS, GroupBatch, LossConfig


@pytest.fixture(autouse=True)
def parsed():
    settings.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint of a phase, with its place in a chain of recipes."""

    def write(name, recipe, before):
        tree = {"params": np.zeros(2, np.float32)}
        metadata = {"recipe": recipe, "before": before}
        checkpoint.save(tmp_path / "checkpoints" / name, tree, metadata)
        return tmp_path

    return write


def test_a_chain_is_followed_to_its_end(save):
    save("warmup", "w", None)
    save("rce", "r", "w")
    assert phases.finished_phases(save("grpo", "g", "r")) == ["warmup", "rce", "grpo"]


def test_what_was_trained_from_an_earlier_selector_is_left_out(save, capsys):
    save("warmup", "w2", None)
    save("rce", "r", "w1")
    assert phases.finished_phases(save("grpo", "g", "r")) == ["warmup"]
    assert "rce was trained from an earlier warmup" in capsys.readouterr().out


def test_a_warm_up_that_the_flags_leave_out_is_no_link(save):
    settings.FLAGS.warmup = "none"
    save("warmup", "w", None)
    save("rce", "r", "fresh")
    assert phases.finished_phases(save("grpo", "g", "r")) == ["rce", "grpo"]


@pytest.mark.parametrize("rewards", [[0.5, 0.5, 9.0], [0.5, 0.5004, 9.0], [0.0, 0.5, 9.0]])
def test_rce_leaves_no_selector_where_all_rewards_are_equal(rewards, monkeypatch, capsys):
    """The third pointer of each group is padding; a range below 0.001 is flat."""
    groups = GroupBatch(
        np.arange(2, dtype=np.int32), np.zeros((2, 3, 2), np.int32),
        np.array([rewards, [0.2, 0.2, 0.0]], np.float32), np.zeros((2, 3), np.float32),
        np.array([[True, True, False]] * 2),
    )  # fmt: skip
    monkeypatch.setattr(phases, "mined_groups", lambda *_: groups)
    monkeypatch.setattr(phases, "_fit", lambda *given, **_: given[4])
    session = types.SimpleNamespace(train=None, store=None)
    trained = phases.train_rce(session, phases.Trained(None, "a"), None)
    flat = rewards[1] - rewards[0] < 1e-3
    assert (trained is None) == flat
    assert ("nothing to learn from" in capsys.readouterr().out) == flat


def test_every_phase_names_the_settings_that_its_loss_reads():
    fields = set(LossConfig.__dataclass_fields__)
    assert set().union(*LOSS_FIELDS.values()) == fields
    settings.FLAGS.kl_coef = 0.5
    assert "kl_coef" not in phases._read_by("rce")
    assert phases._read_by("grpo")["kl_coef"] == 0.5


def test_other_seeds_and_selectors_mine_under_other_names():
    one = phases.Trained(None, "a")
    names = {phases.mining_stage(one), phases.mining_stage(phases.Trained(None, "b"))}
    settings.FLAGS.seed = 3
    names.add(phases.mining_stage(one))
    settings.FLAGS.top_p = 0.5
    names.add(phases.mining_stage(one))
    assert len(names) == 4


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("hard_weight", float("nan"), "--hard_weight=nan must be a finite number"),
        ("soft_weight", float("inf"), "--soft_weight=inf"),
        ("verify", "top_m", "--verify=top_m leaves nothing out"),
        ("train_shots", 9, "--train_shots=9 is out of range"),
        ("verify_uniform", 0, "--verify_uniform=0"),
    ],
)
def test_settings_that_would_mislead_are_refused(flag, value, words):
    settings.FLAGS[flag].value = value
    with pytest.raises(InputError, match=words):
        configs.check()
