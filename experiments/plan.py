"""What a run will cost, before it starts: `--plan` on train, mine and evaluate.

    python -m experiments.train --flagfile=FLAGS --plan [--plan_device=h200] [--plan_out=plan.json]

Prompts by phase come from `workload.py`, their cost from `qwen_bridge/cost.py`, and hours from an
assumed share of a GPU's peak. No worker is started and no weights are read: config.json of
--model is enough. It is a prediction; what it assumes is printed with it.
"""

import dataclasses
import json
import re
import statistics
from typing import Any

from experiments import configs, settings
from experiments.output import check_out, write_out
from experiments.plan_tables import print_plan
from experiments.planned_data import planned_data
from experiments.workload import (
    Phase,
    RunConfig,
    Work,
    evaluation_phases,
    mining_phases,
    training_phases,
)
from lever_jax.errors import InputError
from qwen_bridge import cost
from qwen_bridge.devices import DEVICES, Device
from qwen_bridge.grids import check_pixels, image_grid
from qwen_bridge.hub import TINY_QWEN, hub_id, resolve_config
from qwen_bridge.memory import CONTEXT_BYTES, cache_budgets, forward_bound, worker_memory
from qwen_bridge.shape import PUBLISHED, ModelShape
from qwen_bridge.trie import KEYS_PER_TOKEN

PUBLISHED_PIXELS = (3136, 12_845_056)  # preprocessor_config.json of the published checkpoints
BANDWIDTH_SHARE = 0.6  # of a GPU's memory bandwidth, while it decodes
STORE_BYTES = 300  # a prompt of two shots in the store: its score, answer and proposal


def show(phases: str = "train", **options: Any) -> None:
    """Prints the plan of this run, and writes it where --plan_out says.

    Args:
      phases: `mine` stops before RCE, as `experiments.mine` does; `evaluate` plans the evaluation
        alone, of a run whose embeddings are there.
      **options: of `make_plan`.

    Raises:
      InputError: the flags, the model's config or the data's files do not allow a plan.
    """
    check_out(settings.PLAN_OUT.value)
    document = make_plan(phases, **options)
    print_plan(document)
    write_out(settings.PLAN_OUT.value, document)


def make_plan(
    phases: str = "train", *, selectors: int | None = None, look: bool = True
) -> dict[str, Any]:
    """The plan as a document: model, phases, totals, memory, sizes and assumptions.

    Pairs are [at least, at most]. See `show` for `phases` and the errors, `planned_data` for
    `look`; `selectors` is how many `evaluate` has.
    """
    data = planned_data(look=look)
    model = configs.model()
    shape, bounds = _model(model)
    grids = [_grid(shape, size, bounds) for size in data.image_sizes]
    tokens = statistics.fmean(h * w for h, w in grids) / shape.vision.merge**2
    lengths = _lengths(tokens)
    run = run_config()
    pricer = _Pricer(shape, lengths, grids)
    queries = run.train + run.evaluated
    if phases == "evaluate":
        rows, work = [], evaluation_phases(run, selectors)
    else:
        rows = [pricer.embedding(data.bank, data.bank_images, queries)]
        work = mining_phases(run) + (training_phases(run) if phases == "train" else [])
    rows += [pricer.phase(phase, data.bank_images) for phase in work]
    scored = [sum(row["scored"][i] for row in rows) for i in (0, 1)]
    device = DEVICES[settings.PLAN_DEVICE.value]
    prefix_bytes, feature_bytes = _budgets(shape, device, pricer.value_bytes)
    memory = worker_memory(
        shape,
        lengths,
        shots=max(run.shots, *run.evaluation.shots),
        batch_tokens=settings.BATCH_TOKENS.value,
        cache_bytes=prefix_bytes,
        feature_bytes=feature_bytes,
        value_bytes=pricer.value_bytes,
    )
    memory["selector"] = _table_bytes(shape, data.bank, run)
    return {
        "model": {
            "name": model or configs.EMBEDDED,
            "parameters": shape.parameters,
            "bytes_per_value": pricer.value_bytes,
            "kv_bytes_per_token": shape.kv_values * pricer.value_bytes,
        },
        "prompt": {
            **dataclasses.asdict(lengths),
            "shots": run.shots,
            "tokens": lengths.prefix(run.shots) + lengths.query,
        },
        "phases": rows,
        "total": {
            "asked": [sum(row["asked"][i] for row in rows) for i in (0, 1)],
            "scored": scored,
            "generated": sum(row["generated"] for row in rows),
            "tokens": sum(row["tokens"] for row in rows),
            "flops": [sum(row["flops"][i] for row in rows) for i in (0, 1)],
            "hours": [sum(row["hours"][i] for row in rows) for i in (0, 1)],
        },
        "memory": {
            "parts": memory,
            "total": sum(memory.values()),
            "device": device.memory,
            "fits": sum(memory.values()) <= device.memory,
        },
        "disk": {
            "store": scored[1] * STORE_BYTES + queries * run.pool * 12,
            "embeddings": (data.bank + queries) * shape.embedding_dim * 4,
        },
        "assumptions": {
            "device": settings.PLAN_DEVICE.value,
            "workers": configs.fixed_workers(),
            "peak_flops": device.flops,
            "utilisation": settings.PLAN_UTILISATION.value,
            "bandwidth_share": BANDWIDTH_SHARE,
            "certified": settings.PLAN_CERTIFIED.value,
            "bank": data.bank,
            "bank_images": data.bank_images,
            "images_sampled": len(data.image_sizes),
            "image_tokens": tokens,
            "notes": list(data.assumptions),
        },
    }


