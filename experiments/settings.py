"""Every flag of training, mining and evaluation, in one place, and the configs they make.

All entry points share the flags, so one flag file serves them all. A run writes the flags it ran
with to `flags.txt` in its workdir; entry points that continue a run adopt them from there, and
what is given on the command line wins.
"""

import dataclasses
import math
import os
import pathlib

from absl import flags

from experiments.output import write_out
from lever_jax import decoding, training
from lever_jax.advantages import ADVANTAGES
from lever_jax.demonstrations import RUN_FILE
from lever_jax.diagnostics import Thresholds
from lever_jax.errors import InputError
from lever_jax.evaluation import METRICS, EvaluationConfig
from lever_jax.mining import VERIFY, MiningConfig, RewardConfig
from lever_jax.pooled import PoolConfig
from lever_jax.rewards import REWARD_MODES
from lever_jax.search import CONSTRUCTIONS, SCORES
from lever_jax.selector import SelectorConfig
from lever_jax.training import LossConfig
from qwen_bridge.adapters import check_adapter
from qwen_bridge.devices import DEVICES
from qwen_bridge.grids import check_pixels
from qwen_bridge.vqa.official import DEFAULT_IMAGE_PATTERN

FLAGS = flags.FLAGS
PHASES = ("warmup", "rce", "grpo")
_DATASETS = ("digits", "official", "jsonl")


class _MibParser(flags.ArgumentParser):
    """`auto`, or a number of MiB."""

    def __init__(self, lower_bound: int):
        self._number = flags.IntegerParser(lower_bound=lower_bound)
        self.syntactic_help = f"auto, or an integer of at least {lower_bound}"

    def parse(self, argument):
        """See the base class; what it raises becomes one line that names the flag."""
        if argument == "auto":
            return argument
        try:
            return self._number.parse(argument)
        except ValueError:
            raise ValueError(f"it must be {self.syntactic_help}") from None

    def flag_type(self) -> str:
        """For the help."""
        return "auto or integer"


def _define_mib(name: str, help: str, lower_bound: int):
    parser, serializer = _MibParser(lower_bound), flags.ArgumentSerializer()
    return flags.DEFINE(parser, name, "auto", help, serializer=serializer)


WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "Folder of everything a run writes.")
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of training: the selector's start, pointers drawn, shuffles. Pools are of --world_seed.",
    lower_bound=0,
)

# --- data -------------------------------------------------------------------------------------
DATASET = flags.DEFINE_enum("dataset", "digits", _DATASETS, "Embedded, official JSON, or JSONL.")
WORLD_SEED = flags.DEFINE_integer(
    "world_seed",
    0,
    "Seed of the data: the digits world, examples drawn from files, random places of pools.",
    lower_bound=0,
)
BANK_SIZE = flags.DEFINE_integer(
    "bank_size", 1600, "Demonstrations of the digits world.", lower_bound=1
)
NUM_QUERIES = flags.DEFINE_integer(
    "num_queries", 600, "Training queries; start with 50 and grow.", lower_bound=1
)
NUM_EVAL = flags.DEFINE_integer(
    "num_eval", 400, "Evaluation queries, on other images.", lower_bound=1
)
MAX_BANK = flags.DEFINE_integer(
    "max_bank", None, "Demonstrations drawn by seed; default all.", lower_bound=1
)
for _split in ("bank", "query"):
    flags.DEFINE_string(f"{_split}_questions", "", f"Official JSON: questions of the {_split}.")
    flags.DEFINE_string(f"{_split}_annotations", "", f"Official JSON: answers of the {_split}.")
    flags.DEFINE_string(f"{_split}_jsonl", "", f"JSONL of the {_split}, one example a line.")
    flags.DEFINE_string(
        f"{_split}_images", "", f"Folder of the {_split}'s images; JSONL's own folder by default."
    )
IMAGE_PATTERN = flags.DEFINE_string(
    "image_pattern", DEFAULT_IMAGE_PATTERN, "File name of an image, with --dataset=official."
)

