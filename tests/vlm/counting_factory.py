"""The usual worker, which also says what it was asked and how many prefixes it found in its cache.

Workers of the bridge import it by name; what it says comes to the driver as notes.
"""

import json
import os

from qwen_bridge import workers


def build(settings: dict):
    """As `workers.build`; after each request a note with worker, queries, hits and misses."""
    scorer, hello = workers.build(settings)
    score = scorer.score

    def counted(queries, pointers):
        cache = scorer.cache
        before = cache.hits, cache.misses
        batch = score(queries, pointers)
        said = {
            "worker": int(os.environ["QWEN_BRIDGE_WORKER"]),
            "queries": sorted(set(queries.tolist())),
            "first": pointers[0].tolist(),
            "hits": cache.hits - before[0],
            "misses": cache.misses - before[1],
        }
        scorer.notes.append(json.dumps(said))
        return batch

    scorer.score = counted
    return scorer, hello
