"""Decodes a selector from its checkpoint in every mode, in a process of its own.

    python decode_all.py CHECKPOINT FOLDER OUT.npz

FOLDER is empty; the world is the same in every process, as its seeds are fixed.
"""

import pathlib
import sys

import jax
import numpy as np
from small_world import World

from lever_jax import checkpoint
from lever_jax.decoding import DECODINGS, decode

SHOTS = 3


def decode_all(world, params) -> dict[str, np.ndarray]:
    """Picks of every decoding and, along the greedy picks, the logits they were chosen by."""
    rows = np.arange(len(world.queries))
    found = decode(
        "selector",
        params,
        DECODINGS,
        world.queries,
        world.proposer,
        world.service,
        shots=SHOTS,
        accuracy="accuracy",
        beam_width=3,
        rerank_width=3,
        shuffles=2,
        seed=0,
    )
    arrays = {
        f"{name} {draw}": answered.pointers
        for name, draws in found.items()
        for draw, answered in enumerate(draws)
    }
    arrays["logits"] = logits_along(world, params, found["selector"][0].pointers)
    arrays["log_probs"] = world.proposer.beam(params, rows, shots=SHOTS, width=3).log_probs
    return arrays


def logits_along(world, params, pointers) -> np.ndarray:
    """Logits [Q, S, K] of each shot of the given pointers [Q, S]."""
    policy = world.policy

    @jax.jit
    def every(params, table, pointers):
        def one(query, pool, pointer):
            encoding = policy.encode(params, query, pool)
            state, logits = policy.start(params, encoding), []
            for action in pointer:
                logits.append(policy.logits(params, encoding, state))
                state = policy.update(params, encoding, state, action)
            return jax.numpy.stack(logits)

        return jax.vmap(one)(*table.read(np.arange(len(pointers))), pointers)

    return np.asarray(every(params, world.queries.table, pointers))


def main():
    saved, folder, out = map(pathlib.Path, sys.argv[1:])
    world = World(folder)
    params, _ = checkpoint.restore(saved, jax.eval_shape(world.init, jax.random.key(7)))
    np.savez(out, **decode_all(world, params))
    world.store.close()


if __name__ == "__main__":
    main()
