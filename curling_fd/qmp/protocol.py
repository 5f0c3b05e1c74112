"""QMP without I/O: bytes in, messages out; commands in, bytes out.

The wire format is QEMU's docs/interop/qmp-spec.rst: one JSON object a line. The server greets, the
client negotiates, and then commands are answered in order, except out-of-band ones, which are
answered when they are done; every answer is routed by the `id` its command carried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from attrs import define, frozen

from curling_fd.errors import RemoteProtocolError

#: Longest line taken from QEMU, in bytes. `query-qmp-schema` is about 250 KB on QEMU 11.
MAX_LINE = 16 << 20


@define(auto_exc=True, slots=False, str=False, eq=False)
class QmpProtocolError(RemoteProtocolError):
    """What arrived is not QMP. `got` is the beginning of it."""

    got: str


@frozen
class Greeting:
    """QEMU's first line. `version` is (major, minor, micro), `package` the distributor's suffix."""

    version: tuple[int, int, int]
    package: str
    capabilities: frozenset[str]


@frozen
class Return:
    id: object
    value: Any


@frozen
class Error:
    id: object
    kind: str
    description: str


@frozen
class Event:
    """An event. `timestamp_us` is QEMU's own clock: microseconds since the Unix epoch."""

    name: str
    data: Mapping[str, Any]
    timestamp_us: int


Message: TypeAlias = Greeting | Return | Error | Event


def encode_command(
    name: str, arguments: Mapping[str, Any] | None, id: object, *, out_of_band: bool = False
) -> bytes:
    """One command as the bytes to send. `out_of_band` needs the `oob` capability negotiated."""
    message: dict[str, Any] = {"exec-oob" if out_of_band else "execute": name, "id": id}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"


class Decoder:
    """Turns the bytes QEMU sends into messages, however they are cut."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._max_line = max_line

    @property
    def rest(self) -> bytes:
        """What came of a line that is not whole."""
        return bytes(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Take `data` and return every message that is now whole.

        Raises:
            QmpProtocolError: a line is no JSON object, no QMP message, or too long.
        """
        self._buffer += data
        messages = []
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._scanned = 0
            if line:
                messages.append(_decode(line))
        self._scanned = len(self._buffer)
        if self._scanned > self._max_line:
            raise QmpProtocolError(_beginning(self._buffer))
        return messages


def _decode(line: bytes) -> Message:
    try:
        message = json.loads(line)
        if "QMP" in message:
            version = message["QMP"]["version"]
            qemu = version["qemu"]
            return Greeting(
                (int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"])),
                str(version.get("package", "")),
                frozenset(str(capability) for capability in message["QMP"]["capabilities"]),
            )
        if "return" in message:
            return Return(message.get("id"), message["return"])
        if "error" in message:
            return Error(message.get("id"), str(message["error"]["class"]), str(message["error"]["desc"]))
        if "event" in message:
            stamp = message["timestamp"]
            timestamp_us = int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])
            return Event(str(message["event"]), dict(message.get("data", {})), timestamp_us)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # said below, with the bytes
    raise QmpProtocolError(_beginning(line))


def _beginning(data: bytes | bytearray) -> str:
    return bytes(data[:80]).decode("utf-8", "backslashreplace")
