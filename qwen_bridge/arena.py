"""Shared memory of one driver and one worker, cut into slots of equal size.

It has no name: the worker inherits the file descriptor, and the memory is gone when both have
let go of it, however they end. The driver alone keeps the states of the slots:

| state     | whose it is | what it holds        | what ends it                              |
|-----------|-------------|----------------------|-------------------------------------------|
| `FREE`    | driver      | nothing              | `take`: the driver starts to fill it      |
| `FILLED`  | driver      | a request            | `send`: the request frame is on its way   |
| `SCORING` | worker      | request, then result | `land`: the worker's reply frame is here  |
| `DONE`    | driver      | a result             | `free`: the result has been copied out    |

`free` also takes a slot back from `FILLED` when its request cannot be sent. Results are copied
out before a slot is freed, since JAX may alias a host buffer.
"""

import contextlib
import enum
import errno
import mmap
import os
import tempfile

from qwen_bridge.protocol import ProtocolError


class Arena:
    """Anonymous shared memory of `slots` x `slot_bytes` bytes.

    Attributes:
      fd: what a worker inherits; None once `release_fd` was called.
    """

    def __init__(self, fd: int, slots: int, slot_bytes: int):
        """Maps `fd`, which becomes this arena's own to close."""
        self.fd: int | None = fd
        self.slots = slots
        self.slot_bytes = slot_bytes
        try:
            size, needed = os.fstat(fd).st_size, slots * slot_bytes
            if size != needed:
                raise ProtocolError(
                    f"an arena of {size} bytes is not {slots} slots of {slot_bytes} bytes"
                )
            self._map = mmap.mmap(fd, needed)
        except BaseException:
            self.release_fd()
            raise
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> "Arena":
        """New memory, all of it backed at once: a sparse segment would fault when touched."""
        size = slots * slot_bytes
        fd = _anonymous_file()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
            _seal_size(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise OSError(
                    error.errno, f"no room for {slots} slots of {slot_bytes} bytes; use fewer slots"
                ) from None
            raise
        return cls(fd, slots, slot_bytes)

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot; let go of it, and of arrays over it, before `close`."""
        if not 0 <= slot < self.slots:
            raise ProtocolError(f"slot {slot} is not in [0, {self.slots})")
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def release_fd(self) -> None:
        """Closes the descriptor; the mapping stays."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def close(self) -> None:
        """Unmaps the memory; idempotent."""
        self.release_fd()
        # A view that an exception's traceback still holds unmaps when it goes.
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


class SlotState(enum.Enum):
    """Where a slot is in its round; see the table of this module."""

    FREE = "free"
    FILLED = "filled"
    SCORING = "scoring"
    DONE = "done"


class SlotTable:
    """The driver's record of the slots of one arena; an illegal step is a bug and raises."""

    def __init__(self, slots: int):
        self._states = [SlotState.FREE] * slots
        self._free = list(range(slots))[::-1]

    @property
    def num_free(self) -> int:
        """How many slots can be taken now: the back-pressure of the bridge."""
        return len(self._free)

    def state(self, slot: int) -> SlotState:
        """The state of one slot."""
        return self._states[slot]

    def take(self) -> int:
        """A free slot, to be filled."""
        if not self._free:
            raise RuntimeError("no slot is free")
        slot = self._free.pop()
        self._step(slot, SlotState.FILLED, SlotState.FREE)
        return slot

    def send(self, slot: int) -> None:
        """Its request is on its way: the worker owns the slot."""
        self._step(slot, SlotState.SCORING, SlotState.FILLED)

    def land(self, slot: int) -> None:
        """Its reply is here: the driver owns the slot."""
        self._step(slot, SlotState.DONE, SlotState.SCORING)

    def free(self, slot: int) -> None:
        """Its result is copied out, or its request was never sent."""
        self._step(slot, SlotState.FREE, SlotState.DONE, SlotState.FILLED)
        self._free.append(slot)

    def _step(self, slot: int, new: SlotState, *old: SlotState) -> None:
        if self._states[slot] not in old:
            raise RuntimeError(f"slot {slot} is {self._states[slot].name}, cannot be {new.name}")
        self._states[slot] = new


def _anonymous_file() -> int:
    """A descriptor of a new empty file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("qwen_bridge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd, path = tempfile.mkstemp(prefix="qwen_bridge-")
    os.unlink(path)
    return fd


def _seal_size(fd: int) -> None:
    """Forbids resizing, so that no peer can shrink the memory under us (a bus error)."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except (AttributeError, OSError):
        pass  # Not a memfd, or not Linux: the unlinked file has no such protection.
