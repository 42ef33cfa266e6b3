"""What generation gave for a query before: likely to be what another of its prompts gives."""

import collections

_QUERIES = 1 << 16  # that are remembered
_COUNTED = 16  # outputs of a query that are told apart, for each that is tried


class KnownOutputs:
    """Outputs by query, those given most often first; the queries used last are remembered.

    Args:
      limit: how many outputs `of` returns; 0 remembers nothing.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._outputs: collections.OrderedDict[int, collections.Counter] = collections.OrderedDict()

    def of(self, query_id: int) -> tuple[tuple[int, ...], ...]:
        """The query's usual outputs as tokens, end included."""
        found = self._outputs.get(query_id)
        if found is None:
            return ()
        return tuple(tokens for tokens, _ in found.most_common(self.limit))

    def add(self, query_id: int, tokens: tuple[int, ...]) -> None:
        """Notes that a prompt of the query gave `tokens`, end included."""
        if not self.limit:
            return
        counts = self._outputs.setdefault(query_id, collections.Counter())
        counts[tokens] += 1
        if len(counts) > _COUNTED * self.limit:
            self._outputs[query_id] = collections.Counter(dict(counts.most_common(self.limit)))
        self._outputs.move_to_end(query_id)
        if len(self._outputs) > _QUERIES:
            self._outputs.popitem(last=False)
