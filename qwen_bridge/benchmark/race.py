"""The comparison itself: every way to score the same prompts, side by side in every round."""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from qwen_bridge.benchmark import clock
from qwen_bridge.benchmark.exactness import LEAST_BFLOAT16, difference, faults
from qwen_bridge.benchmark.rungs import (
    BatchedNaiveScorer,
    BranchScorer,
    CachedVisionScorer,
    NaiveScorer,
)
from qwen_bridge.benchmark.workload import Prompts, Workload, measured_lengths, prefix_nodes
from qwen_bridge.cost import RUNGS, PromptLengths, rung_flops
from qwen_bridge.errors import InputError
from qwen_bridge.protocol import ScoreBatch
from qwen_bridge.scorer import DEFAULT_MARGIN, MAX_NEW_TOKENS, PromptScorer
from qwen_bridge.trie_scorer import TrieScorer

FLAG_BEYOND = 0.3  # share by which measured and predicted ratios may differ unremarked


@dataclasses.dataclass(frozen=True)
class Rung:
    """One way to score.

    Attributes:
      scorer: what scores.
      prompts: that it scores in a round.
      prepare: brings its caches into the state that its name says; not timed.
      flops: of the cost model, for one prompt.
    """

    scorer: PromptScorer
    prompts: Prompts
    prepare: Callable[[], None]
    flops: float

    def score(self) -> ScoreBatch:
        """Scores the prompts."""
        return self.scorer.score(self.prompts.queries, self.prompts.pointers)


