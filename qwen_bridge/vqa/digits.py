"""Polyglot digits: the embedded world, which runs with no download.

A picture is a real handwritten digit (scikit-learn's) on a coloured border. The question asks
for this number, the next or the previous one. The border's colour tells which *community*
annotated the picture, and so in which language its ten annotators answer; they sometimes differ.
Nothing in the question names the language: a vision-language model reads it off the
demonstrations. Some demonstrations carry another community's words, so a selector has to look
at the answer too, and when demonstrations disagree the order decides.

A seed makes a world: other seeds give other colours to other languages. Which handwritten
digits serve as demonstrations, training queries or evaluation queries is fixed once, so that a
model pretrained on the first two has never seen an evaluation picture of any world.
"""

import colorsys
import dataclasses
import functools
import hashlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example, fingerprint_of
from qwen_bridge.vqa.languages import NUMBER_WORDS

COMMUNITIES = 8
PICTURE_SIZE = 28  # pixels: one merged visual token of Qwen2.5-VL
BORDER = 5  # pixels
NUM_COLOURS = 10

# How many of the 1,797 handwritten digits serve each part; the rest of a part are re-drawn.
_SPLIT_SEED = 20_250_101
_SPLIT_SIZES = {"bank": 757, "train": 620, "eval": 420}

QUESTIONS = {
    "this": ("What number is this?", 0),
    "next": ("What number comes next?", 1),
    "previous": ("What number comes before?", -1),
}

_BLOCK = 100  # examples drawn from one generator

# Id ranges of the parts, so that an id tells where it belongs.
ID_BASE = {"bank": 0, "train": 1_000_000, "eval": 2_000_000}


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """What decides a world.

    Attributes:
      seed: which world; the same seed is the same world, bit for bit.
      bank: demonstrations, pictures drawn from 757 handwritten digits.
      train: training queries, drawn from 620 others.
      eval: evaluation queries, drawn from 420 others.
      foreign: share of demonstrations annotated in another community's language, in [0, 1].
      dissent: chance that one of the ten annotators answers otherwise than the others, in [0, 1].
    """

    seed: int = 0
    bank: int = 1600
    train: int = 600
    eval: int = 400
    foreign: float = 0.1
    dissent: float = 0.08


@functools.cache
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits: images float32 `[1797, 8, 8]` in [0, 1], labels `[1797]`."""
    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@functools.cache
def split_rows(part: str) -> np.ndarray:
    """Returns which of the 1,797 handwritten digits serve `part`; parts are disjoint."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(handwritten()[1]))
    start = 0
    for name, size in _SPLIT_SIZES.items():
        if name == part:
            return order[start : start + size]
        start += size
    raise KeyError(part)


@functools.cache
def border_colours() -> np.ndarray:
    """Returns `[NUM_COLOURS, 3]` well separated border colours in [0, 1]."""
    hues = [colorsys.hsv_to_rgb(i / (NUM_COLOURS - 2), 0.95, 0.95) for i in range(NUM_COLOURS - 2)]
    return np.array([*hues, (0.95, 0.95, 0.95), (0.35, 0.35, 0.35)], np.float32)


