"""Batches shared by two devices: the same training, and really shared."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from lever_jax.errors import InputError
from lever_jax.parallel import (
    check_room,
    make_mesh,
    over_queries,
    replicated,
    shardings,
    used_devices,
)
from lever_jax.pooled import PooledQueries, placed
from lever_jax.training import PoolTable

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_two_devices_train_and_draw_as_one_does():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parents[1]}",
    }
    done = subprocess.run(
        [sys.executable, HERE / "two_devices.py"], env=environment, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["devices"] == seen["devices_of_the_state"] == 2
    assert seen["rows_of_a_device"] * 2 == seen["rows"]
    assert seen["sums_over_devices"]
    # Adam moves weights whose gradient is only rounding as far as any: 1e-3 a step, six steps.
    assert seen["params_apart"] <= 2e-4
    assert seen["metrics_apart"] <= 1e-4
    assert seen["same_pointers"]
    assert seen["log_probs_apart"] <= 1e-6


def test_one_device_has_no_mesh():
    assert make_mesh("auto") is None
    assert shardings(None, "ws", "s") == {}
    given = jax.numpy.ones(3)
    placed = replicated(None, {"x": given})["x"]
    # As those of a checkpoint may be; else each kind would have a program of its own.
    assert (given.committed, placed.committed) == (False, True)
    np.testing.assert_array_equal(placed, given)
    with pytest.raises(InputError, match="--data_parallel=some is not one of auto, off"):
        make_mesh("some")


def test_a_table_lies_on_a_device_once():
    table = PoolTable(*(np.ones((3, 2), np.float32) for _ in PoolTable._fields))
    queries = PooledQueries(np.arange(3), np.ones((3, 2)), table, np.ones(2), None)
    once = placed(queries, None).table
    again = replicated(None, once)
    assert [x.unsafe_buffer_pointer() for x in again] == [x.unsafe_buffer_pointer() for x in once]
    assert used_devices(None) == jax.local_devices()[:1]


def test_tables_that_do_not_fit_are_refused_before_they_are_sent(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    table = {"bank": np.zeros((100, 2), np.float32), "rows": np.zeros(50, np.int32)}  # 1,000 bytes
    small, large, silent = (
        types.SimpleNamespace(memory_stats=lambda limit=limit: limit and {"bytes_limit": limit})
        for limit in (2400, 2600, None)
    )
    check_room([table, table], [large, silent])
    message = r"0\.0 GB .* lower --pool_size.* more than {} of it"
    with pytest.raises(InputError, match=message.format("XLA_PYTHON_CLIENT_MEM_FRACTION=0.3")):
        check_room([table, table], [large, small])
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.1")  # both names must never be set
    with pytest.raises(InputError, match=message.format("XLA_CLIENT_MEM_FRACTION=0.1")):
        check_room([table, table], [large, small])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_over_queries_is_the_function_of_each_query(count):
    rng = np.random.default_rng()
    rows, pairs = rng.normal(size=(count, 3)), {"k": rng.integers(0, 9, (count, 2, 4))}
    flags = rng.random(count) < 0.5

    def one(row, pair, flag):
        return {"sum": row.sum() + pair["k"].max(), "own": (pair["k"], ~flag)}

    got = jax.jit(over_queries(one))(rows, pairs, flags)
    for i in range(count):
        wanted = one(rows[i], {"k": pairs["k"][i]}, flags[i])
        np.testing.assert_allclose(got["sum"][i], wanted["sum"], rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(got["own"][0][i], wanted["own"][0])
        assert got["own"][1][i] == wanted["own"][1]
    assert {len(x) for x in jax.tree.leaves(got)} == {count}
