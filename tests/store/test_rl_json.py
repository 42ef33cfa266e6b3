"""RL JSON: ours is lossless, others' is read strictly, and nothing appears by half."""

import json
import math
import tracemalloc

import numpy as np
import pytest

from lever_jax import rl_json_stream
from lever_jax.errors import InputError
from lever_jax.rl_json import export_rl_json, import_rl_json, read_rl_json, write_rl_json
from lever_jax.store import ScoreRecord, Store

FINGERPRINT = {"model": "tiny", "metric": "normalized"}
DESCRIPTIONS = {
    7: {"question": "Wie viele?", "gt_answers_raw": ["drei"] * 10, "gt_answers_norm": ["3"] * 10},
    3: {"question": "quel \U0001f600 ?", "gt_answers_raw": ["un"], "gt_answers_norm": ["un"]},
    5: {"question": "", "gt_answers_raw": [], "gt_answers_norm": []},
}


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "a.sqlite", FINGERPRINT) as store:
        yield store


def fill(store):
    """Three queries; scores of every kind, one proposal without a score, one query without any."""
    log_probs = np.array([-0.1, -np.inf], np.float32)
    more = {"gt_prob": 1 / 3, "answer_log_probs": log_probs, "margin": 2.5}
    done = {"prediction": "drei", "accuracy": 0.9, "accuracy_official": 0.6, "confidence": 0.25}
    records = [
        ScoreRecord(7, (30, 10), **more, **done, similarity=1.0, how="verified", certified="drei"),
        ScoreRecord(7, (10, 30), **more),
        ScoreRecord(7, (20,), **more, eval_failed="the worker hung"),
        ScoreRecord(3, (), gt_prob=float(np.float32(0.1)), prediction="", accuracy=0.0),
        ScoreRecord(3, (20, 10), eval_failed="image 20 cannot be decoded"),
    ]
    store.put_pools(np.array([7]), np.array([[10, 20, 30]]), np.array([[0.1, 0.2, 0.3]]))
    pool = np.array([[20, 10], [10, -1]])
    store.put_pools(np.array([3, 5]), pool, np.full((2, 2), np.nan))
    store.put_scores(records)
    pointers = np.array([[30, 10], [20, -1], [10, 30], [20, 30], [-1, -1], [20, 10], [10, -1]])
    sources = ["beam", "random", "sample(temp=1.0)", "policy", "beam", "retrieval", "beam"]
    log_probs = np.array([-1.1, np.nan, -2.2, -3.3, 0.0, np.nan, -4.4], np.float32)
    store.put_proposals("rce", [7, 7, 7, 7, 3, 3, 5], pointers, sources, log_probs)
    store.mark_kept("rce", [7, 7], pointers[[0, 2]], [True, False])
    return records


def content(store, stage="rce"):
    proposals = store.get_proposals(stage)
    pooled = [i for i in (3, 5, 7) if store.has_pools([i])[0]]
    return {
        "scores": list(store.iter_scores()),
        "queries": proposals.query_ids.tolist(),
        "pointers": proposals.pointers.tolist(),
        "sources": proposals.sources,
        "log_probs": proposals.log_probs.tobytes(),
        "kept": proposals.kept.tolist(),
        "pools": [array.tobytes() for i in pooled for array in store.get_pools([i])],
    }


def test_import_of_an_export_is_the_same_store(store, tmp_path):
    fill(store)
    path = tmp_path / "rl.json"
    totals = export_rl_json(store, path, stage="rce", describe=DESCRIPTIONS.get, meta={"by": "me"})
    assert totals == {"queries": 3, "candidates": 5, "unscored": 2}
    with Store.open(tmp_path / "b.sqlite", FINGERPRINT) as second:
        result = import_rl_json(second, path, stage="rce")
        assert (result.candidates, result.known) == (5, 0)
        assert result.meta["by"] == "me"
        assert result.descriptions == DESCRIPTIONS
        export_rl_json(
            second,
            tmp_path / "2.json",
            stage="rce",
            describe=result.descriptions.get,
            query_ids=list(result.descriptions),
            meta={"by": "me"},
        )
        assert (tmp_path / "2.json").read_bytes() == path.read_bytes()
        with Store.open(tmp_path / "c.sqlite", FINGERPRINT) as third:
            import_rl_json(third, tmp_path / "2.json", stage="rce")
            assert content(third) == content(second)
            assert list(third.iter_scores()) == list(store.iter_scores())
            assert third.verify() == []
        again = import_rl_json(second, path, stage="rce")  # Once more changes nothing.
        assert (again.candidates, again.known) == (5, 5)
        assert second.counts()["duplicate_scores"] == 0


