"""LoRA adapters: merged into the weights when the checkpoint is loaded.

Merged, an adapter costs nothing at scoring time, and no scorer knows of it. Reading and merging
are peft's (an extra); here is what is refused before and checked after.
"""

import importlib.util
import json
import pathlib
import warnings

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.records import one_line

# Module names before transformers 4.52, which adapters of that time carry.
_OLD_NAMES = {
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(folder: pathlib.Path) -> None:
    """Refuses an adapter that cannot be merged, by its files alone.

    Raises:
      InputError: peft is not installed, or the folder holds no LoRA adapter in safetensors.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"--adapter={folder} needs peft: pip install -c constraints.txt 'lever[adapter]'"
        )
    if not folder.is_dir():
        raise InputError(f"--adapter={folder} is not a folder; give one that peft has saved")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"--adapter={folder}: no {name}; only safetensors are read")
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, whole = config["peft_type"], config.get("modules_to_save")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"--adapter={folder}: {CONFIG} is not peft's ({one_line(error)}); save it again"
        ) from None
    if kind != "LORA":
        raise InputError(f"--adapter={folder} is of type {kind}; only LORA can be merged")
    if whole:
        raise InputError(
            f"--adapter={folder} holds whole modules beside LoRA ({', '.join(map(str, whole))}); "
            "merge it with peft yourself and give the result as --model"
        )


def merge_adapter(model, folder: pathlib.Path):
    """Adds a LoRA adapter's updates to the weights: W + (alpha / r) B A.

    Args:
      model: the base model; changed in place.
      folder: as peft's `save_pretrained` writes it.

    Returns:
      The model, without any trace of peft.

    Raises:
      InputError: see `check_adapter`; or the adapter was trained for another model.

    Source: LoRA (arXiv:2106.09685).
    """
    check_adapter(folder)
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(
                model, folder, config=config, key_mapping=_OLD_NAMES
            )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _of_another_model(folder, config, one_line(error)) from error
    lacking = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if lacking:
        raise _of_another_model(folder, config, lacking[0])
    expected, found = len(get_peft_model_state_dict(adapted)), _tensors(folder)
    if expected != found:
        raise _of_another_model(
            folder, config, f"{found} tensors in the file, {expected} of them fit the model"
        )
    return adapted.merge_and_unload(safe_merge=True)


def _tensors(folder: pathlib.Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "numpy") as file:
        return len(file.keys())


def _of_another_model(folder, config, why: str) -> InputError:
    base = config.base_model_name_or_path or "another model"
    return InputError(
        f"--adapter={folder} was trained for {base} and does not fit --model: {why[:200]}"
    )
