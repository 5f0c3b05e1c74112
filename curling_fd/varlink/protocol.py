"""Varlink messages: bytes in, calls and replies out. No I/O.

A message is one JSON object followed by one NUL byte. A call has `method` and perhaps `parameters`, `oneway`,
`more` and `upgrade`; a reply has perhaps `parameters`, `continues` and `error`. Messages stay in order: a
client that asked for `more` gets replies with `continues` until one comes without. Source:
https://varlink.org/Method-Call and, where it leaves room, what systemd's sd-varlink accepts, so that
varlinkctl works with both ends.

    client                          server
    {method, parameters}      ->
                              <-    {parameters}  or  {error, parameters}
    {method, more: true}      ->
                              <-    {parameters, continues: true}   any number of times
                              <-    {parameters}  or  {error, parameters}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attrs import define, frozen

from curling_fd.errors import CurlingError, VarlinkError

MESSAGE_LIMIT = 1 << 20
"""The most bytes one message may have, its NUL not counted. A peer that sends more is cut off."""

SERVICE_INTERFACE = "org.varlink.service"


@frozen
class Call:
    """What a client asks for."""

    method: str
    parameters: Mapping[str, Any]
    more: bool = False
    oneway: bool = False
    upgrade: bool = False


@frozen
class Reply:
    """What a service answers. `error` is the full name of an error, then `parameters` are its facts."""

    parameters: Mapping[str, Any]
    continues: bool = False
    error: str | None = None


@define(auto_exc=True, slots=False, str=False, eq=False)
class ErrorReply(CurlingError):
    """A service answered with the error `name`, one that is not a class of `curling_fd.errors`."""

    name: str
    parameters: Mapping[str, Any]


class MessageReader:
    """Cuts a byte stream into messages.

        reader.feed(data)
        while (message := reader.next_message()) is not None: ...

    After a `VarlinkError` the stream cannot be trusted any more: every later call raises it again.
    """

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        self._broken: str | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take in what the peer sent, cut anywhere."""
        self._buffer += data

    def next_message(self) -> dict[str, Any] | None:
        """Return the next whole message, or None when more bytes are needed.

        Raises:
            VarlinkError: the bytes are not a JSON object, or one longer than the limit.
        """
        if self._broken is not None:
            raise VarlinkError(self._broken)
        end = self._buffer.find(0, self._searched)
        if (len(self._buffer) if end < 0 else end) > self._limit:
            raise self._break(f"a message of more than {self._limit} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        text = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            return decode(text)
        except VarlinkError as error:
            raise self._break(error.problem) from None

    def check_end(self) -> None:
        """Say whether the stream may end here.

        Raises:
            VarlinkError: it ends inside a message.
        """
        if self._buffer and self._broken is None:
            raise self._break(f"the connection ended {len(self._buffer)} bytes into a message")

    def _break(self, problem: str) -> VarlinkError:
        self._broken = problem
        self._buffer.clear()
        return VarlinkError(problem)


def decode(text: bytes) -> dict[str, Any]:
    """Read one message, without its NUL.

    Raises:
        VarlinkError: it is not a JSON object in UTF-8.
    """
    try:
        message = json.loads(text.decode(), parse_constant=_no_such_number)
        if b"\\u" in text:
            # An escaped half of a surrogate pair is JSON, but no text: it could not be written out again.
            json.dumps(message, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise VarlinkError(f"a message that is not JSON ({error})") from None
    if not isinstance(message, dict):
        raise VarlinkError("a message that is not a JSON object")
    return message


def encode(message: Mapping[str, Any]) -> bytes:
    """Write one message with its NUL.

    Raises:
        TypeError, ValueError: it holds what JSON cannot say (bytes, NaN, ...).
    """
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\0"


def encode_call(call: Call) -> bytes:
    """Write a call; flags that are not set are left out."""
    message: dict[str, Any] = {"method": call.method, "parameters": call.parameters}
    for flag in ("more", "oneway", "upgrade"):
        if getattr(call, flag):
            message[flag] = True
    return encode(message)


def encode_reply(reply: Reply) -> bytes:
    """Write a reply; what is not set is left out."""
    message: dict[str, Any] = {"parameters": reply.parameters}
    if reply.error is not None:
        message["error"] = reply.error
    if reply.continues:
        message["continues"] = True
    return encode(message)


def parse_call(message: Mapping[str, Any]) -> Call:
    """Read a message as a call. Keys this protocol does not know are vendor extensions and pass.

    Raises:
        VarlinkError: it is none.
    """
    method = message.get("method")
    if not isinstance(method, str) or "." not in method:
        raise VarlinkError("a call without a qualified method name")
    call = Call(
        method=method,
        parameters=_parameters(message),
        more=_flag(message, "more"),
        oneway=_flag(message, "oneway"),
        upgrade=_flag(message, "upgrade"),
    )
    if call.more and call.oneway:
        raise VarlinkError("a call that asks for more replies and for none")
    return call


def parse_reply(message: Mapping[str, Any]) -> Reply:
    """Read a message as a reply.

    Raises:
        VarlinkError: it is none.
    """
    error = message.get("error")
    if error is not None and not isinstance(error, str):
        raise VarlinkError("a reply whose error is not a string")
    reply = Reply(parameters=_parameters(message), continues=_flag(message, "continues"), error=error)
    if reply.error is not None and reply.continues:
        raise VarlinkError("an error that claims to continue")
    return reply


def split_method(method: str) -> tuple[str, str]:
    """Split a full method (or error) name into its interface and its own name."""
    interface, _, name = method.rpartition(".")
    return interface, name


def interface_not_found(interface: str) -> Reply:
    """The answer to a call of an interface the service does not have."""
    return Reply({"interface": interface}, error=f"{SERVICE_INTERFACE}.InterfaceNotFound")


def method_not_found(method: str) -> Reply:
    """The answer to a method (full name) its interface does not have."""
    return Reply({"method": method}, error=f"{SERVICE_INTERFACE}.MethodNotFound")


def method_not_implemented(method: str) -> Reply:
    """The answer to a method (full name) the interface has and the service does not do."""
    return Reply({"method": method}, error=f"{SERVICE_INTERFACE}.MethodNotImplemented")


def invalid_parameter(parameter: str) -> Reply:
    """The answer to a missing, unknown or mistyped parameter."""
    return Reply({"parameter": parameter}, error=f"{SERVICE_INTERFACE}.InvalidParameter")


def expected_more() -> Reply:
    """The answer to a call without `more` of a method that has no last reply."""
    return Reply({}, error=f"{SERVICE_INTERFACE}.ExpectedMore")


def permission_denied() -> Reply:
    """The answer to a caller without the right."""
    return Reply({}, error=f"{SERVICE_INTERFACE}.PermissionDenied")


def _parameters(message: Mapping[str, Any]) -> Mapping[str, Any]:
    # sd-varlink takes null for "none", and so do we.
    parameters = message.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise VarlinkError("parameters that are not a JSON object")
    return parameters


def _flag(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise VarlinkError(f"{name!r} that is not true or false")
    return value


def _no_such_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