def run_config() -> RunConfig:
    """The flags that decide how many prompts are asked."""
    searches = settings.WARMUP.value == "search"
    return RunConfig(
        train=settings.NUM_QUERIES.value,
        evaluated=settings.NUM_EVAL.value,
        pool=settings.POOL_SIZE.value,
        shots=configs.training_shots(),
        warmup_queries=settings.WARMUP_QUERIES.value if searches else 0,
        warmup_beam=settings.WARMUP_BEAM.value,
        mining=configs.mining_config(),
        grpo_epochs=settings.GRPO_EPOCHS.value,
        group_size=settings.GROUP_SIZE.value,
        verify=settings.VERIFY.value,
        evaluation=configs.evaluation_config(),
        warms_up=settings.WARMUP.value != "none",
        construction=settings.SEARCH_CONSTRUCTION.value,
        gain=settings.SEARCH_SCORE.value == "gain",
        mines=settings.RCE_DATA.value != "import",
    )


def _table_bytes(shape: ModelShape, bank: int, run: RunConfig) -> float:
    """Float32 embeddings that JAX holds on a GPU: the queries, and what their pools can name."""
    rows = sum(n + min(bank, n * run.pool) for n in (run.train, run.evaluated))
    return float(rows * shape.embedding_dim * 4)


class _Pricer:
    """Turns prompts into FLOPs and hours for one network, device and scorer."""

    def __init__(self, shape: ModelShape, lengths: cost.PromptLengths, grids):
        self._shape, self._lengths, self._grids = shape, lengths, grids
        self._device = DEVICES[settings.PLAN_DEVICE.value]
        on_cpu = settings.PLAN_DEVICE.value == "cpu"
        dtype = settings.DTYPE.value
        self.value_bytes = 4 if dtype == "float32" or (dtype == "auto" and on_cpu) else 2
        self._image = statistics.fmean(cost.vision_flops(shape.vision, grid) for grid in grids)
        self._fast = settings.SCORER.value == "trie"

    def embedding(self, bank: int, bank_images: int, queries: int) -> dict[str, Any]:
        """The row of the embeddings of bank and queries."""
        flops = (bank_images + queries) * self._image
        for count, answer in ((bank, True), (queries, False)):
            flops += count * cost.embedding_flops(self._shape, self._lengths, answer=answer)
        texts = (bank + queries) * self._lengths.question + bank * self._lengths.answer
        return self._row("embed", (0, 0), (0, 0), 0.0, texts, (flops, flops), 0.0)

    def phase(self, phase: Phase, bank_images: int) -> dict[str, Any]:
        """The row of one phase.

        The vision tower runs once a phase over every image that it shows.
        """
        generated = phase.answered * (1 - settings.PLAN_CERTIFIED.value)
        flops = [self._images(phase, bank_images, least) for least in (True, False)]
        tokens = seconds = 0.0
        for work in phase.work:
            flops[0] += work.queries * self._scoring(work, work.least)
            flops[1] += work.queries * self._scoring(work, work.new)
            answers = work.answered * (1 - settings.PLAN_CERTIFIED.value)
            flops[1] += work.queries * self._generating(work, answers)
            tokens += work.queries * self._tokens(work, answers)
            seconds += self._decode_seconds(work, work.queries * answers)
        return self._row(phase.name, phase.asked, phase.scored, generated, tokens, flops, seconds)

    def _row(self, name, asked, scored, generated, tokens, flops, decode_seconds) -> dict[str, Any]:
        speed = self._device.flops * settings.PLAN_UTILISATION.value * configs.fixed_workers()
        hours = [f / speed / 3600 for f in flops]
        hours[1] += decode_seconds / configs.fixed_workers() / 3600
        return {
            "name": name,
            "asked": list(asked),
            "scored": list(scored),
            "generated": round(generated),
            "tokens": round(tokens),
            "flops": list(flops),
            "hours": hours,
        }

    def _images(self, phase: Phase, bank_images: int, least: bool) -> float:
        if not any(work.new for work in phase.work):
            return 0.0  # Answers to what the phase before has shown.
        shown = sum(
            work.queries * min(work.pool, n * work.shots if work.apart else work.pool * (n > 0))
            for work in phase.work
            for n in [work.least if least else max(work.new, work.answered)]
        )
        return (min(shown, bank_images) + phase.queries) * self._image

    def _scoring(self, work: Work, prompts: int) -> float:
        """FLOPs of scoring so many prompts of one query."""
        if not prompts:
            return 0.0
        if not self._fast:
            grid = self._grids[0]
            args = {"candidates": prompts, "shots": work.shots}
            return cost.rung_flops(self._shape, self._lengths, grid, **args)["naive"]
        last = prompts * cost.last_flops(self._shape, self._lengths, work.shots)
        return last + self._prefixes(work, prompts)

    def _generating(self, work: Work, prompts: float) -> float:
        if not prompts:
            return 0.0
        decode = cost.decode_flops(self._shape, self._lengths, work.shots)
        return prompts * decode + self._prefixes(work, prompts)

    def _prefixes(self, work: Work, prompts: float) -> float:
        """Prefix nodes of one query's prompts; none is known from an earlier phase or query."""
        return sum(
            count * cost.prefix_flops(self._shape, self._lengths, depth)
            for depth, count in enumerate(_nodes(work, prompts), 1)
        )

    def _tokens(self, work: Work, answers: float) -> float:
        """Tokens that pass through the language model for one query, at most."""
        last = self._lengths.query + self._lengths.branch_tokens
        decoded = self._lengths.query + self._lengths.generated
        if not self._fast:
            prompt = self._lengths.prefix(work.shots) + self._lengths.query
            forms = self._lengths.forms * prompt + self._lengths.branch_rows
            return work.new * forms + answers * (prompt + self._lengths.generated)
        nodes = sum(_nodes(work, work.new)) + sum(_nodes(work, answers))
        return work.new * last + answers * decoded + nodes * self._lengths.demonstration

    def _decode_seconds(self, work: Work, prompts: float) -> float:
        """Time that decoding takes beyond its FLOPs: every step of a batch reads all weights."""
        length = self._lengths.prefix(work.shots) + self._lengths.query
        steps, tokens = settings.MAX_NEW_TOKENS.value, settings.BATCH_TOKENS.value
        fits = min(tokens / self._lengths.query, KEYS_PER_TOKEN * tokens / length)
        fits = fits if self._fast else 1
        batch = max(1, min(fits, settings.SCORE_BATCH.value))
        weights = self._shape.language_parameters * self.value_bytes / batch
        keys = length * self._shape.kv_values * self.value_bytes
        return prompts * steps * (weights + keys) / (self._device.bandwidth * BANDWIDTH_SHARE)


