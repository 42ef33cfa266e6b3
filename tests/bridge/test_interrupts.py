"""Ctrl-C is late, never lost, and calls what the user installed."""

import os
import signal
import threading

import pytest

from qwen_bridge.interrupts import Interrupts


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_held_until_the_end():
    steps = []

    def work():
        with Interrupts().held():
            interrupt()
            steps.append("whole")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_that_was_held_does_not_hit_a_later_call():
    interrupts = Interrupts()

    def work():
        with interrupts.held():
            interrupt()
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        work()
    with interrupts.held(), interrupts.allowed():
        pass


def test_held_until_allowed():
    steps = []

    def late():
        interrupts = Interrupts()
        with interrupts.held():
            interrupt()
            steps.append("before")
            with interrupts.allowed():
                steps.append("never")

    def at_once():
        interrupts = Interrupts()
        with interrupts.held(), interrupts.allowed():
            interrupt()
            steps.append("never")

    for work in (late, at_once):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert steps == ["before"]


def test_held_within_allowed():
    """As when a callback closes the environment that called it."""
    steps = []

    def work():
        interrupts = Interrupts()
        with interrupts.held(), interrupts.allowed():
            with interrupts.held():
                interrupt()
                steps.append("inner")
            steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["inner"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_is_delivered_and_the_first_waits():
    steps = []

    def work(times):
        interrupts = Interrupts()
        with interrupts.held():
            with interrupts.allowed(but_the_first=True):
                for step in range(times):
                    interrupt()
                    steps.append(step)
            steps.append("after")
            with interrupts.allowed():
                steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        work(1)
    assert steps == [0, "after"]
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        work(3)
    assert steps == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_ctrl_c_waits_for_a_second_one():
    def stop(number, frame):
        raise SystemExit(number)

    def work():
        interrupts = Interrupts()
        with interrupts.held(), interrupts.allowed(but_the_first=True):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit):
            work()
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_users_handler_is_called_once_for_each(number):
    seen = []

    def handler(number, frame):
        seen.append(number)

    previous = signal.signal(number, handler)
    try:
        with Interrupts().held():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert seen == []
        assert seen == [number, number]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)


def test_other_threads_are_left_alone():
    handlers = []

    def work():
        interrupts = Interrupts()
        with interrupts.held(), interrupts.allowed():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
