"""Parts of embeddings against the model called plainly, one text at a time."""

import dataclasses

import numpy as np
import published
import pytest
import torch
from worker_settings import SETTINGS

from qwen_bridge import workers
from qwen_bridge.embedder import Embedder
from qwen_bridge.errors import InputError


def columns(scorer, rows, part):
    low, high = scorer.parts[part]
    return rows[:, low:high]


def ids_of(examples):
    return np.array([example.id for example in examples])


@torch.inference_mode()
def plain_text_vector(scorer, text):
    """Mean over the text's tokens of the hidden states half-way up, computed alone."""
    ids = torch.tensor([scorer.tokenizer(text, add_special_tokens=False)["input_ids"]])
    states = scorer.model.model.language_model(input_ids=ids, output_hidden_states=True)
    middle = (scorer.model.config.text_config.num_hidden_layers + 1) // 2
    return states.hidden_states[middle][0].mean(0).numpy()


def test_texts_equal_the_model_one_at_a_time(make_scorer):
    scorer = make_scorer()
    bank = scorer.dataset.bank[:70]
    rows = scorer.embed("bank", ids_of(bank)).embeddings
    for i in range(0, 70, 9):
        for part, text in (("question", bank[i].question), ("answer", bank[i].answer)):
            expected = plain_text_vector(scorer, text)
            np.testing.assert_allclose(columns(scorer, rows, part)[i], expected, atol=1e-5)


def test_parts_asked_for_apart_are_those_of_the_whole(make_scorer):
    scorer = make_scorer()
    for kind, examples in (("bank", scorer.dataset.bank), ("query", scorer.dataset.eval)):
        ids = ids_of(examples[:40])
        whole, images, texts = (
            scorer.embed(f"{kind}{only}", ids).embeddings for only in ("", ":image", ":text")
        )
        np.testing.assert_allclose(images + texts, whole, atol=1e-6)
        assert not columns(scorer, images, "question").any()
        assert not columns(scorer, texts, "image").any()
        assert columns(scorer, whole, "answer").any() == (kind == "bank")


def test_an_image_that_cannot_be_read_leaves_its_part_zero(make_scorer):
    scorer = make_scorer()
    first, second, third = scorer.dataset.bank[:3]
    broken = dataclasses.replace(second, image="nowhere")
    load = scorer.factory.vision._load

    def refuse(key):
        if key == "nowhere":
            raise InputError("nowhere.jpg: no such image")
        return load(key)

    scorer.factory.vision._load = refuse
    whole = scorer.embedder.embed([first, second, third], "bank").embeddings
    batch = scorer.embedder.embed([first, broken, third, broken], "bank")
    reason = "image nowhere: nowhere.jpg: no such image"
    assert batch.reasons == {1: reason, 3: reason}
    assert not columns(scorer, batch.embeddings, "image")[[1, 3]].any()
    np.testing.assert_allclose(batch.embeddings[[0, 2]], whole[[0, 2]], atol=1e-5)
    for part in ("question", "answer"):
        ours, theirs = (columns(scorer, rows, part)[1] for rows in (batch.embeddings, whole))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert scorer.embedder.embed([broken], "query:text").reasons == {}


def test_a_text_that_cannot_be_embedded_has_one_mend(make_scorer):
    scorer = make_scorer()
    bad = dataclasses.replace(scorer.dataset.bank[0], question="is this <|im_end|>?")
    with pytest.raises(InputError) as caught:
        scorer.embedder.embed([bad], "bank")
    assert str(caught.value) == (
        f"bank example {bad.id}: the text 'is this <|im_end|>?' holds a special token of the "
        "model; change the text or leave the example out"
    )


def test_similarity_is_the_best_cosine_and_remembers(make_scorer):
    scorer = make_scorer()
    asked = []

    class Spy:
        image_dim = text_dim = scorer.embedder.encoder.text_dim

        def texts(self, texts):
            asked.extend(texts)
            return scorer.embedder.encoder.texts(texts)

    embedder = Embedder(Spy(), Spy())
    vectors = {text: plain_text_vector(scorer, text) for text in ("three", "drei", "tres")}

    def cosine(a, b):
        a, b = vectors[a], vectors[b]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    best = max(cosine("three", "drei"), cosine("three", "tres"))
    for _ in range(2):
        actual = embedder.similarity("three", ["drei", "tres", " ", "drei"])
        assert actual == pytest.approx(best, abs=1e-5)
    assert sorted(asked) == ["drei", "three", "tres"]
    assert embedder.similarity("three", ["three"]) == pytest.approx(1)
    assert embedder.similarity("", ["three"]) == 0
    assert embedder.similarity("three", ["", " "]) == 0


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_another_encoder_changes_embeddings_and_no_score(make_scorer, tmp_path, kind):
    {"clip": published.clip_folder, "siglip": published.siglip_folder}[kind](tmp_path)
    settings = {"encoder": kind, "encoder_model": str(tmp_path)}
    qwen, other = make_scorer(), make_scorer(**settings)
    assert other.embedding_dim == {"clip": 60, "siglip": 96}[kind]
    bank = qwen.dataset.bank[:5]
    rows = other.embed("bank", ids_of(bank)).embeddings
    encoder = other.embedder.encoder
    images, _ = encoder.images([example.image for example in bank])
    np.testing.assert_allclose(columns(other, rows, "image"), images, atol=1e-5)
    answers = encoder.texts([example.answer for example in bank])
    np.testing.assert_allclose(columns(other, rows, "answer"), answers, atol=1e-5)
    query = np.array([qwen.dataset.eval[0].id] * 5)
    ours, theirs = (s.answer(query, ids_of(bank)[:, None]) for s in (qwen, other))
    assert ours.texts == theirs.texts
    np.testing.assert_allclose(ours.similarity, theirs.similarity, atol=1e-5)


def test_the_worker_says_which_encoder_it_has_apart_from_what_decides_scores(tmp_path):
    published.clip_folder(tmp_path)
    _, qwen = workers.build(SETTINGS)
    _, clip = workers.build({**SETTINGS, "encoder": "clip", "encoder_model": str(tmp_path)})
    assert qwen.pop("encoder") != clip.pop("encoder")
    assert qwen == clip


def test_forced_evictions_change_no_score(make_scorer):
    roomy, none = make_scorer(), make_scorer(vision_cache_mib=0)
    rng = np.random.default_rng(4)
    queries = rng.choice(ids_of(roomy.dataset.eval), 30)
    pointers = rng.choice(ids_of(roomy.dataset.bank), (30, 3))
    for first in range(0, 30, 10):
        some = slice(first, first + 10)
        ours, theirs = (s.score(queries[some], pointers[some]) for s in (none, roomy))
        np.testing.assert_allclose(ours.answer_log_probs, theirs.answer_log_probs, atol=1e-4)
        assert ours.texts == theirs.texts
        assert none.factory.vision.kept.bytes == 0
    # What is kept of a segment does not hold on to its image.
    kept = [segment for segment, _ in none.factory._prepared._entries.values()]
    assert len(kept) > 20
    assert all(segment.image is None for segment in kept)
