"""The on-policy rounds of GRPO: the VLM judges one round while JAX trains on another.

With `--overlap`, while the VLM judges round i (main thread), a second thread trains on round i - 1
and then draws round i + 1, so that neither waits for the other. What decides the result is fixed
whatever the timing: the policy before round i's updates draws round i + 1, which is therefore one
round behind when it is trained on; its log-probabilities under the policy that drew it are kept,
and the clipped ratio corrects for the rest. The VLM, the store and Ctrl-C stay in the main thread,
JAX lets go of Python's lock as it computes.

After each round a partial checkpoint holds the state and the parameters that drew the round in
flight; it is drawn again from them when a run is resumed. Another keeps the parameters whose draws
gained most over the first draws for the same queries.
"""

import concurrent.futures
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import configs, settings
from experiments.grpo_programs import GrpoPrograms
from experiments.idle import IdleShares
from experiments.metrics import MetricsLog
from experiments.progress import note
from experiments.watch import Watch, known_picks
from lever_jax import checkpoint
from lever_jax.compilations import count_compilations
from lever_jax.on_policy import Drawn, judge
from lever_jax.parallel import replicated
from lever_jax.policy import Params
from lever_jax.proposing import phase_key
from lever_jax.training import GroupBatch, copied, init_state

PARTIAL = "grpo_rounds"
BEST = "grpo_best"


class _Drawn(NamedTuple):
    """A round that the VLM can judge, and the greedy picks [n, S] of the policy that drew it."""

    groups: Drawn
    greedy: np.ndarray


class _Judged(NamedTuple):
    """A round that can be trained on."""

    number: int
    groups: GroupBatch
    metrics: dict[str, float]


def train_rounds(
    programs: GrpoPrograms, reference: Params, metadata: dict[str, Any], log: MetricsLog
) -> Params | None:
    """Trains over all rounds, or over those that an earlier run of the recipe left.

    Args:
      programs: what runs on the device, of the run; compiled here if they are not yet.
      reference: parameters to start from, and that the KL is measured to.
      metadata: of the phase's checkpoints; its recipe tells whether an earlier run is gone on with.
      log: takes the metrics of every step.

    Returns:
      The parameters to evaluate; None where every group of every round was flat.
    """
    programs.compile_ahead(reference)
    with count_compilations() as compiled:
        rounds = _Rounds(programs, reference, metadata, log, compiled)
        if settings.OVERLAP.value:
            _overlapped(rounds)
        else:
            _in_turn(rounds)
        rounds.summarise()
    return rounds.state.evaluated if rounds.learnt else None


def _in_turn(rounds: "_Rounds") -> None:
    """Draws, judges and trains on one round after the other."""
    for number in range(rounds.first, len(rounds)):
        rounds.train(rounds.judge(number, rounds.draw_due(number)))


def _overlapped(rounds: "_Rounds") -> None:
    """Judges a round while another thread trains on the one before and draws the one after.

    The policy that the run starts from draws two rounds, so the VLM has both to judge if the step
    is still being compiled.
    """
    if rounds.first == len(rounds):
        return

    def train_and_draw(judged: _Judged) -> _Drawn | None:
        rounds.train(judged)
        return rounds.draw_ahead(judged.number + 2)

    thread = concurrent.futures.ThreadPoolExecutor(1, "training")
    try:
        drawn = [rounds.draw_due(rounds.first), rounds.draw_ahead(rounds.first + 1)]
        work = None
        for number in range(rounds.first, len(rounds)):
            judged = rounds.judge(number, drawn.pop(0))
            if work is not None:
                drawn.append(work.result())
            work = thread.submit(train_and_draw, judged)
        work.result()
    finally:
        thread.shutdown(cancel_futures=True)


