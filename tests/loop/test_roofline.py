"""The work that the benchmarks' rooflines count, against hand counts and PyTorch's own counter."""

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.roofline import Machine, Work, measure, work_of
from experiments.sampling_cell import Cell, Models
from lever_jax.errors import InputError
from qwen_bridge.benchmark import clock

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def test_a_product_and_its_arrays():
    assert work_of(jnp.matmul, A, B) == Work(PRODUCT, 4 * (3 * 4 + 4 * 5 + 3 * 5))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda a, b: jnp.tanh(a) + jnp.sum(b), 0),
        (jax.jit(lambda a, b: jnp.tanh(a @ b)), 1),
        (lambda a, b: jax.vmap(lambda row: row @ b)(a), 1),
        (lambda a, b: jax.vmap(lambda _: a @ b)(jnp.arange(7)), 1),  # the same for all seven
        (lambda a, b: jax.lax.map(lambda x: (a + x) @ b, jnp.ones(7)), 7),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b) @ b.T @ b, lambda: a @ b), 3),
        (jax.grad(lambda a, b: jnp.sum(jnp.tanh(a @ b)), (0, 1)), 3),
        (lambda a, b: jax.lax.fori_loop(0, 7, lambda _, x: (a + x[0, 0]) @ b, a @ b), 8),
    ],
)
def test_products_by_hand(function, products):
    assert work_of(function, A, B).flops == products * PRODUCT


def test_a_loop_of_unknown_length_is_refused():
    def grow(a, b):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: (a + x[0, 0]) @ b, a @ b)

    with pytest.raises(InputError, match="unknown length"):
        work_of(grow, A, B)


@pytest.mark.parametrize("method", ["beam", "sample", "top_p"])
def test_ours_has_the_products_of_pytorchs(method):
    models = Models(dim=12, width=8, layers=2, heads=2)
    cell = Cell(models, method, batch=5, pool=9, shots=3, num=4)
    rival = cell.competitors(0, compiled=False)["eager"]
    with FlopCounterMode(display=False) as counter:
        rival()
    # What the counter lacks on a CPU: two products of each attention, 10 tokens by 10 by width 8.
    attention = 5 * 2 * 2 * (2 * 10 * 10 * 8)
    assert cell.work().flops == counter.get_total_flops() + attention


def test_the_least_time_is_of_the_narrower_bound():
    work = Work(flops=600, bytes=50)
    assert work.least_seconds(Machine(flops=100.0, bandwidth=10.0)) == 6.0
    assert work.least_seconds(Machine(flops=100.0, bandwidth=5.0)) == 10.0


def test_the_machines_rates_are_of_what_was_timed(monkeypatch):
    monkeypatch.setattr(clock, "seconds", lambda device, run: 0.5 if run() is not None else None)
    assert measure(torch.device("cpu")) == Machine(2 * 1536**3 / 0.5, 2 * 2**26 / 0.5)
