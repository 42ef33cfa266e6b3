"""How fast prompts are scored: the naive loop, each idea of the fast scorer, and all of them.

    python -m experiments.benchmark_scoring --model=tiny --out=FILE.json

Exactness is checked and printed first, and a failure stops the run. Then all ways score the same
prompts in every round, and each one's speed is given as a ratio to the naive loop of the same
round, beside the ratio that the FLOP model predicts. `--soak=N` instead scores N candidates in a
row, each query with a pool of its own, and says whether memory stays flat.
"""

import os
import sys

import numpy as np
import torch
from absl import flags
from rich.table import Table
from transformers.utils import logging

from experiments import cli
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, bar, note, stage
from qwen_bridge.benchmark import clock
from qwen_bridge.benchmark.models import SHAPES
from qwen_bridge.benchmark.race import FLAG_BEYOND, Race
from qwen_bridge.benchmark.soak import WARM_UP, soak
from qwen_bridge.benchmark.stage_b import WAYS, StageB
from qwen_bridge.benchmark.workload import FEATURE_BYTES, POOLS, Workload, WorkloadConfig
from qwen_bridge.cost import RUNGS
from qwen_bridge.memory import worker_memory
from qwen_bridge.scorer import MAX_NEW_TOKENS
from qwen_bridge.trie_scorer import BATCH_TOKENS
from qwen_bridge.workers import pick_device

_NAIVE_ON_CPU = 4
_RANDOM_TOKENS = 3

