"""Opens the dataset that settings name; driver and workers open the same one."""

import dataclasses

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.digits import DigitsConfig, load_digits_world
from qwen_bridge.vqa.examples import Dataset
from qwen_bridge.vqa.jsonl import load_jsonl
from qwen_bridge.vqa.official import load_official

DATASETS = ("digits", "official", "jsonl")


def open_dataset(settings: dict) -> Dataset:
    """Opens a dataset.

    Args:
      settings: `{"kind": "digits", **fields of DigitsConfig}`,
        `{"kind": "official", **arguments of load_official}` or
        `{"kind": "jsonl", **arguments of load_jsonl}`.

    Raises:
      InputError: an unknown kind, or data that cannot be read.
    """
    settings = dict(settings)
    kind = settings.pop("kind")
    if kind == "digits":
        known = {field.name for field in dataclasses.fields(DigitsConfig)}
        return load_digits_world(DigitsConfig(**{k: v for k, v in settings.items() if k in known}))
    if kind == "official":
        return load_official(**settings)
    if kind == "jsonl":
        return load_jsonl(**settings)
    raise InputError(f"--dataset={kind} is not one of {', '.join(DATASETS)}")
