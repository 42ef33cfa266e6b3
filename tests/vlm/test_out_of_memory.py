"""Memory runs out: batches are halved, the work goes on, and the user is told once."""

import numpy as np
import pytest
import torch
from test_scorer import assert_scores_agree, random_prompts

from qwen_bridge.out_of_memory import is_out_of_memory

CPU_LINE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
)


@pytest.fixture
def scorer(make_scorer):
    """A scorer as if new."""
    scorer = make_scorer(cache_mib=8, batch_tokens=1024)
    fresh = (16_384, 1024, 8 << 20)
    scorer.set_limits(fresh)
    scorer.empty_caches()
    scorer.notes.clear()
    scorer._ran_out = False
    yield scorer
    scorer.set_limits(fresh)


@pytest.fixture
def starve(monkeypatch):
    """Makes a network fail where a predicate of its keyword arguments holds; counts failures."""

    def make(network, error, fails):
        forward, failures = network.forward, []

        def guarded(*args, **kwargs):
            if fails(*args, **kwargs):
                failures.append(1)
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(network, "forward", guarded)
        return failures

    return make


def size(**kwargs):
    """Tokens of a forward of the language model, padding included; 0 where it embeds a text."""
    return kwargs["inputs_embeds"][..., 0].numel() if "past_key_values" in kwargs else 0


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError(CPU_LINE), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error, is_memory):
    assert is_out_of_memory(error) == is_memory


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_LINE), MemoryError()]
)
def test_batches_are_halved_until_they_go_through(scorer, starve, make_scorer, error):
    queries, pointers = random_prompts(scorer, 24, seed=31)
    expected = make_scorer(scorer="reference").score(queries, pointers)
    failures = starve(scorer.model.model.language_model, error, lambda **k: size(**k) > 300)
    assert_scores_agree(scorer.score(queries, pointers), expected)
    assert 0 < len(failures) <= 4
    assert scorer._batch_tokens == 1024 >> len(failures) <= 300
    # It has learnt: nothing fails any more, and nothing more is said.
    seen = len(failures)
    more, shown = random_prompts(scorer, 24, seed=32)
    assert not scorer.score(more, shown).reasons
    assert not scorer.answer(more, shown).reasons
    assert len(failures) == seen
    assert len(scorer.notes) == 1
    assert scorer.notes[0].startswith("out of memory: going on with batches of half the size")


def test_a_prompt_that_never_fits_is_given_up_alone(scorer, starve, make_scorer):
    queries, pointers = random_prompts(scorer, 16, seed=33, most_shots=4)
    pointers = np.concatenate([pointers, np.full((16, 8), -1)], 1)
    pointers[5] = np.resize(pointers[pointers >= 0][:2], 12)
    good = np.delete(np.arange(16), 5)
    expected = make_scorer(scorer="reference").score(queries[good], pointers[good])

    lengths = {
        row: sum(map(len, request.segments))
        for row, request in scorer._requests(queries, pointers)[0].items()
    }
    limit = max(length for row, length in lengths.items() if row != 5) + 60  # and branches
    assert limit < lengths[5]

    def too_long(**kwargs):
        return size(**kwargs) > 0 and kwargs["attention_mask"]["full_attention"].shape[-1] > limit

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore words")
    starve(scorer.model.model.language_model, error, too_long)
    scores = scorer.score(queries, pointers)
    assert scores.reasons == {
        5: "out of memory for this prompt alone: CUDA out of memory. Tried to allocate 9 GiB"
    }
    np.testing.assert_allclose(scores.gt_prob[good], expected.gt_prob, atol=1e-5)
    # It was the prompt's fault and not the batch's.
    assert scorer._batch_tokens == 1024
    assert scorer.answer(queries, pointers).reasons == scores.reasons
    assert len(scorer.notes) == 1


def test_the_vision_tower_may_run_out_too(scorer, starve):
    queries, pointers = random_prompts(scorer, 24, seed=34)
    expected = scorer.score(queries, pointers)
    scorer.empty_caches()

    def large(pixels, **kwargs):
        return len(pixels) > 16

    failures = starve(scorer.model.model.visual, torch.OutOfMemoryError("CUDA"), large)
    scores = scorer.score(queries, pointers)
    np.testing.assert_allclose(scores.gt_prob, expected.gt_prob, atol=1e-5)
    assert failures
    assert scorer.factory.vision.batch_patches <= 16
    assert scorer._batch_tokens == 1024  # The language model was not to blame.
    # An image that fails alone fails its prompts, and no others.
    scorer.empty_caches()
    bad = scorer.dataset.example("query", int(queries[0])).image
    pixels = scorer.factory.vision.patches(bad)[0]

    def shows(given, **kwargs):
        return any(np.array_equal(part, pixels) for part in given.split(len(pixels)))

    starve(scorer.model.model.visual, torch.OutOfMemoryError("CUDA"), shows)
    scores = scorer.score(queries, pointers)
    same = [
        row for row, q in enumerate(queries) if scorer.dataset.example("query", int(q)).image == bad
    ]
    assert sorted(scores.reasons) == same


def test_the_reference_gives_up_one_prompt_and_not_the_rest(make_scorer, starve):
    slow = make_scorer(scorer="reference")
    queries, pointers = random_prompts(slow, 6, seed=35, most_shots=1)
    pointers = np.concatenate([pointers, np.full((6, 2), -1)], 1)
    pointers[3] = slow.dataset.bank[0].id
    length = sum(map(len, slow._requests(queries, pointers)[0][3].segments))

    def long(**kwargs):
        return kwargs["input_ids"].shape[1] >= length

    starve(slow.model, MemoryError(), long)
    scores = slow.score(queries, pointers)
    assert scores.reasons == {3: "out of memory for this prompt alone: MemoryError"}
    assert np.isfinite(np.delete(scores.gt_prob, 3)).all()
    slow.notes.clear()


def test_other_errors_are_bugs(scorer, starve):
    queries, pointers = random_prompts(scorer, 4, seed=36)
    error = RuntimeError("The size of tensor a (3) must match")
    starve(scorer.model.model.language_model, error, lambda **k: size(**k) > 0)
    with pytest.raises(RuntimeError, match="must match"):
        scorer.score(queries, pointers)