def test_the_file_has_the_published_fields(store, tmp_path):
    fill(store)
    path = tmp_path / "rl.json"
    export_rl_json(store, path, stage="rce", describe=DESCRIPTIONS.get)
    data = json.loads(path.read_text())
    assert list(data) == ["_meta", "7", "3", "5"]
    assert data["_meta"]["fingerprint"] == FINGERPRINT
    assert data["7"]["query"] == {"query_id": 7, **DESCRIPTIONS[7]}
    assert data["7"]["candidate_pool_ids"] == [10, 20, 30]
    best, failed, unanswered = data["7"]["pointer_candidates"]
    assert best["pointer"] == [30, 10]
    assert best["pointer_pos"] == [2, 0]
    assert best["gen_method"] == "beam"
    assert best["logprob_score"] == pytest.approx(-1.1)
    assert best["vqa_pred_answer"] == "drei"
    assert (best["vqa_correct"], best["vqa_acc_score"]) == (1, 0.9)
    assert best["vqa_gt_prob"] == 1 / 3
    assert best["eval_failed"] is False
    assert best["answer_log_probs"] == [pytest.approx(-0.1), None]
    assert failed["eval_failed"] is True
    assert failed["vqa_acc_score"] is None
    assert failed["eval_failed_reason"] == "the worker hung"
    assert (unanswered["vqa_correct"], unanswered["vqa_acc_score"]) == (None, None)
    assert data["3"]["pointer_candidates"][0]["pointer"] == []
    assert data["3"]["pointer_candidates"][0]["vqa_correct"] == 0
    assert data["5"]["pointer_candidates"] == []
    assert sorted(p.name for p in tmp_path.glob("*.json*")) == ["rl.json"]


def test_the_memory_of_export_and_import_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_json_stream, "CHUNK", 1 << 14)
    peaks = []
    for count in (96, 384):
        with Store.open(tmp_path / f"{count}.sqlite", FINGERPRINT) as store:
            ids = np.arange(count)
            pools = np.tile(np.arange(8), (count, 1))
            store.put_pools(ids, pools, np.zeros((count, 8)))
            pointers = np.array([[i, j] for i in range(4) for j in range(4) if i != j])
            store.put_scores(
                ScoreRecord(int(i), tuple(p), gt_prob=0.5, prediction="x" * 50, accuracy=0.3)
                for i in ids
                for p in pointers.tolist()
            )
            every = np.tile(pointers, (count, 1))
            names, log_probs = ["beam"] * len(every), np.zeros(len(every))
            store.put_proposals("rce", np.repeat(ids, 12), every, names, log_probs)
            path = tmp_path / f"{count}.json"
            tracemalloc.start()
            export_rl_json(store, path, stage="rce", describe=lambda i: {"question": str(i)})
            sizes = [tracemalloc.get_traced_memory()[1]]
            tracemalloc.reset_peak()
            copied = write_rl_json(tmp_path / "copy.json", {}, read_rl_json(path)[1])
            sizes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert copied == count
        peaks.append(sizes)
    assert path.stat().st_size > 1.5e6
    # A query's id stays; its records would be some 10,000 bytes.
    for small, large in zip(*peaks, strict=True):
        assert (large - small) / (384 - 96) < 1500, peaks


def test_a_failed_export_leaves_the_old_file(store, tmp_path):
    fill(store)
    path = tmp_path / "rl.json"
    path.write_text("old")
    with pytest.raises(KeyError):
        export_rl_json(store, path, stage="rce", describe={7: DESCRIPTIONS[7]}.__getitem__)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.glob("rl*")) == ["rl.json"]


