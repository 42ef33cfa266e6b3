"""RL JSON: mined data as one JSON file that other people's tools read and write.

A file maps each query id to the query's text, its candidate pool and the pointers that were
scored, after one `_meta` object:

    {"_meta": {...}, QUERY_ID: {
        "query": {"query_id", "question", "gt_answers_raw", "gt_answers_norm"},
        "candidate_pool_ids": [...],
        "pointer_candidates": [{"pointer" (demonstration ids), "pointer_pos" (positions in the
            pool), "gen_method", "logprob_score", "vqa_pred_answer", "vqa_correct",
            "vqa_acc_score", "vqa_gt_prob", "eval_failed"}]}}

Ours carries every field of the store besides, so that import, export and import again give the
same store. Files of others may leave out what they do not have, but what could be read in two
ways is refused: a label on the wrong demonstrations is worse than none. Fields that we do not
know pass through from file to file; a store has no place for them and refuses them.

The selector never sees text, so the texts of the queries pass through: `import_rl_json` returns
them and `export_rl_json` asks the caller for them.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lever_jax import store_schema as schema
from lever_jax.errors import InputError
from lever_jax.rl_json_fields import (
    Candidate,
    FileReading,
    QueryEntry,
    entry_to_json,
    json_to_entry,
)
from lever_jax.rl_json_stream import read_entries
from lever_jax.store import Store

__all__ = [
    "Candidate",
    "Imported",
    "QueryEntry",
    "export_rl_json",
    "import_rl_json",
    "read_rl_json",
    "write_rl_json",
]

POINTERS = ("auto", "global", "local")
FORMAT = "rl_json"
_BATCH = 64  # Queries in memory at a time.


@dataclass(slots=True)
class Imported:
    """What `import_rl_json` read.

    Attributes:
      meta: the file's `_meta`.
      descriptions: query id -> its "query" object (question and answers), as in the file.
      candidates: pointers stored, of all queries.
      known: of these, the ones whose equal score was in the store before.
    """

    meta: dict = field(default_factory=dict)
    descriptions: dict[int, dict] = field(default_factory=dict)
    candidates: int = 0
    known: int = 0


def read_rl_json(
    path: str | Path, *, pointers: str = "auto", unlabelled: bool = False
) -> tuple[dict, Iterator[QueryEntry]]:
    """Opens an RL JSON file: its `_meta` now, its queries one by one as they are asked for.

    Args:
      path: the file.
      pointers: what the numbers in "pointer" are: "global" demonstration ids, "local" positions
        in `candidate_pool_ids`, or "auto": whichever of the two fits, where only one does.
      unlabelled: accept pointers without any label, as beam searches write them.

    Returns:
      `_meta`, {} if the file has none, and an iterator over the queries.

    Raises:
      InputError: at once or from the iterator; names the file, the query and the mend.
    """
    if pointers not in POINTERS:
        raise InputError(f"pointers={pointers!r} is not one of {', '.join(POINTERS)}")
    entries = read_entries(path)
    first = next(entries, None)
    meta = {}
    if first is not None and first[0] == "_meta":
        meta, first = first[1], None
        if not isinstance(meta, dict):
            raise InputError(f"{path}: _meta is not an object")
    said = meta.get("pointers", "auto")
    if said not in POINTERS:
        raise InputError(f"{path}: _meta.pointers={said!r} is not one of {', '.join(POINTERS)}")
    if "auto" not in (said, pointers) and said != pointers:
        raise InputError(f"{path}: _meta says that pointers are {said}, not {pointers}")
    if "format" in meta and (meta["format"], meta.get("version")) != (FORMAT, 1):
        raise InputError(
            f"{path}: _meta says format {meta.get('format')!r}, version {meta.get('version')!r}; "
            f"this code reads {FORMAT!r}, version 1"
        )
    file = FileReading(path, said if pointers == "auto" else pointers, unlabelled)

    def queries() -> Iterator[QueryEntry]:
        if first is not None:
            yield json_to_entry(*first, file)
        for key, value in entries:
            if key == "_meta":
                raise InputError(f"{path}: _meta stands after a query; move it to the beginning")
            yield json_to_entry(key, value, file)

    return meta, queries()


def write_rl_json(path: str | Path, meta: dict, entries: Iterable[QueryEntry]) -> int:
    """Writes an RL JSON file, one query a line, and returns how many queries it holds.

    The file appears whole or not at all: it is written beside its place and moved there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with open(partial, "x", encoding="ascii") as file:
            file.write(f'{{"_meta": {json.dumps(meta, allow_nan=False)}')
            for entry in entries:
                value = json.dumps(entry_to_json(entry), allow_nan=False)
                file.write(f',\n"{entry.query_id}": {value}')
                count += 1
            file.write("}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    return count


def import_rl_json(
    store: Store, path: str | Path, *, stage: str | None = None, pointers: str = "auto"
) -> Imported:
    """Reads an RL JSON file into a store, all of it or, where anything is wrong, nothing.

    The file must say in `_meta.fingerprint` that its scores come from the settings of the store:
    labels of another model, prompt or metric never get in. Training can use those beside the
    store; see `lever_jax.imported`.

    Args:
      store: open for writing.
      path: the file.
      stage: under which the pointers go into the store's proposals; `_meta.stage` by default.
      pointers: as in `read_rl_json`.

    Raises:
      InputError: names the file, the query and the mend.
    """
    meta, entries = read_rl_json(path, pointers=pointers)
    origin = meta.get("fingerprint")
    if not isinstance(origin, dict):
        raise InputError(
            f"{path} does not say which model, prompt and settings its scores come from "
            "(_meta.fingerprint), so they cannot join the store; import it for training only"
        )
    schema.check_fingerprint(path, origin, store.fingerprint)
    stage = meta.get("stage") if stage is None else stage
    if not isinstance(stage, str) or not stage:
        raise InputError(f"{path}: _meta.stage does not say what its pointers were proposed for")
    result = Imported(meta=meta)
    with store.transaction():
        for batch in _batches(entries):
            _import_batch(store, path, stage, batch, result)
    return result


def export_rl_json(
    store: Store,
    path: str | Path,
    *,
    stage: str,
    describe: Callable[[int], dict],
    query_ids: Iterable[int] | None = None,
    meta: dict | None = None,
) -> dict[str, int]:
    """Writes the scored pointers of one stage as RL JSON.

    Args:
      store: open for reading or writing.
      path: the file to write; replaced whole.
      stage: whose proposals to write.
      describe: query id -> {"question", "gt_answers_raw", "gt_answers_norm", ...}.
      query_ids: which queries, in order. By default all that have proposals in the stage, as they
        came; `list(imported.descriptions)` also repeats queries that have no candidates.
      meta: further fields of `_meta`.

    Returns:
      {"queries", "candidates", "unscored"}; the unscored are proposals without a score, which
      have no label to write and are left out.
    """
    totals = {"queries": 0, "candidates": 0, "unscored": 0}
    if query_ids is None:
        query_ids = store.proposed_queries(stage).tolist()

    def entries() -> Iterator[QueryEntry]:
        for ids in _batches(int(query_id) for query_id in query_ids):
            for entry in _export_batch(store, stage, ids, totals):
                entry.description = dict(describe(entry.query_id))
                yield entry

    header = {
        "format": FORMAT,
        "version": 1,
        "pointers": "global",
        "stage": stage,
        "fingerprint": store.fingerprint,
    }
    totals["queries"] = write_rl_json(path, {**header, **(meta or {})}, entries())
    return totals


def _import_batch(
    store: Store, path: str | Path, stage: str, batch: list[QueryEntry], result: Imported
) -> None:
    pooled = [entry for entry in batch if entry.pool is not None]
    if pooled:
        blobs = [schema.pack_pointer(entry.pool) for entry in pooled]
        demo_ids = schema.unpack_padded(blobs)
        similarity = np.full(demo_ids.shape, np.nan, np.float32)
        for row, entry in zip(similarity, pooled, strict=True):
            if entry.similarity is not None:
                row[: len(entry.pool)] = entry.similarity
        store.put_pools(np.array([entry.query_id for entry in pooled]), demo_ids, similarity)
    for entry in batch:
        result.descriptions[entry.query_id] = entry.description
        _check_fits_store(path, entry)
    candidates = [candidate for entry in batch for candidate in entry.candidates]
    if not candidates:
        return
    records = [candidate.record for candidate in candidates]
    queries = np.array([record.query_id for record in records], np.int64)
    pointers = schema.unpack_padded([schema.pack_pointer(record.pointer) for record in records])
    new = []
    for record, stored in zip(records, store.get_scores(queries, pointers), strict=True):
        if stored is None:
            new.append(record)
        elif stored != record:
            raise InputError(
                f"{path}: query {record.query_id}, pointer {record.pointer} has another score "
                f"than {store.path}; import into another store"
            )
    store.put_scores(new)
    log_probs = np.array([candidate.log_prob for candidate in candidates], np.float32)
    sources = [candidate.source for candidate in candidates]
    store.put_proposals(stage, queries, pointers, sources, log_probs)
    marked = [i for i, candidate in enumerate(candidates) if candidate.kept is not None]
    kept = np.array([candidates[i].kept for i in marked], bool)
    store.mark_kept(stage, queries[marked], pointers[marked], kept)
    result.candidates += len(candidates)
    result.known += len(candidates) - len(new)


def _check_fits_store(path: str | Path, entry: QueryEntry) -> None:
    """Refuses what a store could not give back as it was."""
    names = {*entry.extra, *(name for one in entry.candidates for name in one.extra)}
    if any(one.beam_score is not None for one in entry.candidates):
        names.add("beam_score")
    if names:
        raise InputError(
            f"{path}, query {entry.query_id}: a store has no place for {', '.join(sorted(names))}; "
            "remove them, or import the file for training only"
        )
    pointers = [one.record.pointer for one in entry.candidates]
    if len(set(pointers)) != len(pointers):
        twice = next(pointer for pointer in pointers if pointers.count(pointer) > 1)
        raise InputError(
            f"{path}, query {entry.query_id}: pointer {twice} is there twice; a store keeps a "
            "pointer once: remove one, or import the file for training only"
        )


def _export_batch(
    store: Store, stage: str, ids: list[int], totals: dict[str, int]
) -> Iterator[QueryEntry]:
    proposals = store.get_proposals(stage, ids)
    records = store.get_scores(proposals.query_ids, proposals.pointers)
    by_query: dict[int, list[Candidate]] = {query_id: [] for query_id in ids}
    columns = zip(
        proposals.query_ids.tolist(),
        records,
        proposals.sources,
        proposals.log_probs.tolist(),
        proposals.kept.tolist(),
        strict=True,
    )
    for query_id, record, source, log_prob, kept in columns:
        if record is None:
            totals["unscored"] += 1
            continue
        totals["candidates"] += 1
        mark = None if kept < 0 else bool(kept)
        by_query[query_id].append(Candidate(record, source, log_prob, mark))
    for query_id, pooled in zip(ids, store.has_pools(ids).tolist(), strict=True):
        pool = similarity = None
        if pooled:
            demo_ids, values = store.get_pools([query_id])
            pool = tuple(demo_ids[0].tolist())
            similarity = None if all(map(math.isnan, values[0])) else tuple(values[0].tolist())
        yield QueryEntry(query_id, {}, pool, similarity, by_query[query_id])


def _batches(items: Iterable) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
