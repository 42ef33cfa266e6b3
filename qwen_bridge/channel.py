"""Frames over one end of a Unix socket pair, with a deadline on every wait.

A frame is 4 bytes of magic, the length of its body as a little-endian uint32, and the body. A
peer that is gone is noticed at once, as end of file. A frame that is too long is skipped byte by
byte without being kept, so that a reader's memory stays flat; a wrong magic means that the two
ends no longer agree where frames begin, and nothing more can be read.
"""

import select
import socket
import struct
import time
from collections.abc import Iterable

from qwen_bridge.protocol import MAX_FRAME_BYTES, ProtocolError

_MAGIC = b"QwB1"
_HEADER = struct.Struct("<4sI")
_CHUNK = 1 << 16
_TURN_S = 0.2


class PeerGone(ConnectionError):
    """The other end is closed: its process left or died."""


class DeadlineExceeded(TimeoutError):
    """The other end is there, but did not do its part in time."""


class StreamBroken(ProtocolError):
    """Bytes where a frame should begin that begin none; the stream cannot be read on."""


class Channel:
    """One end of a socket pair, sending and receiving frames."""

    def __init__(self, sock: socket.socket):
        """Takes `sock`, a connected stream socket, for its own."""
        sock.setblocking(False)
        self._sock = sock
        self._received = bytearray()
        self._unsent = bytearray()
        self._skip = 0

    @classmethod
    def pair(cls) -> tuple["Channel", "Channel"]:
        """Two channels that talk to each other."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """For `select.poll`; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Idempotent; the peer sees end of file."""
        self._sock.close()

    def send(self, body: bytes, timeout_s: float) -> None:
        """Sends one frame whole, or raises `PeerGone` or `DeadlineExceeded`.

        What an interrupt or a deadline leaves unsent goes first next time, so that the frames of
        the stream stay whole.
        """
        if len(body) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {len(body)} bytes; the limit is {MAX_FRAME_BYTES}")
        self._unsent += _HEADER.pack(_MAGIC, len(body)) + body
        deadline = time.monotonic() + timeout_s
        while self._unsent:
            try:
                del self._unsent[: self._sock.send(self._unsent)]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, "take a message")
            except OSError as error:
                raise PeerGone(f"the peer is gone: {error}") from None

    def receive(self, timeout_s: float) -> bytes:
        """The body of the next frame; raises as `send` does, and `ProtocolError`."""
        deadline = time.monotonic() + timeout_s
        while True:
            body = self._next_frame()
            if body is not None:
                return body
            if not self._read():
                self._wait(select.POLLIN, deadline, "send a message")

    def receive_ready(self) -> list[bytes]:
        """The bodies of all frames that are here already; never waits."""
        bodies: list[bytes] = []
        more = _CHUNK
        while more == _CHUNK and len(bodies) < 64:
            try:
                more = self._read()
            except PeerGone:
                if bodies:  # What it said last still counts; the end shows again next time.
                    return bodies
                raise
            while (body := self._next_frame()) is not None:
                bodies.append(body)
        return bodies

    def _read(self) -> int:
        """Takes what the socket has; returns how many bytes that is, 0 for none yet."""
        try:
            chunk = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerGone(f"the peer is gone: {error}") from None
        if not chunk:
            where = " in the middle of a message" if self._received or self._skip else ""
            raise PeerGone(f"the peer is gone{where}")
        self._received += chunk
        return len(chunk)

    def _next_frame(self) -> bytes | None:
        """The next whole frame received so far, if any."""
        if self._skip:
            skipped = min(self._skip, len(self._received))
            del self._received[:skipped]
            self._skip -= skipped
        if self._skip or len(self._received) < _HEADER.size:
            return None
        magic, length = _HEADER.unpack_from(self._received)
        if magic != _MAGIC:
            raise StreamBroken(f"a frame cannot begin with {bytes(magic)!r}")
        if length > MAX_FRAME_BYTES:
            del self._received[: _HEADER.size]
            self._skip = length
            raise ProtocolError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
        end = _HEADER.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        return body

    def _wait(self, event: int, deadline: float, what: str) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise DeadlineExceeded(f"the peer did not {what} in time")


def wait_readable(channels: Iterable[Channel], timeout_s: float) -> set[int]:
    """Waits until a channel has something to read or has ended; their file numbers."""
    poll = select.poll()
    for channel in channels:
        poll.register(channel, select.POLLIN)
    return {fd for fd, _ in poll_in_turns(poll, timeout_s)}


def poll_in_turns(poll: select.poll, timeout_s: float) -> list[tuple[int, int]]:
    """`poll.poll`, coming up every now and then to hear of a Ctrl-C.

    A signal that arrives just before the system call, or in another thread, ends no wait: Python
    would call its handler only after `timeout_s`, which may be many minutes.
    """
    deadline = time.monotonic() + max(0.0, timeout_s)
    while True:
        left = deadline - time.monotonic()
        if (found := poll.poll(max(0.0, min(left, _TURN_S)) * 1000)) or left <= _TURN_S:
            return found