def test_a_failed_import_leaves_the_store_as_it_was(store, tmp_path):
    fill(store)
    path = tmp_path / "rl.json"
    export_rl_json(store, path, stage="rce", describe=DESCRIPTIONS.get)
    text = path.read_text()
    with Store.open(tmp_path / "b.sqlite", FINGERPRINT) as second:
        path.write_text(text.replace('"vqa_correct": 0', '"vqa_correct": 1'))
        with pytest.raises(InputError, match=r"query 3, candidate 0.*vqa_correct is 1"):
            import_rl_json(second, path)
        path.write_text(text[:-200])
        with pytest.raises(InputError, match=r"rl.json, character .* is not whole JSON"):
            import_rl_json(second, path)
        assert second.counts()["scores"] == second.counts()["pools"] == 0
        path.write_text(text.replace('"tiny"', '"big"'))
        with pytest.raises(InputError, match="model is 'big' in the file and 'tiny' now"):
            import_rl_json(second, path)
        for old, new, message in (
            ('"fingerprint"', '"finger"', "does not say which model"),
            ('"stage"', '"phase"', "_meta.stage does not say"),
            ('"format"', '"formats"', None),
            ('"version": 1', '"version": 2', "this code reads 'rl_json', version 1"),
            ('"kept": true', '"kept": true, "seen": 3', "query 7: a store has no place for seen"),
        ):
            assert old in text
            path.write_text(text.replace(old, new))
            if message is not None:
                with pytest.raises(InputError, match=message):
                    import_rl_json(second, path)
        data = json.loads(text)
        data["7"]["pointer_candidates"] += data["7"]["pointer_candidates"][:1]
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"query 7: pointer \(30, 10\) is there twice"):
            import_rl_json(second, path)
        assert second.counts()["scores"] == second.counts()["pools"] == 0
    path.write_text(text.replace("0.9", "0.3"))
    with pytest.raises(InputError, match=r"query 7, pointer \(30, 10\) has another score"):
        import_rl_json(store, path)


# --- files of others ----------------------------------------------------------------------------


def write(tmp_path, candidates, *, pool=(10, 20, 30), meta=None, key="4", **query):
    entry = {"query": query, "pointer_candidates": candidates}
    if pool is not None:
        entry["candidate_pool_ids"] = list(pool)
    path = tmp_path / "others.json"
    path.write_text(json.dumps({**({} if meta is None else {"_meta": meta}), key: entry}))
    return path


def read(path, pointers="auto"):
    return list(read_rl_json(path, pointers=pointers)[1])


def pointers_of(path, pointers="auto"):
    return [candidate.record.pointer for candidate in read(path, pointers)[0].candidates]


LABEL = {"vqa_correct": 1, "vqa_acc_score": 0.6}


def test_pointers_are_ids_or_positions_whichever_fits(tmp_path):
    def path(*pointers, pool=(10, 20, 30), **more):
        candidates = [{"pointer": list(pointer), **LABEL} for pointer in pointers]
        return write(tmp_path, candidates, pool=pool, **more)

    assert pointers_of(path((30, 10), (20,))) == [(30, 10), (20,)]
    assert pointers_of(path((2, 0), ())) == [(30, 10), ()]
    assert pointers_of(path((2, 0), pool=(0, 1, 2))) == [(2, 0)]  # Both readings agree.
    small = (2, 1, 0)
    with pytest.raises(InputError, match="query 4: the pointers fit both"):
        pointers_of(path((2, 0), pool=small))
    assert pointers_of(path((2, 0), pool=small), "global") == [(2, 0)]
    assert pointers_of(path((2, 0), pool=small), "local") == [(0, 2)]
    assert pointers_of(path((2, 0), pool=small, meta={"pointers": "local"})) == [(0, 2)]
    # One pointer that fits only one reading decides for its query.
    assert pointers_of(path((2, 0), (0, 5), pool=(2, 0, 5))) == [(2, 0), (0, 5)]
    with pytest.raises(InputError, match=r"as global: candidate 1: demonstration 1 .*as local: "):
        pointers_of(path((30, 10), (1, 2)))  # A mixture.
    with pytest.raises(InputError, match="_meta says that pointers are local, not global"):
        pointers_of(path((2, 0), meta={"pointers": "local"}), "global")


def test_pointers_without_a_pool(tmp_path):
    path = write(tmp_path, [{"pointer": [2, 0], **LABEL}], pool=None)
    with pytest.raises(InputError, match="query 4: there are no candidate_pool_ids"):
        pointers_of(path)
    with pytest.raises(InputError, match="no candidate_pool_ids"):
        pointers_of(path, "local")
    entry = read(path, "global")[0]
    assert entry.candidates[0].record.pointer == (2, 0)
    assert entry.pool is None
    with pytest.raises(InputError, match="pointers='neither' is not one of auto"):
        pointers_of(path, "neither")


