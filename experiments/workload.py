"""How many prompts a run asks for, phase by phase, from its flags alone.

`asked` counts as `ScoringService.counts.asked` does, repeats included; it is exact for full pools
and at most two shots. What is *scored* is less, as no prompt is scored twice: what the policy
draws, and whether it was drawn before, is known only in the run, so there is a lower bound (all
such draws known already) and an upper one (none). Tests hold the counts to those of real runs.
"""

import dataclasses
import math

from lever_jax.evaluation import EvaluationConfig
from lever_jax.mining import MiningConfig

# Picks of `baseline_picks` without chance: three similarities, each reversed too, and MMR.
_RANKED = 7


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts of one kind in one phase, for `queries` queries alike.

    Attributes:
      queries: how many.
      shots: demonstrations of each prompt.
      pool: demonstrations that they are drawn from.
      new: distinct prompts a query that no earlier work has scored, at most.
      least: the same, at least.
      answered: distinct prompts a query that need the VLM's answer, at most.
      apart: each prompt comes in a call of its own, so that a query's prompts share no prefix.
    """

    queries: int
    shots: int
    pool: int
    new: int
    least: int = 0
    answered: int = 0
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
      name: as in the run's output.
      asked: prompts asked for, at least and at most.
      work: what has to be computed.
      queries: distinct queries it shows to the VLM.
    """

    name: str
    asked: tuple[int, int]
    work: tuple[Work, ...]
    queries: int

    @property
    def scored(self) -> tuple[int, int]:
        """Prompts that are scored, at least and at most."""
        least = sum(work.queries * work.least for work in self.work)
        return least, sum(work.queries * work.new for work in self.work)

    @property
    def answered(self) -> int:
        """Prompts that need an answer, at most."""
        return sum(work.queries * work.answered for work in self.work)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The flags that decide how many prompts a run asks for.

    Attributes:
      train: training queries.
      evaluated: evaluation queries.
      pool: K.
      shots: S in training.
      warmup_queries: that are searched; 0 without a warm-up.
      warmup_beam: pointers kept at each level of that search.
      warms_up: whether a warm-up gives a selector, searched or imported.
      construction: of the search, see `search.extend`.
      gain: the search asks for the prompt without demonstrations too.
      mines: whether data are mined, and picks on training queries compared with them.
      mining: proposals and how many of them are answered.
      grpo_epochs: passes over the training queries; 0 without GRPO.
      group_size: G.
      verify: `all` or `top_m`, see `on_policy.judge`.
      evaluation: shots, random seeds and the oracle.
    """

    train: int
    evaluated: int
    pool: int
    shots: int
    warmup_queries: int
    warmup_beam: int
    mining: MiningConfig
    grpo_epochs: int
    group_size: int
    verify: str
    evaluation: EvaluationConfig
    warms_up: bool = True
    construction: str = "both"
    gain: bool = False
    mines: bool = True


def mining_phases(run: RunConfig) -> list[Phase]:
    """Warm-up, mining and the health check: what `experiments.mine` does."""
    phases, places = [], math.perm(run.pool, run.shots)
    proposals = min(run.mining.proposals, places)
    chosen = min(proposals, run.mining.verify_best + run.mining.verify_low)
    answered = min(proposals, chosen + run.mining.verify_uniform)
    searched = min(run.warmup_queries, run.train)
    if searched:
        levels = search_levels(run.pool, run.shots, run.warmup_beam, run.construction)
        work = _search_work(searched, levels, run.pool, run.warmup_beam)
        if run.gain:
            work.append(Work(searched, 0, run.pool, 1, 1))
        asked = [searched * (sum(bounds) + run.gain) for bounds in zip(*levels)]
        phases.append(Phase("warm-up search", tuple(asked), tuple(work), searched))
        overlap = min(levels[-1][1], proposals)
    else:
        overlap = 0
    if not run.mines:
        return phases
    work = (
        Work(searched, run.shots, run.pool, proposals, proposals - overlap),
        Work(run.train - searched, run.shots, run.pool, proposals, proposals),
    )
    mined = Phase("mining, stage A", (run.train * proposals,) * 2, work, run.train)
    work = (Work(run.train, run.shots, run.pool, 0, 0, answered),)
    asked = (run.train * chosen, run.train * answered)  # the uniform ones may be chosen already
    stage_b = Phase("mining, stage B", asked, work, run.train)
    return [*phases, mined, stage_b, _picks(run, "warm-up" if run.warms_up else "the start")]


def training_phases(run: RunConfig) -> list[Phase]:
    """RCE, GRPO and the evaluation: what `experiments.train` does after mining."""
    phases = [_picks(run, "RCE")] if run.mines else []
    if run.grpo_epochs:
        asked = answered = run.group_size
        if run.verify == "top_m":
            answered = min(asked, run.mining.verify_best + run.mining.verify_low)
            asked += answered
        draws = run.train * run.grpo_epochs
        work = Work(draws, run.shots, run.pool, run.group_size, 0, answered)
        phases.append(Phase("GRPO rounds", (draws * asked,) * 2, (work,), run.train))
        if run.mines:
            phases.append(_picks(run, "GRPO"))
    selectors = 1 + run.warms_up + bool(run.grpo_epochs)
    return [*phases, *_evaluation(run, selectors)]


def evaluation_phases(run: RunConfig, selectors: int) -> list[Phase]:
    """What `experiments.evaluate` does with so many selectors; the store may hold all of it."""
    return [
        dataclasses.replace(
            phase, work=tuple(dataclasses.replace(work, least=0) for work in phase.work)
        )
        for phase in _evaluation(run, selectors)
    ]


def search_levels(
    pool: int, shots: int, beam: int, construction: str = "both"
) -> list[tuple[int, int]]:
    """Prompts that a pool search scores at each level, at least and at most, for one query.

    Level 1 scores every candidate. Level s puts each of the best singles first, last or both to
    each of the best pointers of level s - 1. With both, a tuple can come about in two ways, and
    at level 2, where the best pointers are the best singles, each does.
    """
    levels, kept = [(pool, pool)], min(beam, pool)
    for level in range(2, shots + 1):
        ways = kept * max(0, min(beam, pool) - level + 1)
        most = 2 * ways if construction == "both" and level > 2 else ways
        levels.append((ways, most))
        kept = min(beam, ways)
    return levels


def _search_work(queries: int, levels, pool: int, beam: int) -> list[Work]:
    """The levels of a search; after the first, pointers are made of the best singles only."""
    return [
        Work(queries, shots, pool if shots == 1 else min(beam, pool), high, low)
        for shots, (low, high) in enumerate(levels, 1)
    ]


def _picks(run: RunConfig, name: str) -> Phase:
    """The selector's greedy picks on the training queries; a pick may be known already."""
    work = Work(run.train, run.shots, run.pool, 1, 0, 1, apart=True)
    return Phase(f"picks of {name}", (run.train,) * 2, (work,), run.train)


