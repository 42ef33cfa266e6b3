"""What was used most recently, kept under a byte budget."""

import collections
from collections.abc import Hashable
from typing import Any


class RecentlyUsed:
    """A dictionary that forgets its least recently used entries.

    Entries that a caller still holds live on until it lets go of them: the budget is for what is
    kept beyond that.

    Args:
      budget: bytes that the entries may take together; an entry larger than it is not kept.

    Attributes:
      bytes: what the entries take now.
      evictions: how many entries were forgotten.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.bytes = 0
        self.evictions = 0
        self._entries: collections.OrderedDict[Hashable, tuple[Any, int]] = (
            collections.OrderedDict()
        )

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any | None:
        """The entry of `key`, which is now the one most recently used; None if there is none."""
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keeps `value` of `size` bytes, in place of an earlier entry of `key`."""
        if key in self._entries:
            self.bytes -= self._entries.pop(key)[1]
        if size > self.budget:
            return
        self._entries[key] = (value, size)
        self.bytes += size
        while self.bytes > self.budget:
            _, (_, gone) = self._entries.popitem(last=False)
            self.bytes -= gone
            self.evictions += 1

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.bytes = 0
