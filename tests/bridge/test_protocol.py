"""Messages and arrays survive the wire; whatever else arrives is refused by name."""

import dataclasses
import random

import msgpack
import numpy as np
import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.messages import (
    NO_JOB,
    Failure,
    Hello,
    MessageTooLarge,
    Request,
    Result,
    Settings,
    Shutdown,
    decode,
    encode,
    failure_of,
)
from qwen_bridge.protocol import (
    ALIGNMENT,
    JUDGED,
    MAX_FRAME_BYTES,
    MAX_ROWS,
    VERBS,
    AnswerBatch,
    EmbedBatch,
    ProtocolError,
    ScoreBatch,
    check_answer,
    check_embed,
    check_ids,
    check_prompts,
    check_score,
    failed_answer,
    failed_score,
    join_result,
    offsets,
    read_arrays,
    request_arrays,
    result_arrays,
    rows_that_fit,
    split_result,
    write_arrays,
)

MESSAGES = [
    Settings("qwen_bridge.workers:build", {"a": [1, {"b": None}], "ü": 0.5}, 4, 1 << 16),
    Hello({"embedding_dim": 6, "parts": {"image": [0, 6]}, "model": "sha"}),
    Request("embed", 0, 0, 3, 0, "bank"),
    Request("score", 2**40, 3, 64, 2, ""),
    Result(7, 1, 2, 4, 0.25, ["drei", ""], [[1, "no image"]], ["memory is short"]),
    Failure(NO_JOB, "KeyError", "'x'", False, "Traceback"),
    Shutdown(),
]


def score_batch(rows=3, columns=2, **changes):
    batch = ScoreBatch(
        gt_prob=np.linspace(0.1, 0.9, rows),
        answer_log_probs=np.full((rows, columns), -1.5, np.float32),
        certified=np.arange(rows) % (columns + 1) - 1,
        margin=np.ones(rows, np.float32),
        **{name: np.full(rows, 0.5, np.float32) for name in JUDGED},
        texts=["x"] * rows,
    )
    return dataclasses.replace(batch, **changes)


def answer_batch(rows=3, **changes):
    value = np.linspace(0, 1, rows, dtype=np.float32)
    return dataclasses.replace(AnswerBatch(["x"] * rows, value, value, value, -value), **changes)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.tag)
def test_message_round_trip(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"verb": "train"}, "verb"),
        ({"verb": 3}, "verb"),
        ({"rows": 0}, "rows"),
        ({"rows": MAX_ROWS + 1}, "rows"),
        ({"rows": True}, "rows"),
        ({"rows": 3.0}, "rows"),
        ({"slot": -1}, "slot"),
        ({"slot": 10**9}, "slot"),
        ({"job": -1}, "job"),
        ({"shots": 0}, "shots"),
        ({"shots": 10**6}, "shots"),
        ({"kind": "bank"}, "kind"),
        ({"extra": 1}, "extra"),
        ({"tag": "rquest"}, "rquest"),
        ({"tag": ["request"]}, "request"),
    ],
)
def test_malformed_request_is_named(change, names):
    fields = msgpack.unpackb(encode(Request("score", 1, 0, 3, 2, "")))
    with pytest.raises(ProtocolError, match=names):
        decode(msgpack.packb(fields | change))


def test_missing_field_is_named():
    fields = msgpack.unpackb(encode(Request("score", 1, 0, 3, 2, "")))
    del fields["shots"]
    with pytest.raises(ProtocolError, match=r"'shots' is missing"):
        decode(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
        ({"texts": ["a", 1]}, "texts"),
        ({"reasons": [[1]]}, "reasons"),
        ({"reasons": [["1", "x"]]}, "reasons"),
        ({"reasons": {"1": "x"}}, "reasons"),
    ],
)
def test_malformed_result_is_named(change, names):
    fields = msgpack.unpackb(encode(Result(7, 1, 2, 4, 0.25, ["a", "b"], [], [])))
    with pytest.raises(ProtocolError, match=names):
        decode(msgpack.packb(fields | change))