def _evaluation(run: RunConfig, selectors: int) -> list[Phase]:
    config, count = run.evaluation, run.evaluated
    work = [Work(count, 0, run.pool, 1, 1, 1, apart=True)]  # zero-shot
    asked, oracle = [1, 1], []
    for shots in config.shots:
        places = math.perm(run.pool, shots)
        methods = config.random_seeds + _RANKED + selectors * _decoded(config, shots, places)
        asked = [bound + methods for bound in asked]
        most = min(methods, places)
        # With an oracle every single of the pool is scored, whoever asks first.
        known = shots == 1 and config.oracle_beam
        work.append(Work(count, shots, run.pool, 0 if known else most, 0, most, apart=True))
        if config.oracle_beam:
            levels = search_levels(run.pool, shots, config.oracle_beam)
            oracle = max(oracle, levels, key=len)
            for i, bounds in enumerate(zip(*levels)):
                asked[i] += sum(bounds) + min(config.oracle_verify, bounds[-1]) + _RANKED
    if config.oracle_beam:
        search = _search_work(count, oracle, run.pool, config.oracle_beam)
        work += [
            dataclasses.replace(level, answered=min(config.oracle_verify, level.new))
            if level.shots in config.shots
            else level
            for level in search
        ]
    return [Phase("evaluation", (count * asked[0], count * asked[1]), tuple(work), count)]


def _decoded(config: EvaluationConfig, shots: int, places: int) -> int:
    """Pointers that the decodings of one selector have answered a query; see `decoding.decode`."""
    reranked = min(config.rerank_width, places)
    orders = max(1, min(config.random_seeds, math.factorial(shots) - 1))
    pointers = {"rerank": reranked, "oracle_rerank": reranked, "shuffled": orders}
    return sum(pointers.get(decoding, 1) for decoding in config.decodings)
