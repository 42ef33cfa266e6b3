"""Memory: what caches get, what they hold, and prompts that do not fit."""

import types

import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from test_scorer import assert_scores_agree, prefix_bytes, random_prompts

from experiments import run_folder, settings
from qwen_bridge import free_memory
from qwen_bridge.memory import CPU_CAP, cache_budgets, forward_bound
from qwen_bridge.shape import PUBLISHED
from qwen_bridge.trie import KEYS_PER_TOKEN, fitting_chunks, token_batches

GIB = 2**30
THREE, SEVEN = PUBLISHED.values()


def test_budgets_by_hand():
    # 0.9 x 100 - 10 = 80, of which 0.8 is for prefixes.
    assert cache_budgets(100 * GIB, 10 * GIB) == pytest.approx((64 * GIB, 16 * GIB), abs=2)
    # What the user says is kept; the other cache gets its share of what is left.
    assert cache_budgets(100 * GIB, 10 * GIB, prefix=7) == pytest.approx((7, 16 * GIB), abs=2)
    assert cache_budgets(100 * GIB, 10 * GIB, features=GIB) == pytest.approx((79 * GIB, GIB))
    assert cache_budgets(100 * GIB, 10 * GIB, prefix=75 * GIB)[1] == pytest.approx(5 * GIB)
    assert cache_budgets(100 * GIB, 10 * GIB, prefix=90 * GIB) == (90 * GIB, 0)
    # A forward that might take everything still leaves a quarter.
    assert sum(cache_budgets(8 * GIB, 10 * GIB)) == pytest.approx(2 * GIB, abs=2)
    assert cache_budgets(4 * GIB, GIB, gpu=False) == (GIB // 2, GIB // 2)
    assert cache_budgets(400 * GIB, GIB, gpu=False) == (CPU_CAP, CPU_CAP)
    assert cache_budgets(400 * GIB, GIB, gpu=False, prefix=5 * GIB) == (5 * GIB, CPU_CAP)


@pytest.mark.parametrize("shape", [THREE, SEVEN])
@pytest.mark.parametrize("gib", [80, 141])
def test_a_published_model_fits_its_gpu_with_auto_budgets(shape, gib):
    forward = forward_bound(shape, batch_tokens=8192, value_bytes=2)
    weights = 2 * shape.parameters + GIB
    prefix, features = cache_budgets(gib * GIB - weights, forward)
    assert weights + forward + prefix + features < 0.95 * gib * GIB
    assert prefix > 20 * GIB


def test_workers_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    monkeypatch.delenv("QWEN_BRIDGE_WORKERS", raising=False)
    assert free_memory.free_memory(gpus[0], dealt=True) == 60 * GIB
    monkeypatch.setenv("QWEN_BRIDGE_WORKERS", "3")
    assert [free_memory.workers_on(gpu, dealt=True) for gpu in gpus] == [2, 1]
    assert free_memory.workers_on(gpus[1], dealt=False) == 3
    # Two workers, of which the other has yet to load 7 GiB and a context of 1.
    assert free_memory.free_memory(gpus[0], dealt=True) == (60 - 8) * GIB / 2
    assert free_memory.free_memory(gpus[1], dealt=True) == 60 * GIB


def test_workers_share_main_memory(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  4194304 kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setenv("QWEN_BRIDGE_WORKERS", "2")
    cpu = torch.device("cpu")
    assert free_memory.free_memory(cpu, dealt=True) == 2 * GIB
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setenv("QWEN_BRIDGE_WORKERS", "1")
    assert cache_budgets(free_memory.free_memory(cpu, dealt=True), 0, gpu=False)[0] == CPU_CAP


def test_a_worker_takes_the_flags(make_scorer, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemAvailable: 1048576 kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.delenv("QWEN_BRIDGE_WORKERS", raising=False)
    scorer = make_scorer(cache_mib="auto", vision_cache_mib=3)
    assert scorer.cache.budget == GIB // 8
    assert scorer.factory.vision.kept.budget == 3 << 20


def test_flags_are_auto_or_a_number():
    with flagsaver.flagsaver():
        flags.FLAGS(["train"])
        assert (settings.CACHE_MIB.value, settings.VISION_CACHE_MIB.value) == ("auto", "auto")
        assert run_folder.own_flags()["cache_mib"] == "--cache_mib=auto"
        flags.FLAGS(["train", "--cache_mib=64", "--vision_cache_mib=0"])
        assert (settings.CACHE_MIB.value, settings.VISION_CACHE_MIB.value) == (64, 0)
        assert run_folder.own_flags()["cache_mib"] == "--cache_mib=64"
        for wrong in ("--cache_mib=0", "--cache_mib=lots", "--vision_cache_mib=-1"):
            with pytest.raises(flags.IllegalFlagValueError, match="auto, or an integer"):
                flags.FLAGS(["train", wrong])


def test_chunks_by_hand():
    sizes = {(): 1, (1,): 2, (2,): 2, (1, 2): 3, (2, 1): 3, (1, 3): 10}
    paths = [(2, 1), (1, 2), (1,), (1, 3), (1, 2), ()]
    # Sorted: (), (1,), (1, 2), (1, 2), (1, 3), (2, 1), of 1, 3, 6, 6, 13 and 6 bytes.
    assert fitting_chunks(paths, sizes, 7) == ([[5, 2, 1, 4], [0]], {3: 13})
    assert fitting_chunks(paths, sizes, 11) == ([[5, 2, 1, 4, 0]], {3: 13})
    assert fitting_chunks(paths, sizes, 0) == ([], {0: 6, 1: 6, 2: 3, 3: 13, 4: 6, 5: 1})
    assert fitting_chunks([], {}, 0) == ([], {})


def test_chunks_hold_every_prompt_once_within_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(30):
        paths = [tuple(rng.integers(0, 4, rng.integers(0, 5)).tolist()) for _ in range(40)]
        nodes = {path[:d] for path in paths for d in range(len(path) + 1)}
        sizes = {node: int(rng.integers(1, 9)) for node in nodes}
        budget = int(rng.integers(5, 60))

        def needed(chunk, paths=paths, sizes=sizes):
            held = {paths[i][:d] for i in chunk for d in range(len(paths[i]) + 1)}
            return sum(sizes[node] for node in held)

        chunks, too_large = fitting_chunks(paths, sizes, budget)
        assert sorted([*too_large, *(i for chunk in chunks for i in chunk)]) == list(range(40))
        assert all(needed(chunk) <= budget for chunk in chunks)
        assert all(needed([i]) == size > budget for i, size in too_large.items())


def test_batches_bound_the_keys_they_gather():
    rng = np.random.default_rng(2)
    lengths, prefixes = rng.integers(1, 40, 200).tolist(), rng.integers(0, 4000, 200).tolist()
    batches = token_batches(lengths, 256, prefixes)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        width, prefix = (max(values[i] for i in batch) for values in (lengths, prefixes))
        assert len(batch) == 1 or len(batch) * width <= 256
        assert len(batch) == 1 or len(batch) * (width + prefix) <= KEYS_PER_TOKEN * 256
    assert max(map(len, batches)) > 1
    # Short prefixes bind nothing.
    assert token_batches(lengths, 256, [9] * 200) == token_batches(lengths, 256)


@pytest.fixture
def watched(make_scorer, monkeypatch):
    """A scorer with small batches that notes the most bytes its prefixes ever take."""
    scorer = make_scorer(cache_mib=2, batch_tokens=512)
    scorer.set_limits((scorer.factory.vision.batch_patches, 512, 2 << 20))
    scorer.empty_caches()
    peak = types.SimpleNamespace(bytes=0)
    put = type(scorer.cache).put

    def noted(cache, *args):
        put(cache, *args)
        peak.bytes = max(peak.bytes, cache.bytes)

    monkeypatch.setattr(type(scorer.cache), "put", noted)
    return scorer, peak


def test_prefixes_keep_to_the_budget_within_a_request_too(watched, make_scorer):
    scorer, peak = watched
    queries, pointers = random_prompts(scorer, 16, seed=21, most_shots=8)
    requests = scorer._requests(queries, pointers)[0].values()
    largest = max(prefix_bytes(scorer, request) for request in requests)
    assert sum(prefix_bytes(scorer, request) for request in requests) > 4 * largest
    expected = make_scorer(scorer="reference").score(queries, pointers)
    for budget in (largest, 3 * largest):
        scorer.empty_caches()
        scorer.cache.budget, peak.bytes = budget, 0
        for _ in range(2):
            assert_scores_agree(scorer.score(queries, pointers), expected)
        assert 0.5 * budget < peak.bytes <= budget
        texts = make_scorer(scorer="reference").answer(queries, pointers).texts
        assert scorer.answer(queries, pointers).texts == texts
        assert peak.bytes <= budget


def test_a_prompt_beyond_the_budget_is_refused_alone(watched, make_scorer):
    scorer, _ = watched
    queries, pointers = random_prompts(scorer, 12, seed=22, most_shots=6)
    requests, _ = scorer._requests(queries, pointers)
    needed = np.array([prefix_bytes(scorer, requests[row]) for row in range(12)])
    scorer.cache.budget = int(np.median(needed))
    large = needed > scorer.cache.budget
    # Equal nodes count once, so a prompt that shows one picture twice may fit nevertheless.
    scores = scorer.score(queries, pointers)
    assert 0 < len(scores.reasons) < 12
    assert set(scores.reasons) <= set(np.flatnonzero(large))
    for reason in scores.reasons.values():
        assert "MiB for cached prefixes; raise --cache_mib" in reason
    rest = np.array([row for row in range(12) if row not in scores.reasons])
    expected = make_scorer(scorer="reference").score(queries[rest], pointers[rest])
    np.testing.assert_allclose(scores.gt_prob[rest], expected.gt_prob, atol=1e-5)
    assert sorted(scorer.answer(queries, pointers).reasons) == sorted(scores.reasons)


@pytest.mark.slow
def test_ten_thousand_candidates_leave_memory_flat(make_scorer):
    """A pool for each query, so that nearly every prefix is new; both caches are full early."""
    config = {"kind": "digits", "seed": 0, "bank": 600, "train": 100, "eval": 10}
    scorer = make_scorer(dataset=config, cache_mib=4, vision_cache_mib=0)
    rng = np.random.default_rng(0)
    bank = np.array([example.id for example in scorer.dataset.bank])
    resident = []
    for example in scorer.dataset.train:
        pool = rng.choice(bank, 24, replace=False)
        pointers = np.stack([rng.choice(pool, 2, replace=False) for _ in range(100)])
        scores = scorer.score(np.full(100, example.id), pointers)
        assert not scores.reasons
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * 4096)
    assert scorer.cache.evictions > 1000
    assert scorer.cache.bytes <= 4 << 20
    peaks = [max(resident[i : i + 25]) / 2**20 for i in range(0, 100, 25)]
    print("resident at most, MiB, by 2,500 candidates: " + ", ".join(f"{p:.1f}" for p in peaks))
    assert peaks[-1] - peaks[0] < 16
    assert peaks[-1] - peaks[1] < 8
