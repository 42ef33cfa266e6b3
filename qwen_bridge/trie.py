"""Which prefixes a batch of prompts shares. Pure Python; knows nothing of tensors.

A prompt is system, demonstration 1, demonstration 2, ..., query. Its prefix before the query is
named by the tuple of demonstration ids, `()` for the system turn alone; every prefix of that
tuple is a node of the trie. Nodes are computed level by level, each level a batch.
"""

from collections.abc import Iterable, Mapping, Sequence

Path = tuple[int, ...]

# A forward of n tokens gathers at most so many times n cached keys. Prompts whose images are alike
# have one more segment than shots, so up to 15 shots it is the tokens that fill a batch.
KEYS_PER_TOKEN = 16


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


def fitting_chunks(
    paths: Sequence[Path], sizes: Mapping[Path, int], budget: int
) -> tuple[list[list[int]], dict[int, int]]:
    """Cuts prompts into chunks whose prefix nodes fit a budget together.

    Args:
      paths: each prompt's ordered demonstration ids.
      sizes: bytes of every node of the paths.
      budget: bytes that the distinct nodes of a chunk may take.

    Returns:
      Indices of prompts by chunk, those of like prefixes side by side; and for each prompt whose
      own nodes exceed the budget, their bytes.
    """
    chunks: list[list[int]] = []
    too_large: dict[int, int] = {}
    held: set[Path] = set()
    room = 0
    for i in sorted(range(len(paths)), key=lambda i: paths[i]):
        nodes = {paths[i][:depth] for depth in range(len(paths[i]) + 1)}
        whole = sum(sizes[node] for node in nodes)
        if whole > budget:
            too_large[i] = whole
            continue
        more = sum(sizes[node] for node in nodes - held)
        if not chunks or more > room:
            chunks.append([])
            held, room, more = set(), budget, whole
        chunks[-1].append(i)
        held |= nodes
        room -= more
    return chunks, too_large


def token_batches(
    lengths: Sequence[int], budget: int, prefixes: Sequence[int] | None = None
) -> list[list[int]]:
    """Groups items into batches of similar length whose padded size fits a budget.

    Args:
      lengths: tokens of each item.
      budget: most tokens a batch may hold, padding included; an item beyond it goes alone.
      prefixes: cached tokens before each item; with its own at most `KEYS_PER_TOKEN` times the
        budget in a batch, padding included.

    Returns:
      Indices of items, each exactly once, longest first.
    """
    before = prefixes or [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -before[i]))
    batches: list[list[int]] = []
    longest = 0  # prefix of the open batch
    for i in order:
        if batches:
            width, rows = lengths[batches[-1][0]], len(batches[-1]) + 1
            keys = max(longest, before[i]) + width
            if rows * width <= budget and rows * keys <= KEYS_PER_TOKEN * budget:
                batches[-1].append(i)
                longest = max(longest, before[i])
                continue
        batches.append([i])
        longest = before[i]
    return batches
