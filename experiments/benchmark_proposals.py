"""How good a pointer the proposals find within a few evaluations, before any training.

    python -m experiments.benchmark_proposals --flagfile=grpo.flags --num_queries=200 \\
        --out=benchmarks/proposals.json

The mixture of `--quotas`, local search included, against beam, temperature and random proposals
alone (`--baseline`). Both propose for the same queries with the same untrained selectors, and the
VLM scores them. Reported is the mean over queries of the best `vqa_gt_prob` within 8, 16, 32 and
64 evaluations, and the paired difference with its interval, in two ways:

  budget  each method is asked for so many proposals, its quotas scaled down to them
  prefix  each method is asked for all of them; the first so many count, in the order proposed

Scores go through the store of `--workdir`, as everywhere: a stopped run goes on, and a second run
scores only what is new.
"""

import dataclasses
import os
import platform

import jax
import numpy as np
from absl import flags

from experiments import cli, configs, run_folder, settings
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, note, stage
from experiments.session import open_session
from lever_jax.errors import InputError
from lever_jax.mining import MiningConfig, propose
from lever_jax.proposing import Proposer, phase_key
from lever_jax.sampling import scale_quotas
from lever_jax.scoring import columns
from lever_jax.statistics import mean_ci

_BASELINE = flags.DEFINE_list(
    "baseline", ["beam:16", "sample:32", "random:16"], "Quotas to compare --quotas with."
)
_QUERIES = flags.DEFINE_integer("queries", 200, "Training queries compared.", lower_bound=2)
_SELECTORS = flags.DEFINE_integer(
    "selectors", 3, "Untrained selectors; their results are averaged a query.", lower_bound=1
)
_BUDGETS = flags.DEFINE_list("budgets", ["8", "16", "32", "64"], "Evaluations a query.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")


def best_so_far(gt_prob: np.ndarray) -> np.ndarray:
    """Best of the first n, for each n: [Q, G] of [Q, G]; a failed prompt (NaN) finds nothing."""
    return np.maximum.accumulate(np.nan_to_num(gt_prob, nan=0.0), axis=1)


def main() -> None:
    """Proposes, scores, compares, prints and writes."""
    check_out(_OUT.value)
    configs.check()
    budgets = _budgets()
    mixture = configs.mining_config()
    methods = {
        "mixture": _filled(dict(mixture.quotas), mixture.proposals),
        "baseline": configs.counts("baseline", _BASELINE.value, "beam:16"),
    }
    stage(f"open: {settings.WORKDIR.value}")
    with open_session(run_folder.make_workdir()) as session:
        rows = np.arange(min(_QUERIES.value, len(session.train)))
        proposer = session.train_proposer
        found = {way: {name: {} for name in methods} for way in ("budget", "prefix")}
        for name, quotas in methods.items():
            stage(f"{name}: {quotas}")
            for budget in budgets:
                config = dataclasses.replace(
                    mixture, quotas=scale_quotas(quotas, budget), proposals=budget
                )
                best = _best(session, proposer, rows, config)
                found["budget"][name][budget] = best[:, -1]
                if budget == budgets[-1]:
                    found["prefix"][name] = {n: best[:, n - 1] for n in budgets}
        document = {
            "settings": {
                "queries": len(rows),
                "selectors": _SELECTORS.value,
                "pool": settings.POOL_SIZE.value,
                "shots": configs.training_shots(),
                "quotas": methods,
            },
            "best_gt_prob": {
                way: {str(n): _compared(each, n) for n in budgets} for way, each in found.items()
            },
            "identity": session.identity,
            "load_average_at_end": os.getloadavg(),
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "numpy": np.__version__,
            },
        }
    _show(document["best_gt_prob"])
    write_out(_OUT.value, document)


def _budgets() -> list[int]:
    try:
        budgets = sorted({int(text) for text in _BUDGETS.value})
    except ValueError:
        raise InputError(f"--budgets={','.join(_BUDGETS.value)} must be whole numbers") from None
    if not budgets or budgets[0] < 4:
        raise InputError("--budgets must be 4 or more each, as --budgets=8,16,32,64")
    return budgets


def _filled(quotas: dict[str, int], proposals: int) -> dict[str, int]:
    """Quotas with what they leave open, which is random."""
    left = proposals - sum(quotas.values())
    return {**quotas, "random": quotas.get("random", 0) + left} if left else quotas


def _best(session, proposer: Proposer, rows: np.ndarray, config: MiningConfig) -> np.ndarray:
    """Best gt_prob of the first n proposals, [Q, G], mean over the untrained selectors."""
    results = []
    for seed in range(_SELECTORS.value):
        label = f"{config.proposals} proposals, selector {seed + 1} of {_SELECTORS.value}"
        drawn = propose(
            session.train,
            rows,
            proposer,
            session.init(phase_key(seed, "init")),
            phase_key(seed, "proposals"),
            session.service,
            config,
            configs.training_shots(),
            label,
        )
        group, place = np.nonzero(drawn.mask)
        ids = session.train.demo_ids(rows[group], drawn.pointers[group, place])
        records = session.service.score(session.train.query_ids[rows[group]], ids, label=label)
        gt_prob = np.full(drawn.mask.shape, np.nan, np.float32)
        gt_prob[group, place] = columns(records)["gt_prob"]
        results.append(best_so_far(gt_prob))
    return np.mean(results, axis=0)


def _compared(found: dict[str, dict[int, np.ndarray]], n: int) -> dict:
    values = {name: each[n] for name, each in found.items()}
    values["gain"] = values["mixture"] - values["baseline"]
    estimates = {
        name: mean_ci(each, bounds=(-1.0 if name == "gain" else 0.0, 1.0))
        for name, each in values.items()
    }
    return {name: {"mean": e.value, "ci95": e.interval} for name, e in estimates.items()}


def _show(best: dict) -> None:
    for way, by_budget in best.items():
        note(f"best gt_prob found, by {way}:")
        for n, result in by_budget.items():
            low, high = result["gain"]["ci95"]
            CONSOLE.print(
                f"  {n:>3} evaluations: mixture {result['mixture']['mean']:.4f}, baseline "
                f"{result['baseline']['mean']:.4f}, gain {result['gain']['mean']:+.4f} "
                f"[{low:+.4f}, {high:+.4f}]"
            )


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
