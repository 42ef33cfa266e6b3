"""Jitted training steps: supervised, RCE and GRPO, over batches of query groups.

The embeddings lie on the device once (`PoolTable`); a batch names queries by row and carries
pointers and rewards only. A step compiles once for each shape of batch; `batches.py` makes few.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lever_jax.advantages import compute_advantages, without_replacement
from lever_jax.losses import exact_kl, grpo_loss, mean_over_groups, rce_loss, supervised_loss
from lever_jax.masking import is_masked
from lever_jax.parallel import shardings
from lever_jax.policy import Params, Policy, pointer_log_probs
from lever_jax.types import CandidatePool


class PoolTable(NamedTuple):
    """Embeddings of queries and of the demonstrations in their pools, each once.

    Attributes:
      queries: [Q, D] float32 query embeddings.
      bank: [N', D] float32 embeddings of the demonstrations that some pool holds.
      rows: [Q, K] int32 rows of `bank`; anything where the mask is false.
      mask: [Q, K] bool.
      query_ids: [Q] uint32, for keys that do not depend on the batch.
    """

    queries: jax.Array
    bank: jax.Array
    rows: jax.Array
    mask: jax.Array
    query_ids: jax.Array

    def read(self, query_rows: jax.Array) -> tuple[jax.Array, CandidatePool]:
        """Returns queries [B, D] and pools [B, K, D] of the rows [B]."""
        rows = self.rows[query_rows]
        return self.queries[query_rows], CandidatePool(self.bank[rows], self.mask[query_rows])


class GroupBatch(NamedTuple):
    """B query groups of G pointers; padding is masked.

    Attributes:
      query_rows: [B] int32 rows of the pool table.
      pointers: [B, G, S] int32 actions.
      rewards: [B, G] float32; weights of the targets in the supervised step.
      behaviour_log_probs: [B, G] float32, read by GRPO only.
      mask: [B, G] bool, which pointers count.
      inclusion_log_probs: [B, G] float32, log-probability that a pointer is in its group, where
        GRPO's groups were drawn without replacement; else None.
    """

    query_rows: np.ndarray
    pointers: np.ndarray
    rewards: np.ndarray
    behaviour_log_probs: np.ndarray
    mask: np.ndarray
    inclusion_log_probs: np.ndarray | None = None


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      params: of the selector.
      opt_state: of the optimiser.
      step: int32, optimiser steps done.
      average: moving average of the parameters, or None where none is kept.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    average: Params | None = None

    @property
    def evaluated(self) -> Params:
        """What a phase hands on: the average where one is kept, else the parameters."""
        return self.params if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the losses; see `losses.py` for each.

    Attributes:
      tau: temperature of RCE's softmax over rewards, > 0.
      advantage: `group`, `mean`, `leave_one_out` or `rank`.
      clip_low: GRPO's ratio is clipped below at 1 - clip_low.
      clip_high: and above at 1 + clip_high.
      kl_coef: weight of the exact KL to the reference, nats.
      min_range: a group whose rewards span less is flat and dropped.
      draws: how GRPO's groups are drawn, of `DRAWS`; only i.i.d. draws have an `advantage`.
    """

    tau: float = 1.0
    advantage: str = "group"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.02
    min_range: float = 1e-3
    draws: str = "iid"


DRAWS = ("iid", "sbs", "sbs_normalised")
"""I.i.d., or without replacement, with the unbiased estimator or the one of lower variance."""

LOSS_FIELDS = {
    "supervised": (),
    "rce": ("tau", "min_range"),
    "grpo": ("advantage", "clip_low", "clip_high", "kl_coef", "min_range", "draws"),
}
"""The fields of `LossConfig` that each kind of step reads."""


def make_optimizer(
    learning_rate: float, *, steps: int, warmup: int = 20, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """AdamW with a short linear warm-up, a cosine to a tenth, and gradients clipped to norm 1."""
    warmup = min(warmup, max(steps // 5, 1))
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / 10, learning_rate, warmup, max(steps, warmup + 1), learning_rate / 10
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay)
    )


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """A fresh state around `params`, which are copied so that donation cannot delete them.

    Where it is `averaged`, steps keep a moving average with the decay d of `make_step`:

    average_t = (1 - d) / (1 - d^t) * sum_i d^(t - i) params_i,  i = 1 ... t

    so that it holds nothing of where training started.
    """
    params = copied(params)
    average = copied(params) if averaged else None
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), average)


