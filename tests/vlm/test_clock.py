"""The benchmark's clock reads the device that does the work."""

import contextlib

import torch

from qwen_bridge.benchmark import clock


class FakeGpus:
    """Stands for `torch.cuda`: which device is current, and on which one events are recorded."""

    def __init__(self):
        self.current = torch.device("cuda:0")
        self.recorded, self.awaited = [], []

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def synchronize(self, device=None):
        self.awaited.append(device or self.current)

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpus):
        self.gpus = gpus

    def record(self):
        self.gpus.recorded.append(self.gpus.current)

    def elapsed_time(self, end):
        return 250.0


def test_events_are_of_the_device_that_is_timed(monkeypatch):
    gpus, second = FakeGpus(), torch.device("cuda:1")
    monkeypatch.setattr(clock.torch, "cuda", gpus)
    assert clock.seconds(second, lambda: gpus.recorded.append("run")) == 0.25
    assert gpus.recorded == [second, "run", second]
    assert gpus.awaited == [second, second]
    assert gpus.current == torch.device("cuda:0")  # as the caller left it
