"""Three ways to the greedy answers: the model's own `generate`, batched decoding, certificates.

All with the settings of the bridge: no sampling, no beams, no repetition penalty. The second
decodes all prompts together from their cached prefixes; the third only those whose score did not
already certify the answer.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from qwen_bridge.benchmark import clock
from qwen_bridge.benchmark.race import Race, spread
from qwen_bridge.cost import decode_flops, head_flops, language_flops, vision_flops
from qwen_bridge.scorer import ReferenceScorer
from qwen_bridge.trie_scorer import TrieScorer

WAYS = ("model_generate", "decode", "certified_decode")


class StageB:
    """The three ways over the prompts of a race; prefixes are resident in the last two.

    Args:
      race: whose prompts are answered.
      assumed: share of candidates that random weights, which certify next to none, are taken to
        certify; of no account for a checkpoint, which certifies what it does.
    """

    def __init__(self, race: Race, assumed: float):
        self._race, self._device = race, race.device
        naive, warm = race.rungs["naive"], race.rungs["trie_warm"]
        assert isinstance(naive.scorer, ReferenceScorer)
        assert isinstance(warm.scorer, TrieScorer)
        warm.prepare()
        self._scored = warm.score()
        certified = self._scored.certified >= 0
        self._measured = float(certified.mean())
        rest = np.flatnonzero(~certified)
        self._certified = self._measured
        if race.workload.random:
            rest = np.arange(round(assumed * len(certified)), len(certified))
            self._certified = 1 - len(rest) / len(certified)
        self._asked = {
            "model_generate": (naive.scorer, naive.prompts, np.arange(len(naive.prompts))),
            "decode": (warm.scorer, warm.prompts, np.arange(len(warm.prompts))),
            "certified_decode": (warm.scorer, warm.prompts, rest),
        }

    def faults(self) -> list[str]:
        """Compares the texts of all three ways; a first run of each, and so a warm-up.

        In bfloat16 no two ways break near ties alike, so there only certified answers must be
        those of `generate`.
        """
        texts = {name: self._answer(name) for name in WAYS}
        scored = self._scored
        own, found = texts["model_generate"], []
        self._equal = float(np.mean([a == b for a, b in zip(texts["decode"], own)]))
        if self._race.workload.loaded.model.dtype == torch.float32:
            if texts["decode"][: len(own)] != own:
                found.append("decode: other answers than the model's own generate")
            rest = self._asked["certified_decode"][2]
            if texts["certified_decode"] != [texts["decode"][row] for row in rest]:
                found.append("certified_decode: other answers than decoding all")
        certified = np.flatnonzero(scored.certified[: len(own)] >= 0)
        wrong = sum(scored.texts[row] != own[row] for row in certified)
        if wrong:
            found.append(f"certified_decode: {wrong} certified answers are not generate's")
        self._generated = float(np.mean([self._tokens(text) for text in texts["decode"]]))
        return found

    def round(self, turn: int, advance: Callable[[], None]) -> dict[str, float]:
        """Runs every way once, another one first in every round: seconds a candidate."""
        names = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
        taken = {}
        for name in names:
            self._race.rungs["trie_warm"].prepare()
            count = len(self._asked[name][1])
            taken[name] = clock.seconds(self._device, lambda n=name: self._answer(n)) / count
            advance()
        return taken

    def figures(self, rounds: list[dict[str, float]]) -> dict:
        """What the rounds say, beside what the cost model says."""
        flops = self._flops()
        own = np.array([one["model_generate"] for one in rounds])
        out: dict = {
            "share_certified": self._measured,
            "share_left_out": self._certified,  # an assumption where weights are random
            "share_equal_to_generate": self._equal,
            "tokens_generated": self._generated,
        }
        for name in WAYS:
            taken = np.array([one[name] for one in rounds])
            out[name] = {
                "ratio": spread(own / np.maximum(taken, 1e-9)),
                "candidates_per_s": float(1 / max(np.median(taken), 1e-9)),
                "predicted_ratio": flops["model_generate"] / max(flops[name], 1.0),
                "candidates_measured": len(self._asked[name][1]),
            }
        return out

    def _flops(self) -> dict[str, float]:
        race, shape = self._race, self._race.workload.shape
        lengths, shots = race.lengths, race.workload.config.shots
        side = race.workload.config.image_size // shape.vision.patch
        prompt = lengths.prefix(shots) + lengths.query
        steps = self._generated
        whole = (
            (shots + 1) * vision_flops(shape.vision, (side, side))
            + language_flops(shape, prompt, prompt)
            + language_flops(shape, steps - 1, prompt + steps / 2)
            + head_flops(shape, steps)
        )
        cached = decode_flops(shape, dataclasses.replace(lengths, generated=steps), shots)
        return {
            "model_generate": whole,
            "decode": cached,
            "certified_decode": (1 - self._certified) * cached,
        }

    def _answer(self, name: str) -> list[str]:
        scorer, prompts, rows = self._asked[name]
        if not len(rows):
            return []
        return scorer.answer(prompts.queries[rows], prompts.pointers[rows]).texts

    def _tokens(self, text: str) -> int:
        factory = self._race.workload.parts[2]
        most = self._race.rungs["trie_warm"].scorer.max_new_tokens
        return min(len(factory.builder.text(text)) + 1, most)
