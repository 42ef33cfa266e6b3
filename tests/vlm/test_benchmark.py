"""The benchmark of scoring: what it measures is what it says, and an error stops it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from qwen_bridge.benchmark.exactness import Difference, difference, faults
from qwen_bridge.benchmark.models import SHAPES, random_model
from qwen_bridge.benchmark.race import Race
from qwen_bridge.benchmark.soak import soak
from qwen_bridge.benchmark.workload import Workload, WorkloadConfig, measured_lengths, prefix_nodes
from qwen_bridge.cost import RUNGS, PromptLengths, rung_flops
from qwen_bridge.errors import InputError
from qwen_bridge.protocol import empty_score
from qwen_bridge.scorer import ReferenceScorer

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "image_size": 56,
    "queries": 1,
    "candidates": 5,
    "shots": 2,
    "answers": 3,
    "pool": "shared",
    "pool_size": 3,
    "seed": 0,
}
# What transformers 5.10 knows; the model swallows any other name without a word.
INPUTS_OF_EVERY_VERSION = set(
    "input_ids attention_mask mm_token_type_ids image_grid_thw inputs_embeds use_cache".split()
)
FLAGS = [f"--{name}={value}" for name, value in {**SMALL, "image_size": 28}.items()]


@pytest.fixture(scope="module")
def race():
    workload = Workload(WorkloadConfig(**SMALL), "tiny", "cpu", "float32")
    return Race(workload, naive_candidates=2, batch_tokens=None, cache_bytes=1 << 26)


@pytest.fixture(scope="module")
def found(race):
    return race.exactness()


def run(*flags, code=""):
    """The entry point in a process of its own, as a user starts it."""
    code += "\nfrom experiments import benchmark_scoring, cli\ncli.run(benchmark_scoring.main)"
    return subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_random_networks_have_the_shape_they_are_named_for():
    for dtype in (torch.float32, torch.bfloat16):
        loaded = random_model("tiny", device="cpu", dtype=dtype, seed=0)
        assert loaded.model.dtype == dtype
        assert sum(p.numel() for p in loaded.model.parameters()) == SHAPES["tiny"].parameters
        rotary = loaded.model.model.language_model.rotary_emb
        assert rotary.inv_freq.dtype == torch.float32


def test_the_small_network_has_the_proportions_of_3b():
    lengths = PromptLengths(image=144)
    ratios = []
    for name in ("tiny", "3b_random"):
        flops = rung_flops(SHAPES[name], lengths, (24, 24), candidates=64, shots=2)
        ratios.append([flops["naive"] / flops[rung] for rung in RUNGS])
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=0.06)


def test_each_rung_does_the_work_that_is_predicted(race, found):
    del found  # pictures are resident afterwards, as the figures assume

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for name, rung in race.rungs.items():
        rung.prepare()
        with FlopCounterMode(display=False, custom_mapping={flash: attention}) as counter:
            rung.score()
        counted = counter.get_total_flops() / len(rung.prompts)
        assert counted == pytest.approx(rung.flops, rel=0.05), name  # padding is not predicted


def test_every_rung_agrees_with_the_reference(race, found):
    assert found["faults"] == []
    assert found["max_abs_logprob"] <= 1e-4
    assert {*RUNGS} - {"naive"} <= set(found["by_rung"])
    naive = race.rungs["naive"]
    slow = ReferenceScorer(*race.workload.parts)
    reference = slow.score(naive.prompts.queries, naive.prompts.pointers)
    np.testing.assert_allclose(naive.score().answer_log_probs, reference.answer_log_probs, 1e-6)


def test_kept_pictures_need_no_argument_that_some_versions_ignore(race, monkeypatch):
    model, naive = race.workload.loaded.model, race.rungs["naive"]
    expected = naive.score().answer_log_probs
    forward = model.forward

    def strict(**inputs):
        assert set(inputs) <= INPUTS_OF_EVERY_VERSION
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", strict)
    kept = race.rungs["vision_cache"].score().answer_log_probs
    np.testing.assert_allclose(kept, expected, 1e-5, 1e-5)


def test_prompts_hold_the_work_that_is_asked_for(race):
    prompts = race.workload.prompts()
    assert len({tuple(pointer) for pointer in prompts.pointers}) == SMALL["candidates"]
    requests, reasons = race.rungs["trie_cold"].scorer._requests(prompts.queries, prompts.pointers)
    assert not reasons
    lengths = measured_lengths(list(requests.values()))
    assert lengths.forms == SMALL["answers"]
    assert lengths.image == 4
    whole = np.mean([sum(map(len, request.segments)) for request in requests.values()])
    assert lengths.prefix(2) + lengths.query == pytest.approx(whole)
    assert prefix_nodes(prompts) == [3.0, 5.0]


def test_pools_are_shared_or_not():
    for pool, distinct in (("shared", 4), ("per_query", 8)):
        config = WorkloadConfig(**{**SMALL, "pool": pool, "pool_size": 4, "queries": 2})
        workload = Workload(config, "tiny", "cpu", "float32")
        prompts = workload.prompts()
        first, second = (set(prompts.pointers[prompts.queries == q].ravel()) for q in (0, 1))
        assert len(workload.dataset.bank) == distinct
        assert bool(first & second) == (pool == "shared")


def test_differences_are_found():
    theirs, ours = empty_score(2, 2, {}), empty_score(2, 2, {})
    for batch in (theirs, ours):
        batch.answer_log_probs[:] = [[-1.0, -2.0], [-3.0, -np.inf]]
        batch.gt_prob[:] = 0.5
        batch.margin[:] = [0.5, -0.5]
    assert faults({"x": difference(ours, theirs, 1e-3)}, None) == []
    ours.answer_log_probs[1, 0] += 2e-4
    (fault,) = faults({"x": difference(ours, theirs, 1e-3)}, None)
    assert fault.startswith("x: max difference 2.00e-04 nats exceeds 1.00e-04")
    ours.margin[1] = 0.1
    assert "greedily" in faults({"x": difference(ours, theirs, 1e-3)}, None)[-1]
    assert difference(ours, theirs, 1.0).greedy_equal  # nobody leads by so much
    ours.answer_log_probs[1, 1] = -4.0
    with pytest.raises(ValueError, match="none in the other"):
        difference(ours, theirs, 1e-3)
    ours.gt_prob[0] = np.nan
    with pytest.raises(ValueError, match="not a number"):
        difference(ours, theirs, 1e-3)
    with pytest.raises(ValueError, match="could not be scored: too long"):
        difference(empty_score(2, 2, {0: "too long"}), theirs, 1e-3)


def test_bfloat16_is_held_against_the_naive_loop_itself():
    naive = Difference(p50=0.1, p99=0.2, max=0.3, greedy_equal=True)
    alike = Difference(p50=0.11, p99=0.2, max=0.31, greedy_equal=True)
    worse = Difference(p50=0.16, p99=0.2, max=0.3, greedy_equal=True)
    broken = Difference(p50=float("nan"), p99=0.2, max=0.3, greedy_equal=True)
    assert faults({"x": alike}, naive) == []
    assert len(faults({"x": worse}, naive)) == 1
    assert len(faults({"x": broken}, naive)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 50}, "--image_size=50 is not a multiple of 28"),
        ({"answers": 11}, "--answers=11 exceeds the 10 annotators"),
        ({"pool_size": 1}, "--pool_size=1 is less than --shots=2"),
        ({"candidates": 7}, "--candidates=7 exceeds the 6 different pointers"),
    ],
)
def test_work_that_cannot_be_made_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        WorkloadConfig(**{**SMALL, **change})


def test_prefixes_that_do_not_fit_are_refused(race):
    tight = Race(race.workload, naive_candidates=1, batch_tokens=None, cache_bytes=1 << 10)
    with pytest.raises(InputError, match="--cache_mib=0 is too small to keep"):
        tight.rungs["trie_warm"].prepare()


def test_memory_of_a_long_run_is_noted():
    config = WorkloadConfig(**{**SMALL, "queries": 8, "pool": "per_query"})
    workload = Workload(config, "tiny", "cpu", "float32")
    steps = []
    result = soak(workload, batch_tokens=None, cache_bytes=1 << 18, advance=steps.append)
    assert sum(steps) == result["candidates"] == 40
    assert [count for count, _ in result["memory_bytes"]] == list(range(5, 41, 5))
    assert result["evictions"] > 0
    assert result["flat"] == (result["growth"] <= 0.05)


def test_the_entry_point_writes_what_others_read(tmp_path):
    out = tmp_path / "speed.json"
    done = run(*FLAGS, "--rounds=2", "--naive_candidates=1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (first,) = [i for i, line in enumerate(lines) if "largest difference" in line]
    (timed,) = [i for i, line in enumerate(lines) if "rounds, timed by" in line]
    assert first < timed
    document = json.loads(out.read_text())
    assert {"device", "versions", "config", "exactness", "rungs"} <= set(document)
    assert document["exactness"]["max_abs_logprob"] <= 1e-4
    assert document["exactness"]["greedy_equal"] is True
    assert list(document["rungs"]) == list(RUNGS)
    for name, row in document["rungs"].items():
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"], name
        for figure in ("candidates_per_s", "predicted_ratio", "share_of_peak"):
            assert row[figure] > 0, (name, figure)
        off = row["ratio"]["median"] / row["predicted_ratio"]
        assert row["flag"] == (abs(off - 1) > 0.3)
    naive = document["rungs"]["naive"]
    assert naive["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert naive["predicted_ratio"] == 1.0
    assert document["config"]["candidates"] == SMALL["candidates"]
    assert set(document["stage_b"]) >= {"model_generate", "decode", "certified_decode"}


def test_an_inexact_rung_stops_the_run(tmp_path):
    out = tmp_path / "speed.json"
    code = (
        "from qwen_bridge.trie_scorer import TrieScorer\n"
        "head = TrieScorer._head\n"
        "def off(self, *args):\n"
        "    log_probs, margins = head(self, *args)\n"
        "    return log_probs + 1e-3, margins\n"
        "TrieScorer._head = off"
    )
    done = run(*FLAGS, f"--out={out}", code=code)
    assert done.returncode == 1
    assert "wrong: trie_cold: max difference" in done.stdout
    assert "rounds" not in done.stdout
    document = json.loads(out.read_text())
    assert document["rungs"] == {}
    assert document["exactness"]["max_abs_logprob"] > 1e-4
