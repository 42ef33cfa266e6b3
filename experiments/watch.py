"""Watches GRPO as it runs: warnings by rule, and greedy picks as far as the store knows them."""

import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from experiments import configs
from experiments.curves import learning_curves
from experiments.progress import note
from experiments.session import Session
from lever_jax.run_warnings import find_warnings
from lever_jax.scoring import columns


class Watch:
    """Says once what goes wrong, by the rules of `run_warnings`.

    Args:
      workdir: of the run; a resumed training goes on from its rows in metrics.jsonl.
      recipe: of the training.
      step: optimiser steps done; rows of later ones are of a round that is done again.
    """

    def __init__(self, workdir: pathlib.Path, recipe: str, step: int):
        rows = learning_curves(workdir, {"grpo": recipe})["grpo"] if step else []
        self._rows = [row for row in rows if row["step"] <= step]
        self._told = {warned.rule for warned in find_warnings({"grpo": self._rows})}

    def __call__(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Takes the rows of a round, with their `step`, and prints new warnings."""
        self._rows += rows
        for warned in find_warnings({"grpo": self._rows}):
            if warned.rule not in self._told:
                self._told.add(warned.rule)
                note(f"warning, step {warned.step}: {warned.text}")


def known_picks(session: Session, pointers: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """What is known of greedy picks [n, S] of training queries `rows` without asking the VLM.

    Returns:
      similarity_overlap: share of the picked demonstrations that the S most similar candidates,
        the first of the pool, hold too.
      greedy_known: share of the picks that the store has an answer to; of a policy that is nearly
        certain, its draws are its picks.
      greedy_reward, greedy_accuracy: means over these; left out where there is none.
    """
    known = (pointers >= 0).any(axis=1)
    pointers, rows = pointers[known], np.asarray(rows)[known]
    if not len(rows):
        return {}
    ids = session.train.demo_ids(rows, pointers)
    stored = session.service.known(session.train.query_ids[rows], ids)
    scores = columns([record for record in stored if record is not None])
    rewards = configs.reward_config().of(scores)
    known = np.isfinite(rewards)
    found = {
        "similarity_overlap": float((pointers[pointers >= 0] < pointers.shape[1]).mean()),
        "greedy_known": float(known.sum() / len(rows)),
    }
    if known.any():
        found["greedy_reward"] = float(rewards[known].mean())
        found["greedy_accuracy"] = float(scores["accuracy"][known].mean())
    return found