# --- the VLM ----------------------------------------------------------------------------------
MODEL = flags.DEFINE_string(
    "model",
    "",
    "Qwen2.5-VL: a checkpoint folder, or ORG/NAME[@REVISION] on the Hugging Face hub; empty is the "
    "embedded one.",
)
ADAPTER = flags.DEFINE_string(
    "adapter", "", "Folder of a LoRA adapter (peft, safetensors), merged into the weights."
)
DEVICE = flags.DEFINE_string("device", "auto", "auto, cpu, cuda or cuda:N, for the VLM.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ("auto", "float32", "bfloat16"), "auto: by device.")
MIN_PIXELS = flags.DEFINE_integer(
    "min_pixels",
    None,
    "Enlarge images to at least so many pixels, 784 a token; default as the checkpoint says.",
    lower_bound=1,
)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    None,
    "Shrink images to at most so many pixels, 784 a token; default as the checkpoint says.",
    lower_bound=784,
)
PROMPT_STYLE = flags.DEFINE_enum("prompt_style", "chat", ("chat", "inline"), "Layout of prompts.")
INSTRUCTION = flags.DEFINE_string("instruction", "", "A line after every question.")
SCORER = flags.DEFINE_enum("scorer", "trie", ("trie", "reference"), "Fast, or plain and slow.")
ANSWER_WEIGHT = flags.DEFINE_enum(
    "answer_weight", "count3", ("count3", "official"), "w(a) of vqa_gt_prob."
)
GT_PROB = flags.DEFINE_enum(
    "gt_prob", "product", ("product", "mean_token"), "P(a); mean_token is not a probability."
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 10, "Longest generated answer, tokens.", lower_bound=1
)
WORKERS = flags.DEFINE_integer("workers", 1, "VLM processes; one a GPU.", lower_bound=1)
THREADS = flags.DEFINE_integer(
    "threads", 0, "CPU threads of each; 0 shares the cores.", lower_bound=0
)
SCORE_BATCH = flags.DEFINE_integer(
    "score_batch", 256, "Prompts in one request to a worker.", lower_bound=1
)
BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", 8192, "Tokens of a forward pass of the VLM.", lower_bound=1
)
CACHE_MIB = _define_mib(
    "cache_mib", "Memory of cached prompt prefixes, MiB; auto: by what the device has free.", 1
)
VISION_CACHE_MIB = _define_mib(
    "vision_cache_mib", "Memory of cached image features, MiB; auto: likewise.", 0
)
DEADLINE_S = flags.DEFINE_float(
    "deadline_s", 600.0, "A request that takes longer has hung.", lower_bound=0.001
)

# --- embeddings, pools and selector -----------------------------------------------------------
ENCODER = flags.DEFINE_enum(
    "encoder", "qwen", ("qwen", "clip", "siglip"), "Embeds examples; qwen is the VLM itself."
)
ENCODER_MODEL = flags.DEFINE_string(
    "encoder_model", "", "Local folder of the CLIP or SigLIP checkpoint."
)
EMBEDDINGS_DIR = flags.DEFINE_string(
    "embeddings_dir", "", "Folder of cached embeddings, for any number of runs; WORKDIR/embeddings."
)
POOL_SIZE = flags.DEFINE_integer("pool_size", 32, "K, candidates of a query.", lower_bound=1)
IMAGE_WEIGHT = flags.DEFINE_float(
    "image_weight", 1.0, "Weight of image similarity, >= 0.", lower_bound=0.0
)
QUESTION_WEIGHT = flags.DEFINE_float(
    "question_weight", 1.0, "Weight of question similarity.", lower_bound=0.0
)
POOL_SHARES = flags.DEFINE_list(
    "pool_shares",
    [],
    "Places of a pool by source, as image:8,question:8,random:4; image and question are filled by "
    "that similarity alone, what the shares leave open by both.",
)
NEAR_DUPLICATE = flags.DEFINE_float(
    "near_duplicate",
    1.0,
    "Leave out demonstrations whose image has a cosine (centred) above this with the query's, "
    "such as 0.98 where splits share photographs; 1 is off.",
    lower_bound=0.0,
    upper_bound=1.0,
)
RETRIEVAL_MIB = flags.DEFINE_integer(
    "retrieval_mib", 512, "Memory of the search for pools, MiB; changes no pool.", lower_bound=1
)
SHOTS = flags.DEFINE_list("shots", ["1", "2"], "Numbers of demonstrations evaluated, 1 to 8.")
TRAIN_SHOTS = flags.DEFINE_integer(
    "train_shots", 0, "S in training; 0 is the largest of --shots.", lower_bound=0
)
WIDTH = flags.DEFINE_integer("width", 64, "Width of the selector.")
LAYERS = flags.DEFINE_integer("layers", 1, "Set-encoder layers of the selector.")
HEADS = flags.DEFINE_integer("heads", 4, "Attention heads of the selector.")

