"""The phases of a run, each resumable: warm-up, mining, health, RCE, GRPO, evaluation.

A phase that trains ends with a checkpoint, which holds its *recipe*: everything that decided its
parameters, the recipe of the phase before included. A second run with the same recipe restores
it; with another recipe the phase is trained again, on scores that are already in the store.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import pathlib
import zlib
from typing import Any

import jax
import numpy as np

from experiments import configs, imported, run_folder, settings
from experiments.grpo import BEST, train_rounds
from experiments.grpo_programs import GrpoPrograms
from experiments.metrics import MetricsLog
from experiments.output import whole_file
from experiments.picks import PickLines
from experiments.progress import bar, note
from experiments.session import Session
from experiments.stored import keep_training_picks
from lever_jax import checkpoint
from lever_jax.batches import Batches
from lever_jax.compilations import count_compilations
from lever_jax.diagnostics import Picks, health_csv, measure_health
from lever_jax.errors import InputError
from lever_jax.evaluation import answer_picks, evaluate
from lever_jax.mining import mine, mined_candidates, mined_groups
from lever_jax.parallel import device_count, replicated
from lever_jax.proposing import phase_key
from lever_jax.rewards import is_flat
from lever_jax.search import search_pools, search_targets
from lever_jax.training import (
    LOSS_FIELDS,
    GroupBatch,
    PoolTable,
    init_state,
    make_optimizer,
    make_step,
)

MINING = "mine"
VERSION = "0.1.0"


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters of the selector after a phase.

    Attributes:
      params: the parameters.
      recipe: what decided them; equal recipes give equal parameters.
      before: recipe of the selector that the phase started from; None for a fresh one.
    """

    params: Any
    recipe: str
    before: str | None = None


def fresh(session: Session) -> Trained:
    """A selector that has learnt nothing."""
    recipe = {
        "selector": configs.selector_config().recipe(),
        "pools": configs.pool_config().recipe(),
        "parts": {name: list(span) for name, span in session.parts.items()},
        "identity": session.identity,
        "encoder": session.encoder,
        "seed": settings.SEED.value,
        "shots": configs.training_shots(),
    }
    params = session.init(phase_key(settings.SEED.value, "init"))
    return Trained(params, _hash(recipe))


def warm_up(session: Session, start: Trained, log: MetricsLog) -> Trained:
    """Supervised training on the best pointers that a search of some pools, or a file, gives."""
    training = {"epochs": settings.WARMUP_EPOCHS.value, "rate": settings.WARMUP_RATE.value}
    if settings.WARMUP.value == "import":
        data = imported.warmup_targets(session, configs.training_shots())
        training |= {"table": data.table, "origin": data.origin}
        return _fit(session, "warmup", "supervised", start, data.groups, log, **training)
    rows = np.arange(min(settings.WARMUP_QUERIES.value, len(session.train)))
    found = search_pools(
        session.train,
        rows,
        session.service,
        shots=configs.training_shots(),
        beam=settings.WARMUP_BEAM.value,
        label="warm-up search",
        score=settings.SEARCH_SCORE.value,
        construction=settings.SEARCH_CONSTRUCTION.value,
        shorter=session.policy.stops,
    )
    groups = search_targets(
        rows, found, settings.WARMUP_TARGETS.value, shots=configs.training_shots()
    )
    note(f"{len(groups.query_rows)} of {len(rows)} queries have a pointer worth imitating")
    if session.policy.stops:
        shown = (groups.pointers >= 0).sum(axis=-1)[groups.mask]
        note(
            f"these show {shown.mean():.2f} demonstrations on average, at most "
            f"{configs.training_shots()}"
        )
    return _fit(session, "warmup", "supervised", start, groups, log, **training)


def mine_data(session: Session, selector: Trained) -> None:
    """Two-stage mining of the training queries with proposals of `selector`.

    Another selector, or another mining flag, mines under another name: what it proposes is never
    mixed with what was there before, and scores that both ask for are shared.
    """
    config = configs.mining_config()
    mine(
        mining_stage(selector),
        session.train,
        session.train_proposer,
        selector.params,
        phase_key(settings.SEED.value, MINING),
        session.service,
        config,
        shots=configs.training_shots(),
    )
    session.store.mark_done(mining_stage(selector), {"queries": len(session.train)})


