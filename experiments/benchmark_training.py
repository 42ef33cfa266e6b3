"""Times our GRPO step against the same step in PyTorch, eager and compiled.

    python -m experiments.benchmark_training --out=benchmarks/training.json

Same weights, same groups, same thread, or the same GPU. Before anything is timed, both take the
first steps from the same start, and their losses and parameters are compared. Beside each ratio
stands the largest that any program could reach: what the rival took, divided by the least time of
`experiments/roofline.py`.
"""

import copy
import itertools

from absl import flags

from experiments import cli, side_by_side
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE
from lever_jax.errors import InputError

_B = flags.DEFINE_list("B", ["50"], "Query groups of a step.")
_K = flags.DEFINE_list("K", ["32"], "Candidates of a pool.")
_S = flags.DEFINE_list("S", ["2"], "Shots.")
_G = flags.DEFINE_list("G", ["8", "64"], "Pointers of a group.")
_DIM = flags.DEFINE_integer(
    "dim", 384, "Width of an embedding, of three parts; the embedded world's.", lower_bound=3
)
_WIDTH = flags.DEFINE_integer("width", 64, "Width of the selector.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 1, "Set-encoder layers.", lower_bound=0)
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; each times all competitors.", lower_bound=1)
_COMPILED = flags.DEFINE_bool("compiled", True, "Compare with torch.compile too.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")

_EXACTNESS = ("max_abs_loss_of_first_step", "max_abs_loss_of_three", "max_abs_param")

RATE = 1e-3
"""Of AdamW, constant."""


def main() -> None:
    """Checks, times, prints and writes."""
    check_out(_OUT.value)
    device = side_by_side.one_device()
    from experiments import roofline

    missing = side_by_side.without_compiler(_COMPILED.value)
    compiled = _COMPILED.value and not missing
    cells, exactness = [], dict.fromkeys(_EXACTNESS, 0.0)
    for batch, pool, shots, group in itertools.product(
        *map(side_by_side.numbers, (_B, _K, _S, _G))
    ):
        if shots > pool:
            raise InputError(f"--S={shots} exceeds --K={pool}; lower it")
        competitors, apart, work = _competitors(batch, pool, shots, group, compiled, device)
        exactness = {name: max(exactness[name], apart[name]) for name in exactness}
        side_by_side.warm_up(competitors, device)
        seconds = side_by_side.timed(
            competitors, _ROUNDS.value, f"B={batch} K={pool} S={shots} G={group}"
        )
        sizes = {"B": batch, "K": pool, "S": shots, "G": group}
        cells.append(_cell(sizes, seconds, roofline.figures(work, device, seconds["ours"])))
        _show(cells[-1])
    document = {
        **side_by_side.machine(device),
        "config": {f.name: f.value for f in (_DIM, _WIDTH, _LAYERS, _HEADS, _ROUNDS)},
        "compiled_left_out": missing,
        "exactness": exactness,
        "cells": cells,
    }
    write_out(_OUT.value, document)


def _cell(sizes, seconds, bounds) -> dict:
    """One entry of `cells`; a ratio above 1 says how many times faster ours is.

    `limit` is that of the fastest program that there could be.
    """
    ours, rivals = seconds["ours"], ("eager", "compiled")
    return {
        **sizes,
        "steps_per_s": side_by_side.ratio(1.0, ours)["median"],
        "groups_per_s": side_by_side.ratio(sizes["B"], ours)["median"],
        **{
            f"ratio_{name}": {
                **side_by_side.ratio(seconds[name], ours),
                "limit": side_by_side.ratio(seconds[name], bounds["least_seconds"])["median"],
            }
            if name in seconds
            else None
            for name in rivals
        },
        **bounds,
        "seconds": {name: values.tolist() for name, values in seconds.items()},
    }


def _show(cell: dict) -> None:
    parts = [f"{cell['steps_per_s']:.1f} steps/s"]
    for name in ("eager", "compiled"):
        if shown := cell[f"ratio_{name}"]:
            parts.append(
                f"{name} {shown['median']:.2f}x ({shown['min']:.2f} to {shown['max']:.2f}, "
                f"at most {shown['limit']:.1f})"
            )
    parts.append(f"{cell['share_of_roofline']:.0%} of the roofline")
    sizes = " ".join(f"{name}={cell[name]}" for name in "BKSG")
    CONSOLE.print(f"  {sizes}: " + ", ".join(parts))


def _competitors(batch: int, pool: int, shots: int, group: int, compiled: bool, device):
    """Functions that take one step each, how far the first three differ, and a step's work.

    Raises:
      InputError: they differ by more than rounding explains.
    """
    import jax
    import numpy as np
    import optax
    import torch

    from experiments.roofline import work_of
    from experiments.sampling_cell import Models
    from experiments.torch_selector import from_flax
    from experiments.torch_training import grpo_step
    from lever_jax.training import GroupBatch, LossConfig, PoolTable, init_state, make_step

    models = Models(_DIM.value, _WIDTH.value, _LAYERS.value, _HEADS.value, device)
    query, embeddings, mask = models.batch(batch, pool)
    rng = np.random.default_rng(2)
    pointers = np.array(
        [[rng.permutation(pool)[:shots] for _ in range(group)] for _ in range(batch)], np.int32
    )
    rewards = rng.random((batch, group), np.float32)
    counted = rng.random((batch, group)) < 0.9
    counted[:, :2] = True
    with torch.no_grad():
        tensors = models.tensors(query, embeddings, mask, pointers.astype(int))
        behaviour = models.torch.pointer_log_probs(*tensors)[0]
    config = LossConfig()

    table = PoolTable(
        *map(jax.numpy.asarray, (query, embeddings.reshape(batch * pool, -1))),
        jax.numpy.arange(batch * pool, dtype=np.int32).reshape(batch, pool),
        jax.numpy.asarray(mask),
        jax.numpy.arange(batch, dtype=np.uint32),
    )
    # PyTorch's lie on its device, too.
    groups = jax.device_put(
        GroupBatch(
            np.arange(batch, dtype=np.int32), pointers, rewards, behaviour.cpu().numpy(), counted
        )
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=1e-4))
    our_step = make_step("grpo", models.policy, optimizer, config)
    work = work_of(our_step, init_state(models.params, optimizer), models.params, table, groups)
    holder = {"state": init_state(models.params, optimizer)}

    def ours():
        holder["state"], metrics = our_step(holder["state"], models.params, table, groups)
        return float(jax.block_until_ready(metrics)["loss"])

    batch_of_torch = (*tensors, behaviour, *models.tensors(rewards, counted))

    def theirs(options):
        model = copy.deepcopy(models.torch).train()
        adamw = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4, foreach=True)
        step = grpo_step(model, models.torch, adamw, config, options)
        return model, side_by_side.finished(lambda: float(step(*batch_of_torch)), device)

    model, eager = theirs(None)
    apart = [abs(ours() - eager()) for _ in range(3)]
    trained = from_flax(models.config, models.parts, holder["state"].params)
    worst = max(
        float((a - b.cpu()).detach().abs().max())
        for a, b in zip(trained.parameters(), model.parameters())
    )
    # Before the first update both have the same weights; then Adam moves weights whose gradient is
    # only rounding as far as all others, and the two part slowly.
    if apart[0] > 1e-5 or max(apart) > 1e-2:
        raise InputError(f"the losses of the two steps differ by {apart}")
    competitors = {"ours": ours, "eager": eager}
    if compiled:
        torch.compiler.reset()
        competitors["compiled"] = theirs(side_by_side.compile_options(device))[1]
    return competitors, dict(zip(_EXACTNESS, (apart[0], max(apart), worst))), work


if __name__ == "__main__":
    cli.run(main)