# --- warm-up and mining -----------------------------------------------------------------------
WARMUP = flags.DEFINE_enum(
    "warmup",
    "search",
    ("search", "import", "none"),
    "Warm-up on pointers that a search finds or that experiments.import_rl read; none: a random "
    "start.",
)
WARMUP_QUERIES = flags.DEFINE_integer(
    "warmup_queries", 150, "Training queries that are searched.", lower_bound=1
)
WARMUP_BEAM = flags.DEFINE_integer(
    "warmup_beam", 6, "Pointers kept at each level of the search.", lower_bound=1
)
WARMUP_TARGETS = flags.DEFINE_integer(
    "warmup_targets", 4, "Best pointers a query to imitate.", lower_bound=1
)
SEARCH_SCORE = flags.DEFINE_enum(
    "search_score",
    "gt_prob",
    SCORES,
    "Weight of a pointer found for the warm-up: its gt_prob, or gain, what it adds to the gt_prob "
    "of the prompt without demonstrations; pointers that add nothing are not imitated.",
)
SEARCH_CONSTRUCTION = flags.DEFINE_enum(
    "search_construction",
    "both",
    CONSTRUCTIONS,
    "Where the warm-up's search puts a further demonstration: first (left), last (right), or both.",
)
WARMUP_EPOCHS = flags.DEFINE_integer(
    "warmup_epochs", 15, "Passes over the searched queries.", lower_bound=0
)
PROPOSALS = flags.DEFINE_integer(
    "proposals", 64, "Pointers scored a query in stage A.", lower_bound=1
)
QUOTAS = flags.DEFINE_list(
    "quotas",
    ["beam:12", "sample:20", "top_p:12", "retrieval:4", "random:16"],
    "Proposals by source; what they leave open is random.",
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Of the source `sample`, > 0.", lower_bound=1e-06
)
TOP_P = flags.DEFINE_float(
    "top_p", 0.9, "Of the source `top_p`, (0, 1].", lower_bound=1e-06, upper_bound=1.0
)
VERIFY_BEST = flags.DEFINE_integer("verify_best", 12, "Best proposals answered in stage B.")
VERIFY_LOW = flags.DEFINE_integer("verify_low", 8, "Lowest proposals answered for contrast.")
VERIFY_UNIFORM = flags.DEFINE_integer(
    "verify_uniform", 4, "Proposals answered a query, drawn uniformly, for the health figures."
)

RCE_DATA = flags.DEFINE_enum(
    "rce_data",
    "mined",
    ("mined", "import", "both"),
    "What RCE learns from: this run's mined data, data that experiments.import_rl read (then "
    "nothing is mined), or both.",
)
IMPORT_PARTIAL = flags.DEFINE_bool(
    "import_partial",
    False,
    "Leave out, and count, what of imported data does not fit this run, instead of refusing it.",
)

# --- reward -----------------------------------------------------------------------------------
REWARD_MODE = flags.DEFINE_enum(
    "reward_mode", "hard01_plus_gtprob", tuple(REWARD_MODES), "How scores become rewards."
)
HARD_WEIGHT = flags.DEFINE_float("hard_weight", 2.0, "Weight of right or wrong.")
SOFT_WEIGHT = flags.DEFINE_float("soft_weight", 1.0, "Weight of the graded term.")
SIMILARITY_WEIGHT = flags.DEFINE_float("similarity_weight", 0.0, "Shaping of wrong answers only.")

# --- health -----------------------------------------------------------------------------------
MAX_ZERO_POSITIVE = flags.DEFINE_float(
    "max_zero_positive",
    0.1,
    "GRPO starts only if, by its whole interval, at most this share of queries has no positive.",
    lower_bound=0.0,
    upper_bound=1.0,
)
MIN_SPEARMAN = flags.DEFINE_float(
    "min_spearman",
    0.3,
    "GRPO starts only if, by its whole interval, gt_prob and accuracy correlate more than this.",
    lower_bound=-1.0,
    upper_bound=1.0,
)
MIN_HEADROOM = flags.DEFINE_float(
    "min_headroom",
    0.02,
    "A gap of accuracy from the selector's pick to the best pointer below this leaves nothing to "
    "learn.",
    lower_bound=0.0,
    upper_bound=1.0,
)
FORCE_GRPO = flags.DEFINE_bool("force_grpo", False, "Start GRPO whatever the health check says.")