def copied(params: Params) -> Params:
    """Parameters that a donation of the given ones does not delete."""
    return jax.tree.map(jnp.array, params)


def log_probs_of(policy: Policy, params: Params, query, pool: CandidatePool, pointers, key=None):
    """Log-probabilities [G] and per-step distributions [G, S, A] of one query's pointers.

    With a key the encoding is that of a policy with dropout.
    """
    encoding = policy.encode(params, query, pool, *([] if key is None else [key]))
    return pointer_log_probs(policy, params, encoding, pool.mask, pointers)


class _Totals(NamedTuple):
    """How many groups of a step there are: those that counted, and those present."""

    counted: jax.Array
    present: jax.Array


def make_step(
    kind: str,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    *,
    ema: float = 0.0,
    mesh: jax.sharding.Mesh | None = None,
    dropout_seed: int = 0,
) -> "Step":
    """Returns the jitted step of a phase.

    Args:
      kind: `supervised`, `rce` or `grpo`.
      policy: the selector.
      optimizer: from `make_optimizer`.
      config: settings of the losses.
      ema: in [0, 1), decay of the average that the state keeps if `init_state` gave it one.
      mesh: devices that share each batch, from `parallel.make_mesh`.
      dropout_seed: of what a policy with dropout leaves out.
    """
    losses = {"supervised": _supervised, "rce": _rce, "grpo": _grpo}[kind]

    def groups_of(params, reference, table, batch, step):
        query, pool = table.read(batch.query_rows)
        keys = None
        # GRPO never drops: its ratio compares with what sampling, which does not drop, said.
        if policy.dropout and kind != "grpo":
            keys = _dropout_keys(dropout_seed, table.query_ids[batch.query_rows], step)
        per_query = functools.partial(losses, policy, config, params, reference)
        loss, counted, aux = jax.vmap(per_query)(query, pool, batch, keys)
        present = jnp.any(batch.mask, axis=1)
        return loss, counted, aux, present

    def count(params, reference, table, batch):
        # Neither depends on the parameters: XLA leaves the network out.
        _, counted, _, present = groups_of(params, reference, table, batch, 0)
        return _Totals(jnp.sum(counted), jnp.sum(present))

    def loss_fn(params, reference, table, batch, step, totals):
        """Loss and metrics of a batch, or a part's share in those of the whole."""
        loss, counted, aux, present = groups_of(params, reference, table, batch, step)
        own = _Totals(jnp.sum(counted), jnp.sum(present))
        totals = own if totals is None else totals
        total = mean_over_groups(loss, counted, totals.counted)
        number = jnp.maximum(totals.present, 1)
        metrics = {
            "loss": total,
            "groups": own.present,
            "flat_share": (own.present - own.counted) / number,
            **{name: jnp.sum(jnp.where(present, value, 0)) / number for name, value in aux.items()},
        }
        # The penalty holds every policy near its reference, flat groups included.
        return total + config.kl_coef * metrics["kl"] if kind == "grpo" else total, metrics

    def part(params, reference, table, batch, step, totals):
        grad = jax.grad(loss_fn, has_aux=True)
        return grad(params, reference, table, batch, step, totals)

    def finish(state: TrainState, grads, metrics):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        average, step = state.average, state.step + 1
        if average is not None:
            weight = (1.0 - ema) / (1.0 - ema ** step.astype(jnp.float32))
            average = jax.tree.map(lambda a, b: a + weight * (b - a), average, params)
        return TrainState(params, opt_state, step, average), metrics

    def whole(state, reference, table, batch):
        return finish(state, *part(state.params, reference, table, batch, state.step, None))

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def jit(fn, arguments, **options):
        return jax.jit(fn, **options, **shardings(mesh, arguments, "w"))

    return Step(
        whole=jit(whole, "wwws", donate_argnums=0),
        count=jit(count, "wwws"),
        part=jit(part, "wwwsww"),
        add=jit(add, "ww", donate_argnums=0),
        finish=jit(finish, "www", donate_argnums=0),
    )


