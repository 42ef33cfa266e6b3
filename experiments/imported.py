"""RL JSON and beams of others in a run: kept in `imported.json`, trained on, never in the store.

`experiments.import_rl` checks a file and writes it to the workdir in one fixed form; warm-up and
RCE read it from there. Its labels are others', so they are never mixed with scores of this run.
"""

import dataclasses
import hashlib
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from experiments import configs, settings
from experiments.progress import bar, note
from experiments.session import Session
from lever_jax.errors import InputError
from lever_jax.imported import (
    ImportedData,
    RunExamples,
    fit_to_run,
    imported_groups,
    imported_targets,
    join,
    pooled,
)
from lever_jax.pooled import PooledQueries
from lever_jax.rl_json import FORMAT, QueryEntry, read_rl_json, write_rl_json
from lever_jax.training import GroupBatch, PoolTable
from qwen_bridge.vqa.examples import Dataset

NAME = "imported.json"


@dataclasses.dataclass(frozen=True)
class ImportedGroups:
    """Groups of imported pointers, and what to train them with.

    Attributes:
      groups: rows are those of `table`.
      table: the imported queries with their own pools.
      origin: identifies the source file and the pools; part of a phase's recipe.
    """

    groups: GroupBatch
    table: PoolTable
    origin: dict[str, str]


def check_flags(workdir: pathlib.Path) -> None:
    """Refuses flags that train on imported data where there is none, before anything is opened."""
    asking = [
        f"--{flag.name}={flag.value}"
        for flag in (settings.WARMUP, settings.RCE_DATA)
        if flag.value in ("import", "both")
    ]
    if asking and not (workdir / NAME).is_file():
        raise InputError(
            f"{asking[0]} needs imported data, and {workdir} has none; import them first: "
            f"python -m experiments.import_rl --workdir={workdir} --rl_json=FILE"
        )


def write_imported(workdir: pathlib.Path, source: str, *, pointers: str, beams: bool) -> int:
    """Reads a file strictly and writes it to the workdir in the form that training reads.

    Nothing in it is lost: fields without a meaning here are kept, and an export of it that is
    imported again gives the same bytes.

    Returns:
      The number of its queries.

    Raises:
      InputError: the file is ambiguous or broken, or the workdir has another file's data.
    """
    path = workdir / NAME
    meta, entries = read_rl_json(source, pointers=pointers, unlabelled=beams)
    if not _is_canonical(meta):
        meta = {
            **{name: meta[name] for name in ("fingerprint",) if name in meta},
            "format": FORMAT,
            "version": 1,
            "pointers": "global",
            "unlabelled": beams,
            "source": {
                "file": pathlib.Path(source).name,
                "sha256": _sha256(source),
                "pointers": pointers,
                "meta": meta,
            },
        }
    elif meta.get("unlabelled") and not beams:
        raise InputError(f"{source} may hold pointers without labels; say --import_kind=beams")
    if path.exists():
        known = read_imported(workdir)[0]
        if known != meta:
            raise InputError(
                f"{workdir} has imported {known['source']['file']} already, with other content or "
                f"flags than this; use another --workdir, or remove {path}"
            )
    with bar(f"import {pathlib.Path(source).name}: queries", None) as advance:
        return write_rl_json(path, meta, _counted(entries, advance))


def read_imported(workdir: pathlib.Path) -> tuple[dict, Iterator[QueryEntry]]:
    """The imported data of a run, as `read_rl_json` gives them.

    Raises:
      InputError: the file is not one that `write_imported` wrote.
    """
    path = workdir / NAME
    meta, entries = read_rl_json(path, unlabelled=True)
    if not _is_canonical(meta):
        raise InputError(
            f"{path} was not written by experiments.import_rl; move it elsewhere and import it "
            f"from there: python -m experiments.import_rl --workdir={workdir} --rl_json=FILE"
        )
    return meta, entries


def examples(
    dataset: Dataset,
    train: PooledQueries | None = None,
    broken: frozenset[str] = frozenset(),
) -> RunExamples:
    """What the ids of a run mean, with its pools and broken images where they are known."""
    pools = None
    if train is not None:
        row_of = {query_id: row for row, query_id in enumerate(train.query_ids.tolist())}

        def pools(query_id):
            own = train.pool_ids[row_of[query_id]]
            return own[own >= 0].tolist()

    return RunExamples(
        queries={example.id: (example.image, example.question) for example in dataset.train},
        held_out=frozenset(example.id for example in dataset.eval),
        bank={example.id: example.image for example in dataset.bank},
        pools=pools,
        broken=broken,
    )


def fit(workdir: pathlib.Path, run: RunExamples, shots: int) -> ImportedData:
    """The imported pointers that fit the run; says what was left out."""
    path = workdir / NAME
    _, entries = read_imported(workdir)
    with bar("read imported data: queries", None) as advance:
        data = fit_to_run(
            _counted(entries, advance),
            run,
            shots=shots,
            partial=settings.IMPORT_PARTIAL.value,
            place=str(path),
        )
    note(
        f"imported: {len(data.query_ids):,} pointers of {len(data.queries):,} queries"
        + _listed(data.left_out)
    )
    if not len(data.query_ids):
        raise InputError(f"{path} has no pointer that this run can train on")
    return data


def warmup_targets(session: Session, shots: int) -> ImportedGroups:
    """The best imported pointers of each query, to imitate."""
    data, queries = _open(session, shots)
    groups = imported_targets(data, queries, settings.WARMUP_TARGETS.value)
    if not any(np.isfinite(data.scores[name]).any() for name in ("gt_prob", "accuracy")):
        note("nothing says how good these pointers are: a query's targets weigh the same")
    return _with_origin(session, queries, groups)


def rce_groups(session: Session, shots: int, *, beside: GroupBatch | None) -> ImportedGroups:
    """The imported pointers that have an answer, as groups with rewards.

    `beside` are groups of the run's own, over its own table, that come first. A query that is in
    both has two groups: labels of different origin are never compared with each other.
    """
    data, queries = _open(session, shots)
    found = _with_origin(session, queries, imported_groups(data, queries, configs.reward_config()))
    if beside is None:
        return found
    groups, table = join((beside, session.train.table), (found.groups, found.table))
    return dataclasses.replace(found, groups=groups, table=table)


def _open(session: Session, shots: int) -> tuple[ImportedData, PooledQueries]:
    run = examples(session.dataset, session.train, session.broken)
    data = fit(session.workdir, run, shots)
    return data, pooled(data, session.train, session.bank)


def _with_origin(session: Session, queries: PooledQueries, groups: GroupBatch) -> ImportedGroups:
    pools = hashlib.sha256(queries.query_ids.tobytes() + queries.pool_ids.tobytes()).hexdigest()
    source = read_imported(session.workdir)[0]["source"]["sha256"]
    return ImportedGroups(groups, queries.table, {"source": source, "pools": pools})


def _is_canonical(meta: dict) -> bool:
    source = meta.get("source")
    ours = isinstance(source, dict) and {"file", "sha256"} <= source.keys()
    return ours and meta.get("format") == FORMAT


def _counted(entries: Iterator[QueryEntry], advance) -> Iterator[QueryEntry]:
    for entry in entries:
        yield entry
        advance(1)


def _listed(left_out: Counter) -> str:
    items = [f"{count:,} {reason}" for reason, count in left_out.items()]
    return f"; left out: {', '.join(items)}" if items else ""


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
