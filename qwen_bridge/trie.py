"""Which prefixes a batch of prompts shares. Pure Python; knows nothing of tensors.

A prompt is system, demonstration 1, demonstration 2, ..., query. Its prefix before the query is
named by the tuple of demonstration ids, `()` for the system turn alone; every prefix of that
tuple is a node of the trie. Nodes are computed level by level, each level a batch.
"""

from collections.abc import Iterable

Path = tuple[int, ...]


def levels(paths: Iterable[Path], known=frozenset()) -> list[list[Path]]:
    """Lists the nodes that `paths` need and that are not known yet, by depth.

    Args:
      paths: each prompt's ordered demonstration ids; duplicates are welcome.
      known: nodes that are computed already; anything with `in`.

    Returns:
      `result[d]` has the distinct missing nodes of depth `d`, in order of first need.
    """
    wanted: dict[Path, None] = {}
    for path in dict.fromkeys(tuple(path) for path in paths):
        for depth in range(len(path) + 1):
            wanted.setdefault(path[:depth])
    missing = [node for node in wanted if node not in known]
    depth = max(map(len, missing), default=-1) + 1
    result: list[list[Path]] = [[] for _ in range(depth)]
    for node in missing:
        result[len(node)].append(node)
    return result


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Groups items into batches of similar length whose padded size fits a budget.

    Args:
      lengths: tokens of each item.
      budget: most tokens a batch may hold, padding included; an item beyond it goes alone.

    Returns:
      Indices of items, each exactly once, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
