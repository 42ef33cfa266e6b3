"""Mined data made to have one fault and no other, or none: what the verdict is tested on."""

import numpy as np

from lever_jax.diagnostics import Candidates, Picks

EVALUATIONS = 24  # verified candidates a query, as the main job has


def rows(rng, chance, *, informative=True, evaluations=EVALUATIONS):
    """Candidates whose answers are right with `chance` [Q] by query.

    gt_prob is drawn from Beta(4, 2) for right and Beta(2, 4) for wrong answers, or, where it is not
    informative, from one distribution for both.
    """
    num = len(chance)
    query = np.repeat(np.arange(num) + 1000, evaluations)
    n = len(query)
    right = rng.random(n) < np.repeat(chance, evaluations)
    good, bad = rng.beta(4, 2, n), rng.beta(2, 4, n)
    gt_prob = np.where(right, good, bad) if informative else rng.beta(3, 3, n)
    accuracy = np.where(right, rng.choice([0.3, 0.6, 1.0], n, p=[0.1, 0.2, 0.7]), 0.0)
    return Candidates(
        query_id=query,
        source=rng.choice(["beam", "random", "sample(temp=1.0)"], n),
        gt_prob=gt_prob,
        accuracy=accuracy,
        reward=2.0 * right + gt_prob,
        failed=np.zeros(n, bool),
        pointer=rng.permutation(64 * 64)[:evaluations][None].repeat(num, 0).reshape(n, 1),
    )


def easy(rng, num):
    """Chances [num] of a world in which hardly a query has no positive."""
    return 0.25 + 0.6 * rng.beta(2, 3, num)


def picked(rng, num, share):
    """Picks that are right for about `share` of the queries."""
    return Picks(np.arange(num) + 1000, (rng.random(num) < share).astype(float))


def healthy(rng, num):
    """Headroom that training closed, gt_prob that orders accuracy, positives everywhere."""
    before = rng.uniform(0.4, 0.75)
    return {
        "candidates": rows(rng, easy(rng, num)),
        "picks": picked(rng, num, before),
        "trained": picked(rng, num, rng.uniform(0.85, 0.93)),
    }


def pool_exhausted(rng, num):
    """Two queries of five whose pool has nothing right; the others are fine."""
    chance = np.where(rng.permutation(num) < 0.4 * num, 0.0, easy(rng, num))
    return {"candidates": rows(rng, chance), "picks": picked(rng, num, 0.4)}


def nothing_left(rng, num):
    """The selector's pick is the best pointer of the data already."""
    candidates = rows(rng, easy(rng, num))
    best = candidates.accuracy.reshape(num, -1).max(axis=1)
    return {"candidates": candidates, "picks": Picks(np.arange(num) + 1000, best)}


def proposals_miss(rng, num):
    """Every pool has right pointers, but three proposals of a hundred hit one."""
    return {"candidates": rows(rng, np.full(num, 0.03)), "picks": picked(rng, num, 0.1)}


def search_finds(rng, num):
    """The same where proposals are so poor that the curve says little; a search finds some."""
    candidates = rows(rng, np.full(num, 0.004))
    searched = rng.permutation(num)[:50] + 1000
    return {"candidates": candidates, "ceiling": Picks(searched, np.ones(50))}


def search_finds_nothing(rng, num):
    """As `pool_exhausted`, and a search with extra budget says so."""
    world = pool_exhausted(rng, num)
    searched = rng.permutation(num)[:50] + 1000
    return {**world, "ceiling": Picks(searched, np.zeros(50))}


def reward_misaligned(rng, num):
    """gt_prob says nothing of accuracy."""
    return {
        "candidates": rows(rng, easy(rng, num), informative=False),
        "picks": picked(rng, num, 0.5),
    }


def training_unused(rng, num):
    """The trained selector picks as the one before it did, but for one query of twenty."""
    picks = picked(rng, num, 0.5)
    other = np.where(rng.random(num) < 0.05, 1 - picks.accuracy, picks.accuracy)
    return {
        "candidates": rows(rng, easy(rng, num)),
        "picks": picks,
        "trained": picks._replace(accuracy=other),
    }


def knows_nothing(rng, num):
    """Not one answer is right."""
    return {"candidates": rows(rng, np.zeros(num)), "picks": picked(rng, num, 0.0)}


def on_the_threshold(rng, num):
    """One query of ten has no positive, which is the default threshold itself."""
    chance = np.where(rng.permutation(num) < 0.1 * num, 0.0, 0.5 + 0.5 * easy(rng, num))
    return {"candidates": rows(rng, chance), "picks": picked(rng, num, 0.5)}
