"""Draws pointers for many queries at once: samplers lifted over batches of fixed size.

One compilation for each method, shots and number of pointers. Every query has its own key, made
from the phase's key and the query's id, so its draws do not depend on the batch it is in.
"""

import functools
import zlib
from collections.abc import Mapping

import jax
import numpy as np

from lever_jax.parallel import device_count, over_queries, replicated, shardings
from lever_jax.policy import Params, Policy
from lever_jax.sampling import (
    beam_search,
    inclusion_log_probs,
    local_search,
    sample_mixture,
    sample_temperature,
    stochastic_beam_search,
)
from lever_jax.training import PoolTable
from lever_jax.types import Rollouts, source_index


class Proposer:
    """Samplers over the queries of a pool table.

    Args:
      policy: the selector.
      table: embeddings and pools, on the device.
      batch: queries of one call; the last call is padded.
      mesh: devices that share each call, from `parallel.make_mesh`.
    """

    def __init__(
        self,
        policy: Policy,
        table: PoolTable,
        batch: int = 64,
        mesh: jax.sharding.Mesh | None = None,
    ):
        devices = device_count(mesh)
        self._policy, self._table = policy, replicated(mesh, table)
        self._batch, self._mesh = -(-batch // devices) * devices, mesh
        self._compiled: dict[tuple, object] = {}

    @property
    def stops(self) -> bool:
        """Whether pointers may end before S picks."""
        return self._policy.stops

    def beam(self, params: Params, rows: np.ndarray, *, shots: int, width: int) -> Rollouts:
        """The most probable pointers found by beam search of `width`, best first; 1 is greedy."""

        def draw(policy, params, key, encoding, mask):
            del key
            return beam_search(policy, params, encoding, mask, num=width, shots=shots)

        return self._run(("beam", shots, width), draw, params, jax.random.key(0), rows)

    def greedy(self, params: Params, rows: np.ndarray, *, shots: int) -> np.ndarray:
        """Returns int32 [n, S] actions, the most probable at each shot; -1 after the end."""
        return self.beam(params, rows, shots=shots, width=1).pointers[:, 0]

    def on_policy(
        self, params: Params, key: jax.Array, rows: np.ndarray, *, shots: int, num: int
    ) -> Rollouts:
        """Independent draws from the policy itself, tagged `policy`."""

        def draw(policy, params, key, encoding, mask):
            drawn = sample_temperature(policy, params, key, encoding, mask, num=num, shots=shots)
            return drawn._replace(sources=jax.numpy.full(num, source_index("policy")))

        return self._run(("policy", shots, num), draw, params, key, rows)

    def without_replacement(
        self, params: Params, key: jax.Array, rows: np.ndarray, *, shots: int, num: int
    ) -> tuple[Rollouts, np.ndarray]:
        """Different draws from the policy, and their inclusion log-probabilities [n, num]."""

        def draw(policy, params, key, encoding, mask):
            drawn = stochastic_beam_search(
                policy, params, key, encoding, mask, num=num, shots=shots
            )
            log_probs = drawn.rollouts.log_probs
            return drawn.rollouts, inclusion_log_probs(log_probs, drawn.threshold)

        return self._run(("sbs", shots, num), draw, params, key, rows)

    def mixture(
        self,
        params: Params,
        key: jax.Array,
        rows: np.ndarray,
        *,
        shots: int,
        num: int,
        quotas: Mapping[str, int],
        temperature: float,
        top_p: float,
    ) -> Rollouts:
        """Different pointers from several samplers, see `sample_mixture`."""

        def draw(policy, params, key, encoding, mask):
            return sample_mixture(
                policy,
                params,
                key,
                encoding,
                mask,
                num=num,
                shots=shots,
                quotas=quotas,
                temperature=temperature,
                top_p=top_p,
            )

        name = ("mixture", shots, num, tuple(quotas.items()), temperature, top_p)
        return self._run(name, draw, params, key, rows)

    def local_search(
        self,
        params: Params,
        key: jax.Array,
        rows: np.ndarray,
        scored: Rollouts,
        scores: np.ndarray,
        *,
        num: int,
    ) -> Rollouts:
        """New pointers near the best of those that were scored, see `sampling.local_search`.

        Args:
          params: of the selector.
          key: of the phase.
          rows: int [n].
          scored: Rollouts [n, G] of these queries.
          scores: [n, G] higher is better; NaN where unknown.
          num: pointers a query.

        Returns:
          Rollouts [n, num].
        """

        def draw(policy, params, key, encoding, mask, scored, scores):
            return local_search(policy, params, key, encoding, mask, scored, scores, num=num)

        name = ("local_search", *scored.pointers.shape[1:], num)
        return self._run(name, draw, params, key, rows, scored, np.asarray(scores, np.float32))

    def _run(self, name: tuple, draw, params: Params, key: jax.Array, rows, *given):
        """Draws for the queries of `rows` [n]; `given` are trees of arrays [n, ...] of theirs."""
        if name not in self._compiled:
            split = shardings(self._mesh, "www" + "s" * (1 + len(given)), "s")
            self._compiled[name] = jax.jit(functools.partial(self._many, draw), **split)
        run, rows = self._compiled[name], np.asarray(rows, np.int32)
        parts = []
        for start in range(0, len(rows), self._batch):
            chunk, own = jax.tree.map(
                lambda x: self._padded(x[start : start + self._batch]),  # noqa: B023
                (rows, given),
            )
            parts.append(run(params, key, self._table, chunk, *own))
        return jax.tree.map(lambda *own: np.concatenate(own)[: len(rows)], *parts)

    def _padded(self, array: np.ndarray) -> np.ndarray:
        """An array [n, ...] repeated at its end to the batch's size."""
        missing = [(0, self._batch - len(array))] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, missing, mode="edge")

    def _many(self, draw, params, key, table, rows, *given):
        def one(query, pool, query_id, *given):
            encoding = self._policy.encode(params, query, pool)
            key_of_query = jax.random.fold_in(key, query_id)
            return draw(self._policy, params, key_of_query, encoding, pool.mask, *given)

        query, pool = table.read(rows)
        return over_queries(one, self._mesh)(query, pool, table.query_ids[rows], *given)


def phase_key(seed: int, phase: str) -> jax.Array:
    """The key of a phase: a stream of its own, whatever ran before or was resumed."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(phase.encode()))
