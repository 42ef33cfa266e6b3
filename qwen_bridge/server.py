"""The worker process: builds a scorer, then serves what the driver puts in the slots.

    python -m qwen_bridge.server --socket_fd N --arena_fd N

Started by the driver with both descriptors inherited; nobody runs it by hand. One request at a
time, one reply for each. An exception of the scorer is reported and the worker lives on; when
the driver closes its end of the socket, or dies, the worker leaves, also in the middle of a
batch. JAX is never imported here, and torch only by the factory.
"""

import argparse
import faulthandler
import importlib
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback

from qwen_bridge.arena import Arena
from qwen_bridge.channel import Channel, DeadlineExceeded, PeerGone, StreamBroken
from qwen_bridge.errors import InputError
from qwen_bridge.messages import (
    NO_JOB,
    Hello,
    Message,
    Request,
    Result,
    Settings,
    Shutdown,
    decode,
    encode,
    failure_of,
)
from qwen_bridge.protocol import (
    MAX_TEXT,
    ProtocolError,
    check_ids,
    check_prompts,
    check_result,
    read_arrays,
    request_arrays,
    result_arrays,
    split_result,
    write_arrays,
)

# Modules a factory may come from besides our own, comma-separated; for tests and extensions.
ALLOW_VARIABLE = "QWEN_BRIDGE_FACTORIES"

# A driver may be busy elsewhere for hours (compiling, training) and is still alive.
_IDLE_TICK_S = 60.0
_SEND_S = 24 * 3600.0
_DRIVER_CHECK_S = 1.0

_FACTORY = re.compile(r"(?P<module>[A-Za-z]\w*(?:\.[A-Za-z]\w*)*):(?P<function>[A-Za-z]\w*)")


def load_factory(name: str):
    """The function that "module:function" names, if its module may be named at all.

    Only functions defined in `qwen_bridge.*`, or in a module that the environment variable
    `QWEN_BRIDGE_FACTORIES` lists, are ever called: a settings frame cannot run arbitrary code.

    Raises:
      InputError: it names none of them.
    """
    match = _FACTORY.fullmatch(name)
    if match is None:
        raise InputError(f"--factory={name:.80} is not of the form module:function")
    module_name = match["module"]
    extra = os.environ.get(ALLOW_VARIABLE, "").split(",")
    if not module_name.startswith("qwen_bridge.") and module_name not in extra:
        raise InputError(
            f"--factory={name:.80} is neither in qwen_bridge nor in a module that the environment "
            f"variable {ALLOW_VARIABLE} names"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"--factory={name:.80} cannot be imported: {error}") from None
    function = getattr(module, match["function"], None)
    if getattr(function, "__module__", None) != module_name or not callable(function):
        raise InputError(f"--factory={name:.80}: {module_name} defines no such function")
    return function


def build_scorer(settings: Settings):
    """The scorer and its hello: the factory returns both, or a scorer with a `hello` of its own.

    `embedding_dim` and `parts` of the hello are always the scorer's.
    """
    built = load_factory(settings.factory)(settings.settings)
    scorer, hello = built if isinstance(built, tuple) else (built, built.hello)
    parts = {name: [int(edge) for edge in columns] for name, columns in scorer.parts.items()}
    return scorer, Hello({**hello, "embedding_dim": int(scorer.embedding_dim), "parts": parts})


def run_request(scorer, request: Request, arena: Arena, embedding_dim: int) -> Result:
    """Reads the prompts out of their slot, asks the scorer, writes the result into the slot."""
    view = arena.view(request.slot)
    prompts = read_arrays(view, request_arrays(request.verb, request.rows, request.shots))
    started = time.perf_counter()
    if request.verb == "embed":
        result = scorer.embed(request.kind, check_ids(prompts["ids"]))
    else:
        verb = scorer.score if request.verb == "score" else scorer.answer
        result = verb(*check_prompts(**prompts))
    seconds = time.perf_counter() - started
    result = check_result(request.verb, result, request.rows, embedding_dim)
    columns, arrays, texts, reasons = split_result(request.verb, result)
    write_arrays(view, result_arrays(request.verb, request.rows, columns), arrays)
    pairs = [[row, why] for row, why in reasons.items()]
    notes = _take_notes(scorer)
    return Result(request.job, request.slot, request.rows, columns, seconds, texts, pairs, notes)


def _take_notes(scorer) -> list[str]:
    """What the scorer wants the user to read, if it is one that has such things to say."""
    notes = getattr(scorer, "notes", [])
    taken = [note[:MAX_TEXT] for note in notes]
    notes.clear()
    return taken


def serve(channel: Channel, arena_fd: int) -> int:
    """Settings, hello, then requests until the driver is done; returns the exit code."""
    settings = _next_message(channel, Settings)
    if settings is None:
        return 0
    try:
        arena = Arena(arena_fd, settings.slots, settings.slot_bytes)
        scorer, hello = build_scorer(settings)
        channel.send(encode(hello), _SEND_S)
    except PeerGone:
        return 0
    except Exception as error:
        _reply(channel, failure_of(error, NO_JOB, traceback.format_exc()))
        return 1
    embedding_dim = hello.hello["embedding_dim"]
    while (request := _next_message(channel, Request)) is not None:
        try:
            body = encode(run_request(scorer, request, arena, embedding_dim))
        except Exception as error:
            _reply(channel, failure_of(error, request.job, traceback.format_exc()))
            if hasattr(scorer, "empty_caches"):  # Nothing half done outlives the exception.
                scorer.empty_caches()
            continue
        channel.send(body, _SEND_S)
    return 0


def _next_message(channel: Channel, wanted: type) -> Message | None:
    """The next message of the wanted kind; None when the driver is done with us.

    Anything else is answered by a failure, and the wait goes on.
    """
    while True:
        try:
            message = decode(channel.receive(_IDLE_TICK_S))
            if isinstance(message, Shutdown):
                return None
            if isinstance(message, wanted):
                return message
            raise ProtocolError(f"{message.tag} came where {wanted.tag} was expected")
        except DeadlineExceeded:
            continue
        except StreamBroken as error:
            _reply(channel, failure_of(error, NO_JOB))
            return None
        except ProtocolError as error:
            _reply(channel, failure_of(error, NO_JOB))


def _reply(channel: Channel, message: Message) -> None:
    channel.send(encode(message), _SEND_S)


def _leave_with_driver(fd: int) -> None:
    """Ends this process as soon as the driver's end of the socket is closed.

    The main thread may be deep in a forward pass that takes minutes and would be for nobody.
    """
    parent = os.getppid()
    poll = select.poll()
    poll.register(fd, 0)  # Hang-up and errors only, which poll always reports.
    while os.getppid() == parent:
        if poll.poll(_DRIVER_CHECK_S * 1000):
            break
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Entry point of a worker process."""
    parser = argparse.ArgumentParser(prog="python -m qwen_bridge.server", description=__doc__)
    parser.add_argument("--socket_fd", type=int, required=True, help="inherited socket")
    parser.add_argument("--arena_fd", type=int, required=True, help="inherited shared memory")
    args = parser.parse_args(argv)
    # Ctrl-C is the driver's to handle: it finishes what is in hand and then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # The driver asks a hung worker.
    channel = Channel(socket.socket(fileno=args.socket_fd))
    threading.Thread(target=_leave_with_driver, args=(args.socket_fd,), daemon=True).start()
    try:
        return serve(channel, args.arena_fd)
    except PeerGone:
        return 0


if __name__ == "__main__":
    sys.exit(main())
