"""Flags of encoders and embeddings, and runs that start with embeddings of earlier ones."""

import numpy as np
import published
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import configs, run_folder, session
from lever_jax.errors import InputError
from lever_jax.store import ScoreRecord, StoreError
from qwen_bridge.vqa.digits import DigitsConfig, load_digits_world

SMALL = {"bank_size": 120, "num_queries": 20, "num_eval": 10, "pool_size": 8, "threads": 1}


@pytest.fixture
def given(tmp_path):
    """Sets flags; all of them are as before when the test ends."""
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()

        def give(**values):
            for name, value in {"workdir": str(tmp_path / "run"), **values}.items():
                flags.FLAGS[name].value = value

        yield give


@pytest.mark.parametrize(
    ("encoder", "folder", "message"),
    [
        ("clip", "", "--encoder=clip needs --encoder_model, a local clip checkpoint"),
        ("siglip", "", "--encoder=siglip needs --encoder_model"),
        ("qwen", "x", "--encoder=qwen uses the VLM itself; leave --encoder_model=x out"),
    ],
)
def test_encoder_and_its_folder_belong_together(given, encoder, folder, message):
    given(encoder=encoder, encoder_model=folder)
    with pytest.raises(InputError, match=message):
        configs.check()


def test_embeddings_are_in_the_workdir_unless_told_otherwise(given, tmp_path):
    given()
    assert configs.embeddings_dir() == tmp_path / "run" / "embeddings"
    given(embeddings_dir=str(tmp_path / "shared"))
    assert configs.embeddings_dir() == tmp_path / "shared"
    (tmp_path / "shared").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        configs.check()


@pytest.mark.slow
def test_a_second_start_computes_no_embedding(given, tmp_path, capsys):
    given(**SMALL)
    workdir = run_folder.make_workdir()
    with session.open_session(workdir) as first:
        computed = first.environment.stats["ids_embedded"]
        pools, bank = first.train.pool_ids, np.asarray(first.train.table.bank)
    assert computed >= 150
    with session.open_session(workdir) as second:
        assert second.environment.stats["ids_embedded"] == 0
        assert second.encoder == first.encoder
        np.testing.assert_array_equal(second.train.pool_ids, pools)
        np.testing.assert_array_equal(np.asarray(second.train.table.bank), bank)
        direct = second.environment.embed("bank", [0, 50, 119]).embeddings
        np.testing.assert_allclose(second.bank.embeddings[[0, 50, 119]], direct, atol=1e-5)
    assert ", 0 computed" in capsys.readouterr().out
    # Another workdir with the same embeddings, and more queries than before.
    given(**SMALL | {"num_queries": 25}, embeddings_dir=str(workdir / "embeddings"))
    flags.FLAGS["workdir"].value = str(tmp_path / "other")
    with session.open_session(run_folder.make_workdir()) as other:
        assert other.environment.stats["ids_embedded"] == 5
        np.testing.assert_array_equal(other.train.pool_ids[:20], pools)


@pytest.mark.slow
def test_another_encoder_keeps_the_scores_and_refuses_the_pools(given, tmp_path):
    published.clip_folder(tmp_path / "clip")
    given(**SMALL)
    workdir = run_folder.make_workdir()
    with session.open_session(workdir) as qwen:
        identity = qwen.identity
    clip = {"encoder": "clip", "encoder_model": str(tmp_path / "clip")}
    given(**SMALL, **clip)
    refused = pytest.raises(StoreError, match=r"another candidate pool .* --encoder")
    with refused, session.open_session(workdir):
        pass
    flags.FLAGS["workdir"].value = str(tmp_path / "other")
    with session.open_session(run_folder.make_workdir()) as other:
        assert other.identity == identity
        assert other.encoder != qwen.encoder
        assert other.parts == {"image": (0, 20), "question": (20, 40), "answer": (40, 60)}
        world = load_digits_world(DigitsConfig(bank=120, train=20, eval=10))
        assert other.bank.embeddings.shape == (len(world.bank), 60)


@pytest.mark.slow
def test_retry_failed_asks_again_for_the_failures_of_this_run(given, capsys):
    given(**SMALL)
    workdir = run_folder.make_workdir()
    with session.open_session(workdir) as first:
        query, pool = int(first.train.query_ids[0]), first.train.pool_ids[0]
        pointers = [tuple(map(int, pool[i : i + 2])) for i in range(3)]
        failed = [ScoreRecord(query, pointer, eval_failed="lost") for pointer in pointers]
        elsewhere = ScoreRecord(10**9, pointers[0], eval_failed="lost")
        first.store.put_scores([*failed, elsewhere])
    given(**SMALL, retry_failed=True)
    with session.open_session(workdir) as second:
        assert second.environment.stats["prompts_scored"] == 3
        found = second.store.get_scores([query] * 3, pointers)
        assert all(record.gt_prob is not None for record in found)
        assert second.store.reasons("score") == {"lost": 1}
        assert second.store.verify() == []
    said = "--retry_failed: 3 prompts asked for again, 0 of them failed again"
    assert said in capsys.readouterr().out
