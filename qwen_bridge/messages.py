"""Control messages of the bridge: small msgpack maps, one a frame, never pickle.

| message    | from   | when                                                          |
|------------|--------|---------------------------------------------------------------|
| `Settings` | driver | first: which scorer to build, and how the arena is cut        |
| `Hello`    | worker | the scorer is built; what it is                               |
| `Request`  | driver | a slot is filled: embed, score or answer what is in it        |
| `Result`   | worker | the slot holds the result; its words are in this frame        |
| `Failure`  | worker | instead of `Hello` or `Result`: what went wrong               |
| `Shutdown` | driver | leave                                                         |

A worker answers every request with one `Result` or one `Failure`, in the order of the requests.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import msgpack

from qwen_bridge.errors import InputError
from qwen_bridge.protocol import (
    KINDS,
    MAX_EMBEDDING_DIM,
    MAX_FRAME_BYTES,
    MAX_ROWS,
    MAX_SHOTS,
    MAX_TEXT,
    VERBS,
    ProtocolError,
)

MAX_DEPTH = 16
MAX_SLOTS = 64
MAX_SLOT_BYTES = 1 << 30
MIN_SLOT_BYTES = 1 << 12

# A failure that belongs to no request: the frame could not be read, or the scorer not built.
NO_JOB = -1


class MessageTooLarge(ProtocolError):
    """A message of ours that would exceed `MAX_FRAME_BYTES`."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Which scorer to build, and how the arena is cut.

    Attributes:
      factory: "module:function", called with `settings`.
      settings: for the factory; anything that msgpack can carry with string keys.
      slots: how many slots the arena has.
      slot_bytes: bytes of each.
    """

    tag: ClassVar[str] = "settings"
    factory: str
    settings: dict
    slots: int
    slot_bytes: int

    def __post_init__(self):
        _range("slots", self.slots, 1, MAX_SLOTS)
        _range("slot_bytes", self.slot_bytes, MIN_SLOT_BYTES, MAX_SLOT_BYTES)


@dataclass(frozen=True, slots=True)
class Hello:
    """What the worker's scorer is: fingerprints, `embedding_dim`, `parts`."""

    tag: ClassVar[str] = "hello"
    hello: dict

    def __post_init__(self):
        dim = self.hello.get("embedding_dim")
        if type(dim) is not int:
            raise ProtocolError(f"hello['embedding_dim'] is {dim!r}, not an integer")
        _range("hello['embedding_dim']", dim, 1, MAX_EMBEDDING_DIM)
        parts = self.hello.get("parts")
        if not isinstance(parts, dict):
            raise ProtocolError(f"hello['parts'] is {parts!r}, not a dict of column ranges")
        for name, columns in parts.items():
            good = isinstance(columns, list | tuple) and len(columns) == 2
            good = good and all(type(column) is int for column in columns)
            if not good or not 0 <= columns[0] <= columns[1] <= dim:
                raise ProtocolError(
                    f"hello['parts'][{name!r}] is {columns!r}, not a range of {dim} columns"
                )


@dataclass(frozen=True, slots=True)
class Request:
    """Do `verb` for the prompts in `slot`.

    Attributes:
      verb: "embed", "score" or "answer".
      job: the driver's number of this request, repeated in the reply.
      slot: where the prompts lie and the result shall.
      rows: how many prompts.
      shots: columns of the pointers; 0 for embed.
      kind: one of `KINDS` for embed, else "".
    """

    tag: ClassVar[str] = "request"
    verb: str
    job: int
    slot: int
    rows: int
    shots: int
    kind: str

    def __post_init__(self):
        _among("verb", self.verb, VERBS)
        _range("job", self.job, 0, 2**63 - 1)
        _range("slot", self.slot, 0, MAX_SLOTS - 1)
        _range("rows", self.rows, 1, MAX_ROWS)
        if self.verb == "embed":
            _range("shots", self.shots, 0, 0)
            _among("kind", self.kind, KINDS)
        else:
            _range("shots", self.shots, 1, MAX_SHOTS)
            _among("kind", self.kind, ("",))


