"""Every flag of training, mining and evaluation, in one place; `configs.py` makes configs of them.

All entry points share the flags, so one flag file serves them all. A run writes the flags it ran
with to `flags.txt` in its workdir; entry points that continue a run adopt them from there, and
what is given on the command line wins.
"""

from absl import flags

from lever_jax import decoding, parallel, training
from lever_jax.advantages import ADVANTAGES
from lever_jax.evaluation import METRICS
from lever_jax.on_policy import VERIFY
from lever_jax.rewards import REWARD_MODES
from lever_jax.search import CONSTRUCTIONS, SCORES
from lever_jax.selector import HISTORIES, POINTER_SCORES
from qwen_bridge.devices import DEVICES
from qwen_bridge.vqa.official import DEFAULT_IMAGE_PATTERN

FLAGS = flags.FLAGS
PHASES = ("warmup", "rce", "grpo")
_DATASETS = ("digits", "official", "jsonl")


class _AutoParser(flags.ArgumentParser):
    """`auto`, or a whole number."""

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


def _define_auto(name: str, help: str, lower_bound: int, default: str | int = "auto"):
    parser, serializer = _AutoParser(lower_bound), flags.ArgumentSerializer()
    return flags.DEFINE(parser, name, default, help, serializer=serializer)


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
    "Qwen2.5-VL: a checkpoint folder, or ORG/NAME[@REVISION] on the Hugging Face hub; embedded, or "
    "empty with --dataset=digits: the small one that comes with the project.",
)
ADAPTER = flags.DEFINE_string(
    "adapter", "", "Folder of a LoRA adapter (peft, safetensors), merged into the weights."
)
DEVICE = flags.DEFINE_string(
    "device",
    "auto",
    "Where VLM workers compute: cuda, dealt to all GPUs in turn; cuda:N; cpu; auto: cuda where "
    "torch sees a GPU, else cpu.",
)
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
ENGINE = flags.DEFINE_enum(
    "engine",
    "local",
    ("local", "ray"),
    "Where workers live: processes of this machine, or actors of a Ray cluster.",
)
WORKERS = _define_auto(
    "workers",
    "VLM workers, one a GPU; auto, with --engine=ray: as many as the cluster has room for, and "
    "more when machines join.",
    1,
    default=1,
)
THREADS = flags.DEFINE_integer(
    "threads",
    0,
    "CPU threads of each worker; 0 shares the cores, with --engine=ray it means 1.",
    lower_bound=0,
)
RAY_ADDRESS = flags.DEFINE_string(
    "ray_address",
    "auto",
    "With --engine=ray: auto, the cluster of this machine; HOST:PORT of its head; or local, a new "
    "one of this machine, on its loopback interface.",
)
GPUS_PER_WORKER = flags.DEFINE_float(
    "gpus_per_worker",
    None,
    "With --engine=ray: GPUs of a worker, 0, 1 or a share such as 0.5; default 1 where the cluster "
    "has GPUs and --device is not cpu.",
    lower_bound=0.0,
)
SCORE_BATCH = flags.DEFINE_integer(
    "score_batch", 256, "Prompts in one request to a worker.", lower_bound=1
)
BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", 8192, "Tokens of a forward pass of the VLM.", lower_bound=1
)
CACHE_MIB = _define_auto(
    "cache_mib", "Memory of cached prompt prefixes, MiB; auto: by what the device has free.", 1
)
VISION_CACHE_MIB = _define_auto(
    "vision_cache_mib", "Memory of cached image features, MiB; auto: likewise.", 0
)
DEADLINE_S = flags.DEFINE_float(
    "deadline_s", 600.0, "A request that takes longer has hung.", lower_bound=0.001
)
RETRY_FAILED = flags.DEFINE_bool(
    "retry_failed",
    False,
    "Ask again, once at the start, for every prompt of this run that is eval_failed in the store.",
)
FACTORY = flags.DEFINE_string(
    "factory",
    "qwen_bridge.workers:build",
    "module:function that builds a worker's scorer; a module outside qwen_bridge must be named in "
    "the environment variable QWEN_BRIDGE_FACTORIES.",
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
MAX_BAD_IMAGES = flags.DEFINE_float(
    "max_bad_images",
    0.01,
    "Share of the data set's images that may be missing or broken, [0, 1]: their demonstrations "
    "are in no pool and prompts of their queries fail. More are an error, as a wrong folder is.",
    lower_bound=0.0,
    upper_bound=1.0,
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
HISTORY = flags.DEFINE_enum(
    "history",
    "gru",
    HISTORIES,
    "How a pick changes the selector's state: not at all, by a gated sum, by a GRU, or by "
    "attention over all picks so far.",
)
POINTER_SCORE = flags.DEFINE_enum(
    "pointer_score",
    "dot",
    POINTER_SCORES,
    "How the state is compared with candidates, beside the short paths: product of two "
    "projections, one bilinear form, or a hidden layer.",
)
DIVERSITY = flags.DEFINE_bool(
    "diversity", False, "A learned penalty on a candidate's similarity to what is picked."
)
STOP = flags.DEFINE_bool(
    "stop",
    False,
    "A learned end: the selector shows one to S demonstrations, as many as a query needs.",
)
DROPOUT = flags.DEFINE_float(
    "dropout",
    0.0,
    "Share of the set encoder left out in warm-up and RCE steps, [0, 1); GRPO has none.",
    lower_bound=0.0,
)

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
    "warmup_targets",
    4,
    "Best pointers a query to imitate, of all that the search found; 1 is the best one only.",
    lower_bound=1,
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
SHOT_COST = flags.DEFINE_float(
    "shot_cost",
    0.0,
    "Taken off the reward for each demonstration shown, with --stop; the warm-up knows no cost.",
    lower_bound=0.0,
)

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
ACCUMULATE = flags.DEFINE_integer(
    "accumulate",
    0,
    "Pieces that an optimiser step is computed in, for memory and ragged groups; the step is the "
    "same up to rounding. 0: one, or as many as padding asks for.",
    lower_bound=0,
)
EMA = flags.DEFINE_float(
    "ema",
    0.0,
    "Decay of the moving average of parameters that a phase hands on, such as 0.99; 0 is off.",
    lower_bound=0.0,
    upper_bound=0.999999,
)
DATA_PARALLEL = flags.DEFINE_enum(
    "data_parallel",
    "auto",
    parallel.MODES,
    "auto: all local devices share the selector's batches; off: the first computes them.",
)
OVERLAP = flags.DEFINE_bool(
    "overlap",
    True,
    "Draw and train on one on-policy round while the VLM judges the next, which is then one round "
    "behind the policy; the clipped ratio corrects for it.",
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
    "plan_bank", None, "Demonstrations of the bank, where its file is not there to be counted.", 1
)
PLAN_BANK_IMAGES = flags.DEFINE_integer(
    "plan_bank_images", None, "Distinct images of the bank, beside --plan_bank.", lower_bound=1
)
PLAN_OUT = flags.DEFINE_string("plan_out", None, "JSON file that --plan writes besides.")
