"""The PyTorch versions that the benchmarks compare with do the same as ours."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from main_job import ROOT

from experiments import torch_samplers
from experiments.sampling_cell import METHODS, Cell, Models
from experiments.side_by_side import one_device
from lever_jax import sampling
from lever_jax.errors import InputError
from lever_jax.policy import pointer_log_probs
from lever_jax.types import CandidatePool


@pytest.fixture(scope="module")
def models():
    return Models(dim=12, width=8, layers=2, heads=2)


def ragged(models, queries=5, pool=9):
    """A batch whose pools are padded, the padding full of numbers that must not be read."""
    query, embeddings, mask = models.batch(queries, pool, seed=3)
    mask = np.arange(pool) < np.array([9, 7, 5, 4, 9])[:, None]
    return query, embeddings, mask


@pytest.mark.parametrize("shots", [1, 3])
def test_the_two_selectors_agree_on_padded_pools(models, shots):
    query, embeddings, mask = ragged(models)
    rng = np.random.default_rng(0)
    pointers = np.array([[rng.permutation(n)[:shots] for _ in range(6)] for n in mask.sum(1)])

    @jax.jit
    @jax.vmap
    def ours(query, embeddings, mask, pointers):
        encoding = models.policy.encode(models.params, query, CandidatePool(embeddings, mask))
        return pointer_log_probs(models.policy, models.params, encoding, mask, pointers)

    tensors = [torch.from_numpy(x) for x in (query, embeddings, mask, pointers)]
    with torch.no_grad():
        log_probs, steps = models.torch.pointer_log_probs(*tensors)
    wanted, wanted_steps = ours(query, embeddings, mask, pointers)
    np.testing.assert_allclose(log_probs.numpy(), wanted, atol=1e-4)
    assert np.asarray(wanted).std() > 0.1  # the selector has opinions, so equality says something
    np.testing.assert_allclose(steps.exp().numpy(), np.exp(wanted_steps), atol=1e-5)


def test_beam_searches_agree_batched_and_in_the_loop(models):
    arrays = ragged(models)
    tensors = [torch.from_numpy(x) for x in arrays]
    options = {"num": 6, "shots": 2}
    pointers, log_probs = torch_samplers.batched(models.torch, *tensors, method="beam", **options)

    @jax.jit
    @jax.vmap
    def ours(query, embeddings, mask):
        encoding = models.policy.encode(models.params, query, CandidatePool(embeddings, mask))
        return sampling.beam_search(models.policy, models.params, encoding, mask, **options)

    wanted = ours(*arrays)
    np.testing.assert_array_equal(pointers.numpy(), wanted.pointers)
    np.testing.assert_allclose(log_probs.numpy(), wanted.log_probs, atol=1e-4)
    for row in range(len(pointers)):
        single = [x[row : row + 1] for x in tensors]
        own, totals = torch_samplers.loop(models.torch, *single, method="beam", **options)
        assert own == [tuple(p) for p in pointers[row].tolist()]
        np.testing.assert_allclose(totals, log_probs[row].numpy(), atol=1e-4)


@pytest.mark.parametrize("method", ["sample", "top_p"])
def test_draws_come_with_their_own_log_probs(models, method):
    tensors = [torch.from_numpy(x) for x in ragged(models)]
    torch.manual_seed(0)
    pointers, log_probs = torch_samplers.batched(
        models.torch, *tensors, method=method, num=7, shots=3
    )
    with torch.no_grad():
        own = models.torch.pointer_log_probs(*tensors, pointers)[0]
    if method == "sample":
        np.testing.assert_allclose(log_probs.numpy(), own.numpy(), atol=1e-4)
    else:  # renormalised over a nucleus, so never less
        assert (log_probs >= own - 1e-4).all()
    assert all(len(set(p)) == 3 for p in pointers.flatten(0, 1).tolist())
    assert tensors[2].gather(1, pointers.flatten(1)).all()
    first, _ = torch_samplers.loop(
        models.torch, *[x[:1] for x in tensors], method=method, num=4, shots=3
    )
    assert all(len(set(p)) == 3 for p in first)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_cell_runs_for_every_method(models, method):
    cell = Cell(models, method, batch=3, pool=8, shots=2, num=8)
    assert cell.difference() < 1e-4
    for run in cell.competitors(1, compiled=False).values():
        assert run() is not None


SMALL = "--B=4 --K=7 --S=2 --G=5 --dim=12 --width=8 --heads=2 --rounds=2 --nocompiled".split()


def run_benchmark(name, *options):
    """What `python -m experiments.NAME` prints, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *SMALL, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr, done.returncode


def test_the_sampling_benchmark_writes_what_it_says(tmp_path):
    out = tmp_path / "sampling.json"
    printed, status = run_benchmark(
        "benchmark_sampling", f"--out={out}", "--methods=beam,sbs,random", "--loop_queries=1"
    )
    assert status == 0, printed
    document = json.loads(out.read_text())
    assert document["exactness"]["max_abs_logprob"] < 1e-4
    beam, sbs, random = document["cells"]
    assert random["share_of_roofline"] is None  # it does not ask the selector
    assert beam["ratio_loop"] > beam["ratio_batched_eager"] > 0
    assert beam["ratio_batched_compiled"] is None
    assert sbs["ratio_loop"] is None  # PyTorch has no form of it
    for cell in (beam, sbs):
        assert 0 < cell["least_seconds"] < min(cell["seconds"]["ours"])
        assert 0 < cell["share_of_roofline"] < 1
        assert cell["machine"]["flops"] > 0
        assert f"{cell['share_of_roofline']:.0%} of the roofline" in printed


def test_a_gpu_that_one_of_the_two_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(InputError, match=r"JAX computes on a cpu, PyTorch on a gpu.*cuda12"):
        one_device()


def test_the_training_steps_agree_and_the_benchmark_writes_what_it_says(tmp_path):
    out = tmp_path / "training.json"
    printed, status = run_benchmark("benchmark_training", f"--out={out}")
    assert status == 0, printed
    document = json.loads(out.read_text())
    assert document["exactness"]["max_abs_loss_of_first_step"] < 1e-5
    (cell,) = document["cells"]
    assert cell["ratio_eager"]["min"] <= cell["ratio_eager"]["median"] <= cell["ratio_eager"]["max"]
    assert cell["ratio_eager"]["limit"] > cell["ratio_eager"]["median"]
    assert cell["ratio_compiled"] is None
    assert len(cell["seconds"]["ours"]) == 2