@dataclass(frozen=True, slots=True)
class Result:
    """The slot of request `job` now holds its result.

    Attributes:
      job: as in the request.
      slot: as in the request.
      rows: as in the request.
      columns: D for embed, A for score, 0 for answer.
      seconds: how long the scorer took.
      texts: one string a row; none for embed.
      reasons: [row, why] for each row that could not be done.
      notes: lines that the user should read once.
    """

    tag: ClassVar[str] = "result"
    job: int
    slot: int
    rows: int
    columns: int
    seconds: float
    texts: list
    reasons: list
    notes: list

    def __post_init__(self):
        _range("job", self.job, 0, 2**63 - 1)
        _range("slot", self.slot, 0, MAX_SLOTS - 1)
        _range("rows", self.rows, 1, MAX_ROWS)
        _range("columns", self.columns, 0, MAX_EMBEDDING_DIM)
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ProtocolError(f"result: seconds is {self.seconds}")
        for name in ("texts", "notes"):
            if not {str}.issuperset(map(type, getattr(self, name))):
                raise ProtocolError(f"result: {name} holds something that is not a string")
        for pair in self.reasons:
            if type(pair) is not list or [type(item) for item in pair] != [int, str]:
                raise ProtocolError(f"result: reasons holds {pair!r:.80}, not [row, why]")


@dataclass(frozen=True, slots=True)
class Failure:
    """A request could not be done, or the scorer not be built; the worker lives on.

    Attributes:
      job: as in the request, or `NO_JOB`.
      type: name of the exception's class; "InputError" is raised as such by the driver.
      message: its text.
      retryable: the same prompts may go through in a smaller batch or another time.
      detail: the worker's traceback, or "".
    """

    tag: ClassVar[str] = "failure"
    job: int
    type: str
    message: str
    retryable: bool
    detail: str

    def __post_init__(self):
        _range("job", self.job, NO_JOB, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave."""

    tag: ClassVar[str] = "shutdown"


Message = Settings | Hello | Request | Result | Failure | Shutdown

_MESSAGES = {
    kind.tag: (kind, {field.name: field.type for field in dataclasses.fields(kind)})
    for kind in (Settings, Hello, Request, Result, Failure, Shutdown)
}


def encode(message: Message) -> bytes:
    """The frame body of a message."""
    fields = {name: getattr(message, name) for name in _MESSAGES[message.tag][1]}
    try:
        body = msgpack.packb({"tag": message.tag, **fields}, unicode_errors="replace")
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{message.tag} cannot be sent: {error}") from None
    if len(body) > MAX_FRAME_BYTES:
        raise MessageTooLarge(
            f"{message.tag} takes {len(body)} bytes; a message holds {MAX_FRAME_BYTES}"
        )
    return body


def decode(body: bytes) -> Message:
    """The message in a frame body; anything but a well-formed one is a `ProtocolError`."""
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes; the limit is {MAX_FRAME_BYTES}")
    try:
        fields = msgpack.unpackb(body, strict_map_key=True, max_ext_len=0, max_bin_len=0)
    except (ValueError, TypeError, RecursionError) as error:
        what = str(error) or type(error).__name__
        raise ProtocolError(f"not msgpack as we write it: {what}") from None
    if not isinstance(fields, dict):
        raise ProtocolError(f"a message is a map, not {type(fields).__name__}")
    _check_depth(fields)
    tag = fields.pop("tag", None)
    if not isinstance(tag, str) or tag not in _MESSAGES:
        raise ProtocolError(f"message {tag!r:.80} is none of {', '.join(_MESSAGES)}")
    kind, types = _MESSAGES[tag]
    if fields.keys() != types.keys():
        odd = sorted(fields.keys() ^ types.keys())[0]
        state = "is missing" if odd in types else "is unknown"
        raise ProtocolError(f"{tag}: field {odd[:80]!r} {state}")
    for name, value in fields.items():
        if type(value) is not types[name]:
            raise ProtocolError(
                f"{tag}: {name} is {type(value).__name__}, not {types[name].__name__}"
            )
    return kind(**fields)


def failure_of(error: BaseException, job: int, detail: str = "") -> Failure:
    """The `Failure` that reports an exception; out of memory may go away in a smaller batch."""
    name = "InputError" if isinstance(error, InputError) else type(error).__name__
    retryable = (
        isinstance(error, MemoryError | MessageTooLarge)
        or "OutOfMemory" in name
        or getattr(error, "retryable", False) is True
    )
    return Failure(job, name[:MAX_TEXT], str(error)[:MAX_TEXT], retryable, detail[-MAX_TEXT:])


def device_is_lost(failure: Failure) -> bool:
    """Whether the worker's GPU takes no further work: after such an error of CUDA none ends well.

    Want of memory is not meant; torch says AcceleratorError, older ones RuntimeError.
    """
    return not failure.retryable and (
        failure.type == "AcceleratorError" or "CUDA error:" in failure.message
    )


def _check_depth(tree) -> None:
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ProtocolError(f"a message nested deeper than {MAX_DEPTH}")
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) in (dict, list)
        ]


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ProtocolError(f"{name} is {value}; it must be in [{low}, {high}]")


def _among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ProtocolError(f"{name} is {value!r:.80}; it must be one of {allowed}")
