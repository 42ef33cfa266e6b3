"""One cell of the sampling benchmark: the same pools for our sampler and for PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments import torch_samplers
from experiments.roofline import Work, work_of
from experiments.side_by_side import compile_options, finished
from experiments.torch_selector import from_flax
from lever_jax import sampling
from lever_jax.errors import InputError
from lever_jax.parallel import over_queries
from lever_jax.policy import pointer_log_probs
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.types import CandidatePool

MIXTURE = {"retrieval": 4, "beam": 16, "sbs": 24, "top_p": 8, "random": 12}
"""Shares of a group; a local search, which needs scores, is not timed."""

_CPU = torch.device("cpu")

METHODS = (*torch_samplers.METHODS, "sbs", "random", "mixture")


class Models:
    """The selector with random weights, in JAX and in PyTorch.

    Args:
      dim: D, split into three equal parts; the query's last is zero, as an answer's.
      width: of the selector.
      layers: of its set encoder.
      heads: of each layer.
      device: of the PyTorch selector.
    """

    def __init__(self, dim: int, width: int, layers: int, heads: int, device: torch.device = _CPU):
        self.device = device
        third = dim // 3
        names = ("image", "question", "answer")
        self.parts = {n: (i * third, (i + 1) * third) for i, n in enumerate(names)}
        self.dim, self.config = 3 * third, SelectorConfig(width, layers, heads)
        init, self.policy = make_selector(self.config, self.parts, self.dim)
        params = jax.jit(init)(jax.random.key(0))
        rng = np.random.default_rng(0)
        # Opinions: an untrained selector is close to uniform, and hides mistakes.
        self.params = jax.tree.map(
            lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params
        )
        self.torch = from_flax(self.config, self.parts, self.params).eval().to(device)

    def batch(self, queries: int, pool: int, seed: int = 0):
        """Random embeddings [B, D] and [B, K, D] and a mask of full pools."""
        rng = np.random.default_rng(seed)
        query = rng.standard_normal((queries, self.dim), np.float32)
        query[:, self.parts["answer"][0] :] = 0.0
        embeddings = rng.standard_normal((queries, pool, self.dim), np.float32)
        return query, embeddings, np.ones((queries, pool), bool)

    def tensors(self, *arrays) -> list[torch.Tensor]:
        """Arrays where the PyTorch selector is."""
        return [torch.from_numpy(x).to(self.device) for x in arrays]


class Cell:
    """A method at one size.

    Args:
      models: the two selectors.
      method: one of `METHODS`.
      batch: B.
      pool: K.
      shots: S.
      num: G.
    """

    def __init__(self, models: Models, method: str, batch: int, pool: int, shots: int, num: int):
        self._models, self._method = models, method
        self._shots, self._num = shots, num
        self._arrays = models.batch(batch, pool)
        self._tensors = models.tensors(*self._arrays)

    def difference(self) -> float:
        """Largest difference of the two networks' log-probabilities of the same pointers.

        Raises:
          InputError: it is more than rounding explains.
        """
        query, embeddings, mask = (x[:4] for x in self._arrays)
        rng = np.random.default_rng(1)
        pointers = np.array(
            [[rng.permutation(mask.shape[1])[: self._shots] for _ in range(8)] for _ in query]
        )
        models = self._models

        @jax.jit
        @jax.vmap
        def ours(query, embeddings, mask, pointers):
            encoding = models.policy.encode(models.params, query, CandidatePool(embeddings, mask))
            return pointer_log_probs(models.policy, models.params, encoding, mask, pointers)[0]

        with torch.no_grad():
            tensors = models.tensors(query, embeddings, mask, pointers)
            theirs = models.torch.pointer_log_probs(*tensors)[0].cpu().numpy()
        worst = float(np.abs(theirs - np.asarray(ours(query, embeddings, mask, pointers))).max())
        if worst > 1e-3:
            raise InputError(f"the two selectors' log-probabilities differ by {worst:.1e}")
        return worst

    def competitors(self, loop_queries: int, compiled: bool) -> dict:
        """Name to a function that draws once; those that PyTorch has no form of are left out."""
        runs = {"ours": self._ours()}
        if self._method not in torch_samplers.METHODS:
            return runs
        options = {"method": self._method, "num": self._num, "shots": self._shots}
        model, tensors, device = self._models.torch, self._tensors, self._models.device
        batched = functools.partial(torch_samplers.batched, model, **options)
        runs["eager"] = finished(lambda: batched(*tensors), device)
        if compiled:
            torch.compiler.reset()
            whole = torch.compile(batched, **compile_options(device))
            runs["compiled"] = finished(lambda: whole(*tensors), device)
        if loop_queries:
            rows = range(min(loop_queries, len(tensors[0])))
            single = [[x[row : row + 1] for x in tensors] for row in rows]
            runs["loop"] = finished(
                lambda: [torch_samplers.loop(model, *one, **options) for one in single], device
            )
        return runs

    def work(self) -> Work | None:
        """What nobody can save who draws from this selector; None where it is not asked."""
        if self._method == "random":
            return None
        return work_of(self._draws(jax.vmap), *self._arguments())

    def _ours(self):
        run, arguments = jax.jit(self._draws(over_queries)), self._arguments()
        return lambda: jax.block_until_ready(run(*arguments))

    def _draws(self, lift):
        """(params, key, ids, queries, embeddings, masks) -> the draws of all queries."""

        def draws(params, key, *batch):
            return lift(functools.partial(self._one, params, key))(*batch)

        return draws

    def _arguments(self):
        arrays = [jnp.asarray(x) for x in self._arrays]
        return self._models.params, jax.random.key(0), jnp.arange(len(arrays[0])), *arrays

    def _one(self, params, key, query_id, query, embeddings, mask):
        encoding = self._models.policy.encode(params, query, CandidatePool(embeddings, mask))
        return self._draw(params, jax.random.fold_in(key, query_id), encoding, mask)

    def _draw(self, params, key, encoding, mask):
        policy, rows = self._models.policy, {"num": self._num, "shots": self._shots}
        if self._method == "beam":
            return sampling.beam_search(policy, params, encoding, mask, **rows)
        if self._method == "random":
            return sampling.sample_uniform_distinct(key, mask, **rows)
        if self._method == "mixture":
            share = sampling.scale_quotas(MIXTURE, self._num)
            return sampling.sample_mixture(
                policy, params, key, encoding, mask, **rows, quotas=share
            )
        draw = {
            "sample": sampling.sample_temperature,
            "top_p": sampling.sample_top_p,
            "sbs": sampling.stochastic_beam_search,
        }[self._method]
        return draw(policy, params, key, encoding, mask, **rows)
