"""The cost model, against counted operations, real networks and the figures of the design."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qwen_bridge import cost
from qwen_bridge.errors import InputError
from qwen_bridge.hub import TINY_QWEN
from qwen_bridge.memory import worker_memory
from qwen_bridge.shape import PUBLISHED, ModelShape
from qwen_bridge.vision import batch_equal_windows

THREE, SEVEN = PUBLISHED.values()


def small_config(**changes):
    """Shapes of all kinds differ, so that no two terms can stand for each other."""
    text = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 208,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_heads": 3,
        "out_hidden_size": 96,
        "fullatt_block_indexes": [1, 3],
        "window_size": 112,
    }
    return Qwen2_5_VLConfig(
        text_config={**text, **changes}, vision_config=vision, tie_word_embeddings=False
    )


@pytest.fixture(scope="module")
def network():
    model = Qwen2_5_VLForConditionalGeneration(small_config()).eval()
    shape = ModelShape.from_config(json.loads(model.config.to_json_string()))
    return model, shape


def counted(work):
    """FLOPs that torch counts; attention as two matrix products, the only ones it sees on a CPU."""
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_shapes_of_the_published_configs(shared):
    for name, shape in zip(("3b", "7b"), (THREE, SEVEN)):
        path = shared / "qwen2_5_vl" / f"config_{name}.json"
        assert ModelShape.from_config(json.loads(path.read_text())) == shape
        config = Qwen2_5_VLConfig.from_dict(json.loads(path.read_text()))
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(config)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert shape.vision.parameters == sum(p.numel() for p in model.model.visual.parameters())


def test_published_sizes():
    # As the model pages state: 3.75 and 8.29 billion, 36 KiB and 56 KiB of keys a token in bf16.
    assert (THREE.parameters, SEVEN.parameters) == (3_754_622_976, 8_292_166_656)
    assert (2 * THREE.kv_values, 2 * SEVEN.kv_values) == (36 * 1024, 56 * 1024)


def test_parameters_of_saved_configs(network):
    model, shape = network
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    embedded = ModelShape.from_folder(TINY_QWEN)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_QWEN)
    assert embedded.parameters == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "not of a qwen2_5_vl model"),
        ("[", "is not JSON"),
        ('{"model_type": "qwen2_5_vl"}', "needs the field 'vision_config'"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words):
        ModelShape.from_folder(tmp_path)


def test_no_config_at_all(tmp_path):
    with pytest.raises(InputError, match="no configuration"):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (12, 20), (26, 36)])
def test_vision_flops_are_those_counted(network, grid):
    model, shape = network
    visual = model.model.visual
    pixels = torch.randn(grid[0] * grid[1], shape.vision.patch_values)
    work = lambda: visual(pixels, grid_thw=torch.tensor([[1, *grid]]))  # noqa: E731
    expected = cost.vision_flops(shape.vision, grid)
    assert counted(work) == pytest.approx(expected, rel=1e-6)


def test_windows_as_batches_cost_the_same():
    model = Qwen2_5_VLForConditionalGeneration(small_config()).eval()
    shape = ModelShape.from_config(json.loads(model.config.to_json_string()))
    batch_equal_windows(model.model.visual)
    pixels = torch.randn(12 * 20, shape.vision.patch_values)
    work = lambda: model.model.visual(pixels, grid_thw=torch.tensor([[1, 12, 20]]))  # noqa: E731
    assert counted(work) == pytest.approx(cost.vision_flops(shape.vision, (12, 20)), rel=1e-6)


@pytest.mark.parametrize(("prefix", "own"), [(0, 17), (40, 9)])
def test_language_flops_are_those_counted(network, prefix, own):
    model, shape = network
    language = model.model.language_model
    layers = model.config.text_config.num_hidden_layers
    past = DynamicCache([(torch.randn(1, 2, prefix, 16),) * 2 for _ in range(layers)])
    mask = torch.ones(1, 1, own, prefix + own, dtype=torch.bool)

    def work():
        hidden = language(
            inputs_embeds=torch.randn(1, own, 96),
            position_ids=torch.arange(own).expand(3, 1, -1),
            attention_mask={"full_attention": mask},
            past_key_values=past if prefix else None,
        ).last_hidden_state
        model.lm_head(hidden[:, :5])

    expected = cost.language_flops(shape, own, prefix + own) + cost.head_flops(shape, 5)
    # Rotations are matrix products as well: some thousandths at this width.
    assert counted(work) == pytest.approx(expected, rel=5e-3)


def test_ratios_of_the_design():
    # 3B, images of 336 x 336 (144 tokens), 64 candidates x 2 shots x 4 answers of two tokens (a
    # word and the end). The features of 65 images are computed once, but for the naive loop.
    lengths = cost.PromptLengths(image=144, forms=4, branch_tokens=4, branch_rows=8)
    size = {"candidates": 64, "shots": 2, "images": 65}
    flops = cost.rung_flops(THREE, lengths, (24, 24), **size)
    ratio = {name: flops["naive"] / value for name, value in flops.items()}
    assert tuple(flops) == cost.RUNGS
    assert ratio["naive_batched"] == 1
    assert ratio["vision_cache"] == pytest.approx(1.6, rel=0.1)
    assert ratio["branches"] == pytest.approx(6, rel=0.1)
    assert 6.5 <= ratio["trie_cold"] <= 8.5
    assert ratio["trie_warm"] == pytest.approx(20, rel=0.2)


def test_prefix_nodes_against_pointers_drawn():
    rng = np.random.default_rng()
    pool, shots, candidates = 9, 3, 40
    every = np.array(list(itertools.permutations(range(pool), shots)))
    counts = []
    for _ in range(400):
        drawn = every[rng.choice(len(every), candidates, replace=False)]
        counts.append([len({tuple(p[:depth]) for p in drawn}) for depth in (1, 2, 3)])
    expected = cost.trie_nodes(candidates, shots, pool)
    assert np.mean(counts, 0) == pytest.approx(expected, rel=0.02)


def test_prefix_nodes_at_the_edges():
    assert cost.trie_nodes(10, 0, 5) == []
    assert cost.trie_nodes(1, 2, 5) == pytest.approx([1, 1])
    assert cost.trie_nodes(0.5, 2, 5) == pytest.approx([0.5, 0.5])
    assert cost.trie_nodes(3, 1, 3) == cost.trie_nodes(99, 1, 3) == pytest.approx([3])
    assert cost.trie_nodes(0, 3, 2) == [0, 0, 0]
    assert cost.trie_nodes(30, 2, 6) == pytest.approx([6, 30])


def test_the_parts_add_up():
    lengths = cost.PromptLengths(image=100)
    size = {"candidates": 1, "shots": 1}
    one = cost.rung_flops(THREE, lengths, (20, 20), **size)
    # One candidate shares nothing: its prefix is paid once and the last forward once.
    parts = [cost.prefix_flops(THREE, lengths, depth) for depth in (0, 1)]
    parts.append(cost.last_flops(THREE, lengths, 1))
    assert one["trie_cold"] == pytest.approx(sum(parts))
    # Generating two tokens is less than twice a prefill and more than one.
    prefill = cost.language_flops(THREE, lengths.query, lengths.prefix(1) + lengths.query)
    assert prefill < cost.decode_flops(THREE, lengths, 1) < 2 * prefill


def test_lengths_are_those_of_real_questions(shared):
    import shutil
    import tempfile

    from transformers import AutoTokenizer

    from qwen_bridge.prompts import PromptBuilder, PromptTemplate
    from qwen_bridge.targets import answer_branches
    from qwen_bridge.vqa.images import ImageFolders
    from qwen_bridge.vqa.official import DEFAULT_IMAGE_PATTERN, read_split

    with tempfile.TemporaryDirectory() as folder:
        for file in (shared / "qwen2_5_vl").iterdir():
            if not file.name.startswith("config_"):
                shutil.copy(file, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    builder = PromptBuilder(tokenizer, PromptTemplate())
    mini = shared / "vqav2_mini"
    files = [mini / "bank_questions.json", mini / "bank_annotations.json"]
    examples = read_split("bank", *files, DEFAULT_IMAGE_PATTERN, ImageFolders({"bank": mini}))
    branches = [answer_branches(e.answers, builder, "count3") for e in examples]
    segments = [[len(s.ids) for s in builder.segments([e], e)] for e in examples]
    lengths = cost.PromptLengths(image=1)
    system, demonstration, query = np.mean(segments, 0)
    measured = {
        "system": system,
        "demonstration": demonstration,
        "query": query,
        "branch_tokens": np.mean([sum(len(f) - 1 for f in b.forms) for b in branches]),
        "branch_rows": np.mean([sum(map(len, b.forms)) for b in branches]),
        "forms": np.mean([len(b.forms) for b in branches]),
    }
    for name, value in measured.items():
        assert getattr(lengths, name) == pytest.approx(value, rel=0.15), name


def test_memory_of_a_worker():
    lengths = cost.PromptLengths(image=234)
    size = {"shots": 2, "batch_tokens": 16_384, "cache_bytes": 8 << 30, "feature_bytes": 2 << 30}
    parts = worker_memory(THREE, lengths, **size, value_bytes=2)
    assert parts["weights"] == 2 * 3_754_622_976
    assert parts["prefix_cache"] == 8 << 30
    # More tokens a batch, more shots and wider numbers take more; the weights do not grow.
    for change in ({"batch_tokens": 32_768}, {"shots": 8}):
        larger = worker_memory(THREE, lengths, **{**size, **change}, value_bytes=2)
        assert larger["forward"] > parts["forward"]
        assert larger["weights"] == parts["weights"]
    assert worker_memory(THREE, lengths, **size, value_bytes=4)["weights"] == 2 * parts["weights"]


def test_the_fast_scorer_does_what_the_model_says(make_scorer):
    """Cold and warm, one query and all ordered pairs of six demonstrations; padding included."""
    scorer = make_scorer(batch_tokens=1 << 14)
    query = scorer.dataset.train[0].id
    pool = [example.id for example in scorer.dataset.bank[:6]]
    pointers = np.array(list(itertools.permutations(pool, 2)))
    requests, _ = scorer._requests(np.full(len(pointers), query), pointers)
    requests = list(requests.values())
    forms = requests[0].branches.forms
    system, shown, asked = (
        np.mean([len(request.segments[i]) for request in requests]) for i in (0, 1, -1)
    )
    lengths = cost.PromptLengths(
        image=1,
        system=system,
        layout=0,
        question=asked - 1,
        answer=shown - asked - 2,
        branch_tokens=sum(len(form) - 1 for form in forms),
        branch_rows=sum(map(len, forms)),
        forms=len(forms),
    )
    assert (lengths.query, lengths.demonstration) == pytest.approx((asked, shown))
    expected = cost.rung_flops(
        ModelShape.from_folder(TINY_QWEN),
        lengths,
        (2, 2),
        candidates=len(pointers),
        shots=2,
        nodes=cost.trie_nodes(len(pointers), 2, len(pool)),
    )
    for rung in ("trie_cold", "trie_warm"):
        measured = counted(lambda: scorer._score_branches(requests))
        assert measured == pytest.approx(expected[rung], rel=0.05), rung
