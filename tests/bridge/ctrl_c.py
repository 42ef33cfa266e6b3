"""Ctrl-C at a moment that the test names, not after some time that a busy machine may stretch."""

import signal
import threading
import time

GIVES_UP_S = 60.0


def press(*conditions):
    """Sends this process a Ctrl-C as each condition comes true, one after the other.

    The sending thread takes the signal, so that it ends no system call of the main thread: the
    same as one that comes just before the call.

    Returns:
      A list that gets the time of each (monotonic seconds).
    """
    times, until = [], time.monotonic() + GIVES_UP_S

    def send():
        for condition in conditions:
            while not condition():
                if time.monotonic() > until:  # Else it would hit a later test.
                    return
                time.sleep(0.005)
            times.append(time.monotonic())
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    return times


def at_work(env):
    """Whether all workers of an environment have something to do, as a condition."""
    return lambda: all(seat.worker and seat.worker.in_flight for seat in env._scheduler.seats)
