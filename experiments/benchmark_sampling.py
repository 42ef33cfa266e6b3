"""Times our samplers against PyTorch, with the same weights, sizes and thread.

    python -m experiments.benchmark_sampling --out=benchmarks/sampling.json --plot=sampling.png

For every cell of the grid B, K, S, G and method, against
  loop               one query at a time, Python over its beams, the network anew at every step
  batched, eager     all queries and beams at once, encoded once
  batched, compiled  the same through torch.compile; left out, saying so, without a C++ compiler
The two networks' log-probabilities are compared first. The loop's time grows with the number of
queries and nothing else, so it is measured on `--loop_queries` of them and scaled. Where there is a
GPU, all of them use it. The share of the roofline is what `experiments/roofline.py` says.
"""

import functools
import importlib.util
import itertools

from absl import flags

from experiments import cli, side_by_side
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE
from lever_jax.errors import InputError

_B = flags.DEFINE_list("B", ["64"], "Queries of a batch.")
_K = flags.DEFINE_list("K", ["64"], "Candidates of a pool.")
_S = flags.DEFINE_list("S", ["2"], "Shots.")
_G = flags.DEFINE_list("G", ["64"], "Pointers a query; beams, for the beam searches.")
_METHODS = flags.DEFINE_list(
    "methods", ["beam", "sample", "top_p", "sbs", "random", "mixture"], "Samplers."
)
_DIM = flags.DEFINE_integer(
    "dim", 384, "Width of an embedding, of three parts; the embedded world's.", lower_bound=3
)
_WIDTH = flags.DEFINE_integer("width", 64, "Width of the selector.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 1, "Set-encoder layers.", lower_bound=0)
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; each times all competitors.", lower_bound=1)
_LOOP_QUERIES = flags.DEFINE_integer(
    "loop_queries", 2, "Queries that the loop is timed on; 0 leaves it out.", lower_bound=0
)
_COMPILED = flags.DEFINE_bool("compiled", True, "Compare with torch.compile too.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")
_PLOT = flags.DEFINE_string("plot", None, "Picture of pointers a second, PNG or SVG.")


def main() -> None:
    """Checks, times, prints, writes and draws."""
    check_out(_OUT.value)
    check_out(_PLOT.value, "plot")
    if _PLOT.value and not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib; pip install 'lever[benchmark]'")
    device = side_by_side.one_device()
    from experiments import roofline, sampling_cell

    grid = [side_by_side.numbers(flag) for flag in (_B, _K, _S, _G)]
    methods = _METHODS.value
    for method in methods:
        if method not in sampling_cell.METHODS:
            raise InputError(
                f"--methods: {method!r} is not one of {', '.join(sampling_cell.METHODS)}"
            )
    missing = side_by_side.without_compiler(_COMPILED.value)
    compiled = _COMPILED.value and not missing
    models = sampling_cell.Models(_DIM.value, _WIDTH.value, _LAYERS.value, _HEADS.value, device)
    cells, worst = [], 0.0
    for (batch, pool, shots, num), method in itertools.product(itertools.product(*grid), methods):
        if shots > pool:
            raise InputError(f"--S={shots} exceeds --K={pool}; lower it")
        cell = sampling_cell.Cell(models, method, batch, pool, shots, num)
        worst = max(worst, cell.difference())
        competitors = cell.competitors(_LOOP_QUERIES.value, compiled)
        side_by_side.warm_up(competitors, device)
        label = f"{method} B={batch} K={pool} S={shots} G={num}"
        seconds = side_by_side.timed(competitors, _ROUNDS.value, label)
        if "loop" in seconds:
            seconds["loop"] = seconds["loop"] * (batch / min(batch, _LOOP_QUERIES.value))
        bounds = roofline.figures(cell.work(), device, seconds["ours"])
        cells.append({**_cell(method, batch, pool, shots, num, seconds), **bounds})
        _show(cells[-1])
    document = {
        **side_by_side.machine(device),
        "config": {
            name: flag.value
            for name, flag in {
                "dim": _DIM,
                "width": _WIDTH,
                "layers": _LAYERS,
                "heads": _HEADS,
                "rounds": _ROUNDS,
                "loop_queries": _LOOP_QUERIES,
            }.items()
        },
        "compiled_left_out": missing,
        "exactness": {"max_abs_logprob": worst},
        "cells": cells,
    }
    write_out(_OUT.value, document)
    if _PLOT.value:
        _plot(cells, _PLOT.value)


def _cell(method, batch, pool, shots, num, seconds) -> dict:
    """One entry of `cells`; a ratio above 1 says how many times faster ours is."""
    rates = {name: batch * num / values for name, values in seconds.items()}
    against = functools.partial(side_by_side.ratio, fast=seconds["ours"])
    names = {
        "loop": "loop",
        "batched_eager": "eager",
        "batched_compiled": "compiled",
    }
    summary = {
        f"ratio_{name}": against(seconds[key]) if key in seconds else None
        for name, key in names.items()
    }
    spread = side_by_side.ratio(rates["ours"], 1.0)
    return {
        "method": method,
        "B": batch,
        "K": pool,
        "S": shots,
        "G": num,
        "pointers_per_s": spread["median"],
        "pointers_per_s_min_max": [spread["min"], spread["max"]],
        "groups_per_s": spread["median"] / num,
        **{name: value and value["median"] for name, value in summary.items()},
        "ratio_min_max": {
            name: value and [value["min"], value["max"]] for name, value in summary.items()
        },
        "seconds": {name: values.tolist() for name, values in seconds.items()},
    }


def _show(cell: dict) -> None:
    parts = [f"{cell['pointers_per_s']:,.0f} pointers/s"]
    for name, (low, high) in ((n, r) for n, r in cell["ratio_min_max"].items() if r):
        parts.append(f"{name.removeprefix('ratio_')} {cell[name]:.1f}x ({low:.1f} to {high:.1f})")
    if cell["share_of_roofline"]:
        parts.append(f"{cell['share_of_roofline']:.0%} of the roofline")
    CONSOLE.print(
        f"  {cell['method']:8} B={cell['B']} K={cell['K']} S={cell['S']} G={cell['G']}: "
        + ", ".join(parts)
    )


def _plot(cells: list[dict], path: str) -> None:
    """Pointers a second of ours and of each competitor, one bar group a cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "ours": "JAX, ours",
        "compiled": "PyTorch, batched, compiled",
        "eager": "PyTorch, batched, eager",
        "loop": "PyTorch, a query at a time",
    }
    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(cells), 4), layout="constrained")
    for place, name in enumerate(names):
        shown = [(i, c) for i, c in enumerate(cells) if name in c["seconds"]]
        rates = [
            c["B"] * c["G"] / sorted(c["seconds"][name])[len(c["seconds"][name]) // 2]
            for _, c in shown
        ]
        axes.bar([i + 0.2 * place for i, _ in shown], rates, 0.2, label=names[name])
    labels = [f"{c['method']}\nB={c['B']} K={c['K']}\nS={c['S']} G={c['G']}" for c in cells]
    axes.set_xticks([i + 0.3 for i in range(len(cells))], labels)
    axes.set(yscale="log", ylabel="pointers a second")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    cli.run(main)
