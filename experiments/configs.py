"""The configs that the flags of `settings.py` make, each checked as it is made."""

import itertools
import math
import os
import pathlib

from experiments import settings
from lever_jax import decoding
from lever_jax.diagnostics import Thresholds
from lever_jax.errors import InputError
from lever_jax.evaluation import EvaluationConfig
from lever_jax.mining import MiningConfig, RewardConfig
from lever_jax.pooled import PoolConfig
from lever_jax.selector import SelectorConfig
from lever_jax.training import LossConfig
from qwen_bridge.adapters import check_adapter
from qwen_bridge.engine import Engine, LocalEngine
from qwen_bridge.grids import check_pixels
from qwen_bridge.placement import check_device
from qwen_bridge.ray_cluster import RayEngine

EMBEDDED = "embedded"
"""What `--model` calls the checkpoint that comes with the project."""


def check(*, scoring: bool = True) -> None:
    """Builds every config once, so that a wrong flag is found before anything is computed.

    Args:
      scoring: whether the VLM will be asked anything.

    Raises:
      InputError: a flag is wrong, or does not fit another.
    """
    for make in (
        evaluation_config,
        worker_settings,
        engine,
        embeddings_dir,
        pool_config,
        selector_config,
        mining_config,
        reward_config,
        loss_config,
        thresholds,
    ):
        make()
    if scoring:
        _check_data()
    _check_numbers()
    _check_stop()
    if settings.DRAWS.value != "iid" and settings.VERIFY.value != "all":
        raise InputError(
            f"--draws={settings.DRAWS.value} needs --verify=all: every draw counts by its "
            "probability"
        )
    answered = settings.VERIFY_BEST.value + settings.VERIFY_LOW.value
    if settings.VERIFY.value == "top_m" and answered >= settings.GROUP_SIZE.value:
        raise InputError(
            f"--verify=top_m leaves nothing out: --verify_best={settings.VERIFY_BEST.value} and "
            f"--verify_low={settings.VERIFY_LOW.value} cover "
            f"--group_size={settings.GROUP_SIZE.value}; lower them, or use --verify=all, which is "
            "unbiased"
        )


def _check_numbers() -> None:
    """Refuses infinite and undefined numbers, which pass every bound."""
    for flag in settings.FLAGS.flags_by_module_dict()[settings.__name__]:
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise InputError(f"--{flag.name}={flag.value} must be a finite number")


def _check_stop() -> None:
    """Refuses a stop that can never come, and a cost that nothing can save."""
    if settings.STOP.value and training_shots() == 1:
        raise InputError(
            "--stop ends pointers after their first demonstration at the earliest, and "
            "--train_shots=1 has no more; raise it, or leave --stop out"
        )
    imports = settings.WARMUP.value == "import" or settings.RCE_DATA.value != "mined"
    if settings.STOP.value and imports:
        raise InputError(
            "--stop learns from pointers of every length, and imported ones all have S "
            "demonstrations; leave --stop out, or --warmup=import and --rce_data"
        )
    if settings.SHOT_COST.value and not settings.STOP.value:
        raise InputError(
            f"--shot_cost={settings.SHOT_COST.value} is the same for every pointer without --stop; "
            "add --stop, or set it to 0"
        )


def evaluated_shots() -> tuple[int, ...]:
    """The numbers of shots to evaluate, checked."""
    try:
        shots = tuple(dict.fromkeys(int(text) for text in settings.SHOTS.value))
    except ValueError:
        raise InputError(
            f"--shots={','.join(settings.SHOTS.value)} must be whole numbers"
        ) from None
    if not shots:
        raise InputError("--shots is empty; give numbers such as --shots=1,2")
    for name, value in [("shots", n) for n in shots] + [("train_shots", _training_shots(shots))]:
        if not 1 <= value <= 8:
            raise InputError(f"--{name}={value} is out of range; shots go from 1 to 8")
        if value > settings.POOL_SIZE.value:
            raise InputError(
                f"--{name}={value} exceeds --pool_size={settings.POOL_SIZE.value}; "
                "lower it or enlarge the pool"
            )
    return shots


def training_shots() -> int:
    """S in training."""
    return _training_shots(evaluated_shots())


def _training_shots(evaluated: tuple[int, ...]) -> int:
    return settings.TRAIN_SHOTS.value or max(evaluated)


def left_out(phase: str) -> bool:
    """Whether the flags leave a phase out of the run."""
    return phase == "warmup" and settings.WARMUP.value == "none"


def evaluated_decodings() -> tuple[str, ...]:
    """How selectors pick in the evaluation, checked."""
    names = tuple(dict.fromkeys(settings.DECODINGS.value))
    for name in names:
        if name not in decoding.DECODINGS:
            raise InputError(f"--decodings: {name!r} is not one of {', '.join(decoding.DECODINGS)}")
    if not names:
        raise InputError("--decodings is empty; give some, as --decodings=greedy,beam")
    return names