def _budgets(shape: ModelShape, device: Device, value_bytes: int) -> tuple[int, int]:
    """Bytes of cached prefixes and image features, as a worker on the device would choose them."""
    forward = forward_bound(
        shape, batch_tokens=settings.BATCH_TOKENS.value, value_bytes=value_bytes
    )
    asked = (settings.CACHE_MIB.value, settings.VISION_CACHE_MIB.value)
    prefix, features = (None if mib == "auto" else mib << 20 for mib in asked)
    return cache_budgets(
        max(0.0, device.memory - shape.parameters * value_bytes - CONTEXT_BYTES),
        forward,
        prefix=prefix,
        features=features,
        gpu=settings.PLAN_DEVICE.value != "cpu",
    )


def _nodes(work: Work, prompts: float) -> list[float]:
    """Prefix nodes by depth that so many prompts of one query need."""
    if work.apart:
        return [prompts] * work.shots
    return cost.trie_nodes(prompts, work.shots, work.pool)


def _grid(shape: ModelShape, size: tuple[int, int], bounds: tuple[int, int]) -> tuple[int, int]:
    return image_grid(
        *size,
        min_pixels=bounds[0],
        max_pixels=bounds[1],
        patch_size=shape.vision.patch,
        merge_size=shape.vision.merge,
    )


def _model(model: str) -> tuple[ModelShape, tuple[int, int]]:
    """Shape of the network, and the pixel bounds in force."""
    named = hub_id(model)
    if named is not None and named[0] in PUBLISHED:
        shape, found = PUBLISHED[named[0]], {}
    else:
        folder = resolve_config(model) if model else TINY_QWEN
        if not folder.is_dir():
            raise InputError(f"--model={model} is not a folder; give a Qwen2.5-VL checkpoint")
        shape, path = ModelShape.from_folder(folder), folder / "preprocessor_config.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
    size = found.get("size") or {}
    low = settings.MIN_PIXELS.value or found.get("min_pixels") or size.get("shortest_edge")
    high = settings.MAX_PIXELS.value or found.get("max_pixels") or size.get("longest_edge")
    bounds = low or PUBLISHED_PIXELS[0], high or PUBLISHED_PIXELS[1]
    check_pixels(*bounds, patch_size=shape.vision.patch, merge_size=shape.vision.merge)
    return shape, bounds


def _lengths(image_tokens: float) -> cost.PromptLengths:
    """Lengths of prompts with these flags; an instruction has a token a word or mark, and a break.

    A batch that generates goes on until its longest answer ends, so the limit is assumed for all.
    """
    usual = cost.PromptLengths(image=image_tokens)
    instruction = re.findall(r"\w+|[^\w\s]", settings.INSTRUCTION.value)
    return dataclasses.replace(
        usual,
        question=usual.question + (len(instruction) + 1 if instruction else 0),
        generated=float(settings.MAX_NEW_TOKENS.value),
    )
