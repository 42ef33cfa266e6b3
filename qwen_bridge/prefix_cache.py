"""Keys and values of prompt prefixes, kept under a byte budget.

Each node keeps only its own segment; a path's cache is its nodes end to end. The least recently
used nodes go first, deep ones before those of depth 0 and 1, which most prompts share.
"""

import collections
import dataclasses
from collections.abc import Collection

import torch

from qwen_bridge.trie import Path


@dataclasses.dataclass(slots=True)
class PrefixNode:
    """One computed segment of a prefix.

    Attributes:
      kv: `[layers, 2, heads, L, head_dim]` keys and values of the segment's own tokens.
      next_position: M-RoPE counter after the segment.
    """

    kv: torch.Tensor
    next_position: int

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return self.kv.numel() * self.kv.element_size()


class PrefixCache:
    """Nodes by path, least recently used first to go.

    Args:
      budget: bytes that nodes may hold, see `make_room`.

    Attributes:
      evictions: how many nodes were evicted.
      hits: how many nodes of the prompts' prefixes were there already.
      misses: how many had to be computed.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self._shallow: collections.OrderedDict[Path, PrefixNode] = collections.OrderedDict()
        self._deep: collections.OrderedDict[Path, PrefixNode] = collections.OrderedDict()
        self._bytes = 0
        self.evictions = self.hits = self.misses = 0

    def __contains__(self, path: Path) -> bool:
        return path in self._shelf(path)

    def __len__(self) -> int:
        return len(self._shallow) + len(self._deep)

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def put(self, path: Path, node: PrefixNode) -> None:
        """Adds a node; nothing is evicted, see `make_room`."""
        self._shelf(path)[path] = node
        self._bytes += node.bytes

    def path(self, path: Path) -> list[PrefixNode]:
        """Returns the nodes of a prefix from the system turn on, and marks them as used."""
        nodes = []
        for depth in range(len(path) + 1):
            prefix = path[:depth]
            shelf = self._shelf(prefix)
            shelf.move_to_end(prefix)
            nodes.append(shelf[prefix])
        return nodes

    def make_room(self, wanted: int, spared: Collection[Path]) -> None:
        """Evicts until `wanted` more bytes fit into the budget.

        Args:
          wanted: bytes of the nodes that will be put next.
          spared: nodes in use; with them and what is wanted the budget must do.
        """
        for shelf in (self._deep, self._shallow):
            for path in [path for path in shelf if path not in spared]:
                if self._bytes + wanted <= self.budget:
                    return
                self._bytes -= shelf.pop(path).bytes
                self.evictions += 1

    def clear(self) -> None:
        """Forgets every node."""
        self._shallow.clear()
        self._deep.clear()
        self._bytes = 0

    def _shelf(self, path: Path):
        return self._shallow if len(path) <= 1 else self._deep