def dataset_settings() -> dict:
    """What `open_dataset` takes, for driver and workers alike."""
    if settings.DATASET.value == "digits":
        return {
            "kind": "digits",
            "seed": settings.WORLD_SEED.value,
            "bank": settings.BANK_SIZE.value,
            "train": settings.NUM_QUERIES.value,
            "eval": settings.NUM_EVAL.value,
        }
    kind = settings.DATASET.value
    needed = ("questions", "annotations", "images") if kind == "official" else ("jsonl",)
    names = [f"{split}_{what}" for split in ("bank", "query") for what in needed]
    for name in names:
        if not settings.FLAGS[name].value:
            raise InputError(f"--dataset={kind} needs --{name}")
    if kind == "official":
        options = {"image_pattern": settings.IMAGE_PATTERN.value}
    else:
        names += ["bank_images", "query_images"]
        options = {}
    return {
        "kind": kind,
        **{name: settings.FLAGS[name].value for name in names},
        **options,
        "num_train": settings.NUM_QUERIES.value,
        "num_eval": settings.NUM_EVAL.value,
        "seed": settings.WORLD_SEED.value,
        "max_bank": settings.MAX_BANK.value,
    }


def model() -> str:
    """The checkpoint, as `--model`; empty for the embedded one."""
    return "" if settings.MODEL.value == EMBEDDED else settings.MODEL.value


def _check_data() -> None:
    """Refuses data flags that a new run would pass over, and photographs for the embedded VLM.

    A workdir with a run in it has settled both.
    """
    if (pathlib.Path(settings.WORKDIR.value) / "flags.txt").exists():
        return
    data = settings.DATASET.value
    if not settings.MODEL.value and data != "digits":
        raise InputError(
            f"--dataset={data} needs --model: a Qwen2.5-VL folder or hub id (--model=embedded is "
            "the small one that comes with the project and has seen digits only)"
        )
    if data != "digits":
        return
    formats = {"jsonl": "jsonl", "questions": "official", "annotations": "official"}
    for split, (what, kind) in itertools.product(("bank", "query"), formats.items()):
        if settings.FLAGS[f"{split}_{what}"].value:
            raise InputError(
                f"--{split}_{what} is given, but --dataset=digits has data of its own; add "
                f"--dataset={kind}, or --{split}_{what}= to do without it"
            )


def worker_settings() -> dict:
    """What a worker is built from."""
    encoder, folder = settings.ENCODER.value, settings.ENCODER_MODEL.value
    if (encoder == "qwen") == bool(folder):
        raise InputError(
            f"--encoder={encoder} uses the VLM itself; leave --encoder_model={folder} out, or "
            "give --encoder=clip or siglip"
            if folder
            else f"--encoder={encoder} needs --encoder_model, a local {encoder} checkpoint folder"
        )
    if settings.MIN_PIXELS.value is not None and settings.MAX_PIXELS.value is not None:
        check_pixels(settings.MIN_PIXELS.value, settings.MAX_PIXELS.value)
    if settings.ADAPTER.value:
        check_adapter(pathlib.Path(settings.ADAPTER.value))
    return {
        "dataset": dataset_settings(),
        "model": model(),
        "adapter": settings.ADAPTER.value,
        "device": settings.DEVICE.value,
        "dtype": settings.DTYPE.value,
        "min_pixels": settings.MIN_PIXELS.value,
        "max_pixels": settings.MAX_PIXELS.value,
        "prompt_style": settings.PROMPT_STYLE.value,
        "instruction": settings.INSTRUCTION.value,
        "scorer": settings.SCORER.value,
        "answer_weight": settings.ANSWER_WEIGHT.value,
        "gt_prob": settings.GT_PROB.value,
        "max_new_tokens": settings.MAX_NEW_TOKENS.value,
        "encoder": settings.ENCODER.value,
        "encoder_model": settings.ENCODER_MODEL.value,
        "cache_mib": settings.CACHE_MIB.value,
        "vision_cache_mib": settings.VISION_CACHE_MIB.value,
        "batch_tokens": settings.BATCH_TOKENS.value,
    }


def absolute_worker_settings() -> dict:
    """The same with absolute paths of what exists here, so that any process finds it."""
    worker = worker_settings()
    for part in (worker, worker["dataset"]):
        for name, value in part.items():
            if isinstance(value, str) and value and os.path.exists(value):
                part[name] = os.path.abspath(value)
    return worker


