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
_FILES = {"official": "bank_questions", "jsonl": "bank_jsonl"}
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


def planned_data(*, look: bool = True) -> PlannedData:
    """Looks at the data that the flags name.

    Args:
      look: for files; otherwise the flags' numbers and the usual size of images are taken even
        where there are some.

    Raises:
      InputError: the bank's files are not there and --plan_bank does not say how large it is.
    """
    kind, assumptions = settings.DATASET.value, []
    if kind == "digits":
        size = settings.BANK_SIZE.value
        return PlannedData(size, size, ((PICTURE_SIZE, PICTURE_SIZE),), ())
    path = pathlib.Path(settings.FLAGS[_FILES[kind]].value)
    if path.is_file() and (look or not settings.PLAN_BANK.value):
        bank, images = _count(kind, path)
        if settings.PLAN_BANK.value not in (None, bank):
            assumptions.append(f"a bank of {bank:,}, counted in {path}, not --plan_bank's number")
    elif settings.PLAN_BANK.value:
        bank, images = settings.PLAN_BANK.value, settings.PLAN_BANK_IMAGES.value
        images = min(images or bank, bank)
        assumptions.append(f"a bank of {bank:,}, as --plan_bank says: {path} is not there")
    else:
        raise InputError(
            f"--plan: --{_FILES[kind]}={path} is not there to be counted; give --plan_bank=N, or "
            "the file"
        )
    if settings.MAX_BANK.value is not None and settings.MAX_BANK.value < bank:
        bank = settings.MAX_BANK.value
        images = min(images, bank)
    folder = settings.FLAGS["bank_images"].value
    if not folder and kind == "jsonl":
        folder = str(pathlib.Path(settings.FLAGS["bank_jsonl"].value).parent)
    sizes = sample_sizes(pathlib.Path(folder)) if look else ()
    if not sizes:
        width, height = ASSUMED_SIZE
        sizes = (ASSUMED_SIZE,)
        assumptions.append(f"images of {width} x {height} pixels: none seen in {folder}")
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


def _image_of(line: bytes, place: str) -> str:
    try:
        image = json.loads(line)["image"]
    except (ValueError, KeyError, TypeError, RecursionError):
        image = None
    if not isinstance(image, str):
        raise InputError(
            f"{place} is no example with a text 'image'; experiments.check_data lists all that is "
            "wrong"
        )
    return image


def _count(kind: str, path: pathlib.Path) -> tuple[int, int]:
    """Demonstrations and distinct images of the bank's file."""
    flag = _FILES[kind]
    with open_bytes(flag, path) as stream:
        if kind == "official":
            content = stream.read()
            questions = len(_QUESTION_ID.findall(content))
            images = len(set(_IMAGE_ID.findall(content)))
        else:
            names = [
                _image_of(line, f"--{flag}={path}:{number}")
                for number, line in enumerate(stream, 1)
                if line.strip()
            ]
            questions, images = len(names), len(set(names))
    if not questions:
        raise InputError(f"--{flag}={path} holds no questions")
    return questions, images
