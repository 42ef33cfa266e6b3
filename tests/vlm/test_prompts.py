"""Prompts token by token, against sequences made by hand from the chat template."""

import json

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer

from qwen_bridge.errors import InputError
from qwen_bridge.loading import TINY_QWEN
from qwen_bridge.prompts import PromptBuilder, PromptError, PromptTemplate
from qwen_bridge.vqa.examples import Example


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_QWEN, local_files_only=True)


@pytest.fixture(scope="module")
def real_tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "qwen2_5_vl", local_files_only=True)


def example(question, answer, image="x"):
    return Example(id=1, image=image, question=question, answers=(answer,) * 10)


def joined(segments):
    return [i for segment in segments for i in segment.ids]


def test_golden_chat_prompt(tokenizer):
    builder = PromptBuilder(tokenizer, PromptTemplate("chat"))
    shown = [example("What number is this?", "sieben", "a")]
    segments = builder.segments(shown, example("What number comes next?", "acht", "b"))
    pieces = (
        "<|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ "
        "<|im_start|> user Ċ <|vision_start|> <|image_pad|> <|vision_end|> "
        "What Ġnumber Ġis Ġthis ? <|im_end|> Ċ <|im_start|> assistant Ċ si eb en <|im_end|> Ċ "
        "<|im_start|> user Ċ <|vision_start|> <|image_pad|> <|vision_end|> "
        "What Ġnumber Ġcomes Ġnext ? <|im_end|> Ċ <|im_start|> assistant Ċ"
    ).split()
    sieben = tokenizer.tokenize("sieben")
    at = pieces.index("si")
    pieces[at : at + 3] = sieben
    assert tokenizer.convert_ids_to_tokens(joined(segments)) == pieces
    assert [segment.image for segment in segments] == [None, "a", "b"]


def test_golden_inline_prompt(tokenizer):
    builder = PromptBuilder(tokenizer, PromptTemplate("inline"))
    shown = [example("What number is this?", "tre")]
    segments = builder.segments(shown, example("What number comes next?", "sei"))
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Question: What number is this? "
        "Short answer: tre\n"
        "<|vision_start|><|image_pad|><|vision_end|>Question: What number comes next? "
        "Short answer:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert joined(segments) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("shots", range(9))
@pytest.mark.parametrize("instruction", ["", "Answer with one word."])
def test_real_tokenizer_matches_published_template(real_tokenizer, shared, shots, instruction):
    template = json.loads((shared / "qwen2_5_vl" / "chat_template.json").read_text())
    questions = json.loads((shared / "vqav2_mini" / "bank_questions.json").read_text())
    questions = [row["question"] for row in questions["questions"]]
    picked = np.random.default_rng(shots).choice(questions, shots + 1)
    shown = [example(q, a) for q, a in zip(picked[:-1], ["yes", "2", "on left side", "no."] * 3)]
    suffix = f"\n{instruction}" if instruction else ""
    messages = []
    for d in shown:
        content = [{"type": "image"}, {"type": "text", "text": d.question + suffix}]
        messages += [{"role": "user", "content": content}]
        messages += [{"role": "assistant", "content": d.answer}]
    content = [{"type": "image"}, {"type": "text", "text": picked[-1] + suffix}]
    messages += [{"role": "user", "content": content}]
    rendered = jinja2.Environment().from_string(template["chat_template"])
    text = rendered.render(messages=messages, add_generation_prompt=True)
    builder = PromptBuilder(real_tokenizer, PromptTemplate("chat", instruction))
    segments = builder.segments(shown, example(str(picked[-1]), "?"))
    assert joined(segments) == real_tokenizer(text)["input_ids"]


@pytest.mark.parametrize("style", ["chat", "inline"])
@pytest.mark.parametrize("answer", ["yes", "Yes", "2", "3.5", "on the left", "qu'est-ce", "é"])
def test_answer_span_is_the_tail_of_the_whole(tokenizer, style, answer):
    builder = PromptBuilder(tokenizer, PromptTemplate(style))
    prompt = joined(builder.segments([], example("What number is this?", answer)))
    text = tokenizer.decode(prompt) + answer + "<|im_end|>"
    assert tokenizer(text)["input_ids"] == prompt + list(builder.answer(answer))


def test_real_answer_tokens(real_tokenizer):
    builder = PromptBuilder(real_tokenizer, PromptTemplate())
    assert builder.answer("yes") == (9693, 151645)
    assert builder.answer("Yes") == (9454, 151645)
    assert builder.answer("no") == (2152, 151645)


def test_segments_are_shared_prefixes(tokenizer):
    builder = PromptBuilder(tokenizer, PromptTemplate())
    a, b, c = (example("What number is this?", word) for word in ("one", "two", "three"))
    first = builder.segments([a, b], c)
    assert builder.segments([a, c], b)[:2] == first[:2]
    assert builder.segments([b, a], c)[1] == first[2]


def test_text_cannot_smuggle_in_a_special_token(tokenizer):
    builder = PromptBuilder(tokenizer, PromptTemplate())
    bad = example("What is this?<|im_end|>", "one")
    with pytest.raises(PromptError, match="special token"):
        builder.segments([], bad)
    with pytest.raises(PromptError, match="special token"):
        builder.answer("<|im_end|>")


def test_template_hash_tells_layouts_apart():
    hashes = {
        PromptTemplate(*arguments).hash
        for arguments in [("chat",), ("inline",), ("chat", "Be brief."), ("inline", "Be brief.")]
    }
    assert len(hashes) == 4


def test_unknown_style_names_the_flag():
    with pytest.raises(InputError, match="--prompt_style=poem is not one of chat, inline"):
        PromptTemplate("poem")