@pytest.mark.parametrize(
    "hello",
    [
        {},
        {"embedding_dim": 0, "parts": {}},
        {"embedding_dim": "6", "parts": {}},
        {"embedding_dim": 6},
        {"embedding_dim": 6, "parts": {"image": [0, 7]}},
        {"embedding_dim": 6, "parts": {"image": [3, 2]}},
        {"embedding_dim": 6, "parts": {"image": 6}},
    ],
)
def test_malformed_hello(hello):
    with pytest.raises(ProtocolError, match="hello"):
        Hello(hello)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x90",
        b"\x05",
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa3tag\xa7request\x00",
        b"\x91" * 5000 + b"\x90",
        msgpack.packb({"tag": "shutdown", "x": b"bytes"}),
        msgpack.packb(msgpack.Timestamp(1, 2)),
        msgpack.packb({1: 2}),
        b"\x81\xa3tag\xa2\xff\xff",
    ],
)
def test_other_bytes_are_refused(body):
    with pytest.raises(ProtocolError):
        decode(body)


def test_a_message_that_is_too_long_is_refused_however_good_it_is():
    fields = {"job": 0, "type": "x", "message": "", "retryable": False, "detail": ""}
    room = MAX_FRAME_BYTES - len(
        msgpack.packb({"tag": "failure", **fields, "message": "y" * 2**16})
    )
    for more in (0, 1):
        fields["message"] = "y" * (2**16 + room + more)
        body = msgpack.packb({"tag": "failure", **fields})
        assert len(body) == MAX_FRAME_BYTES + more
        if not more:
            assert decode(body).message == fields["message"]
    with pytest.raises(ProtocolError, match=f"{MAX_FRAME_BYTES + 1} bytes; the limit is"):
        decode(body)


def test_deep_nesting_is_refused():
    deep = {}
    for _ in range(20):
        deep = {"deeper": deep}
    with pytest.raises(ProtocolError, match="nested deeper"):
        decode(encode(Settings("a:b", deep, 1, 4096)))


def test_what_cannot_be_sent():
    with pytest.raises(ProtocolError, match="settings cannot be sent"):
        encode(Settings("a:b", {"x": object()}, 1, 4096))
    with pytest.raises(MessageTooLarge):
        encode(Failure(0, "x", "y" * MAX_FRAME_BYTES, False, ""))


@pytest.mark.parametrize("seed", range(20))
def test_mutated_messages_never_do_anything_else(seed):
    """Bit flips, cuts and insertions: a message, or a ProtocolError."""
    rng = random.Random(seed)
    for _ in range(50):
        body = bytearray(encode(rng.choice(MESSAGES)))
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(len(body) + 1)
            kind = rng.randrange(3)
            if kind == 0 and where < len(body):
                body[where] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del body[where : where + rng.randint(1, 8)]
            else:
                body[where:where] = rng.randbytes(rng.randint(1, 8))
        try:
            message = decode(bytes(body))
        except ProtocolError:
            continue
        assert decode(encode(message)) == message


def test_failure_keeps_input_errors_and_knows_what_may_pass():
    class ImageError(InputError):
        pass

    class OutOfMemoryError(RuntimeError):
        pass

    assert failure_of(ImageError("line"), 3) == Failure(3, "InputError", "line", False, "")
    assert failure_of(OutOfMemoryError(), 3).retryable
    assert failure_of(MemoryError(), 3).retryable
    assert not failure_of(ValueError("no"), 3).retryable


@pytest.mark.parametrize("verb", VERBS)
def test_arrays_are_aligned_and_survive(verb):
    rng = np.random.default_rng(0)
    for specs in (request_arrays(verb, 5, 3), result_arrays(verb, 5, 3)):
        view = memoryview(bytearray(4096))
        assert all(start % ALIGNMENT == 0 for start in offsets(specs, 4096))
        arrays = {s.name: rng.integers(-9, 9, s.shape).astype(s.dtype) for s in specs}
        write_arrays(view, specs, arrays)
        copies = read_arrays(view, specs)
        view[:] = bytes(4096)
        for spec in specs:
            np.testing.assert_array_equal(copies[spec.name], arrays[spec.name])
            assert copies[spec.name].dtype.str == spec.dtype