class Step:
    """One optimiser step over a batch of groups, whole or in parts.

    step(state, reference, table, batch) -> (state, metrics): the new state (the old one is
    donated) and scalars. `reference` are the parameters that the KL of GRPO is measured to.
    `batch` is a GroupBatch or a list of them, the parts of one batch: their gradients are added
    up, each divided by the number of groups that count in all of them, so that the step is that
    of the whole batch.
    """

    def __init__(self, *, whole, count, part, add, finish):
        self._whole, self._count, self._part = whole, count, part
        self._add, self._finish = add, finish

    def __call__(
        self,
        state: TrainState,
        reference: Params,
        table: PoolTable,
        batch: GroupBatch | Sequence[GroupBatch],
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """See the class."""
        parts = [batch] if isinstance(batch, GroupBatch) else list(batch)
        if len(parts) == 1:
            return self._whole(state, reference, table, parts[0])
        totals = [self._count(state.params, reference, table, each) for each in parts]
        totals = functools.reduce(self._add, totals)
        done = None
        for each in parts:
            own = self._part(state.params, reference, table, each, state.step, totals)
            done = own if done is None else self._add(done, own)
        return self._finish(state, *done)

    def programs(self) -> int:
        """How many programs were compiled for it."""
        functions = (self._whole, self._count, self._part, self._add, self._finish)
        return sum(each._cache_size() for each in functions)


def make_log_probs(policy: Policy, mesh: jax.sharding.Mesh | None = None):
    """Returns (params, table, batch) -> log-probabilities [B, G] as the losses compute them."""

    def log_probs(params, table, batch):
        query, pool = table.read(batch.query_rows)
        one = functools.partial(log_probs_of, policy, params)
        return jax.vmap(lambda *own: one(*own)[0])(query, pool, batch.pointers)

    return jax.jit(log_probs, **shardings(mesh, "wws", "s"))


def _dropout_keys(seed: int, query_ids: jax.Array, step: jax.Array) -> jax.Array:
    """A key [B] for each query of a step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, query_ids)


def _entropy(step_log_probs, mask):
    """Mean entropy in nats of the picks that had a choice, over the pointers that count."""
    possible = ~is_masked(step_log_probs)  # [G, S, A]
    per_step = -jnp.sum(jnp.where(possible, jnp.exp(step_log_probs) * step_log_probs, 0.0), axis=-1)
    choice = mask[:, None] & (jnp.sum(possible, axis=-1) > 1)
    return jnp.sum(jnp.where(choice, per_step, 0.0)) / jnp.maximum(jnp.sum(choice), 1)


def _supervised(policy, config, params, reference, query, pool, group, key):
    del config, reference
    log_probs, steps = log_probs_of(policy, params, query, pool, group.pointers, key)
    loss, counted = supervised_loss(log_probs, weights=group.rewards, where=group.mask)
    return loss, counted, {"entropy": _entropy(steps, group.mask)}


def _rce(policy, config, params, reference, query, pool, group, key):
    del reference
    log_probs, steps = log_probs_of(policy, params, query, pool, group.pointers, key)
    loss, counted = rce_loss(
        log_probs,
        group.rewards,
        temperature=config.tau,
        where=group.mask,
        min_range=config.min_range,
    )
    return loss, counted, {"entropy": _entropy(steps, group.mask)}


def _grpo(policy, config, params, reference, query, pool, group, key):
    del key
    log_probs, steps = log_probs_of(policy, params, query, pool, group.pointers)
    _, reference_steps = log_probs_of(policy, reference, query, pool, group.pointers)
    weights = None
    if config.draws == "iid":
        advantages = compute_advantages(
            config.advantage, group.rewards, where=group.mask, min_range=config.min_range
        )
    else:
        advantages, weights = without_replacement(
            group.rewards,
            group.behaviour_log_probs,
            group.inclusion_log_probs,
            where=group.mask,
            normalised=config.draws == "sbs_normalised",
            min_range=config.min_range,
        )
    loss, aux = grpo_loss(
        log_probs,
        group.behaviour_log_probs,
        advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        where=group.mask,
        weights=weights,
    )
    drift = jnp.max(jnp.where(group.mask, jnp.abs(log_probs - group.behaviour_log_probs), 0.0))
    return (
        loss,
        aux.counted,
        {
            "entropy": _entropy(steps, group.mask),
            "kl": exact_kl(steps, jax.lax.stop_gradient(reference_steps), group.mask, weights),
            "clip_share": aux.clip_share,
            "ratio": aux.ratio_mean,
            "behaviour_drift": drift,
            "advantage_abs": jnp.sum(jnp.abs(advantages)) / jnp.maximum(jnp.sum(group.mask), 1),
        },
    )
