"""Which GPU a worker takes, on machines that are not there."""

import pytest
import torch

from qwen_bridge.errors import InputError
from qwen_bridge.workers import pick_device


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many GPUs, and which of its workers this process is."""

    def of(gpus, worker=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("QWEN_BRIDGE_WORKER", str(worker))

    return of


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_workers_take_the_gpus_in_turn(machine, name):
    taken = []
    for worker in range(10):
        machine(8, worker)
        taken.append(pick_device(name))
    assert taken == [f"cuda:{i % 8}" for i in range(10)]


def test_a_gpu_that_is_named_is_taken(machine):
    machine(8, worker=5)
    assert pick_device("cuda:3") == "cuda:3"
    assert pick_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device=cuda:8: there are 8 GPUs"):
        pick_device("cuda:8")


def test_only_auto_goes_without_a_gpu(machine):
    machine(0)
    assert pick_device("auto") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=f"--device={name}: this torch .* sees no GPU"):
            pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "", "cpu:0", "cuda:1\n"])
def test_other_names_are_refused(machine, name):
    machine(1)
    with pytest.raises(InputError, match="is not auto, cpu, cuda or cuda:N"):
        pick_device(name)