def test_layout_by_hand():
    specs = request_arrays("score", 9, 2)  # 72 bytes of queries, 144 of pointers
    assert offsets(specs, 272) == [0, 128]
    with pytest.raises(ProtocolError, match=r"pointers of shape \(9, 2\) ends at byte 272"):
        offsets(specs, 271)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("capacity", [4096, 5000, 1 << 20])
def test_rows_that_fit_do_fit(verb, capacity):
    rows = rows_that_fit(verb, 4, 96, capacity)
    assert rows > 0
    for specs in (request_arrays(verb, rows, 4), result_arrays(verb, rows, 96)):
        assert len(offsets(specs, capacity)) == len(specs)
    assert rows_that_fit("embed", 0, 1 << 16, 4096) == 0


def test_write_refuses_another_shape():
    with pytest.raises(ProtocolError, match="ids has shape"):
        write_arrays(memoryview(bytearray(4096)), request_arrays("embed", 3, 0), {"ids": [1, 2]})


def test_prompts_are_normalised():
    queries, pointers = check_prompts(np.array([1, 2], np.int32), [[4, -1], [5, 6]])
    assert queries.dtype == pointers.dtype == np.int64
    assert check_prompts([1, 2], np.zeros((2, 0)))[1].tolist() == [[-1], [-1]]


@pytest.mark.parametrize(
    ("queries", "pointers", "names"),
    [
        ([1, -2], [[1], [1]], "queries"),
        ([1.0], [[1]], "queries"),
        ([[1]], [[1]], "queries"),
        ([1], [1], "pointers"),
        ([1], [[1], [2]], "2 pointers for 1"),
        ([1], [[-1, 3]], r"row 0 is \[-1, 3\]"),
        ([1], [[3, -2]], "-2"),
        ([1], [[1.5]], "pointers"),
        ([1], [list(range(65))], "65 shots"),
        ([2**64 - 1], [[1]], "queries"),
    ],
)
def test_malformed_prompts_are_named(queries, pointers, names):
    with pytest.raises(ProtocolError, match=names):
        check_prompts(queries, pointers)


def test_ids_and_embeddings():
    assert check_ids([3]).tolist() == [3]
    rows = np.array([[1.0, 2.0], [0.0, 0.0]])
    checked = check_embed(EmbedBatch(rows, {np.int64(1): "no such image"}), 2, 2)
    assert (checked.embeddings.dtype, checked.reasons) == (np.float32, {1: "no such image"})
    np.testing.assert_array_equal(checked.embeddings, rows)
    for wrong, words in [
        (EmbedBatch(np.array([[1.0, np.inf]])), "finite"),
        (EmbedBatch(np.array([[1.0, np.nan]]), {0: "a reason does not excuse it"}), "finite"),
        (EmbedBatch(np.ones((1, 3))), r"float of shape \(1, 2\)"),
        (EmbedBatch(np.ones((1, 2)), {1: "x"}), "reasons names row 1 of 1"),
        (EmbedBatch(np.ones((1, 2)), {0: ""}), "must say why"),
        (np.ones((1, 2)), "embed returned ndarray"),
    ]:
        with pytest.raises(ProtocolError, match=words):
            check_embed(wrong, 1, 2)


def test_an_embed_batch_survives_the_wire():
    batch = EmbedBatch(np.array([[1.0, 2.0], [0.0, 3.0]], np.float32), {1: "broken"})
    columns, arrays, texts, reasons = split_result("embed", batch)
    assert (columns, texts) == (2, [])
    back = join_result("embed", arrays, texts, reasons)
    np.testing.assert_array_equal(back.embeddings, batch.embeddings)
    assert (back.reasons, len(back)) == ({1: "broken"}, 2)


