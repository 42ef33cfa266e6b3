"""Trains and draws on two forced host devices and on one; prints how far they are apart.

A process of its own: the number of devices is fixed when JAX starts.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from small_world import World

from lever_jax.batches import Batches
from lever_jax.parallel import device_count, make_mesh, replicated
from lever_jax.proposing import Proposer
from lever_jax.training import GroupBatch, LossConfig, init_state, make_optimizer, make_step


def main():
    """One epoch on the mesh and on the first device."""
    world = World(pathlib.Path(tempfile.mkdtemp()))
    rng = np.random.default_rng(0)
    pointers = np.array([[rng.permutation(8)[:2] for _ in range(4)] for _ in range(12)], np.int32)
    groups = GroupBatch(
        np.arange(12, dtype=np.int32),
        pointers,
        rng.normal(size=(12, 4)).astype(np.float32),
        rng.normal(-4, 0.1, (12, 4)).astype(np.float32),
        rng.random((12, 4)) < 0.9,
    )
    results, drawn, seen = [], [], {}
    for mode in ("auto", "off"):
        mesh = make_mesh(mode)
        optimizer = make_optimizer(1e-3, steps=6)
        step = make_step("grpo", world.policy, optimizer, LossConfig(), mesh=mesh)
        reference, state, table = replicated(
            mesh, (world.params, init_state(world.params, optimizer), world.queries.table)
        )
        for pieces in (1, 2):
            batches = Batches(groups, 5, pieces=pieces, devices=device_count(mesh))
            for batch in batches.epoch((pieces,)):
                state, metrics = step(state, reference, table, batch)
        results.append(jax.tree.map(np.asarray, (state.params, metrics)))
        proposer = Proposer(world.policy, world.queries.table, batch=7, mesh=mesh)
        drawn.append(
            proposer.on_policy(world.params, jax.random.key(0), np.arange(12), shots=2, num=5)
        )
        if mesh is not None:
            program = step._whole.lower(state, reference, table, batch[0]).compile()
            (_, _, _, split), _ = program.input_shardings
            rows = split.query_rows.shard_shape(batch[0].query_rows.shape)[0]
            seen = {
                "devices": len(jax.local_devices()),
                "rows": len(batch[0].query_rows),
                "rows_of_a_device": rows,
                "sums_over_devices": "all-reduce" in program.as_text(),
                "devices_of_the_state": len(jax.tree.leaves(state.params)[0].sharding.device_set),
                "programs": step.programs(),
            }
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *results)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), drawn[0], drawn[1])
    world.store.close()
    json.dump(
        {
            **seen,
            "params_apart": max(jax.tree.leaves(apart[0])),
            "metrics_apart": max(jax.tree.leaves(apart[1])),
            "same_pointers": same.pointers,
            "log_probs_apart": float(np.abs(drawn[0].log_probs - drawn[1].log_probs).max()),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
