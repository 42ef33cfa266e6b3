"""The flags of an evaluation: what they allow, and which files a differing one writes."""

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import configs, run_folder
from lever_jax.decoding import DECODINGS
from lever_jax.errors import InputError


@pytest.fixture
def saved(tmp_path):
    """A workdir whose run had two unusual flags; what a test sets is forgotten after it."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    with flagsaver.flagsaver(shots=["1", "2"], random_seeds=5):
        run_folder.save_flags(tmp_path)
        yield tmp_path


def test_the_same_evaluation_has_no_changes(saved):
    assert run_folder.evaluation_changes(saved) == []


def test_changes_are_named_in_the_order_of_the_flags(saved):
    with flagsaver.flagsaver(decodings=["greedy", "beam"], shots=["1", "4"], random_seeds=3):
        changes = ["shots-1-4", "decodings-greedy-beam", "random_seeds-3"]
        assert run_folder.evaluation_changes(saved) == changes


def test_a_run_from_before_a_flag_had_its_default(saved):
    lines = (saved / "flags.txt").read_text().splitlines()
    old = [line for line in lines if not line.startswith(("--decodings", "--beam_width"))]
    assert len(old) == len(lines) - 2
    (saved / "flags.txt").write_text("\n".join(old) + "\n")
    assert run_folder.evaluation_changes(saved) == []
    with flagsaver.flagsaver(decodings=["beam"]):
        assert run_folder.evaluation_changes(saved) == ["decodings-beam"]


def test_decodings_are_checked(saved):
    with flagsaver.flagsaver(decodings=[*DECODINGS, "greedy"], beam_width=3, rerank_width=4):
        config = configs.evaluation_config()
    assert (config.decodings, config.beam_width, config.rerank_width) == (DECODINGS, 3, 4)
    with (
        flagsaver.flagsaver(decodings=["gredy"]),
        pytest.raises(InputError, match=r"--decodings: 'gredy' is not one of greedy, beam"),
    ):
        configs.evaluation_config()
    with flagsaver.flagsaver(decodings=[]), pytest.raises(InputError, match="is empty"):
        configs.evaluation_config()