class Race:
    """All rungs over one workload.

    Features of pictures are resident in every rung but the first two; so the cost model counts
    no picture there.

    Args:
      workload: the network and the prompts.
      naive_candidates: of the prompts, how many the three rungs score that run a forward for
        each answer: their cost is linear in prompts, and all would take very long on a CPU.
      batch_tokens: tokens of a forward pass; None by device.
      cache_bytes: budget of cached prefixes of a scorer.
      max_new_tokens: most tokens of a generated answer.

    Attributes:
      rungs: by name, in the order of `RUNGS`.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        naive_candidates: int,
        batch_tokens: int | None,
        cache_bytes: int,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        self.workload = workload
        self.device = workload.loaded.model.device
        every = workload.prompts()
        few = every.first(naive_candidates)
        plain = {"max_new_tokens": max_new_tokens}
        # Outputs that a query gave before would be extra branches: not the work that is predicted.
        fast = {"batch_tokens": batch_tokens, "cache_bytes": cache_bytes, "known_outputs": 0}
        fast |= plain
        parts = workload.parts
        cold, warm = (TrieScorer(*parts, **fast) for _ in range(2))
        self.lengths = self._lengths(warm, every)
        flops = self._flops(every)

        def nothing() -> None:
            pass

        def fill() -> None:
            self._fill(warm, every)

        branches = BranchScorer(*parts, **fast)
        self.rungs = {
            name: Rung(scorer, prompts, prepare, flops[name])
            for name, scorer, prompts, prepare in [
                ("naive", NaiveScorer(*parts, **plain), few, nothing),
                ("naive_batched", BatchedNaiveScorer(*parts, **plain), few, nothing),
                ("vision_cache", CachedVisionScorer(*parts, **plain), few, nothing),
                ("branches", branches, every, nothing),
                ("trie_cold", cold, every, cold.cache.clear),
                ("trie_warm", warm, every, fill),
            ]
        }

    def exactness(self) -> dict:
        """Compares every rung to the naive loop; the first run of each, and so a warm-up.

        Returns:
          `max_abs_logprob`, `greedy_equal`, `faults` (empty where all is well), `against`,
          `candidates`, and `by_rung` with quantiles.
        """
        dtype = self.workload.loaded.model.dtype
        near = DEFAULT_MARGIN[dtype]
        count = len(self.rungs["naive"].prompts)
        if dtype != torch.float32:
            count = max(count, LEAST_BFLOAT16)
        every = self.rungs["branches"].prompts
        # Of as many queries as there are: answers to one query err alike.
        asked = every.spread(count, len(self.workload.dataset.eval))
        results = {
            name: rung.scorer.score(asked.queries, asked.pointers)
            for name, rung in self.rungs.items()
        }
        naive, own = results["naive"], None
        against = "the naive loop, float32"
        if dtype != torch.float32:
            against = "the naive loop on the same weights in float32"
            naive = self._float32(asked)
            own = difference(results["naive"], naive, near)
        by_rung = {
            name: difference(result, naive, near)
            for name, result in results.items()
            if name != "naive"
        }
        wrong = faults(by_rung, own)
        # All that is timed, too: the naive loop cannot be asked for so many.
        timed = {}
        for name, rung in self.rungs.items():
            if rung.prompts is every:
                rung.prepare()
                timed[name] = rung.score()
        if own is None:
            whole = {
                f"{name} against branches": difference(timed[name], timed["branches"], near)
                for name in ("trie_cold", "trie_warm")
            }
            wrong += faults(whole, None)
            by_rung |= whole
        return {
            "max_abs_logprob": max(one.max for one in by_rung.values()),
            "greedy_equal": all(one.greedy_equal for one in by_rung.values()),
            "faults": wrong,
            "against": against,
            "candidates": count,
            "naive_loop_itself": None if own is None else dataclasses.asdict(own),
            "by_rung": {name: dataclasses.asdict(one) for name, one in by_rung.items()},
        }

    def round(self, turn: int, advance: Callable[[], None]) -> dict[str, tuple[float, int]]:
        """Runs every rung once, another one first in every round.

        Args:
          turn: number of the round.
          advance: called after every rung.

        Returns:
          Seconds a candidate and the peak of memory in bytes, by rung.
        """
        names = list(self.rungs)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        measured = {}
        for name in names:
            rung = self.rungs[name]
            rung.prepare()
            clock.reset_peak_memory(self.device)
            taken = clock.seconds(self.device, rung.score)
            measured[name] = (taken / len(rung.prompts), clock.peak_memory(self.device))
            advance()
        return measured

    def figures(self, rounds: list[dict[str, tuple[float, int]]], peak: float) -> dict[str, dict]:
        """What the rounds say of each rung, beside what the cost model says.

        Args:
          rounds: of `round`.
          peak: FLOP/s of a large matrix product.
        """
        naive = self.rungs["naive"].flops
        out = {}
        for name in RUNGS:
            rung = self.rungs[name]
            taken = np.array([one[name][0] for one in rounds])
            ratios = np.array([one["naive"][0] for one in rounds]) / taken
            measured, predicted = float(np.median(ratios)), naive / rung.flops
            out[name] = {
                "ratio": spread(ratios),
                "candidates_per_s": float(1 / np.median(taken)),
                "predicted_ratio": predicted,
                "share_of_peak": float(rung.flops / np.median(taken) / peak),
                "measured_over_predicted": measured / predicted,
                "flag": abs(measured / predicted - 1) > FLAG_BEYOND,
                "flops_per_candidate": rung.flops,
                "candidates_measured": len(rung.prompts),
                "peak_memory_bytes": max(one[name][1] for one in rounds),
            }
        return out

    def _lengths(self, scorer: TrieScorer, prompts: Prompts) -> PromptLengths:
        requests, reasons = scorer._requests(prompts.queries, prompts.pointers)
        if reasons:
            raise InputError(f"a prompt cannot be scored: {next(iter(reasons.values()))}")
        return measured_lengths(list(requests.values()))

    def _flops(self, prompts: Prompts) -> dict[str, float]:
        image = self.workload.config.image_size // self.workload.shape.vision.patch
        total = rung_flops(
            self.workload.shape,
            self.lengths,
            (image, image),
            candidates=len(prompts),
            shots=self.workload.config.shots,
            nodes=prefix_nodes(prompts),
        )
        return {name: flops / len(prompts) for name, flops in total.items()}

    def _fill(self, warm: TrieScorer, prompts: Prompts) -> None:
        """Makes the prefixes resident where they are not: another query's, where a pool is shared.

        Raises:
          InputError: they do not fit.
        """

        def resident() -> bool:
            return all(tuple(pointer) in warm.cache for pointer in prompts.pointers.tolist())

        if resident():
            return
        config = self.workload.config
        before = prompts.of(config.queries) if config.pool == "shared" else prompts
        warm.score(before.queries, before.pointers)
        if not resident():
            raise InputError(
                f"--cache_mib={warm.cache.budget >> 20} is too small to keep the prefixes of "
                f"{len(prompts)} candidates; raise it, or lower --candidates"
            )

    def _float32(self, prompts: Prompts) -> ScoreBatch:
        """What the naive loop says in float32, on the same weights."""
        loaded = self.workload.loaded
        wide = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model).float())
        scorer = NaiveScorer(*self.workload.parts_of(wide))
        result = scorer.score(prompts.queries, prompts.pointers)
        del wide, scorer
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result


def spread(ratios: np.ndarray) -> dict[str, float]:
    """Median, min and max of the ratios of all rounds."""
    return {
        "median": float(np.median(ratios)),
        "min": float(ratios.min()),
        "max": float(ratios.max()),
    }
