"""Faults on purpose: wraps a worker's scorer and has it crash, hang or answer nonsense.

By hand, on any run; the driver must come through, and the result must be as without:

    PYTHONPATH=tests QWEN_BRIDGE_FACTORIES=faults.injection \\
    LEVER_FAULTS='crash=0.05,hang=0.01,nan=0.02,seed=3' \\
    python -m experiments.mine --factory=faults.injection:build --deadline_s=20 --workdir=runs/hail

`LEVER_FAULTS` holds, separated by commas, `FAULT=P` (the probability a request), `FAULT@prompts=P`
(that share of all prompts, by a hash of prompt and seed, always meets the fault), `seed=N`,
`log=FILE` (a line of JSON is appended for each request and each fault). Faults: crash (or
crash_during), crash_before, crash_after, hang, slow, wrong_shape, wrong_rows, nan, not_a_batch,
out_of_memory, raise, input_error, lost_device.

Tests give the same as a list of dicts, with a choice of
  p: probability a request; drawn anew in each process
  prompts: share of prompts that always meet it, with `seed`
  query: only for batches that hold this query id (or this id, in embed)
  request: only for the n-th request that this process serves, from 0
  worker: only in the place of this number
  rows: only for batches of more than so many rows
  once: path of a file made when the fault strikes; where it exists, the fault does not
"""

import json
import os
import random
import threading
import time

import numpy as np

from qwen_bridge.errors import InputError

FAULTS = (
    "crash_before", "crash_during", "crash_after", "hang", "slow", "wrong_shape", "wrong_rows",
    "nan", "not_a_batch", "out_of_memory", "raise", "input_error", "lost_device",
)  # fmt: skip
VARIABLE = "LEVER_FAULTS"
SLOW_S = 0.3


def build(settings: dict):
    """The usual worker with the faults of `LEVER_FAULTS`."""
    from qwen_bridge import workers

    scorer, hello = workers.build(settings)
    return Faulty(scorer, *parse(os.environ.get(VARIABLE, ""))), hello


def parse(text: str) -> tuple[list[dict], str | None]:
    """The faults and the log file that a value of `LEVER_FAULTS` names."""
    faults, log, seed = [], None, 0
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name == "seed":
            seed = int(value)
        elif name == "log":
            log = value
        else:
            fault, _, share = name.partition("@")
            fault = "crash_during" if fault == "crash" else fault
            if fault not in FAULTS or share not in ("", "prompts") or not 0 <= float(value) <= 1:
                raise InputError(
                    f"{VARIABLE}: {item!r} is not FAULT=P or FAULT@prompts=P with P in [0, 1] and "
                    f"a fault of {', '.join(FAULTS)}"
                )
            faults.append({"fault": fault, share or "p": float(value)})
    return [{"seed": seed, **fault} for fault in faults], log


def hashed(*columns) -> np.ndarray:
    """Uniform [0, 1) float32 of integer columns of one length."""
    state = np.full(len(columns[0]), 0x243F6A8885A308D3, np.uint64)
    for column in columns:
        state ^= np.asarray(column).astype(np.uint64)
        state *= np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(29)
    return ((state >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


def chosen(queries, pointers, share: float, seed: int) -> np.ndarray:
    """Which prompts meet a fault of the kind `@prompts`."""
    seeds = np.full(len(queries), seed)
    return hashed(seeds, queries, *np.asarray(pointers).T) < share


class Faulty:
    """Serves as the wrapped scorer does, but for its faults."""

    def __init__(self, scorer, faults: list[dict], log: str | None = None):
        self._scorer, self._faults, self._log = scorer, faults, log
        self._requests = 0
        seeds = [fault.get("seed", 0) for fault in faults]
        self._random = random.Random(f"{seeds} {os.getpid()}")

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def embed(self, kind, ids):
        """Embeddings, or a fault."""
        return self._serve("embed", ids, None, lambda: self._scorer.embed(kind, ids))

    def score(self, queries, pointers):
        """Scores, or a fault."""
        return self._serve(
            "score", queries, pointers, lambda: self._scorer.score(queries, pointers)
        )

    def answer(self, queries, pointers):
        """Answers, or a fault."""
        return self._serve(
            "answer", queries, pointers, lambda: self._scorer.answer(queries, pointers)
        )

    def _serve(self, verb, ids, pointers, work):
        struck = [name for name in FAULTS if self._strikes(name, ids, pointers)]
        for name in struck:
            self._write({"fault": name})
        if "crash_before" in struck:
            os._exit(3)
        result = work()
        if pointers is not None:
            prompts = [[int(q), *map(int, p)] for q, p in zip(ids, pointers)]
            self._write({"verb": verb, "prompts": prompts})
        for name in struck:
            result = _do(name, result)
        self._requests += 1
        return result

    def _write(self, line: dict) -> None:
        if self._log:
            fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, (json.dumps(line) + "\n").encode())
            os.close(fd)

    def _strikes(self, name: str, ids, pointers) -> bool:
        for fault in self._faults:
            if fault["fault"] != name:
                continue
            if "query" in fault and fault["query"] not in ids:
                continue
            if fault.get("request", self._requests) != self._requests:
                continue
            if fault.get("worker", _worker()) != _worker():
                continue
            if len(ids) <= fault.get("rows", 0) or self._random.random() >= fault.get("p", 1.0):
                continue
            if "prompts" in fault and (
                pointers is None or not chosen(ids, pointers, fault["prompts"], fault["seed"]).any()
            ):
                continue
            if "once" in fault:
                try:
                    os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
            return True
        return False


def _worker() -> int:
    return int(os.environ.get("QWEN_BRIDGE_WORKER", 0))


def _do(name: str, result):
    """What a fault makes of a result, if there still is one."""
    if name == "crash_during":
        os._exit(3)
    if name == "crash_after":
        threading.Timer(0.005, os._exit, (3,)).start()
    elif name == "hang":
        time.sleep(3600)
    elif name == "slow":
        time.sleep(SLOW_S)
    elif name == "not_a_batch":
        return {"gt_prob": [0.0]}
    elif name == "raise":
        raise ZeroDivisionError("a bug in the scorer")
    elif name == "input_error":
        raise InputError("query 5 is not in the dataset; use ids of questions.json")
    elif name == "out_of_memory":
        raise MemoryError("the batch does not fit")
    elif name == "lost_device":
        raise RuntimeError("CUDA error: device-side assert triggered")
    elif hasattr(result, "embeddings"):
        rows = result.embeddings
        changed = {"wrong_shape": rows[:, 1:], "wrong_rows": rows[1:], "nan": rows * np.nan}
        return type(result)(changed[name], result.reasons)
    elif name == "wrong_shape":
        result.similarity.shape = (1, -1)
    elif name == "wrong_rows":
        result.texts.pop()
    else:
        scored = hasattr(result, "gt_prob")
        (result.gt_prob if scored else result.accuracy)[0] = np.nan
    return result
