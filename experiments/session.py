"""Opens a run: dataset, workers, store, embeddings, pools and the selector, in that order."""

import collections
import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from experiments import configs, settings
from experiments.batched import BatchedEnvironment
from experiments.progress import bar, note
from lever_jax.errors import InputError
from lever_jax.parallel import check_room, make_mesh, used_devices
from lever_jax.pooled import Embedded, PooledQueries, placed, pool_queries
from lever_jax.proposing import Proposer
from lever_jax.scoring import ScoringService
from lever_jax.selector import make_selector
from lever_jax.store import Store
from qwen_bridge.client import Environment
from qwen_bridge.embedding_cache import EmbeddingCache
from qwen_bridge.errors import InputError as BridgeInputError
from qwen_bridge.gathered import GatheredRows
from qwen_bridge.hub import resolve_model
from qwen_bridge.vqa.examples import Dataset, Example
from qwen_bridge.vqa.sources import open_dataset

# What the workers say of embeddings, which decides no score.
_EMBEDDING = frozenset({"embedding_dim", "parts", "encoder"})


@dataclasses.dataclass
class Session:
    """Everything the phases share.

    Attributes:
      workdir: folder of the run.
      dataset: examples by id.
      environment: the workers.
      service: scores prompts through the store.
      bank: the demonstrations, embedded.
      train: training queries with their pools.
      eval: evaluation queries with their pools.
      broken: image keys that cannot be read; no demonstration of `bank` has one.
      init: key to fresh parameters of the selector.
      policy: the selector.
      identity: what decides scores: fingerprints of model, prompts, generation, data, metric.
      encoder: what decides embeddings, and so pools; scores do not depend on it.
      mesh: local devices that share the selector's work; None where one does it.
    """

    workdir: pathlib.Path
    dataset: Dataset
    environment: Environment
    service: ScoringService
    bank: Embedded
    train: PooledQueries
    eval: PooledQueries
    broken: frozenset[str]
    init: object
    policy: object
    identity: dict[str, str]
    encoder: str
    mesh: jax.sharding.Mesh | None

    @functools.cached_property
    def train_proposer(self) -> Proposer:
        """Samplers over the training queries; one, so that each is compiled once a run."""
        return Proposer(self.policy, self.train.table, mesh=self.mesh)

    @functools.cached_property
    def eval_proposer(self) -> Proposer:
        """Samplers over the evaluation queries."""
        return Proposer(self.policy, self.eval.table, mesh=self.mesh)

    @property
    def store(self) -> Store:
        """Where scores are kept."""
        return self.service.store

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Column ranges of the parts of an embedding."""
        return self.environment.hello["parts"]


@contextlib.contextmanager
def open_session(workdir: pathlib.Path) -> Iterator[Session]:
    """Opens the run in `workdir` with the flags as they stand; closes it whatever happens.

    Raises:
      InputError: flags, data, model or store do not fit.
    """
    logging.basicConfig(format="  %(levelname)s %(message)s", level=logging.WARNING)
    dataset = open_dataset(configs.dataset_settings())
    if len(dataset.bank) < settings.POOL_SIZE.value:
        raise InputError(
            f"--pool_size={settings.POOL_SIZE.value} exceeds the {len(dataset.bank)} "
            "demonstrations of the bank; lower it or add demonstrations"
        )
    note(
        f"{dataset.name}: {len(dataset.bank):,} demonstrations, {len(dataset.train):,} training "
        f"and {len(dataset.eval):,} evaluation queries"
    )
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(
            Environment(
                # Resolved here, once: workers must not download the same files at the same time.
                {
                    **configs.absolute_worker_settings(),
                    "model": resolve_model(configs.model()),
                },
                engine=configs.engine(),
                deadline_s=settings.DEADLINE_S.value,
                factory=settings.FACTORY.value,
            )
        )
        hello = environment.hello
        name = configs.model() or configs.EMBEDDED
        note(f"VLM: {name}, {_places(environment.devices)}")
        identity = {k: v for k, v in hello.items() if k not in _EMBEDDING}
        if identity["dataset"] != dataset.fingerprint:
            raise InputError("the worker reads other data than the driver; are the files changing?")
        store = stack.enter_context(Store.open(workdir / "store.sqlite", identity))
        batched = BatchedEnvironment(environment, settings.SCORE_BATCH.value)
        service = ScoringService(store, batched, bar, blameless=(BridgeInputError,))
        bank, queries, broken = _embeddings(environment, dataset)
        config = configs.pool_config()
        pooled = [pool_queries(each, bank, hello["parts"], config, store, bar) for each in queries]
        mesh = make_mesh(settings.DATA_PARALLEL.value)
        check_room([each.table for each in pooled], used_devices(mesh))
        pooled = [placed(each, mesh) for each in pooled]
        _report_excluded(pooled)
        if settings.RETRY_FAILED.value:
            _retry_failed(service, bank, pooled)
        init, policy = make_selector(
            configs.selector_config(), hello["parts"], hello["embedding_dim"]
        )
        yield Session(
            workdir,
            dataset,
            environment,
            service,
            bank,
            *pooled,
            broken,
            init,
            policy,
            identity,
            hello["encoder"],
            mesh,
        )


def _places(devices: list[str]) -> str:
    """How many workers are where: `3 workers on cuda:0, bfloat16 (2); cuda:1, bfloat16`."""
    counts = collections.Counter(devices)
    places = [each if n == 1 else f"{each} ({n})" for each, n in counts.items()]
    return f"{len(devices)} worker{'s' if len(devices) > 1 else ''} on {'; '.join(places)}"


def _embeddings(
    environment: Environment, dataset: Dataset
) -> tuple[Embedded, list[Embedded], frozenset[str]]:
    """Embeddings of bank and queries (training, evaluation) through the cache, and broken images.

    Demonstrations with a broken image are left out. Queries stay, and fail when they are scored.
    """
    groups = (
        (dataset.train, "embed training queries"),
        (dataset.eval, "embed evaluation queries"),
    )
    folder, max_broken = configs.embeddings_dir(), settings.MAX_BAD_IMAGES.value
    with EmbeddingCache(folder, environment, dataset, bar, max_broken) as cache:
        bank = _embedded(*cache.demonstrations(dataset.bank, "embed the bank"))
        queries = [_embedded(some, cache.embed("query", some, label)) for some, label in groups]
    damaged = f", of these {cache.counts.damaged:,} again, as their checksums were wrong"
    note(
        f"embeddings: {cache.counts.read:,} images and texts read from {folder}, "
        f"{cache.counts.computed:,} computed{damaged if cache.counts.damaged else ''}"
    )
    if cache.broken:
        lost = sum(example.image in cache.broken for some, _ in groups for example in some)
        note(
            f"{len(cache.broken):,} images cannot be read, so "
            f"{len(dataset.bank) - len(bank.ids):,} demonstrations are in no pool and every prompt "
            f"of {lost:,} queries is eval_failed: {cache.first_broken()}"
        )
    return bank, queries, frozenset(cache.broken)


def _embedded(examples: Sequence[Example], rows: GatheredRows) -> Embedded:
    ids = np.array([example.id for example in examples], np.int64)
    return Embedded(ids, tuple(example.image for example in examples), rows)


def _retry_failed(service: ScoringService, bank: Embedded, pooled: list[PooledQueries]) -> None:
    """Asks again for what has failed and says what became of it."""
    query_ids = np.concatenate([queries.query_ids for queries in pooled])
    asked, failed = service.retry_failed(query_ids, bank.ids, label="retry what failed")
    note(f"--retry_failed: {asked:,} prompts asked for again, {failed:,} of them failed again")


def _report_excluded(pooled: list[PooledQueries]) -> None:
    """Says how many demonstrations the pools of all queries left out, and why."""
    itself, image, near = np.sum([queries.excluded for queries in pooled], axis=0)
    count = sum(len(queries) for queries in pooled)
    note(
        f"pools of {count:,} queries leave out {itself:,} demonstrations that are the query, "
        f"{image:,} on its image, {near:,} on a near duplicate of it"
    )