# --- RCE and GRPO -----------------------------------------------------------------------------
RCE_EPOCHS = flags.DEFINE_integer(
    "rce_epochs", 20, "Passes of RCE over the mined groups.", lower_bound=0
)
GRPO_EPOCHS = flags.DEFINE_integer(
    "grpo_epochs", 5, "Passes of GRPO over the training queries.", lower_bound=0
)
GRPO_UPDATES = flags.DEFINE_integer(
    "grpo_updates", 2, "Passes over the groups of a round.", lower_bound=1
)
GRPO_QUERIES = flags.DEFINE_integer(
    "grpo_queries", 200, "Queries of an on-policy round.", lower_bound=1
)
GROUP_SIZE = flags.DEFINE_integer(
    "group_size", 8, "G, pointers drawn a query in GRPO.", lower_bound=2
)
BATCH_QUERIES = flags.DEFINE_integer(
    "batch_queries", 50, "Query groups of an optimiser step.", lower_bound=1
)
WARMUP_RATE = flags.DEFINE_float(
    "warmup_learning_rate", 1e-3, "AdamW's peak rate in warm-up.", lower_bound=0.0
)
RCE_RATE = flags.DEFINE_float(
    "rce_learning_rate", 1e-3, "AdamW's peak rate in RCE.", lower_bound=0.0
)
GRPO_RATE = flags.DEFINE_float(
    "grpo_learning_rate", 3e-4, "AdamW's peak rate in GRPO.", lower_bound=0.0
)
TAU = flags.DEFINE_float(
    "tau", 1.0, "Temperature of RCE's softmax over rewards, > 0.", lower_bound=1e-06
)
ADVANTAGE = flags.DEFINE_enum("advantage", "group", tuple(ADVANTAGES), "Baseline of a group.")
DRAWS = flags.DEFINE_enum(
    "draws",
    "iid",
    training.DRAWS,
    "GRPO's groups: i.i.d. draws, or without replacement (sbs: unbiased, by its own baseline "
    "instead of --advantage; sbs_normalised: of lower variance).",
)
CLIP_LOW = flags.DEFINE_float(
    "clip_low", 0.2, "GRPO clips the ratio below at 1 - clip_low.", lower_bound=0.0
)
CLIP_HIGH = flags.DEFINE_float(
    "clip_high", 0.28, "GRPO clips the ratio above at 1 + clip_high.", lower_bound=0.0
)
KL_COEF = flags.DEFINE_float(
    "kl_coef", 0.02, "Weight of the KL to the policy after RCE.", lower_bound=0.0
)
MIN_RANGE = flags.DEFINE_float(
    "min_range", 1e-3, "Groups whose rewards span less are flat.", lower_bound=0.0
)
VERIFY = flags.DEFINE_enum(
    "verify", "all", VERIFY, "On-policy draws answered: all, or --verify_best and --verify_low."
)

# --- evaluation -------------------------------------------------------------------------------
METRIC = flags.DEFINE_enum("metric", "normalized", tuple(METRICS), "VQA accuracy mode reported.")
DECODINGS = flags.DEFINE_list(
    "decodings",
    ["greedy"],
    f"How selectors pick, of {', '.join(decoding.DECODINGS)}. rerank and oracle_rerank cost "
    "--rerank_width answers a query each.",
)
BEAM_WIDTH = flags.DEFINE_integer("beam_width", 8, "Beams of --decodings=beam.", lower_bound=1)
RERANK_WIDTH = flags.DEFINE_integer(
    "rerank_width", 8, "Most probable pointers that a rerank has answered.", lower_bound=1
)
RANDOM_SEEDS = flags.DEFINE_integer(
    "random_seeds", 3, "Random picks, and orders of `shuffled`, averaged a query.", lower_bound=1
)
MMR_TRADE_OFF = flags.DEFINE_float(
    "mmr_trade_off", 0.7, "1 is plain similarity, [0, 1].", lower_bound=0.0, upper_bound=1.0
)
ORACLE_BEAM = flags.DEFINE_integer(
    "oracle_beam", 6, "Width of the oracle's search; 0 leaves it out.", lower_bound=0
)