MODEL = flags.DEFINE_string(
    "model", "tiny", f"{', '.join(SHAPES)} (random weights), or a checkpoint folder."
)
DEVICE = flags.DEFINE_string("device", "auto", "auto, cpu, cuda or cuda:N.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ("auto", "float32", "bfloat16"), "auto: by device.")
THREADS = flags.DEFINE_integer(
    "threads", 1, "Of torch on a CPU; two on a shared machine gave bogus ratios.", lower_bound=1
)
IMAGE_SIZE = flags.DEFINE_integer("image_size", 336, "Side of every picture, pixels.")
QUERIES = flags.DEFINE_integer("queries", 1, "Scored together in a round.", lower_bound=1)
CANDIDATES = flags.DEFINE_integer("candidates", 64, "Of each query.", lower_bound=1)
SHOTS = flags.DEFINE_integer("shots", 2, "Demonstrations of each candidate.", lower_bound=0)
ANSWERS = flags.DEFINE_integer("answers", 4, "Ground truths of each query.", lower_bound=1)
POOL = flags.DEFINE_enum(
    "pool",
    "shared",
    POOLS,
    "trie_warm finds prefixes left by another query (shared), or by an earlier visit (per_query).",
)
POOL_SIZE = flags.DEFINE_integer("pool_size", 16, "Demonstrations of a pool.", lower_bound=1)
NAIVE_CANDIDATES = flags.DEFINE_integer(
    "naive_candidates",
    None,
    "Prompts that the three naive rungs and `generate` score; 4 on a CPU and all on a GPU by "
    "default. Their time is linear in prompts.",
    lower_bound=1,
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Each runs every rung once.", lower_bound=1)
BATCH_TOKENS_FLAG = flags.DEFINE_integer(
    "batch_tokens", None, f"Tokens of a forward pass; by device {BATCH_TOKENS}.", lower_bound=1
)
CACHE_MIB = flags.DEFINE_integer("cache_mib", 4096, "Of prefixes of one scorer.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Of weights, pictures and pointers.", lower_bound=0)
MAX_NEW_TOKENS_FLAG = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    f"Most tokens of a generated answer; {MAX_NEW_TOKENS} by default, and {_RANDOM_TOKENS} with "
    "random weights, which never end: a VQA answer and its end are 2.4 tokens in the mean.",
    lower_bound=1,
)
CERTIFIED = flags.DEFINE_float(
    "certified",
    0.5,
    "Share of candidates that random weights are taken to certify: their own share is next to "
    "none. Of no account for a checkpoint.",
    lower_bound=0.0,
    upper_bound=1.0,
)
SOAK = flags.DEFINE_integer("soak", 0, "Score so many candidates in a row instead.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "JSON file of all figures.")


def main():
    check_out(OUT.value)
    logging.set_verbosity_error()
    torch.set_num_threads(THREADS.value)
    device = pick_device(DEVICE.value)
    dtype = DTYPE.value
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    config = WorkloadConfig(
        image_size=IMAGE_SIZE.value,
        queries=-(-SOAK.value // CANDIDATES.value) if SOAK.value else QUERIES.value,
        candidates=CANDIDATES.value,
        shots=SHOTS.value,
        answers=ANSWERS.value,
        pool="per_query" if SOAK.value else POOL.value,
        pool_size=POOL_SIZE.value,
        seed=SEED.value,
    )
    stage(f"making {MODEL.value}, {dtype}, on {device}")
    workload = Workload(config, MODEL.value, device, dtype)
    document = {
        "device": clock.describe(workload.loaded.model.device),
        "versions": clock.versions(),
        "command": " ".join(["python -m experiments.benchmark_scoring", *sys.argv[1:]]),
        "config": {
            "model": MODEL.value,
            "dtype": dtype,
            **vars(config),
            "threads": THREADS.value,
            "batch_tokens": BATCH_TOKENS_FLAG.value or BATCH_TOKENS[device.partition(":")[0]],
            "cache_mib": CACHE_MIB.value,
            "max_new_tokens": _max_new_tokens(workload),
        },
    }
    document |= _soak(workload) if SOAK.value else _race(workload)
    write_out(OUT.value, document)
    if document["faults"]:
        sys.exit(cli.FAILED)


def _race(workload: Workload) -> dict:
    device = workload.loaded.model.device
    prompts = workload.config.queries * workload.config.candidates
    few = NAIVE_CANDIDATES.value or (_NAIVE_ON_CPU if device.type == "cpu" else prompts)
    stage("exactness")
    race = Race(
        workload,
        naive_candidates=min(few, prompts),
        batch_tokens=BATCH_TOKENS_FLAG.value,
        cache_bytes=CACHE_MIB.value << 20,
        max_new_tokens=_max_new_tokens(workload),
    )
    exactness = race.exactness()
    faults = exactness.pop("faults")
    note(
        f"largest difference of an answer's log-probability {exactness['max_abs_logprob']:.1e} "
        f"nats to {exactness['against']}; greedy flags "
        f"{'equal' if exactness['greedy_equal'] else 'differ'}"
    )
    if not faults:
        stage_b = StageB(race, CERTIFIED.value)
        faults = stage_b.faults()
    for fault in faults:
        note(f"wrong: {fault}")
    result = {"exactness": exactness, "faults": faults}
    if faults:
        return {**result, "rungs": {}}
    stage(f"{ROUNDS.value} rounds, timed by {clock.clock_name(device)}")
    warm_ups = 1 if device.type == "cuda" else 0  # one run was for exactness
    load = os.getloadavg()[0]
    rounds, rounds_b = [], []
    with bar("rungs", (ROUNDS.value + warm_ups) * (len(RUNGS) + len(WAYS))) as advance:
        for turn in range(-warm_ups, ROUNDS.value):
            one = race.round(turn, lambda: advance(1))
            one_b = stage_b.round(turn, lambda: advance(1))
            if turn >= 0:
                rounds.append(one)
                rounds_b.append(one_b)
    peak = clock.peak_flops(device, workload.loaded.model.dtype)
    result |= {
        "rungs": race.figures(rounds, peak),
        "stage_b": stage_b.figures(rounds_b),
        "measured_peak_flops": peak,
        "clock": clock.clock_name(device),
        "load": [load, os.getloadavg()[0]],
        "lengths": vars(race.lengths),
        "memory": _memory(workload, race),
        "rounds": ROUNDS.value,
        "seconds_a_candidate": {name: [one[name][0] for one in rounds] for name in RUNGS},
    }
    _print_rungs(result)
    _print_stage_b(result["stage_b"], workload.random)
    return result


def _max_new_tokens(workload: Workload) -> int:
    default = _RANDOM_TOKENS if workload.random else MAX_NEW_TOKENS
    return MAX_NEW_TOKENS_FLAG.value or default


def _memory(workload: Workload, race: Race) -> dict:
    """What the plan foresees for one worker beside what the fast rungs held at most."""
    foreseen = worker_memory(
        workload.shape,
        race.lengths,
        shots=workload.config.shots,
        batch_tokens=BATCH_TOKENS_FLAG.value or BATCH_TOKENS[race.device.type],
        cache_bytes=CACHE_MIB.value << 20,
        feature_bytes=FEATURE_BYTES,
        value_bytes=workload.loaded.model.dtype.itemsize,
    )
    return {"foreseen_bytes": sum(foreseen.values()), "foreseen": foreseen}


def _soak(workload: Workload) -> dict:
    total = workload.config.queries * workload.config.candidates
    stage(f"{total:,} candidates in a row")
    with bar("candidates", total) as advance:
        result = soak(
            workload,
            batch_tokens=BATCH_TOKENS_FLAG.value,
            cache_bytes=CACHE_MIB.value << 20,
            advance=advance,
        )
    held = result["memory_bytes"]
    for row in np.unique(np.linspace(0, len(held) - 1, 9).astype(int)):
        note(f"after {held[row][0]:>7,} candidates: {held[row][1] / 2**20:,.0f} MiB")
    line = f"{result['growth']:+.1%} after the first {WARM_UP:.0%} of the candidates"
    note(f"memory is {'flat' if result['flat'] else 'NOT flat'}: {line}")
    faults = [] if result["flat"] else [f"memory grew: {line}"]
    return {"soak": result, "faults": faults}


def _print_rungs(result: dict):
    title = "ratio to the naive loop of the same round: median of all rounds [min, max]"
    table = Table(title=title, title_justify="left")
    columns = "rung", "ratio", "candidates/s", "predicted", "measured/predicted", "share of peak"
    for column in columns:
        table.add_column(column, justify="left" if column == "rung" else "right", no_wrap=True)
    for name, row in result["rungs"].items():
        flagged = f" beyond {FLAG_BEYOND:.0%}" if row["flag"] else ""
        table.add_row(
            name,
            _spread(row["ratio"]),
            f"{row['candidates_per_s']:,.2f}",
            f"{row['predicted_ratio']:.2f}",
            f"{row['measured_over_predicted']:.2f}{flagged}",
            f"{row['share_of_peak']:.0%}",
        )
    CONSOLE.print(table)
    note(f"peak: {result['measured_peak_flops'] / 1e9:,.0f} GFLOP/s of a large matrix product")


def _print_stage_b(result: dict, random: bool):
    share, how = result["share_left_out"], "are taken to be" if random else "are"
    title = f"greedy answers; {share:.0%} of the candidates {how} certified by their score"
    table = Table(title=title, title_justify="left")
    for column in ("way", "ratio to model_generate", "candidates/s", "predicted"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for name in WAYS:
        row = result[name]
        table.add_row(
            name,
            _spread(row["ratio"]),
            f"{row['candidates_per_s']:,.2f}",
            f"{row['predicted_ratio']:.2f}",
        )
    CONSOLE.print(table)


def _spread(ratio: dict) -> str:
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"


if __name__ == "__main__":
    cli.run(main)
