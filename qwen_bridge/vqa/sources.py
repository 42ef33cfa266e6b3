"""Opens the dataset that settings name; driver and workers open the same one."""

import dataclasses

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.digits import DigitsConfig, load_digits_world
from qwen_bridge.vqa.examples import Dataset
from qwen_bridge.vqa.jsonl import load_jsonl
from qwen_bridge.vqa.official import load_official
from qwen_bridge.vqa.subsample import SubSample

_LOADERS = {"official": load_official, "jsonl": load_jsonl}
DATASETS = ("digits", *_LOADERS)


def open_dataset(settings: dict) -> Dataset:
    """Opens a dataset.

    Args:
      settings: `{"kind": "digits", **fields of DigitsConfig}`,
        `{"kind": "official", **arguments of load_official}` or
        `{"kind": "jsonl", **arguments of load_jsonl}`; in the place of `sample` stand the fields
        of `SubSample`.

    Raises:
      InputError: an unknown kind, or data that cannot be read.
    """
    settings = dict(settings)
    kind = settings.pop("kind")
    if kind == "digits":
        known = {field.name for field in dataclasses.fields(DigitsConfig)}
        return load_digits_world(DigitsConfig(**{k: v for k, v in settings.items() if k in known}))
    if kind not in _LOADERS:
        raise InputError(f"--dataset={kind} is not one of {', '.join(DATASETS)}")
    names = {field.name for field in dataclasses.fields(SubSample)} & settings.keys()
    sample = SubSample(**{name: settings.pop(name) for name in names})
    return _LOADERS[kind](**settings, sample=sample)