class _Rounds:
    """State of the training, and what is done with each round.

    `draw` and `train` need JAX only, `judge` the VLM and the store: each may have its thread.

    Attributes:
      state: of the training.
      first: the round to begin with.
      learnt: whether any group so far was not flat.
    """

    def __init__(
        self,
        programs: GrpoPrograms,
        reference: Params,
        metadata: dict[str, Any],
        log: MetricsLog,
        compiled: Callable[[], int],
    ):
        session = programs.session
        self._session, self._programs = session, programs
        self._metadata, self._log = metadata, log
        self._recipe = metadata["recipe"]
        averaged, optimizer = settings.EMA.value > 0, programs.optimizer
        self._reference, self.state = replicated(
            session.mesh, (reference, init_state(reference, optimizer, averaged=averaged))
        )
        # The parameters that draw, or drew, the round that is trained on next.
        self._behaviour = copied(self.state.params)
        self._first_rewards = np.full(len(session.train), np.nan, np.float32)
        self.first, self.learnt = 0, False
        self._partial = session.workdir / "checkpoints" / PARTIAL
        self._best = session.workdir / "checkpoints" / BEST
        self._resume()
        self._watch = Watch(session.workdir, self._recipe, int(self.state.step))
        self._key = phase_key(settings.SEED.value, "grpo")
        self._compiled, self._warm = compiled, None
        self._shares = IdleShares(session.environment)

    def __len__(self) -> int:
        return len(self._programs.rounds)

    def draw_due(self, number: int) -> _Drawn:
        """Draws round `number`, the next to be trained on."""
        return self._draw(number, self._behaviour)

    def draw_ahead(self, number: int) -> _Drawn | None:
        """Draws the round after next from the present policy; None where there is none."""
        return self._draw(number, self.state.params) if number < len(self) else None

    def judge(self, number: int, drawn: _Drawn) -> _Judged:
        """Has the VLM judge a round."""
        session = self._session
        self._shares.begin()
        groups, scores = judge(
            session.train,
            drawn.groups,
            session.service,
            configs.reward_config(),
            verify=settings.VERIFY.value,
            config=configs.mining_config(),
            label=f"GRPO round {number + 1}/{len(self)}",
        )
        metrics = {}
        if len(groups.query_rows):
            metrics = {
                "sample_reward": np.nanmean(scores["reward"]),
                "sample_accuracy": np.nanmean(scores["accuracy"]),
                **known_picks(session, drawn.greedy, drawn.groups.rows),
            }
        return _Judged(number, groups, {**metrics, **self._shares.since_last()})

    def train(self, judged: _Judged) -> None:
        """The updates on a round, and the partial checkpoint after it."""
        number, groups, _ = judged
        with self._shares.jax_busy():
            self._programs.wait_for_step()
            self._keep_best(groups)
            before, rows = copied(self.state.params), []
            if len(groups.query_rows):
                rows = self._updates(judged)
            self._behaviour = before if settings.OVERLAP.value else copied(self.state.params)
            self.learnt |= any(row["flat_share"] < 1 for row in rows)
            metadata = {**self._metadata, "round": number + 1, "learnt": self.learnt}
            checkpoint.save(self._partial, self._in_flight(), metadata)
        if not rows:
            note(f"round {number + 1}: no prompt could be scored; see eval_failed in the store")
            return
        if self._warm is None:
            self._warm = self._compiled()
        flat, kl, entropy = (np.mean([r[n] for r in rows]) for n in ("flat_share", "kl", "entropy"))
        note(
            f"round {number + 1}: samples {rows[0]['sample_accuracy']:.3f} right, {flat:.0%} of "
            f"groups flat and dropped, KL {kl:.3f}, entropy {entropy:.2f} nats"
        )
        self._watch(rows)

    def _keep_best(self, groups: GroupBatch) -> None:
        """Keeps the parameters whose draws gained most over the first draws for the same queries.

        Rounds have different queries, some harder than others: mean rewards do not compare.
        """
        counts = np.maximum(groups.mask.sum(axis=1), 1)
        rewards = np.where(groups.mask, groups.rewards, 0.0).sum(axis=1) / counts
        first = self._first_rewards[groups.query_rows]
        gains = np.where(np.isnan(first), 0.0, rewards - first)
        new = groups.query_rows[np.isnan(first)]
        self._first_rewards[new] = rewards[np.isnan(first)]
        gain = float(gains.mean()) if len(gains) else math.nan
        tree = {"params": self._behaviour}
        checkpoint.save_if_best(self._best, tree, self._metadata, figure="reward_gain", value=gain)

    def summarise(self) -> None:
        """Prints how long each side waited for the other, and what was compiled again."""
        if self._warm is not None:
            seconds, idle = self._shares.total()
            note(
                f"GRPO rounds took {seconds:.0f} s from the first request: the VLM was idle for "
                f"{idle['bridge_idle']:.1%} of it, JAX for {idle['jax_idle']:.1%}; "
                f"{self._compiled() - self._warm} compilations after the first round"
            )

    def _draw(self, number: int, params: Params) -> _Drawn:
        epoch, start = self._programs.rounds[number]
        order = np.random.default_rng([settings.SEED.value, epoch])
        order = order.permutation(len(self._session.train))
        rows = np.sort(order[start : start + settings.GRPO_QUERIES.value])
        key = jax.random.fold_in(self._key, number)
        with self._shares.jax_busy():
            self._programs.wait_for_draws()
            return _Drawn(*self._programs.draw(params, key, rows))

    def _updates(self, judged: _Judged) -> list[dict[str, float]]:
        """Passes over the groups of a round; returns the metrics of each step."""
        number, groups, common = judged
        programs = self._programs
        batches = programs.batches(groups)
        metrics, at = [], int(self.state.step)
        for update in range(settings.GRPO_UPDATES.value):
            for batch in batches.epoch((settings.SEED.value, number, update)):
                if not metrics:
                    common = {**common, "behaviour_error": self._behaviour_error(batch[0])}
                self.state, one = programs.step(self.state, self._reference, programs.table, batch)
                metrics.append(one)
        common["compilations"] = 0 if self._warm is None else self._compiled() - self._warm
        return [
            {"step": step, **self._log.write("grpo", self._recipe, step, {**own, **common})}
            for step, own in enumerate(jax.device_get(metrics), start=at + 1)
        ]

    def _behaviour_error(self, batch: GroupBatch) -> float:
        """How far the losses' log-probabilities are from those that the pointers were drawn with.

        Under the parameters that drew them: the policy that samples is the one that is trained.
        """
        computed = self._programs.log_probs(self._behaviour, self._programs.table, batch)
        return float(
            np.max(np.abs(computed - batch.behaviour_log_probs), where=batch.mask, initial=0)
        )

    def _in_flight(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "behaviour": self._behaviour,
            "first_rewards": self._first_rewards,
        }

    def _resume(self) -> None:
        """Goes on after the last round of an earlier run of the same recipe."""
        if not checkpoint.exists(self._partial):
            return
        if checkpoint.read_metadata(self._partial)["recipe"] != self._recipe:
            return
        tree, metadata = checkpoint.restore(self._partial, self._in_flight())
        self.state, self._behaviour = tree["state"], tree["behaviour"]
        self._first_rewards = tree["first_rewards"]
        self.first, self.learnt = metadata["round"], metadata["learnt"]
        note(f"resumed after round {self.first} of {len(self)}")
