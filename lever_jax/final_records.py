"""Records that are complete, in memory: on-policy rounds ask for the same prompts again and again.

Reading them from the store takes tens of milliseconds a round, in which the VLM has nothing to do.
"""

from collections import OrderedDict
from collections.abc import Iterable

from lever_jax.store import ScoreRecord

Key = tuple[int, tuple[int, ...]]


class FinalRecords:
    """The latest records that have an answer, which no later call can change; oldest out first.

    Args:
      limit: most records; one takes about 1 KB.
    """

    def __init__(self, limit: int = 1 << 16):
        self._limit = limit
        self._records: OrderedDict[Key, ScoreRecord] = OrderedDict()

    def get(self, key: Key) -> ScoreRecord | None:
        """The record of a query id and a pointer; None where it is not held."""
        return self._records.get(key)

    def add(self, records: Iterable[ScoreRecord]) -> None:
        """Takes those of the records that are final: failures may be asked for again."""
        for record in records:
            if record.answered and record.eval_failed is None:
                self._records[record.query_id, record.pointer] = record
        while len(self._records) > self._limit:
            self._records.popitem(last=False)
