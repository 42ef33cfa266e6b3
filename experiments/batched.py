"""The environment with the request size of a run."""

from qwen_bridge.client import Environment


class BatchedEnvironment:
    """The environment with the run's request size, as `ScoringService` calls it."""

    def __init__(self, environment: Environment, batch: int):
        self._environment, self._batch = environment, batch

    def score(self, queries, pointers, on_batch=None):
        """See `Environment.score`."""
        return self._environment.score(queries, pointers, on_batch, batch_size=self._batch)

    def answer(self, queries, pointers, on_batch=None):
        """See `Environment.answer`."""
        return self._environment.answer(queries, pointers, on_batch, batch_size=self._batch)
