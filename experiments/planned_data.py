"""What a plan needs to know of the data, without reading all of it: counts and image sizes.

Images are sampled by seed and only their headers are read. Where files are not there yet, the
sizes come from flags and an assumption that is printed with the plan.
"""

import dataclasses
import json
import os
import pathlib
import random
import re

from PIL import Image

from experiments import settings
from lever_jax.errors import InputError
from qwen_bridge.vqa.digits import PICTURE_SIZE
from qwen_bridge.vqa.records import open_bytes

ASSUMED_SIZE = (640, 480)  # of most MS COCO pictures
SAMPLED = 64
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_IMAGE_ID = re.compile(rb'"image_id"\s*:\s*("[^"]*"|\d+)')
_QUESTION_ID = re.compile(rb'"question_id"\s*:')


@dataclasses.dataclass(frozen=True)
class PlannedData:
    """Size of the data.

    Attributes:
      bank: demonstrations.
      bank_images: distinct images of them.
      image_sizes: (width, height) of some images, pixels.
      assumptions: what was assumed for want of files, in words.
    """

    bank: int
    bank_images: int
    image_sizes: tuple[tuple[int, int], ...]
    assumptions: tuple[str, ...]


def planned_data() -> PlannedData:
    """Looks at the data that the flags name.

    Raises:
      InputError: the bank's files are not there and --plan_bank does not say how large it is.
    """
    kind, assumptions = settings.DATASET.value, []
    if kind == "digits":
        size = settings.BANK_SIZE.value
        return PlannedData(size, size, ((PICTURE_SIZE, PICTURE_SIZE),), ())
    bank, images = settings.PLAN_BANK.value, settings.PLAN_BANK_IMAGES.value
    if bank is None:
        bank, counted = _count(kind)
        images = images or counted
    images = min(images or bank, bank)
    if settings.MAX_BANK.value is not None and settings.MAX_BANK.value < bank:
        bank = settings.MAX_BANK.value
        images = min(images, bank)
    folder = settings.FLAGS["bank_images"].value
    if not folder and kind == "jsonl":
        folder = str(pathlib.Path(settings.FLAGS["bank_jsonl"].value).parent)
    sizes = sample_sizes(pathlib.Path(folder))
    if not sizes:
        width, height = ASSUMED_SIZE
        sizes = (ASSUMED_SIZE,)
        assumptions.append(f"images of {width} x {height} pixels: none found in {folder}")
    return PlannedData(bank, images, sizes, tuple(assumptions))


def sample_sizes(folder: pathlib.Path, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """(width, height) of up to 64 images of a folder and its subfolders, drawn by seed."""
    names = []
    for path, _, files in os.walk(folder):
        names += [os.path.join(path, f) for f in files if f.lower().endswith(_SUFFIXES)]
    drawn = random.Random(seed).sample(sorted(names), min(SAMPLED, len(names)))
    sizes = []
    for name in drawn:
        try:
            with Image.open(name) as image:
                sizes.append(image.size)
        except OSError:
            continue  # A broken file is the data check's affair, and does not change the mean.
    return tuple(sizes)


def _count(kind: str) -> tuple[int, int]:
    """Demonstrations and distinct images of the bank's file."""
    flag = "bank_questions" if kind == "official" else "bank_jsonl"
    path = settings.FLAGS[flag].value
    if not pathlib.Path(path).is_file():
        raise InputError(
            f"--plan: --{flag}={path} is not there to be counted; give --plan_bank=N, or the file"
        )
    with open_bytes(flag, path) as stream:
        if kind == "official":
            content = stream.read()
            questions = len(_QUESTION_ID.findall(content))
            images = len(set(_IMAGE_ID.findall(content)))
        else:
            try:
                names = [json.loads(line)["image"] for line in stream if line.strip()]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"--{flag}={path}: a line is no example ({error})") from None
            questions, images = len(names), len(set(names))
    if not questions:
        raise InputError(f"--{flag}={path} holds no questions")
    return questions, images