def test_pointer_and_pointer_pos_must_agree(tmp_path):
    both = {"pointer": [30, 10], "pointer_pos": [2, 0], **LABEL}
    assert pointers_of(write(tmp_path, [both])) == [(30, 10)]
    assert pointers_of(write(tmp_path, [{"pointer_pos": [2], **LABEL}])) == [(30,)]
    same = {"pointer": [2, 0], "pointer_pos": [2, 0], **LABEL}
    assert pointers_of(write(tmp_path, [same])) == [(30, 10)]
    both["pointer_pos"] = [0, 2]
    with pytest.raises(InputError, match=r"query 4: .* is not at pointer_pos, where \(10, 30\) is"):
        pointers_of(write(tmp_path, [both]))
    with pytest.raises(InputError, match="position 3 is beyond the pool of 3"):
        pointers_of(write(tmp_path, [{"pointer_pos": [3], **LABEL}]))


def test_what_others_leave_out(tmp_path):
    path = write(
        tmp_path,
        [
            {"pointer": [30], "vqa_correct": 0, "vqa_acc_score": 0, "extra": [1]},
            {"pointer": [30], "vqa_correct": 0, "vqa_acc_score": 0, "gen_method": "again"},
            {"pointer": [10], "eval_failed": True, "vqa_acc_score": 0.0, "vqa_pred_answer": ""},
            {"pointer": [20], "vqa_gt_prob": 0.5, "eval_failed": False},
        ],
    )
    entry = read(path)[0]
    assert entry.description == {}
    first, again, failed, scored = [candidate.record for candidate in entry.candidates]
    assert (first.accuracy, first.gt_prob, first.prediction, first.how) == (0.0, None, None, None)
    assert again == first
    assert [c.source for c in entry.candidates[:2]] == ["imported", "again"]
    assert entry.candidates[0].extra == {"extra": [1]}
    assert math.isnan(entry.candidates[0].log_prob)
    assert failed.accuracy is None
    assert failed.prediction is None
    assert failed.eval_failed == "eval_failed in imported data"
    assert entry.candidates[2].extra == {"vqa_acc_score": 0.0, "vqa_pred_answer": ""}
    assert (scored.gt_prob, scored.answered) == (0.5, False)


def test_files_of_others_survive_reading_and_writing(tmp_path):
    source = {
        "_meta": {"by": "them", "pointers": "local"},
        "12": {
            "query": {"query_id": 12, "question": "What?", "gt_answers_raw": ["a"], "lang": "en"},
            "candidate_pool_ids": [70, 30, 50],
            "candidate_pool_similarity": [0.1, None, 1e-300],
            "pointer_candidates": [
                {"pointer": [2, 0], "vqa_correct": 1, "vqa_acc_score": 1 / 3, "rank": 1},
                {"pointer": [2, 0], "vqa_acc_score": 1 / 3, "gen_method": "sample"},
                {"pointer": [0], "eval_failed": True, "vqa_pred_answer": "", "vqa_correct": 0},
                {"pointer": [1], "eval_failed": "no image", "vqa_gt_prob": 0.25},
                {"pointer": [], "vqa_gt_prob": 0.7, "vqa_pred_answer": "nobody judged this"},
                {"pointer": [1, 2], "vqa_acc_score": 0, "beam_score": -3.5, "logprob_score": -0.1},
            ],
            "split": {"name": "val", "weights": [1, 2.5, "x", None, 10**30]},
        },
        "3": {"candidate_pool_ids": [1], "pointer_candidates": []},
    }
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(source))
    meta, entries = read_rl_json(path)
    entries = list(entries)
    for name in ("1.json", "2.json"):
        write_rl_json(tmp_path / name, {"pointers": "global"}, entries)
        entries = list(read_rl_json(tmp_path / name)[1])
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert meta == source["_meta"]
    written = json.loads((tmp_path / "2.json").read_text())
    assert list(written) == ["_meta", "12", "3"]
    pool = source["12"]["candidate_pool_ids"]
    for key in ("12", "3"):
        theirs, ours = source[key], written[key]
        assert theirs.get("query", {}).items() <= ours["query"].items()
        for name in theirs.keys() - {"query", "pointer_candidates"}:
            assert ours[name] == theirs[name], name
        for one, own in zip(theirs["pointer_candidates"], ours["pointer_candidates"], strict=True):
            assert own["pointer_pos"] == one["pointer"]
            assert own["pointer"] == [pool[action] for action in one["pointer"]]
            for name in one.keys() - {"pointer", "eval_failed"}:
                assert own[name] == one[name], name
            assert own["eval_failed"] == bool(one.get("eval_failed"))
    assert written["12"]["pointer_candidates"][3]["eval_failed_reason"] == "no image"


