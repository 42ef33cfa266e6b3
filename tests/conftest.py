"""The real data that some tests use, and a checkpoint with Qwen2.5-VL's real vocabulary."""

import pathlib

import pytest
from random_qwen import write_checkpoint

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """The folder of real data, or a skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which are not part of the product")
    return SHARED


@pytest.fixture(scope="session")
def random_qwen(shared, tmp_path_factory):
    """A checkpoint folder as published, but small and with random weights."""
    folder = tmp_path_factory.mktemp("random_qwen")
    write_checkpoint(folder, shared / "qwen2_5_vl")
    return folder