# Flags that decide what an evaluation table holds; see `evaluation_changes`.
_EVALUATION = (
    "shots", "metric", "decodings", "beam_width", "rerank_width", "random_seeds",
    "mmr_trade_off", "oracle_beam", "num_eval",
)  # fmt: skip

# --- plan -------------------------------------------------------------------------------------
PLAN = flags.DEFINE_bool("plan", False, "Print prompts, hours and memory to expect, and stop.")
PLAN_DEVICE = flags.DEFINE_enum("plan_device", "h100", tuple(DEVICES), "GPU that is planned for.")
PLAN_UTILISATION = flags.DEFINE_float(
    "plan_utilisation",
    0.35,
    "Share of the GPU's bf16 peak assumed to be sustained, (0, 1].",
    lower_bound=0.01,
    upper_bound=1.0,
)
PLAN_CERTIFIED = flags.DEFINE_float(
    "plan_certified",
    0.5,
    "Share of answers assumed to be proven by their scores, so not generated, [0, 1].",
    lower_bound=0.0,
    upper_bound=1.0,
)
PLAN_BANK = flags.DEFINE_integer(
    "plan_bank", None, "Demonstrations of the bank; default counted in its files.", lower_bound=1
)
PLAN_BANK_IMAGES = flags.DEFINE_integer(
    "plan_bank_images", None, "Distinct images of the bank; default counted.", lower_bound=1
)
PLAN_OUT = flags.DEFINE_string("plan_out", None, "JSON file that --plan writes besides.")

# Flags that say where or how to run, not what: a run may be continued with others.
_NOT_ADOPTED = frozenset({"workdir", "flagfile", "undefok", "device", "workers", "threads"})


