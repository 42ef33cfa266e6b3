"""All that can be wrong with one prompt, in one batch: each has its reason, the rest is scored."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from qwen_bridge.embedder import Embedder, QwenEncoder
from qwen_bridge.loading import load_model
from qwen_bridge.prompts import PromptBuilder, PromptTemplate
from qwen_bridge.scorer import ReferenceScorer
from qwen_bridge.segments import SegmentFactory
from qwen_bridge.trie_scorer import TrieScorer
from qwen_bridge.vision import VisionCache
from qwen_bridge.vqa.digits import DigitsConfig, load_digits_world

THIN, DAMAGED, BLANK, SPECIAL = 9001, 9002, 9003, 9004
REASONS = {
    0: "has 2[0-9]{3} tokens; the model's context is 2048",
    1: "absolute aspect ratio must be smaller than 200, got 10000",
    2: "image damaged: cannot read",
    3: "the query has no answer that could be scored",
    4: "demonstration 9003 has an empty answer",
    5: "777777",
    6: "holds a special token of the model",
}


@pytest.fixture(scope="module")
def dataset():
    """The digits, and examples that cannot be shown."""
    world = load_digits_world(DigitsConfig(bank=60, train=6, eval=6))
    usual = world.bank[0]

    def like(id, **changes):
        return dataclasses.replace(usual, id=id, **changes)

    def load(key):
        if key == "thin":
            return Image.new("RGB", (10_000, 1))
        if key == "damaged":
            raise OSError("cannot read")
        return world.load_image(key)

    bad = (
        like(THIN, image="thin"),
        like(DAMAGED, image="damaged"),
        like(BLANK, answers=(" ", "")),
        like(SPECIAL, question="What <|im_end|> is this?"),
    )
    return dataclasses.replace(
        world,
        bank=world.bank + bad,
        eval=(*world.eval, like(BLANK, answers=(" ", ""), image=world.eval[0].image)),
        load_image=load,
    )


@pytest.fixture(scope="module", params=["trie", "reference"])
def scorer(request, dataset):
    loaded = load_model("")
    builder = PromptBuilder(loaded.tokenizer, PromptTemplate())
    vision = VisionCache(loaded.model.model.visual, loaded.image_processor, dataset.load_image)
    encoder = QwenEncoder(loaded.model, builder, vision, loaded.fingerprint)
    parts = loaded, dataset, SegmentFactory(builder, vision), Embedder(encoder, encoder)
    return (TrieScorer if request.param == "trie" else ReferenceScorer)(*parts)


def prompts(dataset):
    """One prompt for each fault, among good ones."""
    query, demo = dataset.eval[0].id, dataset.bank[0].id
    rows = [
        (query, [demo] * 110),
        (query, [demo, THIN]),
        (query, [DAMAGED]),
        (BLANK, [demo]),
        (query, [demo, BLANK]),
        (query, [777_777, demo]),
        (query, [SPECIAL]),
        (query, [demo]),
        (dataset.eval[1].id, [demo, dataset.bank[1].id]),
        (dataset.eval[2].id, []),
    ]
    pointers = np.full((len(rows), 110), -1)
    for row, (_, shown) in enumerate(rows):
        pointers[row, : len(shown)] = shown
    return np.array([query for query, _ in rows]), pointers


def test_each_fault_is_refused_for_its_prompt_alone(scorer, dataset):
    queries, pointers = prompts(dataset)
    good = np.arange(len(REASONS), len(queries))
    for verb in (scorer.score, scorer.answer):
        batch, alone = verb(queries, pointers), verb(queries[good], pointers[good])
        assert not alone.reasons
        assert sorted(batch.reasons) == sorted(REASONS)
        for row, words in REASONS.items():
            assert re.search(words, batch.reasons[row]), batch.reasons[row]
        assert np.array(batch.texts)[good].tolist() == alone.texts
        numbers = "gt_prob" if verb == scorer.score else "accuracy"
        ours = getattr(batch, numbers)
        assert np.isnan(ours[: len(REASONS)]).all()
        np.testing.assert_allclose(ours[good], getattr(alone, numbers), atol=1e-5)


@pytest.mark.parametrize("scorer", ["trie"], indirect=True)  # The other keeps no prefixes.
def test_a_budget_too_small_is_one_more(scorer, dataset):
    queries, pointers = prompts(dataset)
    requests, _ = scorer._requests(queries, pointers)
    budget, scorer.cache.budget = scorer.cache.budget, 1
    longest = max(requests, key=lambda row: sum(map(len, requests[row].segments)))
    scorer.cache.budget = 3 * 2 * 128 * 4 * sum(map(len, requests[longest].segments[:-1])) - 1
    scorer.cache.clear()
    try:
        scores = scorer.score(queries, pointers)
    finally:
        scorer.cache.budget = budget
    assert sorted(scores.reasons) == sorted([*REASONS, longest])
    assert "raise --cache_mib" in scores.reasons[longest]