def check_health(session: Session, selector: Trained, name: str) -> dict[str, Any]:
    """Measures what `selector` mined against what it picks; writes health.json and health.csv."""
    candidates = mined_candidates(
        mining_stage(selector),
        session.train,
        session.store,
        configs.reward_config(),
        configs.mining_config(),
    )
    picks = training_picks(session, selector, name)
    health = measure_health(
        candidates,
        picks=Picks(session.train.query_ids, picks),
        thresholds=configs.thresholds(),
        min_range=settings.MIN_RANGE.value,
    )
    health["stage"] = mining_stage(selector)
    write_json(session.workdir / "health.json", health)
    with (session.workdir / "health.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(health_csv(health))
    return health


def training_picks(session: Session, selector: Trained, name: str) -> np.ndarray:
    """Accuracy [Q] of the selector's greedy pick on the training queries.

    They are kept in training_picks.json, from where experiments.analyze tells whether training
    used the data without asking the VLM again.
    """
    pointers = session.train_proposer.greedy(
        selector.params, np.arange(len(session.train)), shots=configs.training_shots()
    )
    scores = answer_picks(session.train, pointers, session.service, label=f"picks of {name}")
    keep_training_picks(session.workdir, name, session.train.query_ids, scores["accuracy"])
    return scores["accuracy"]


def train_rce(
    session: Session, start: Trained, log: MetricsLog, stage: str | None = None
) -> Trained | None:
    """Reward-weighted cross-entropy on what `start` mined, on imported groups, or on both.

    A `stage` names mined data of another selector, to be learnt from instead of `start`'s. Returns
    None, and leaves no checkpoint, where every group is flat: there is nothing to learn then.
    """
    training = {"epochs": settings.RCE_EPOCHS.value, "rate": settings.RCE_RATE.value}
    source, reward, groups = settings.RCE_DATA.value, configs.reward_config(), None
    if source != "import":
        stage = stage or mining_stage(start)
        groups = mined_groups(stage, session.train, session.store, reward)
    if source != "mined":
        data = imported.rce_groups(session, configs.training_shots(), beside=groups)
        groups, training = data.groups, training | {"table": data.table, "origin": data.origin}
    flat = functools.partial(is_flat, min_range=configs.loss_config().min_range)
    if len(groups.query_rows) and all(map(flat, groups.rewards, groups.mask)):
        note("RCE: the rewards of every group are equal, there is nothing to learn from")
        return None
    return _fit(session, "rce", "rce", start, groups, log, **training)


def compile_grpo(session: Session, selector: Trained) -> GrpoPrograms:
    """Begins to compile what GRPO runs, in a thread, unless a GRPO is there to be restored.

    Args:
      session: the run.
      selector: any of the architecture.
    """
    programs = GrpoPrograms(session, configs.training_shots())
    if not checkpoint.exists(session.workdir / "checkpoints" / "grpo"):
        programs.compile_ahead(selector.params)
    return programs


def train_grpo(
    session: Session, start: Trained, log: MetricsLog, programs: GrpoPrograms
) -> Trained | None:
    """GRPO from `start`, which is also the reference of the KL; resumes after the last round.

    Returns None, and leaves no checkpoint, where every group was flat: nothing was learnt then.
    """
    names = (
        "grpo_epochs grpo_updates grpo_queries group_size grpo_learning_rate batch_queries "
        "verify verify_best verify_low"
    ).split()
    recipe = _hash(
        {
            "phase": "grpo",
            "before": start.recipe,
            "flags": {name: settings.FLAGS[name].value for name in names},
            "loss": _read_by("grpo"),
            "reward": configs.reward_config().recipe(),
            "queries": _digest([session.train.query_ids]),
            **({"overlap": True} if settings.OVERLAP.value else {}),
            **_steps_recipe(),
        }
    )
    restored = _restored(session, "grpo", recipe)
    if restored is not None:
        return restored
    if settings.VERIFY.value == "top_m":
        note("--verify=top_m leaves draws out of their groups, which biases the gradient")
    metadata = _metadata(session, "grpo", recipe, start.recipe)
    params = train_rounds(programs, start.params, metadata, log)
    if params is None:
        note("GRPO: every group of every round was flat, nothing was learnt; see the health check")
        return None
    return _save(session, "grpo", Trained(params, recipe, start.recipe))


def evaluate_phases(
    session: Session, selectors: dict[str, Trained], picks: pathlib.Path | None = None
) -> dict[str, Any]:
    """Evaluates the selectors (phase name to parameters) beside the baselines and the oracle.

    What each method showed to each query goes to `picks`, by default picks.jsonl of the workdir.
    """
    queries = session.eval
    examples = [session.dataset.example("query", int(id)) for id in queries.query_ids]
    with whole_file(picks or session.workdir / "picks.jsonl", "picks") as write:
        return evaluate(
            queries,
            session.parts,
            {f"selector_{name}": trained.params for name, trained in selectors.items()},
            session.eval_proposer,
            session.service,
            configs.evaluation_config(),
            answer_types=[example.answer_type for example in examples],
            on_picks=PickLines(write, queries, session.dataset, session.identity),
        )


def restore_phase(session: Session, name: str) -> Trained:
    """Reads the checkpoint of a finished phase, into the architecture that the flags describe."""
    path = session.workdir / "checkpoints" / name
    configs.selector_config().check_same(checkpoint.read_metadata(path)["selector"], str(path))
    abstract = {"params": jax.eval_shape(session.init, jax.random.key(0))}
    tree, metadata = checkpoint.restore(path, abstract)
    return Trained(tree["params"], metadata["recipe"], metadata.get("before"))


def finished_phases(workdir: pathlib.Path) -> list[str]:
    """Names of the phases that have a checkpoint, in order, as far as each starts from the last.

    A checkpoint that was trained from an earlier version of the phase before it is left out, and
    the run says so: it belongs to no selector of this run.
    """
    folder, finished, recipe = workdir / "checkpoints", [], None
    for name in settings.PHASES:
        if not checkpoint.exists(folder / name) or configs.left_out(name):
            continue
        metadata = checkpoint.read_metadata(folder / name)
        if recipe is not None and metadata.get("before") != recipe:
            note(
                f"{name} was trained from an earlier {finished[-1]} and is left out; train again "
                "to go on from the present one"
            )
            break
        recipe = metadata["recipe"]
        finished.append(name)
    return finished


def best_of_grpo(workdir: pathlib.Path, finished: list[str]) -> bool:
    """Whether there is a best state of GRPO that started from the present phase before it."""
    folder = workdir / "checkpoints"
    if not checkpoint.exists(folder / BEST):
        return False
    before = [name for name in finished if name != "grpo"]
    if not before:
        return True
    recipe = checkpoint.read_metadata(folder / before[-1])["recipe"]
    return checkpoint.read_metadata(folder / BEST)["before"] == recipe


def write_json(path, content) -> None:
    """Writes JSON atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _restored(session: Session, name: str, recipe: str) -> Trained | None:
    """The checkpoint of a phase if it was made by this recipe, else None."""
    path = session.workdir / "checkpoints" / name
    if not checkpoint.exists(path):
        return None
    if checkpoint.read_metadata(path)["recipe"] != recipe:
        note(f"{name} was trained with other settings or data: it is trained again")
        return None
    note(f"{name} was finished earlier: restored from {path}")
    return restore_phase(session, name)


def _save(session: Session, name: str, trained: Trained) -> Trained:
    """Writes the checkpoint of a finished phase."""
    metadata = _metadata(session, name, trained.recipe, trained.before)
    checkpoint.save(session.workdir / "checkpoints" / name, {"params": trained.params}, metadata)
    return trained


def _metadata(session: Session, name: str, recipe: str, before: str | None) -> dict[str, Any]:
    """What stands in every checkpoint of a phase."""
    return {
        "phase": name,
        "shots": configs.training_shots(),
        "recipe": recipe,
        "before": before,
        "selector": dataclasses.asdict(configs.selector_config()),
        "parts": {part: list(span) for part, span in session.parts.items()},
        "embedding_dim": session.environment.hello["embedding_dim"],
        "identity": session.identity,
        "encoder": session.encoder,
        "flags": run_folder.own_flags(),
        "code": VERSION,
    }


def _fit(
    session: Session,
    name: str,
    kind: str,
    start: Trained,
    groups: GroupBatch,
    log: MetricsLog,
    *,
    epochs: int,
    rate: float,
    table: PoolTable | None = None,
    origin: dict[str, str] | None = None,
) -> Trained:
    """A phase of training over fixed groups, or its checkpoint if the recipe is the same.

    Groups with imported ones among them come with a table of their own and with their origin.
    """
    if not len(groups.query_rows):
        raise InputError(
            f"{name}: no query has a pointer to learn from; look at eval_failed in health.json, "
            "or raise --num_queries"
        )
    size = min(settings.BATCH_QUERIES.value, len(groups.query_rows))
    recipe = _hash(
        {
            "phase": name,
            "before": start.recipe,
            "groups": _digest(groups),
            "loss": _read_by(kind),
            "training": [epochs, rate, size],
            **_steps_recipe(),
            **({} if origin is None else {"imported": origin}),
        }
    )
    restored = _restored(session, name, recipe)
    if restored is not None:
        return restored
    batches = Batches(
        groups, size, pieces=settings.ACCUMULATE.value, devices=device_count(session.mesh)
    )
    steps = epochs * len(batches)
    optimizer = make_optimizer(rate, steps=steps)
    ema, mesh = settings.EMA.value, session.mesh
    step = make_step(
        kind,
        session.policy,
        optimizer,
        configs.loss_config(),
        ema=ema,
        mesh=mesh,
        dropout_seed=zlib.crc32(f"{settings.SEED.value} {name}".encode()),
    )
    state, reference, table = replicated(
        mesh,
        (
            init_state(start.params, optimizer, averaged=ema > 0),
            start.params,
            session.train.table if table is None else table,
        ),
    )
    warm = 0
    with bar(f"{name}: optimiser steps", steps) as advance, count_compilations() as compiled:
        for epoch in range(epochs):
            totals = []
            for batch in batches.epoch((settings.SEED.value, epoch)):
                state, metrics = step(state, reference, table, batch)
                totals.append(metrics)
                advance(1)
            means = {n: np.mean([float(t[n]) for t in totals]) for n in totals[0]}
            warm = compiled() if epoch == 0 else warm
            means["compilations"] = compiled() - warm
            log.write(name, recipe, int(state.step), means)
    if epochs:
        note(
            f"{name}: loss {means['loss']:.3f} nats, entropy {means['entropy']:.2f} nats; "
            f"{means['compilations']} compilations after the first epoch"
        )
    return _save(session, name, Trained(state.evaluated, recipe, start.recipe))


def mining_stage(selector: Trained) -> str:
    """Name under which the store keeps what `selector` proposed; pointers of one length only."""
    config = dataclasses.asdict(configs.mining_config())
    by = _hash({"selector": selector.recipe, "config": config, "seed": settings.SEED.value})
    return f"{MINING}_{configs.training_shots()}_shots_{by}"


def _read_by(kind: str) -> dict[str, Any]:
    """The settings that a loss reads: those of another phase do not change its recipe."""
    config = dataclasses.asdict(configs.loss_config())
    return {name: config[name] for name in LOSS_FIELDS[kind]}


def _steps_recipe() -> dict[str, Any]:
    """How optimiser steps are made, as far as it is not the default and decides parameters."""
    given = {"accumulate": settings.ACCUMULATE.value, "ema": settings.EMA.value}
    return {name: value for name, value in given.items() if value}


def _digest(arrays) -> str:
    """Identifies the content of some arrays."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, jax.tree.leaves(arrays)):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _hash(content: dict) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