def test_random_files_survive_reading_and_writing(tmp_path):
    rng = np.random.default_rng()

    def number():
        return float(rng.choice([0.0, 1.0, rng.random(), rng.random() * 1e-20]))

    def candidate(pool):
        pointer = rng.permutation(len(pool))[: rng.integers(0, 4)].tolist()
        one = {"pointer": pointer}
        accuracy = number()
        if rng.random() < 0.2:
            one |= {"eval_failed": rng.choice([True, "why"]).item(), "vqa_pred_answer": "?"}
        else:
            one["vqa_acc_score"] = accuracy
            if rng.random() < 0.5:
                one["vqa_correct"] = int(accuracy > 0)
            if rng.random() < 0.5:
                one["vqa_gt_prob"] = number()
        for name in ("logprob_score", "beam_score", "mine", "confidence"):
            if rng.random() < 0.3:
                one[name] = -number() if name != "confidence" else number()
        return one

    source = {}
    for key in rng.permutation(1000)[:30]:
        pool = (rng.permutation(10**6)[:8] + 10).tolist()
        candidates = {tuple(c["pointer"]): c for c in (candidate(pool) for _ in range(6))}
        source[str(key)] = {
            "candidate_pool_ids": pool,
            "pointer_candidates": list(candidates.values()),
        }
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(source))
    entries = list(read_rl_json(path, pointers="local")[1])
    write_rl_json(tmp_path / "1.json", {}, entries)
    write_rl_json(tmp_path / "2.json", {}, read_rl_json(tmp_path / "1.json")[1])
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    written = json.loads((tmp_path / "2.json").read_text())
    for key, theirs in source.items():
        for one, own in zip(
            theirs["pointer_candidates"], written[key]["pointer_candidates"], strict=True
        ):
            assert own["pointer_pos"] == one.pop("pointer")
            failed = one.pop("eval_failed", False)
            assert own["eval_failed"] == (failed is not False)
            assert one.items() <= own.items()


def test_a_file_has_one_convention_for_its_pointers(tmp_path):
    def entry(pointer, pool):
        candidates = [{"pointer": pointer, **LABEL}]
        return {"candidate_pool_ids": pool, "pointer_candidates": candidates}

    path = tmp_path / "mixed.json"
    content = {"4": entry([30, 10], [10, 20, 30]), "5": entry([], [7]), "6": entry([0], [40])}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="query 6: its pointers can only be local, those of query"):
        read(path)
    with pytest.raises(InputError, match="query 4: as local: candidate 0: position 30 is beyond"):
        read(path, "local")
    content["6"] = entry([40], [40])
    path.write_text(json.dumps(content))
    assert len(read(path)) == 3


