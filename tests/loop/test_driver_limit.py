"""The simulation of many workers is exact where the driver's own time is given."""

import pytest

from experiments.driver_limit import DriverModel, Workload, calibrate, simulate

# A batch takes a worker 8 s.
WORK = Workload(seconds_per_prompt=1.0, batch=8, batches=64)


def no_time():
    """A clock by which the driver's own work takes none."""
    return 0.0


def test_model_by_hand():
    model = DriverModel(a=0.8, c=0.0, r=0.0)  # 0.1 s a prompt
    assert model.saturation(WORK) == pytest.approx(10.0)
    assert model.predict(5, WORK) == pytest.approx((5.0, 0.5))
    assert model.predict(10, WORK) == pytest.approx((10.0, 1.0))
    assert model.predict(40, WORK) == pytest.approx((10.0, 1.0))
    alone = DriverModel(a=0.8, c=0.0, r=0.1)  # 0.2 s a prompt for a worker, and 0.1 s for none
    assert alone.predict(5, WORK) == pytest.approx((1 / 0.3, 0.2 / 0.3))
    growing = DriverModel(a=0.5, c=0.1, r=0.0)
    limit = growing.saturation(WORK)
    assert limit * (0.5 + 0.1 * limit) == pytest.approx(8.0)


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_workers_are_the_limit_of_a_driver_that_takes_no_time(workers):
    run = simulate(workers, WORK, clock=no_time)
    assert run["prompts"] == 512
    assert run["prompts_per_s"] == pytest.approx(workers)
    assert run["busy"] == 0
    assert run["driver_ms_per_batch"] == 0


def test_the_driver_is_the_limit_beyond_saturation():
    work = Workload(seconds_per_prompt=1.0, batch=8, batches=64, message_s=1.0)
    few, many = (simulate(workers, work, clock=no_time) for workers in (2, 32))
    assert few["prompts_per_s"] == pytest.approx(2, rel=0.1)  # 8 prompts in 8 s, twice
    assert few["busy"] == pytest.approx(0.25, rel=0.1)
    assert many["prompts_per_s"] == pytest.approx(8, rel=0.1)  # 8 prompts a second, not 32
    assert many["busy"] > 0.9
    assert many["driver_ms_per_batch"] == pytest.approx(1000)
    model = calibrate(2, 32, work, clock=no_time)
    assert (model.a, model.c) == pytest.approx((1.0, 0.0))
    assert model.saturation(work) == pytest.approx(8.0)


def test_own_work_counts_as_time():
    work = Workload(seconds_per_prompt=1e-6, batch=64, batches=20)
    run = simulate(8, work)
    assert run["busy"] > 0.9
    assert run["driver_ms_per_batch"] > 0.05