def engine() -> Engine:
    """Where workers live."""
    workers, threads = settings.WORKERS.value, settings.THREADS.value
    gpus, device = settings.GPUS_PER_WORKER.value, settings.DEVICE.value
    check_device(device)
    if settings.ENGINE.value == "local":
        rays = (settings.GPUS_PER_WORKER, settings.RAY_ADDRESS)
        if any(flag.value != flag.default for flag in rays):
            raise InputError("--ray_address and --gpus_per_worker need --engine=ray")
        workers = fixed_workers()
        if workers != 1 and device.startswith("cuda:"):
            raise InputError(
                f"--device={device} puts all --workers={workers} on one GPU; --device=cuda deals "
                "them to all, and CUDA_VISIBLE_DEVICES says which there are"
            )
        return LocalEngine(workers, threads)
    if device.startswith("cuda:"):
        raise InputError(f"--device={device}: Ray deals the GPUs; use --device=cuda or auto")
    if device == "cpu":
        if gpus:
            raise InputError(f"--gpus_per_worker={gpus:g} is for nothing with --device=cpu")
        gpus = 0.0
    elif device == "cuda" and gpus == 0:
        raise InputError("--gpus_per_worker=0 leaves --device=cuda no GPU; give 1 or a share")
    return RayEngine(
        address=settings.RAY_ADDRESS.value,
        workers=None if workers == "auto" else workers,
        threads=threads,
        gpus_per_worker=gpus,
        deadline_s=settings.DEADLINE_S.value,
    )


def fixed_workers() -> int:
    """The number of workers, where it has to be known beforehand."""
    if settings.WORKERS.value == "auto":
        raise InputError("--workers=auto needs --engine=ray, and no --plan; give a number")
    return settings.WORKERS.value


def embeddings_dir() -> pathlib.Path:
    """Where embeddings are cached."""
    given = settings.EMBEDDINGS_DIR.value
    folder = pathlib.Path(given) if given else pathlib.Path(settings.WORKDIR.value) / "embeddings"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--embeddings_dir={folder} is a file; give a folder")
    return folder


def pool_config() -> PoolConfig:
    """How pools are made."""
    return PoolConfig(
        size=settings.POOL_SIZE.value,
        image_weight=settings.IMAGE_WEIGHT.value,
        question_weight=settings.QUESTION_WEIGHT.value,
        shares=counts("pool_shares", settings.POOL_SHARES.value, "image:8"),
        near_duplicate=settings.NEAR_DUPLICATE.value,
        seed=settings.WORLD_SEED.value,
        memory_mib=settings.RETRIEVAL_MIB.value,
    )


def counts(flag: str, items: list[str], example: str) -> dict[str, int]:
    """Reads `source:count` items."""
    counts = {}
    for item in items:
        name, _, count = item.partition(":")
        if not count.isdigit() or name in counts:
            raise InputError(
                f"--{flag}: {item!r} is not of the form source:count, each source once, as "
                f"{example}"
            )
        counts[name] = int(count)
    return counts


def selector_config() -> SelectorConfig:
    """The selector's architecture."""
    return SelectorConfig(
        width=settings.WIDTH.value,
        layers=settings.LAYERS.value,
        heads=settings.HEADS.value,
        history=settings.HISTORY.value,
        pointer_score=settings.POINTER_SCORE.value,
        diversity=settings.DIVERSITY.value,
        stop=settings.STOP.value,
        dropout=settings.DROPOUT.value,
    )


def mining_config() -> MiningConfig:
    """How pointers are proposed and verified."""
    return MiningConfig(
        proposals=settings.PROPOSALS.value,
        quotas=counts("quotas", settings.QUOTAS.value, "beam:12"),
        temperature=settings.TEMPERATURE.value,
        top_p=settings.TOP_P.value,
        verify_best=settings.VERIFY_BEST.value,
        verify_low=settings.VERIFY_LOW.value,
        verify_uniform=settings.VERIFY_UNIFORM.value,
    )


def reward_config() -> RewardConfig:
    """How scores become rewards."""
    return RewardConfig(
        settings.REWARD_MODE.value,
        settings.HARD_WEIGHT.value,
        settings.SOFT_WEIGHT.value,
        settings.SIMILARITY_WEIGHT.value,
        settings.SHOT_COST.value,
    )


def loss_config() -> LossConfig:
    """Settings of RCE and GRPO."""
    return LossConfig(
        tau=settings.TAU.value,
        advantage=settings.ADVANTAGE.value,
        clip_low=settings.CLIP_LOW.value,
        clip_high=settings.CLIP_HIGH.value,
        kl_coef=settings.KL_COEF.value,
        min_range=settings.MIN_RANGE.value,
        draws=settings.DRAWS.value,
    )


def thresholds() -> Thresholds:
    """What GRPO asks of the data."""
    return Thresholds(
        settings.MAX_ZERO_POSITIVE.value, settings.MIN_SPEARMAN.value, settings.MIN_HEADROOM.value
    )


def evaluation_config() -> EvaluationConfig:
    """What is evaluated."""
    return EvaluationConfig(
        shots=evaluated_shots(),
        metric=settings.METRIC.value,
        decodings=evaluated_decodings(),
        beam_width=settings.BEAM_WIDTH.value,
        rerank_width=settings.RERANK_WIDTH.value,
        random_seeds=settings.RANDOM_SEEDS.value,
        mmr_trade_off=settings.MMR_TRADE_OFF.value,
        oracle_beam=settings.ORACLE_BEAM.value,
        image_weight=settings.IMAGE_WEIGHT.value,
        question_weight=settings.QUESTION_WEIGHT.value,
    )