def test_beams_need_no_label(tmp_path):
    beams = [{"pointer": [30, 10], "logprob_score": -0.5}, {"pointer": [20], "beam_score": 3}]
    path = write(tmp_path, beams)
    with pytest.raises(InputError, match=r"query 4, candidate 0.*read the file as beams"):
        read(path)
    first, second = next(read_rl_json(path, unlabelled=True)[1]).candidates
    assert (first.labelled, first.log_prob, first.beam_score) == (False, -0.5, None)
    assert (second.labelled, second.beam_score) == (False, 3.0)
    failed = write(tmp_path, [{"pointer": [30], "eval_failed": True}])
    assert read(failed)[0].candidates[0].labelled


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"pointer": [30]}, "has no vqa_acc_score and no vqa_gt_prob"),
        ({**LABEL}, "neither pointer nor pointer_pos"),
        ({"pointer": [30], "vqa_correct": 1}, "vqa_correct without vqa_acc_score"),
        ({"pointer": [30], "vqa_acc_score": 60.0}, "must be from 0 to 1"),
        ({"pointer": [30], "vqa_acc_score": "0.6"}, "not a finite number"),
        ({"pointer": [30], "vqa_acc_score": True}, "not a finite number"),
        ({"pointer": [30], "vqa_acc_score": 10**400}, "not a finite number"),
        ({"pointer": [30], "vqa_gt_prob": -0.5}, "must be >= 0"),
        ({"pointer": [30], "vqa_correct": 0.6, "vqa_acc_score": 0.6}, "it must be 0 or 1"),
        ({"pointer": [30], "eval_failed": True, **LABEL}, "eval_failed and an accuracy"),
        ({"pointer": [30, 30], **LABEL}, "contains a number twice"),
        ({"pointer": [40], **LABEL}, "demonstration 40 is not in candidate_pool_ids"),
        ({"pointer": ["30"], **LABEL}, "whole numbers"),
        ({"pointer": [-1], **LABEL}, "whole numbers"),
        ({"pointer": [True], **LABEL}, "whole numbers"),
        ({"pointer": 30, **LABEL}, "is not a list"),
        ({"pointer": [30], **LABEL, "how": "asked"}, "how is 'asked'"),
        ({"pointer": [30], **LABEL, "vqa_pred_answer": "\ud800"}, "not valid Unicode"),
        ({"pointer": [30], **LABEL, "eval_failed": 2}, "eval_failed is 2; it must be"),
        ({"pointer": [30], "eval_failed": ["x"]}, "eval_failed is .*; it must be"),
        ({"pointer": [30], **LABEL, "eval_failed_reason": "x"}, "reason without eval_failed"),
        ({"pointer": [30], **LABEL, "beam_score": "x"}, "not a finite number"),
        ({"pointer": [10], "vqa_acc_score": 0.3}, "the same pointer has another score"),
        ([30], "a pointer candidate is not an object"),
    ],
)
def test_every_doubt_is_an_error_that_names_the_query(tmp_path, candidate, message):
    path = write(tmp_path, [{"pointer": [10], **LABEL}, candidate])
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "others.json, query 4" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 0, after the beginning: the file ends too early"),
        ("[]", "expected {, found '\\['"),
        ('{"4": {}}', "query 4: has no pointer_candidates"),
        ('{"four": {"pointer_candidates": []}}', "the key is not a query id"),
        ('{"4": {"query": {"query_id": 5}}}', "query.query_id is 5"),
        ('{"4": {"pointer_candidates": []}, "4": {}}', "key '4' is there twice"),
        ('{"4": {"pointer_candidates": []}, "04": {}}', "query id 4 is there twice"),
        ('{"4": {"query": {}, "query": {}}}', "entry '4' has the field 'query' twice"),
        ('{"4": {"pointer_candidates": [NaN]}}', "entry '4' contains NaN"),
        ('{"4": {"pointer_candidates": []}, "_meta": {}}', "_meta stands after a query"),
        ('{"4": {"pointer_candidates": []}} {', "text after the end"),
        ('{"4": {"pointer_candidates": []}', "the file ends too early"),
        ('{"4": {"pointer_candidates": [', "not whole JSON"),
        ('{"4": {"pointer_candidates": [' + "[" * 10**5, "nested too deeply"),
        ('{"4": {"x": ' + "9" * 5000 + "}}", "impossible number"),
        ('{"4" 5}', "expected :, found '5'"),
        ('{"4": {"x": [1e999]}}', "contains 1e999, beyond any float"),
        ('{"_meta": {"format": "beams"}}', "_meta says format 'beams'"),
        ('{"4": 5}', "the entry is not an object"),
        ('{"_meta": {"pointers": "both"}}', "_meta.pointers='both'"),
        ('{"4": {"candidate_pool_ids": [1, 1]}}', "contains a number twice"),
    ],
)
def test_broken_files_are_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "broken.json" in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none.json"):
        read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b'{"\xff')
    with pytest.raises(InputError, match="is not UTF-8"):
        read(tmp_path / "binary.json")


def test_reading_does_not_depend_on_the_chunks(store, tmp_path, monkeypatch):
    fill(store)
    path = tmp_path / "rl.json"
    export_rl_json(store, path, stage="rce", describe=DESCRIPTIONS.get)
    meta, entries = read_rl_json(path)
    entries = list(entries)
    for chunk in (1, 2, 3, 17, 64):
        monkeypatch.setattr(rl_json_stream, "CHUNK", chunk)
        assert read_rl_json(path)[0] == meta
        found = read(path)
        assert len(found) == len(entries)
        assert [e.candidates[0].record for e in found[:2]] == [
            e.candidates[0].record for e in entries[:2]
        ]
    assert write_rl_json(tmp_path / "copy.json", meta, entries) == 3
    assert (tmp_path / "copy.json").read_bytes() == path.read_bytes()
    monkeypatch.setattr(rl_json_stream, "MAX_ENTRY", 100)
    with pytest.raises(InputError, match="longer than 100 characters"):
        read(path)
