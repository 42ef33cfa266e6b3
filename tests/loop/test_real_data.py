"""The whole job on real questions and photographs, with a Qwen2.5-VL that knows nothing.

The checkpoint has the real vocabulary, tokenizer and image processor, and random weights. So its
accuracy is zero whatever is shown to it, and what is proven is everything else: that real data
go through every phase, that the health check says what such a run is worth, that a run which is
killed goes on where it stopped and ends in the same place, and that it grows.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lever_jax import checkpoint
from lever_jax.store import Store
from qwen_bridge import workers

ROOT = pathlib.Path(__file__).parents[2]
PHASES = ("warmup", "rce", "grpo")
NUM_QUERIES, NUM_EVAL, BANK = 10, 6, 40
SMALL = (
    f"--num_queries={NUM_QUERIES} --num_eval={NUM_EVAL} --max_bank={BANK} --pool_size=8 "
    "--max_pixels=12544 --max_new_tokens=3 --threads=1 --width=16 --heads=2 --warmup_queries=4 "
    "--warmup_beam=2 --warmup_epochs=2 --proposals=8 --quotas=beam:2,sample:2,retrieval:2 "
    "--verify_best=2 --verify_low=2 --rce_epochs=2 --grpo_epochs=1 --grpo_queries=5 "
    "--group_size=2 --batch_queries=5 --oracle_beam=2 --random_seeds=1"
).split()


@pytest.fixture(scope="module")
def mini(shared):
    """The flags of the data, by name."""
    folder = shared / "vqav2_mini"
    flags = {"dataset": "official", "instruction": "Answer with a single word or a short phrase."}
    for role in ("bank", "query"):
        flags[f"{role}_questions"] = folder / f"{role}_questions.json"
        flags[f"{role}_annotations"] = folder / f"{role}_annotations.json"
        flags[f"{role}_images"] = folder / "train2014"
    return flags


def as_flags(named):
    return [f"--{name}={value}" for name, value in named.items()]


@pytest.fixture(scope="module")
def scorers(mini, random_qwen):
    """The fast and the plain scorer over the real data, in this process."""
    files = {name: str(value) for name, value in mini.items() if name.startswith(("bank", "query"))}
    settings = {
        "dataset": {
            "kind": "official", **files, "num_train": 4, "num_eval": 4, "seed": 0, "max_bank": BANK
        },
        "model": str(random_qwen),
        "device": "cpu",
        "dtype": "float32",
        "min_pixels": None,
        "max_pixels": 12_544,
        "prompt_style": "chat",
        "instruction": mini["instruction"],
        "answer_weight": "count3",
        "gt_prob": "product",
        "max_new_tokens": 3,
        "cache_mib": 64,
        "batch_tokens": 4096,
    }  # fmt: skip
    return [workers.build({**settings, "scorer": name})[0] for name in ("trie", "reference")]


def test_both_scorers_agree_on_real_photographs(scorers):
    trie, reference = scorers
    dataset = reference.dataset
    rng = np.random.default_rng(0)
    queries = np.repeat([example.id for example in dataset.train[:2]], 3)
    bank = [example.id for example in dataset.bank]
    pointers = np.array([rng.permutation(bank)[:2] for _ in queries])
    pointers[::3, 1] = -1  # one shot
    for fast, plain in zip(trie.score(queries, pointers), reference.score(queries, pointers)):
        assert fast.failure == plain.failure == ""
        np.testing.assert_allclose(fast.answer_log_probs, plain.answer_log_probs, atol=1e-4)
        # Nothing is known: no answer is more probable than a few times one in the vocabulary.
        assert 0 < plain.gt_prob < 1e-6
    fast, plain = (scorer.answer(queries, pointers) for scorer in scorers)
    assert [one.prediction for one in fast] == [one.prediction for one in plain]
    assert [one.accuracy for one in plain] == [0.0] * len(queries)
