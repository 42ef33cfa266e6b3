"""What GRPO runs on the device: one step, compiled before the first round needs it."""

import concurrent.futures

import jax
import numpy as np

from experiments import configs, settings
from experiments.session import Session
from lever_jax.batches import Batches
from lever_jax.compilations import compiling_ahead
from lever_jax.on_policy import Drawn, draw
from lever_jax.parallel import device_count, replicated
from lever_jax.policy import Params
from lever_jax.training import (
    GroupBatch,
    copied,
    init_state,
    make_log_probs,
    make_optimizer,
    make_step,
)


class GrpoPrograms:
    """The compiled functions of GRPO, and how the queries are cut into rounds.

    Args:
      session: the run.
      shots: S.

    Attributes:
      session, shots: these.
      rounds: epoch and first place in its order of the queries, of each round.
      table: the pools, on all devices.
      optimizer, step, log_probs: see `lever_jax.training`.
    """

    def __init__(self, session: Session, shots: int):
        self.session, self.shots = session, shots
        count, size = len(session.train), settings.GRPO_QUERIES.value
        self.rounds = [
            (epoch, start)
            for epoch in range(settings.GRPO_EPOCHS.value)
            for start in range(0, count, size)
        ]
        self._batch_size = min(settings.BATCH_QUERIES.value, size, count)
        steps = sum(
            settings.GRPO_UPDATES.value * -(-min(size, count - start) // self._batch_size)
            for _, start in self.rounds
        )
        mesh, config = session.mesh, configs.loss_config()
        self.optimizer = make_optimizer(settings.GRPO_RATE.value, steps=steps)
        self.step = make_step(
            "grpo", session.policy, self.optimizer, config, ema=settings.EMA.value, mesh=mesh
        )
        self.log_probs = make_log_probs(session.policy, mesh)
        self.table = replicated(mesh, session.train.table)
        self._ahead: list[concurrent.futures.Future] = []

    def batches(self, groups: GroupBatch) -> Batches:
        """Groups as `step` takes them, in batches of one size: all rounds share one program."""
        return Batches(
            groups,
            self._batch_size,
            pieces=settings.ACCUMULATE.value,
            devices=device_count(self.session.mesh),
            one_size=True,
        )

    def compile_ahead(self, params: Params) -> None:
        """Begins to compile in a thread of its own, what draws first; at most once.

        Args:
          params: of any selector of this architecture.
        """
        if self._ahead:
            return
        thread = concurrent.futures.ThreadPoolExecutor(1, "compiling")
        self._ahead = [
            thread.submit(compile_, params)
            for compile_ in (self._compile_draws, self._compile_step)
        ]
        thread.shutdown(wait=False)

    def wait_for_draws(self) -> None:
        """Waits until what draws is compiled. What went wrong there goes wrong in a draw, too."""
        concurrent.futures.wait(self._ahead[:1])

    def wait_for_step(self) -> None:
        """Waits until all is compiled."""
        concurrent.futures.wait(self._ahead)

    def draw(self, params: Params, key: jax.Array, rows: np.ndarray) -> tuple[Drawn, np.ndarray]:
        """Groups of the training queries `rows`, and the greedy picks [n, S] of the same policy."""
        proposer = self.session.train_proposer
        groups = draw(
            proposer,
            params,
            key,
            rows,
            shots=self.shots,
            group_size=settings.GROUP_SIZE.value,
            draws=settings.DRAWS.value,
        )
        return groups, proposer.greedy(params, rows, shots=self.shots)

    def _compile_draws(self, params: Params) -> None:
        rows = np.arange(min(settings.GRPO_QUERIES.value, len(self.session.train)))
        with compiling_ahead():
            self.draw(params, jax.random.key(0), rows)

    def _compile_step(self, params: Params) -> None:
        """On groups that are thrown away, and copies of the parameters."""
        shape = self._batch_size, settings.GROUP_SIZE.value
        zeros = np.zeros(shape, np.float32)
        groups = GroupBatch(
            np.zeros(shape[0], np.int32),
            np.zeros((*shape, self.shots), np.int32),
            zeros,
            zeros,
            np.ones(shape, bool),
            None if settings.DRAWS.value == "iid" else zeros,
        )
        with compiling_ahead():
            (batch,) = self.batches(groups).epoch((0,))
            averaged = settings.EMA.value > 0
            reference, state = replicated(
                self.session.mesh,
                (params, init_state(params, self.optimizer, averaged=averaged)),
            )
            self.log_probs(copied(reference), self.table, batch[0])
            jax.block_until_ready(self.step(state, reference, self.table, batch))
