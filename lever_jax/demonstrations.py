"""A trained selector as a library: which demonstrations to show with a new image and question.

    encoder = RunEncoder.open("runs/digits")                     # qwen_bridge.encoding
    selector = DemonstrationSelector.restore("runs/digits", encoder)
    pick = selector.pick("kitchen.jpg", "What is on the stove?", shots=2)
    [encoder.demonstration(i) for i in pick.demonstrations]

Pools, parameters and embeddings are those of the run: the same functions make them as in training
and evaluation. The two halves of the package meet only in the caller's program, which hands the
encoder over.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lever_jax import checkpoint
from lever_jax.errors import InputError
from lever_jax.policy import Policy
from lever_jax.pooled import Embedded, PoolConfig, make_pools
from lever_jax.sampling import beam_search
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.types import CandidatePool

RUN_FILE = "run.json"
PHASES = ("grpo", "rce", "warmup")
# A new query has no id of the data set's; no demonstration has this one.
_NEW = -1
# Queries of one call: always as many, so that one compilation serves any number.
_BATCH = 8


class Encoder(Protocol):
    """What the selector asks of an encoder; `qwen_bridge.encoding.RunEncoder` is one.

    Attributes:
      fingerprint: identifies the vectors it gives; must be that of the run.
    """

    fingerprint: str

    def bank(self) -> tuple[np.ndarray, Sequence[str], Any]:
        """Ids int64 [N], image keys and embeddings [N, D] of the run's demonstrations."""

    def queries(self, images: Sequence, questions: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Image keys and embeddings float32 [Q, D] of new queries."""


class Pick(NamedTuple):
    """The demonstrations to show with one query.

    Attributes:
      demonstrations: ids in prompt order, the last next to the query; fewer than `shots` where a
        selector that can stop did.
      log_prob: log-probability of this pointer under the selector, nats.
      pool: ids of the candidates it was chosen from, most similar first.
    """

    demonstrations: tuple[int, ...]
    log_prob: float
    pool: tuple[int, ...]


class DemonstrationSelector:
    """Picks demonstrations for new queries; make one with `restore`.

    Attributes:
      phase: of the checkpoint: `warmup`, `rce` or `grpo`.
      shots: S in training; any number of shots up to the pool's size can be asked for.
    """

    def __init__(self, encoder: Encoder, metadata: dict, pools: PoolConfig, policy, params):
        self._encoder, self._metadata, self._pools = encoder, metadata, pools
        self._policy, self._params = policy, params
        ids, images, embeddings = encoder.bank()
        self._bank = Embedded(np.asarray(ids, np.int64), tuple(images), embeddings)
        self.phase, self.shots = metadata["phase"], metadata["shots"]

    @classmethod
    def restore(
        cls, workdir: str | pathlib.Path, encoder: Encoder, phase: str | None = None
    ) -> "DemonstrationSelector":
        """Restores the selector of a run.

        Args:
          workdir: of the run.
          encoder: the run's own, opened by the caller.
          phase: whose checkpoint; the last that the run has by default.

        Raises:
          InputError: no such checkpoint, a damaged one, or another encoder than the run's.
        """
        workdir = pathlib.Path(workdir)
        found = [name for name in PHASES if checkpoint.exists(workdir / "checkpoints" / name)]
        if not found or phase not in (None, *found):
            raise InputError(
                f"{workdir} has no checkpoint{f' of phase {phase!r}' if phase else ''}; "
                f"it has {', '.join(found) or 'none: train first'}"
            )
        path = workdir / "checkpoints" / (phase or found[0])
        metadata = checkpoint.read_metadata(path)
        if metadata["encoder"] != encoder.fingerprint:
            raise InputError(
                f"{path} was trained on embeddings of encoder {metadata['encoder']}, not "
                f"{encoder.fingerprint}; open the encoder of this very run"
            )
        init, policy = make_selector(
            SelectorConfig(**metadata["selector"]), metadata["parts"], metadata["embedding_dim"]
        )
        tree, _ = checkpoint.restore(path, {"params": jax.eval_shape(init, jax.random.key(0))})
        pools = PoolConfig(**json.loads((workdir / RUN_FILE).read_text())["pools"])
        return cls(encoder, metadata, pools, policy, tree["params"])

    def pick(self, image, question: str, *, shots: int | None = None, beam: int = 1) -> Pick:
        """Picks demonstrations for one query; see `pick_batch`."""
        return self.pick_batch([image], [question], shots=shots, beam=beam)[0]

    def pick_batch(
        self,
        images: Sequence,
        questions: Sequence[str],
        *,
        shots: int | None = None,
        beam: int = 1,
    ) -> list[Pick]:
        """Picks demonstrations for many queries, each as if it were alone.

        Args:
          images: what the encoder reads: paths, or PIL images.
          questions: one an image.
          shots: S; as in training by default.
          beam: width of the search for the most probable pointer; 1 is greedy.

        Raises:
          InputError: an unreadable image, lists of different lengths, too many shots.
        """
        shots = self.shots if shots is None else shots
        if len(images) != len(questions):
            raise InputError(f"{len(images)} images beside {len(questions)} questions")
        if not 1 <= shots <= min(8, self._pools.size):
            raise InputError(f"shots={shots} is out of range; give 1 to {min(8, self._pools.size)}")
        if not len(images):
            return []
        keys, embeddings = self._encoder.queries(images, questions)
        ids = np.full(len(keys), _NEW, np.int64)
        queries = Embedded(ids, tuple(keys), embeddings)
        pools = make_pools(queries, self._bank, self._metadata["parts"], self._pools)
        picks = []
        for start in range(0, len(keys), _BATCH):
            some = slice(start, start + _BATCH)
            rows, mask = pools.rows[some], pools.mask[some]
            pool = CandidatePool(self._bank.embeddings[rows], mask)
            pointers, log_probs = _most_probable(
                self._policy, self._params, *_padded(embeddings[some], pool), shots, beam
            )
            picks += [
                Pick(
                    tuple(ids[pointer[pointer >= 0]].tolist()),
                    float(log_prob),
                    tuple(ids[known].tolist()),
                )
                for ids, known, pointer, log_prob in zip(
                    self._bank.ids[rows], mask, np.asarray(pointers), np.asarray(log_probs)
                )
            ]
        return picks


def _padded(queries: np.ndarray, pool: CandidatePool) -> tuple[np.ndarray, CandidatePool]:
    """Repeats the last of n <= _BATCH queries until there are _BATCH."""
    missing = _BATCH - len(queries)

    def pad(array):
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), mode="edge")

    return pad(queries), CandidatePool(*map(pad, pool))


@functools.partial(jax.jit, static_argnames=("policy", "shots", "width"))
def _most_probable(policy: Policy, params, queries, pools: CandidatePool, shots: int, width: int):
    """Pointers [B, S] that a beam search finds most probable, and their log-probabilities [B]."""

    def one(query, pool):
        encoding = policy.encode(params, query, pool)
        found = beam_search(policy, params, encoding, pool.mask, num=width, shots=shots)
        return found.pointers[0], found.log_probs[0]

    return jax.vmap(one)(queries, pools)