def make_workdir() -> pathlib.Path:
    """Makes the folder of the run.

    Raises:
      InputError: it cannot be made or written.
    """
    workdir = pathlib.Path(WORKDIR.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    return workdir


def own_flags() -> dict[str, str]:
    """Every flag of ours as `--name=value` text, by name."""
    defined = FLAGS.flags_by_module_dict()[__name__]
    return {
        flag.name: flag.serialize()
        for flag in defined
        if flag.name != "workdir" and not flag.name.startswith("plan")
    }


def save_flags(workdir: pathlib.Path) -> None:
    """Writes the flags as run; `--flagfile=WORKDIR/flags.txt` repeats the run. Also run.json.

    S of training is written as a number, so that evaluating other shots does not change it.
    """
    resolved = f"--train_shots={train_shots(evaluated_shots())}"
    lines = [line for line in {**own_flags(), "train_shots": resolved}.values() if line]
    (workdir / "flags.txt").write_text("\n".join([f"--workdir={workdir}", *lines]) + "\n")
    write_out(str(workdir / RUN_FILE), run_settings())


def run_settings() -> dict:
    """What it takes to use the run's selector elsewhere; `lever_jax.demonstrations` reads it.

    Files and folders have their absolute paths, so that any program finds them.
    """
    worker = worker_settings()
    for part in (worker, worker["dataset"]):
        for name, value in part.items():
            if isinstance(value, str) and value and os.path.exists(value):
                part[name] = os.path.abspath(value)
    return {
        "worker": worker,
        "pools": dataclasses.asdict(pool_config()),
        "embeddings_dir": str(embeddings_dir().absolute()),
    }


def adopt_flags(workdir: pathlib.Path) -> None:
    """Takes over the flags of an earlier run, but for those given on the command line.

    Raises:
      InputError: there is no run in `workdir`.
    """
    path = workdir / "flags.txt"
    if not path.exists():
        raise InputError(f"--workdir={workdir} holds no run (no flags.txt); train there first")
    for line in path.read_text().splitlines():
        name, _, value = line.removeprefix("--").partition("=")
        if not line.startswith("--") or name in _NOT_ADOPTED:
            continue
        if name.startswith("no") and name[2:] in FLAGS:
            name, value = name[2:], "false"
        elif name in FLAGS and FLAGS[name].flag_type() == "bool":
            value = value or "true"
        if name in FLAGS and not FLAGS[name].present:
            FLAGS[name].parse(value)


def evaluated_shots() -> tuple[int, ...]:
    """The numbers of shots to evaluate, checked."""
    try:
        shots = tuple(dict.fromkeys(int(text) for text in SHOTS.value))
    except ValueError:
        raise InputError(f"--shots={','.join(SHOTS.value)} must be whole numbers") from None
    if not shots:
        raise InputError("--shots is empty; give numbers such as --shots=1,2")
    for name, value in [("shots", n) for n in shots] + [("train_shots", train_shots(shots))]:
        if not 1 <= value <= 8:
            raise InputError(f"--{name}={value} is out of range; shots go from 1 to 8")
        if value > POOL_SIZE.value:
            raise InputError(
                f"--{name}={value} exceeds --pool_size={POOL_SIZE.value}; "
                "lower it or enlarge the pool"
            )
    return shots


def left_out(phase: str) -> bool:
    """Whether the flags leave a phase out of the run."""
    return phase == "warmup" and WARMUP.value == "none"


def evaluated_decodings() -> tuple[str, ...]:
    """How selectors pick in the evaluation, checked."""
    names = tuple(dict.fromkeys(DECODINGS.value))
    for name in names:
        if name not in decoding.DECODINGS:
            raise InputError(f"--decodings: {name!r} is not one of {', '.join(decoding.DECODINGS)}")
    if not names:
        raise InputError("--decodings is empty; give some, as --decodings=greedy,beam")
    return names


def evaluation_changes(workdir: pathlib.Path) -> list[str]:
    """What differs from the evaluation of the run itself, as `shots-1-2-4`; flags are adopted."""
    run = dict(
        line.removeprefix("--").partition("=")[::2]
        for line in (workdir / "flags.txt").read_text().splitlines()
    )
    changes = []
    for name in _EVALUATION:
        value = FLAGS[name].serialize().partition("=")[2]
        if value != run.get(name, _default(name)):
            changes.append(f"{name}-{value.replace(',', '-')}")
    return changes


def _default(name: str) -> str:
    """A flag's default as it would stand in flags.txt."""
    default = FLAGS[name].default
    return ",".join(default) if isinstance(default, list) else str(default)


def train_shots(shots: tuple[int, ...]) -> int:
    """S in training."""
    return TRAIN_SHOTS.value or max(shots)


def check() -> None:
    """Builds every config once, so that a wrong flag is found before anything is computed."""
    for make in (
        evaluation_config,
        worker_settings,
        embeddings_dir,
        pool_config,
        selector_config,
        mining_config,
        reward_config,
        loss_config,
        thresholds,
    ):
        make()
    _check_numbers()
    if DRAWS.value != "iid" and VERIFY.value != "all":
        raise InputError(
            f"--draws={DRAWS.value} needs --verify=all: every draw counts by its probability"
        )
    answered = VERIFY_BEST.value + VERIFY_LOW.value
    if VERIFY.value == "top_m" and answered >= GROUP_SIZE.value:
        raise InputError(
            f"--verify=top_m leaves nothing out: --verify_best={VERIFY_BEST.value} and "
            f"--verify_low={VERIFY_LOW.value} cover --group_size={GROUP_SIZE.value}; lower them, "
            "or use --verify=all, which is unbiased"
        )


def _check_numbers() -> None:
    """Refuses infinite and undefined numbers, which pass every bound."""
    for flag in FLAGS.flags_by_module_dict()[__name__]:
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise InputError(f"--{flag.name}={flag.value} must be a finite number")


def dataset_settings() -> dict:
    """What `open_dataset` takes, for driver and workers alike."""
    if DATASET.value == "digits":
        return {
            "kind": "digits",
            "seed": WORLD_SEED.value,
            "bank": BANK_SIZE.value,
            "train": NUM_QUERIES.value,
            "eval": NUM_EVAL.value,
        }
    kind = DATASET.value
    needed = ("questions", "annotations", "images") if kind == "official" else ("jsonl",)
    names = [f"{split}_{what}" for split in ("bank", "query") for what in needed]
    for name in names:
        if not FLAGS[name].value:
            raise InputError(f"--dataset={kind} needs --{name}")
    if kind == "official":
        options = {"image_pattern": IMAGE_PATTERN.value}
    else:
        names += ["bank_images", "query_images"]
        options = {}
    return {
        "kind": kind,
        **{name: FLAGS[name].value for name in names},
        **options,
        "num_train": NUM_QUERIES.value,
        "num_eval": NUM_EVAL.value,
        "seed": WORLD_SEED.value,
        "max_bank": MAX_BANK.value,
    }


def worker_settings() -> dict:
    """What a worker is built from."""
    encoder, folder = ENCODER.value, ENCODER_MODEL.value
    if (encoder == "qwen") == bool(folder):
        raise InputError(
            f"--encoder={encoder} uses the VLM itself; leave --encoder_model={folder} out, or "
            "give --encoder=clip or siglip"
            if folder
            else f"--encoder={encoder} needs --encoder_model, a local {encoder} checkpoint folder"
        )
    if MIN_PIXELS.value is not None and MAX_PIXELS.value is not None:
        check_pixels(MIN_PIXELS.value, MAX_PIXELS.value)
    if ADAPTER.value:
        check_adapter(pathlib.Path(ADAPTER.value))
    return {
        "dataset": dataset_settings(),
        "model": MODEL.value,
        "adapter": ADAPTER.value,
        "device": DEVICE.value,
        "dtype": DTYPE.value,
        "min_pixels": MIN_PIXELS.value,
        "max_pixels": MAX_PIXELS.value,
        "prompt_style": PROMPT_STYLE.value,
        "instruction": INSTRUCTION.value,
        "scorer": SCORER.value,
        "answer_weight": ANSWER_WEIGHT.value,
        "gt_prob": GT_PROB.value,
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "encoder": ENCODER.value,
        "encoder_model": ENCODER_MODEL.value,
        "cache_mib": CACHE_MIB.value,
        "vision_cache_mib": VISION_CACHE_MIB.value,
        "batch_tokens": BATCH_TOKENS.value,
    }


def embeddings_dir() -> pathlib.Path:
    """Where embeddings are cached."""
    given = EMBEDDINGS_DIR.value
    folder = pathlib.Path(given) if given else pathlib.Path(WORKDIR.value) / "embeddings"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--embeddings_dir={folder} is a file; give a folder")
    return folder


def pool_config() -> PoolConfig:
    """How pools are made."""
    return PoolConfig(
        size=POOL_SIZE.value,
        image_weight=IMAGE_WEIGHT.value,
        question_weight=QUESTION_WEIGHT.value,
        shares=counts("pool_shares", POOL_SHARES.value, "image:8"),
        near_duplicate=NEAR_DUPLICATE.value,
        seed=WORLD_SEED.value,
        memory_mib=RETRIEVAL_MIB.value,
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
    return SelectorConfig(width=WIDTH.value, layers=LAYERS.value, heads=HEADS.value)


def mining_config() -> MiningConfig:
    """How pointers are proposed and verified."""
    return MiningConfig(
        proposals=PROPOSALS.value,
        quotas=counts("quotas", QUOTAS.value, "beam:12"),
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        verify_best=VERIFY_BEST.value,
        verify_low=VERIFY_LOW.value,
        verify_uniform=VERIFY_UNIFORM.value,
    )


def reward_config() -> RewardConfig:
    """How scores become rewards."""
    return RewardConfig(
        REWARD_MODE.value, HARD_WEIGHT.value, SOFT_WEIGHT.value, SIMILARITY_WEIGHT.value
    )


def loss_config() -> LossConfig:
    """Settings of RCE and GRPO."""
    return LossConfig(
        tau=TAU.value,
        advantage=ADVANTAGE.value,
        clip_low=CLIP_LOW.value,
        clip_high=CLIP_HIGH.value,
        kl_coef=KL_COEF.value,
        min_range=MIN_RANGE.value,
        draws=DRAWS.value,
    )


def thresholds() -> Thresholds:
    """What GRPO asks of the data."""
    return Thresholds(MAX_ZERO_POSITIVE.value, MIN_SPEARMAN.value, MIN_HEADROOM.value)


def evaluation_config() -> EvaluationConfig:
    """What is evaluated."""
    return EvaluationConfig(
        shots=evaluated_shots(),
        metric=METRIC.value,
        decodings=evaluated_decodings(),
        beam_width=BEAM_WIDTH.value,
        rerank_width=RERANK_WIDTH.value,
        random_seeds=RANDOM_SEEDS.value,
        mmr_trade_off=MMR_TRADE_OFF.value,
        oracle_beam=ORACLE_BEAM.value,
        image_weight=IMAGE_WEIGHT.value,
        question_weight=QUESTION_WEIGHT.value,
    )