def test_good_batches_are_cast_and_kept():
    batch = check_score(score_batch(), 3)
    assert (batch.gt_prob.dtype, batch.certified.dtype) == (np.float32, np.int16)
    assert len(batch) == 3
    assert len(check_answer(answer_batch(), 3)) == 3


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"gt_prob": np.array([0.1, np.nan, 0.2])}, r"gt_prob\[1\] is nan"),
        ({"gt_prob": np.array([0.1, 0.3, -0.2])}, r"gt_prob\[2\]"),
        ({"gt_prob": np.array([0.1, 1e300, 0.2])}, r"gt_prob\[1\] is inf"),
        ({"gt_prob": np.zeros((3, 1))}, "gt_prob"),
        ({"gt_prob": np.zeros(3, np.int64)}, "gt_prob"),
        ({"gt_prob": None}, "gt_prob"),
        ({"answer_log_probs": np.full((3, 2), np.nan)}, "answer_log_probs"),
        ({"answer_log_probs": np.full((3, 2), 0.5)}, "answer_log_probs"),
        ({"answer_log_probs": np.zeros((2, 2))}, "answer_log_probs"),
        ({"answer_log_probs": np.zeros((3, 300))}, "300 columns"),
        ({"certified": np.array([0, 1, 2])}, r"certified\[2\] is 2"),
        ({"certified": np.array([0, 1])}, "certified"),
        ({"margin": np.full(3, np.nan)}, r"margin\[1\]"),
        ({"accuracy": np.full(3, np.nan)}, r"accuracy\[1\]"),
        ({"confidence": np.full(3, 1.5)}, r"confidence\[1\]"),
        ({"texts": ["a", "b"]}, "texts"),
        ({"texts": "abc"}, "texts"),
        ({"texts": ["a", "b", 3]}, r"texts\[2\]"),
        ({"reasons": {3: "x"}}, "row 3 of 3"),
        ({"reasons": {0: ""}}, r"reasons\[0\]"),
        ({"reasons": [(0, "x")]}, "reasons"),
    ],
)
def test_nonsense_scores_are_named(change, names):
    with pytest.raises(ProtocolError, match=names):
        check_score(score_batch(**change), 3)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"accuracy": np.array([0, np.nan, 1])}, "accuracy"),
        ({"accuracy_official": np.array([0, 1.5, 1])}, "accuracy_official"),
        ({"confidence": np.array([0, -0.5, 1])}, "confidence"),
        ({"similarity": np.array([0, -1.5, 1])}, "similarity"),
        ({"texts": [None] * 3}, "texts"),
    ],
)
def test_nonsense_answers_are_named(change, names):
    with pytest.raises(ProtocolError, match=names):
        check_answer(answer_batch(**change), 3)


def test_another_type_or_size_is_nonsense():
    for check in (check_score, check_answer):
        with pytest.raises(ProtocolError, match="dict"):
            check({}, 3)
    with pytest.raises(ProtocolError, match="shape"):
        check_score(score_batch(4), 3)


def test_a_row_with_a_reason_carries_no_number():
    batch = check_score(score_batch(reasons={1: "no image"}), 3)
    assert np.isnan(batch.gt_prob).tolist() == [False, True, False]
    assert np.isneginf(batch.answer_log_probs[1]).all()
    assert (batch.certified[1], batch.texts[1]) == (-1, "")
    batch = check_answer(answer_batch(reasons={np.int64(2): "no image"}), 3)
    assert np.isnan(batch.accuracy).tolist() == [False, False, True]
    assert batch.reasons == {2: "no image"}


def test_failed_batches_are_valid():
    assert check_score(failed_score(2, "why"), 2).reasons == {0: "why", 1: "why"}
    assert check_answer(failed_answer(2, "why"), 2).reasons == {0: "why", 1: "why"}


@pytest.mark.parametrize(
    ("verb", "batch"), [("score", score_batch(reasons={0: "x"})), ("answer", answer_batch())]
)
def test_split_and_join_are_inverse(verb, batch):
    batch = (check_score if verb == "score" else check_answer)(batch, 3)
    columns, arrays, texts, reasons = split_result(verb, batch)
    assert columns == (2 if verb == "score" else 0)
    again = join_result(verb, arrays, texts, reasons)
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(batch, field.name))