def render(digits: np.ndarray, colours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws pictures: each digit slightly moved, turned and scaled, on its border.

    Args:
      digits: float32 `[n, 8, 8]` in [0, 1].
      colours: float32 `[n, 3]` border colours in [0, 1].
      rng: decides the distortion, the ink and the shade of the border.

    Returns:
      uint8 `[n, PICTURE_SIZE, PICTURE_SIZE, 3]`.
    """
    n = len(digits)
    inner = PICTURE_SIZE - 2 * BORDER
    angle = rng.uniform(-0.2, 0.2, n)
    scale = 8 / inner * rng.uniform(0.9, 1.12, (n, 2))
    shift = rng.uniform(-0.7, 0.7, (n, 2)) + 3.5
    grid = np.arange(inner) - (inner - 1) / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    source_y = (cos * y - sin * x) * scale[:, 0, None, None] + shift[:, 0, None, None]
    source_x = (sin * y + cos * x) * scale[:, 1, None, None] + shift[:, 1, None, None]
    ink = _bilinear(digits, source_y, source_x) * rng.uniform(0.8, 1.0, (n, 1, 1))
    shade = np.clip(colours * rng.uniform(0.9, 1.05, (n, 1)), 0, 1)
    picture = np.broadcast_to(shade[:, None, None, :], (n, PICTURE_SIZE, PICTURE_SIZE, 3)).copy()
    picture[:, BORDER:-BORDER, BORDER:-BORDER] = ink[..., None]
    return np.round(picture * 255).astype(np.uint8)


def _bilinear(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples `[n, 8, 8]` images at real coordinates `[n, h, w]`; outside is empty paper."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    y, x = np.clip(y + 2, 0, 10.999), np.clip(x + 2, 0, 10.999)
    row, column = y.astype(np.int64), x.astype(np.int64)
    dy, dx = y - row, x - column
    image = np.arange(len(images))[:, None, None]
    top = padded[image, row, column] * (1 - dx) + padded[image, row, column + 1] * dx
    bottom = padded[image, row + 1, column] * (1 - dx) + padded[image, row + 1, column + 1] * dx
    return top * (1 - dy) + bottom * dy


def ask(label: int, rng: np.random.Generator) -> tuple[str, int]:
    """Returns the kind of a question about a digit, and the number that answers it."""
    kinds = [kind for kind, (_, step) in QUESTIONS.items() if label + step >= 0]
    kind = kinds[rng.integers(len(kinds))]
    return kind, label + QUESTIONS[kind][1]


def annotate(
    language: str, number: int, languages: list[str], dissent: float, rng: np.random.Generator
) -> tuple[str, ...]:
    """Returns ten annotators' answers; at least six of them agree on the language's word."""
    word = NUMBER_WORDS[language][number]
    answers = [word] * 10
    for annotator in np.flatnonzero(rng.random(10) < dissent)[:4]:
        other = languages[rng.integers(len(languages))]
        wrong = min(10, max(0, number + int(rng.choice([-1, 1]))))
        answers[annotator] = [
            str(number),
            NUMBER_WORDS[other][number],
            NUMBER_WORDS[language][wrong],
        ][rng.integers(3)]
    return tuple(answers)


def load_digits_world(config: DigitsConfig) -> Dataset:
    """Makes the world that `config` describes.

    Raises:
      InputError: a size or share out of range.
    """
    for name, flag in (("bank", "bank_size"), ("train", "num_queries"), ("eval", "num_eval")):
        if getattr(config, name) < 1:
            raise InputError(f"--{flag}={getattr(config, name)} must be at least 1")
    if not 0 <= config.foreign < 1:
        raise InputError(f"--foreign={config.foreign} must lie in [0, 1)")
    root = np.random.default_rng([config.seed, 0])
    names = sorted(NUMBER_WORDS)
    languages = [names[i] for i in root.permutation(len(names))[:COMMUNITIES]]
    colours = root.permutation(NUM_COLOURS)[:COMMUNITIES]
    pictures: dict[str, np.ndarray] = {}
    parts = {
        part: _draw_part(part, config, languages, colours, pictures)
        for part in ("bank", "train", "eval")
    }

    def load_image(key: str) -> Image.Image:
        if key not in pictures:
            raise InputError(f"no picture {key!r} in the digits world of seed {config.seed}")
        return Image.fromarray(pictures[key])

    return Dataset(
        name=f"digits-{config.seed}",
        load_image=load_image,
        fingerprint=_fingerprint(config, parts["bank"]),
        **parts,
    )


def _fingerprint(config: DigitsConfig, bank: tuple[Example, ...]) -> str:
    """Identifies a world; how many of its queries are used does not change it."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("train", "eval")}
    return hashlib.sha256(f"{settings} {fingerprint_of(bank)}".encode()).hexdigest()


def _draw_part(part, config, languages, colours, pictures) -> tuple[Example, ...]:
    """Draws a part block by block, so that a larger part begins with the smaller one."""
    part_seed = [config.seed, 1, sorted(ID_BASE).index(part)]
    rows = np.random.default_rng(part_seed).permutation(split_rows(part))
    rows = np.resize(rows, getattr(config, part))  # more pictures than digits: drawn again
    images, labels = handwritten()
    examples = []
    for start in range(0, len(rows), _BLOCK):
        rng = np.random.default_rng([*part_seed, start])
        padded = np.resize(rows[start : start + _BLOCK], _BLOCK)
        community = rng.integers(COMMUNITIES, size=_BLOCK)
        drawn = render(images[padded], border_colours()[colours[community]], rng)
        for i in range(min(_BLOCK, len(rows) - start)):
            language = languages[community[i]]
            if part == "bank" and rng.random() < config.foreign:
                others = [name for name in languages if name != language]
                language = others[rng.integers(len(others))]
            kind, number = ask(int(labels[padded[i]]), rng)
            key = f"{part}/{start + i}"
            pictures[key] = drawn[i]
            examples.append(
                Example(
                    id=ID_BASE[part] + start + i,
                    image=key,
                    question=QUESTIONS[kind][0],
                    answers=annotate(language, number, languages, config.dissent, rng),
                    question_type=kind,
                    answer_type=language,
                )
            )
    return tuple(examples)
